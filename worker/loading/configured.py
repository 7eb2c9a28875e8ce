"""Plain weights with a config of transformers: the model of a folder that came without its folder."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from app.contract.architecture import ModelSpec
from worker.loading.folder import Folder, describe
from worker.loading.huggingface import ConfigPlan, written
from worker.loading.weights import Weights
from worker.model import Dtypes, Model, Save


def load_configured(weights: Weights, spec: ModelSpec, scratch: Path) -> Model:
    """Builds the class that `spec.config` names, without tokenizer or processor: the model takes arrays.

    Raises ModelRejected as a Hugging Face folder does.
    """
    assert spec.config is not None
    path = Path(tempfile.mkdtemp(prefix="configured-", dir=scratch)) / "model"
    path.mkdir()
    # Copies, since tied weights share their storage and safetensors holds none twice.
    state = {name: tensor.clone().contiguous() for name, tensor in weights.state.items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    folder = describe(spec.config, path)

    return ConfigPlan(folder, spec, weights.name, functools.partial(_saver, weights)).read(folder)


def _saver(weights: Weights, folder: Folder, casts: Dtypes) -> Save:
    def save(module: nn.Module, target: Path) -> Path:
        """Under the names that transformers gives them, and in dtypes that go by those of the module; a tied weight is
        there once."""
        with written(folder, module, casts=casts) as saved:
            return weights.store(_read(saved), target)

    return save


def _read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, in however many files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
