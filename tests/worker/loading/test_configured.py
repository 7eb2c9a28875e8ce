"""Plain weights with a config of transformers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from app.contract.errors import ModelRejected
from tests.worker.loading.files import bert, torch_saved
from worker.data.base import RawBatch
from worker.loading import load_model
from worker.model import Model

IDS = {"input_ids": torch.tensor([[2, 4, 6, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("bert")
    return folder, bert(folder)


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found | changes


def saved_again(model: Model, folder: Path, spec: dict[str, Any]) -> Model:
    return load_model(model.save(model.module, folder), "again", spec, folder)


@pytest.mark.parametrize("container", ["safetensors", "pt", "wrapped"])
def test_weights_and_config_are_the_model(tmp_path: Path, made: tuple[Path, Any], container: str) -> None:
    folder, module = made
    path = tmp_path / "weights"
    state = {name: tensor.half() for name, tensor in module.state_dict().items()}
    content = torch_saved(state if container == "pt" else {"state_dict": state})
    path.write_bytes((folder / "model.safetensors").read_bytes() if container == "safetensors" else content)
    spec = {"config": config(folder), "labels": ["a", "b", "c"]}
    model = load_model(path, "weights", spec, tmp_path)
    assert (model.facts.task, model.facts.accepts, model.facts.labels) == (
        "text-classification",
        ("arrays",),
        ("a", "b", "c"),
    )
    reference = module if container == "safetensors" else bert_of(state, module)
    inputs = model.encode(RawBatch(IDS, None))
    with torch.no_grad():
        expected = reference(**IDS).logits
        assert torch.equal(model.module(*inputs), expected)
        again = saved_again(model, tmp_path, spec)
        assert torch.equal(again.module(*inputs), expected)
    written = tmp_path / model.facts.native_file
    assert written.name == ("model.safetensors" if container == "safetensors" else "model.pt")
    if container == "safetensors":
        assert {t.dtype for t in load_file(written).values()} == {torch.float32}
    else:
        loaded = torch.load(io.BytesIO(written.read_bytes()), weights_only=True)
        tensors = loaded["state_dict"] if container == "wrapped" else loaded
        assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float16}


def bert_of(state: dict[str, torch.Tensor], like: Any) -> Any:
    module = type(like)(like.config).eval()
    module.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return module


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"architectures": None}, "architectures"),
        ({"num_hidden_layers": 3}, "weights lack"),
        ({"hidden_size": 32}, "do not fit config"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"quantization_config": {}}, "quantized already"),
    ],
)
def test_a_config_is_vetted_as_in_a_folder(
    tmp_path: Path, made: tuple[Path, Any], changes: dict[str, Any], words: str
) -> None:
    folder, _ = made
    with pytest.raises(ModelRejected, match=words):
        load_model(folder / "model.safetensors", "w", {"config": config(folder, **changes)}, tmp_path)


def test_a_config_and_an_architecture_are_one_too_many(tmp_path: Path, made: tuple[Path, Any]) -> None:
    spec = {
        "config": config(made[0]),
        "task": "text-classification",
        "architecture": {"layers": [{"type": "ReLU"}]},
        "input": {"shape": [1]},
    }
    with pytest.raises(ModelRejected, match="not both"):
        load_model(made[0] / "model.safetensors", "w", spec, tmp_path)
