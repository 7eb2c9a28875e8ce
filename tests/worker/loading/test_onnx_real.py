"""Real models of TensorFlow, Paddle and PyTorch against ONNX Runtime, on noise and on real inputs.

They come with the packages magika, silero-vad and rapidocr; those of a package that is not installed are looked for in
the folder that TERSOR_TEST_DATA names, under their file names.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto

from app.contract.errors import ModelRejected
from app.contract.facts import ModelFacts
from tests.worker.loading.onnx_files import Array, noise, run
from worker.loading import load_model
from worker.loading.heads import to_outputs
from worker.loading.onnx_graph import NotImportable, import_graph, model_inputs
from worker.model import Model

TOLERANCE = 1e-4
RATE = 16_000


def real(package: str, *path: str) -> Path:
    """A file of an installed package, or of the folder of test data; skips where it is in neither."""
    found = importlib.util.find_spec(package)
    places = [Path(found.origin).parent.joinpath(*path)] if found is not None and found.origin else []
    data = os.environ.get("TERSOR_TEST_DATA")
    places += [Path(data) / path[-1], Path(data) / package / path[-1]] if data else []
    for place in places:
        if place.is_file():
            return place
    pytest.skip(f"{path[-1]} comes with {package}, which is not installed; TERSOR_TEST_DATA may name a folder with it")


def loaded(path: Path, task: str, folder: Path) -> Model:
    return load_model(path, path.name, {"task": task}, folder)


def agrees(model: Model, path: Path, *inputs: Array) -> Array:
    """The file's output, which the module's logits give as well."""
    assert model.facts.trainable, model.facts.untrainable_reason
    names = [tensor.name for tensor in model.facts.inputs]
    expected = run(onnx.load(path), dict(zip(names, inputs, strict=True)))
    with torch.no_grad():
        logits = model.module(*(torch.from_numpy(array) for array in inputs)).numpy()
    got = to_outputs(model.facts.output_kind, logits)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() < TOLERANCE
    return expected


def kinds(facts: ModelFacts) -> dict[str, int]:
    found: dict[str, int] = {}
    for layer in facts.layers:
        found[layer.type] = found.get(layer.type, 0) + 1
    return found


# --- magika: TensorFlow (JAX) by tf2onnx, opset 15 ----------------------------------------------------------------


def test_magika(tmp_path: Path) -> None:
    path = real("magika", "models", "standard_v3_3", "model.onnx")
    model = loaded(path, "text-classification", tmp_path)
    facts = model.facts
    assert (facts.classes, facts.output_kind, facts.inputs[0].dtype) == (214, "softmax", "int32")
    assert kinds(facts) == {"Linear": 2, "Conv2d": 1}
    rng = np.random.default_rng(0)
    agrees(model, path, rng.integers(0, 257, (4, 2048)).astype(np.int32))
    source = Path(__file__).read_bytes().strip()
    # The model sees the first and the last 1,024 bytes of a file.
    content = np.frombuffer(source[:1024] + source[-1024:], np.uint8).astype(np.int32)[None]
    outputs = agrees(model, path, content)
    labels = json.loads(path.with_name("config.min.json").read_text())["target_labels_space"]
    assert labels[int(outputs.argmax())] == "python"


# --- rapidocr: Paddle, opset 11; the classifier keeps every weight in a Constant node -----------------------------


def photo(height: int, width: int) -> Array:
    """A real photograph as the detector takes it: [1, 3, height, width], mean and deviation 0.5."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels = datasets.load_sample_image("china.jpg")[:height, :width].astype(np.float32) / 255
    return np.ascontiguousarray(((pixels - 0.5) / 0.5).transpose(2, 0, 1)[None])


RAPIDOCR: dict[str, tuple[str, str, tuple[int, int], dict[str, int]]] = {
    "detection": ("PP-OCRv6_det_small.onnx", "regression", (320, 480), {"Conv2d": 83, "ConvTranspose2d": 2}),
    "recognition": (
        "PP-OCRv6_rec_small.onnx",
        "token-classification",
        (48, 320),
        {"Conv2d": 57, "BatchNorm2d": 3, "Linear": 9},
    ),
    "direction": (
        "ch_ppocr_mobile_v2.0_cls_mobile.onnx",
        "image-classification",
        (48, 192),
        {"Conv2d": 53, "BatchNorm2d": 35, "Linear": 1},
    ),
}


@pytest.mark.parametrize("name", RAPIDOCR)
def test_rapidocr(name: str, tmp_path: Path) -> None:
    file, task, size, layers = RAPIDOCR[name]
    path = real("rapidocr", "models", file)
    model = loaded(path, task, tmp_path)
    assert kinds(model.facts) == layers
    agrees(model, path, noise(2, 3, *size))
    agrees(model, path, photo(*size))
    assert onnx.load(model.save(model.module, tmp_path)) == onnx.load(path)


# --- silero-vad: states and branches, so no model to be fed from datasets; its graphs are imported ----------------


def speech(samples: int) -> Array:
    """Something like a voice: a hundred hertz and its overtones, rising and falling."""
    time = np.arange(samples) / RATE
    waves = sum(np.sin(2 * np.pi * 110 * n * time) / n for n in range(1, 12))
    return (0.3 * waves * np.sin(np.pi * time * 4) ** 2).astype(np.float32)


def check_graph(proto: ModelProto, feed: dict[str, Array]) -> None:
    """Every output of a graph."""
    for value in proto.graph.output:
        module = import_graph(proto, value.name).module.eval()
        with torch.no_grad():
            got = module(*(torch.from_numpy(feed[one.name]) for one in model_inputs(proto.graph))).numpy()
        assert np.abs(got - run(proto, feed, value.name)).max() < TOLERANCE


def branches(path: Path) -> dict[str, ModelProto]:
    """The two sides of a model's only If as models of their own, with the tensors of the graph around them."""
    outer = onnx.load(path)
    (choice,) = (node for node in outer.graph.node if node.op_type == "If")
    found = {}
    for attribute in choice.attribute:
        proto = ModelProto()
        proto.CopyFrom(outer)
        proto.graph.CopyFrom(attribute.g)
        proto.graph.initializer.extend(outer.graph.initializer)
        read = {name for node in proto.graph.node for name in node.input}
        proto.graph.input.extend(value for value in outer.graph.input if value.name in read)
        found[attribute.name] = proto
    return found


@pytest.mark.parametrize(("branch", "samples"), [("then_branch", 512 + 64), ("else_branch", 256 + 32)])
def test_branches_of_silero(branch: str, samples: int) -> None:
    proto = branches(real("silero_vad", "data", "silero_vad_op18_ifless.onnx"))[branch]
    for sound in (noise(3, samples) * 0.1, np.tile(speech(samples), (3, 1))):
        check_graph(proto, {"input": sound, "state": noise(2, 3, 128) * 0.1})


def test_silero_over_a_sequence() -> None:
    proto = onnx.load(real("silero_vad", "data", "silero_vad_16k_sequence.onnx"))
    frames = speech(576 * 20).reshape(20, 576)
    check_graph(proto, {"input": frames, "h": np.zeros((1, 1, 128), np.float32), "c": noise(1, 1, 128) * 0.1})


def test_silero_for_openvino() -> None:
    """No initializers at all, and shapes that are computed from nothing."""
    proto = onnx.load(real("silero_vad", "data", "silero_vad_openvino_16k.onnx"))
    check_graph(proto, {"input": speech(576)[None], "state": noise(2, 1, 128) * 0.1})


def test_silero_itself_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = real("silero_vad", "data", "silero_vad.onnx")
    with pytest.raises(ModelRejected, match="'state' has a first dimension of 2"):
        loaded(path, "audio-classification", tmp_path)
    with pytest.raises(NotImportable, match=r"control flow \(If\)"):
        import_graph(onnx.load(path), "output")


def test_a_real_model_trains_a_little(tmp_path: Path) -> None:
    """Six steps on one batch lower the loss, through every one of its operators."""
    path = real("magika", "models", "standard_v3_3", "model.onnx")
    module = loaded(path, "text-classification", tmp_path).module.train()
    rng = np.random.default_rng(0)
    inputs = torch.from_numpy(rng.integers(0, 257, (4, 2048)).astype(np.int32))
    targets = torch.arange(4)
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    losses: list[Any] = []
    for _ in range(6):
        loss = torch.nn.functional.cross_entropy(module(inputs), targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
