"""The models in their own runtimes: what the loaded ones are compared with. None of it goes through Tersor."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from tests.models.declared import load_state
from tests.models.packages import module_folder
from worker.data.base import RawBatch, Sound

Array = NDArray[np.float32]
Reference = Callable[[RawBatch], Array]
"""The output of the model in its own runtime for raw samples; float32, as the loaded model's module gives it."""


def package_code(path: Path, name: str, **stubs: dict[str, Any]) -> Any:
    """One file of a package as a module, without the package's own imports: `stubs` stand in for those by name."""
    made = {stub: types.ModuleType(stub) for stub in stubs}
    for stub, values in stubs.items():
        made[stub].__dict__.update(values)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = {stub: sys.modules.get(stub) for stub in made}
    sys.modules.update(made)
    try:
        spec.loader.exec_module(module)
    finally:
        for stub, old in before.items():
            if old is None:
                del sys.modules[stub]
            else:
                sys.modules[stub] = old
    return module


def crepe(size: str) -> Reference:
    """torchcrepe's own class, whose outputs are probabilities."""
    folder = module_folder("torchcrepe")
    code = package_code(folder / "model.py", "own_crepe", torchcrepe={"PITCH_BINS": 360})
    module = code.Crepe(size)
    module.load_state_dict(load_state(folder / "assets" / f"{size}.pth"))
    return partial(_of_arrays, module.eval())


def mtcnn(name: str, file: str) -> Reference:
    """facenet-pytorch's own class; its outputs joined as the declared architecture joins them: probabilities first."""
    folder = module_folder("facenet_pytorch")
    nothing = {"detect_face": None, "extract_face": None}
    stubs = {"own_mtcnn": {"__path__": []}, "own_mtcnn.utils": {"__path__": []}, "own_mtcnn.utils.detect_face": nothing}
    code = package_code(folder / "models" / "mtcnn.py", "own_mtcnn.mtcnn", **stubs)
    module = getattr(code, name)(pretrained=False)
    module.load_state_dict(load_state(folder / "data" / file))

    def joined(inputs: Tensor) -> Tensor:
        outputs = module.eval()(inputs)
        return torch.cat((outputs[-1], *outputs[:-1]), dim=1)

    return partial(_of_arrays, joined)


def silero(state: dict[str, Tensor]) -> Reference:
    """The formulas of silero_vad/tinygrad_model.py in torch, at the start of a sound."""
    cell = nn.LSTMCell(128, 128)
    cell.load_state_dict({name: state[f"lstm_cell.{name}"] for name in cell.state_dict()})

    def forward(windows: Tensor) -> Tensor:
        spectrum = functional.conv1d(functional.pad(windows, (0, 64), "reflect"), state["stft_conv.weight"], stride=128)
        found = (spectrum[:, :129] ** 2 + spectrum[:, 129:] ** 2).sqrt()
        for i, stride in enumerate((1, 2, 2, 1), start=1):
            weight, bias = state[f"conv{i}.weight"], state[f"conv{i}.bias"]
            found = functional.conv1d(found, weight, bias, stride=stride, padding=1).relu()
        hidden, _ = cell(found.squeeze(-1))
        final = functional.conv1d(hidden.unsqueeze(-1).relu(), state["final_conv.weight"], state["final_conv.bias"])
        return final.sigmoid().squeeze(-1)

    return partial(_of_arrays, forward)


def sentence_vectors(folder: Path) -> Reference:
    """transformers, with the pooling and the normalization that the folder's modules name written out."""
    from transformers import AutoModel, AutoTokenizer

    module = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def forward(raw: RawBatch) -> Array:
        found = []
        for text in raw.inputs:  # one by one, so that no padding is in it
            inputs = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            with torch.inference_mode():
                states = module(**inputs).last_hidden_state[0]
            mean = states.mean(0)
            found.append((mean / mean.norm()).numpy())
        return np.stack(found)

    return forward


def next_tokens(module: nn.Module, tokenizer: Any) -> Callable[[RawBatch], tuple[Array, float]]:
    """Logits of transformers' own causal language model on each of the first texts, and its perplexity on all."""

    def forward(raw: RawBatch) -> tuple[Array, float]:
        rows, loss, tokens = [], 0.0, 0
        for text in raw.inputs:  # one by one, so that no padding is in it
            ids = tokenizer(text, return_tensors="pt").input_ids
            with torch.inference_mode():
                found = module(input_ids=ids, labels=ids)
            loss += float(found.loss) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
            rows.append(found.logits[0].clone())
        return nan_padded(rows[:2]), math.exp(loss / tokens)

    return forward


def transcripts(source: Path, folder: Path) -> Callable[[RawBatch], tuple[list[str], Array, float]]:
    """What CTranslate2 writes of sounds, the logits of each token that it wrote, and its word error rate.

    `folder` has the tokenizer and the feature extractor: the package itself leaves both to its user.
    """
    import ctranslate2
    from transformers import AutoFeatureExtractor, AutoTokenizer

    own = ctranslate2.models.Whisper(str(source), compute_type="float32", intra_threads=2)
    extractor, tokenizer = AutoFeatureExtractor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    *start, _ = tokenizer("").input_ids

    def forward(raw: RawBatch) -> tuple[list[str], Array, float]:
        waves = [sound.samples.numpy() for sound in raw.inputs if isinstance(sound, Sound)]
        features = extractor(waves, sampling_rate=16_000, return_tensors="np").input_features
        found = own.generate(
            ctranslate2.StorageView.from_array(features),
            [start] * len(waves),
            beam_size=1,
            suppress_tokens=[],
            suppress_blank=False,
            return_logits_vocab=True,
        )
        said = [tokenizer.decode(one.sequences_ids[0], skip_special_tokens=True) for one in found]
        written = [torch.tensor(np.array([np.asarray(row) for row in one.logits[0]])) for one in found]
        # No logits of what follows the tokens of the start before the first that was written.
        rows = [torch.cat((torch.full((len(start) - 1, row.shape[1]), torch.nan), row)) for row in written]
        return said, nan_padded(rows), wrong_words(said, raw.targets)

    return forward


def nan_padded(rows: list[Tensor]) -> Array:
    """[rows, longest, ...] with not-a-numbers behind the end of shorter ones."""
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan).numpy()


def wrong_words(said: list[str], meant: Any) -> float:
    """Word error rate by the recurrence of edit distance, of lower-case words without punctuation."""
    edits = words = 0
    for own, other in zip(said, meant, strict=True):
        a, b = (re.sub(r"[^a-z' ]", " ", text.lower()).split() for text in (own, other))
        row = list(range(len(b) + 1))
        for i, word in enumerate(a, start=1):
            above, row = row, [i]
            for j, reference in enumerate(b, start=1):
                row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != reference)))
        edits += row[-1]
        words += len(b)
    return edits / words


def _of_arrays(forward: Callable[[Tensor], Tensor], raw: RawBatch) -> Array:
    """`forward` of the only array of a batch."""
    assert isinstance(raw.inputs, dict)
    (inputs,) = raw.inputs.values()
    with torch.inference_mode():
        return forward(inputs).numpy()
