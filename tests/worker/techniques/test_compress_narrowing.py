"""Units that a search no longer needs leave the network between its rounds, and nothing else changes."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from app.contract.architecture import Architecture
from app.contract.compression import Compress
from app.contract.facts import ModelFormat
from app.contract.training import Training
from tests.worker.helpers import context_for, digits_data, part_of
from tests.worker.jobs import Recorder, job
from tests.worker.loading.programs import exported
from tests.worker.techniques.test_compress import BRIEF, Killed, accuracy, compress, digits, size, trained
from worker.checkpoints.points import Checkpoints, Kind
from worker.constraints import baked, masks
from worker.context import Context
from worker.data.base import Data
from worker.export.onnx import export_onnx
from worker.loading import load_model
from worker.loading.layers import build
from worker.model import Model
from worker.packed import load, packed
from worker.run import run_job
from worker.structure.groups import structure_of
from worker.techniques.compression import compress as searching
from worker.techniques.compression.attempt import Attempt, snapshot
from worker.techniques.compression.narrowing import Narrowing, dead, narrowing, rewritable
from worker.training.loop import train

__all__ = ["digits", "trained"]
Layers = list[dict[str, Any]]


def linear(inputs: int, outputs: int) -> dict[str, Any]:
    return {"type": "Linear", "in_features": inputs, "out_features": outputs}


MLP: Layers = [linear(64, 64), {"type": "ReLU"}, linear(64, 32), {"type": "ReLU"}, linear(32, 10)]
FEW: dict[str, Any] = {"keep": 0.08, "factor": 0.6, "max_accuracy_drop": 0.2, "margin": 0}


def uploaded(module: nn.Module, layers: Layers, folder: Path, shape: tuple[int, ...] = (64,)) -> Model:
    """The model of an architecture."""
    save_file(module.state_dict(), folder / "upload.safetensors")
    spec = {
        "task": "image-classification",
        "architecture": {"layers": layers},
        "input": {"shape": list(shape), "dtype": "float32"},
    }
    return load_model(folder / "upload.safetensors", "upload.safetensors", spec, folder)


@pytest.fixture
def own(trained: nn.Module, digits: Data, tmp_path: Path) -> Callable[[], Context]:
    """Makes contexts of the trained network, as an architecture."""
    return lambda: context_for(uploaded(trained, MLP, tmp_path), digits, tmp_path)


def groups(details: Any) -> dict[str, tuple[int, int]]:
    return {row["name"]: (row["units"], row["kept"]) for row in details["groups"]}


def test_the_network_without_dead_units_gives_what_it_gave_in_fewer_bytes(own: Callable[[], Context]) -> None:
    context, before = own(), own()
    told, other = compress(context, rounds=1, **FEW), compress(before, rounds=1, narrow=False, **FEW)
    assert told["held"]
    assert other["held"]
    assert "groups" not in other
    left = groups(told)
    assert {name: units for name, (units, _) in left.items()} == {"0.weight": 64, "2.weight": 32}
    assert left["0.weight"][1] < 50  # of 64
    module, whole = baked(context.model.module), baked(before.model.module)
    assert [tuple(one.shape) for name, one in module.named_parameters() if name.endswith("weight")] == [
        (left["0.weight"][1], 64), (left["2.weight"][1], left["0.weight"][1]), (10, left["2.weight"][1]),
    ]  # fmt: skip
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(module(x), whole(x), atol=1e-5)
    assert told["packed_bytes"] == size(module) <= size(whole) == other["packed_bytes"]
    assert told["parameters"] == sum(one.numel() for one in module.parameters()) < told["parameters_before"]  # type: ignore[operator]
    assert accuracy(context, module) == accuracy(before, whole)
    # What shares values still does: in the file, and in a state that is trained on.
    nonzero = [set(weight[weight != 0].tolist()) for weight in whole.parameters()]
    assert [set(weight[weight != 0].tolist()) for weight in module.parameters()] == nonzero


def test_rounds_go_on_with_the_smaller_network_and_masks_hold(
    own: Callable[[], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    found: list[Narrowing] = []

    def noted(context: Context, exclude: tuple[str, ...], attempt: Attempt) -> Narrowing | None:
        sizes.append(sum(one.numel() for one in context.model.module.parameters()))
        less = narrowing(context, exclude, attempt)
        found.extend([] if less is None else [less])
        return less

    monkeypatch.setattr(searching, "narrowing", noted)
    context = own()
    details = compress(context, rounds=4, patience=4, **FEW)
    assert len(found) >= 2
    assert sizes[1] < sizes[0]
    rows = details["rounds"]
    assert isinstance(rows, list)
    assert [row["kept"] for row in rows[:2]] == [0.08, pytest.approx(0.048)]
    kept = sum(int(mask.sum()) for mask in masks(context.model.module).values())
    assert kept <= round(details["kept_share"] * 6464)  # type: ignore[arg-type, operator]  # a share of what was uploaded
    zeros = {name: ~mask for name, mask in masks(context.model.module).items()}
    assert all(mask.any() for mask in zeros.values())
    train(context, Training(steps=5, lr=0.1, batch_size=64))
    after = baked(context.model.module).state_dict()
    assert all(not after[name][gone].any() for name, gone in zeros.items())
    assert [edit["kind"] for edit in context.edits or ()] == ["narrow"] * len(context.edits or ())


def test_where_nothing_is_dead_all_is_as_it_was(own: Callable[[], Context]) -> None:
    context, before = own(), own()
    fields: dict[str, Any] = {"rounds": 1, "keep": 0.9, "max_accuracy_drop": 0.1}
    told = compress(context, **fields)
    assert told["held"]
    assert told == compress(before, narrow=False, **fields)
    assert context.edits == []
    ours, theirs = (baked(one.model.module).state_dict() for one in (context, before))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_after_a_kill_in_a_narrower_network_it_ends_with_equal_bits(own: Callable[[], Context], tmp_path: Path) -> None:
    whole = own()
    expected = compress(whole, rounds=3, patience=3, **FEW)
    saved: dict[str, Path] = {}
    first = own()

    def announce(kind: Kind, name: str) -> None:
        saved[kind] = Path(shutil.copy(tmp_path / name, tmp_path / f"stored-{kind}"))

    first.checkpoints = Checkpoints(tmp_path, announce, 0.0)

    def count(share: float) -> None:
        if share * 3 > 1.4:
            raise Killed

    first.progress = count
    with pytest.raises(Killed):
        compress(first, rounds=3, patience=3, **FEW)
    assert len(first.edits or ()) == 1
    second = own()
    second.checkpoints = Checkpoints(tmp_path, None, 0.0, saved)
    shares: list[float] = []
    second.progress = shares.append
    assert compress(second, rounds=3, patience=3, **FEW) == expected
    assert min(shares) > 1 / 3  # the round before was not taken again
    assert second.edits == whole.edits
    assert len(second.edits or ()) > 1
    assert second.model.spec == whole.model.spec
    ours, theirs = (baked(one.model.module).state_dict() for one in (second, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_layers_that_are_excluded_stay_whole(own: Callable[[], Context]) -> None:
    context = own()
    left = groups(compress(context, rounds=1, exclude=("4",), **FEW))
    assert left["0.weight"][1] < 64
    assert left["2.weight"] == (32, 32)
    assert context.model.module[4].weight.shape == (10, 32)  # type: ignore[index]


def sparse(activation: str) -> nn.Sequential:
    """64 -> 6 -> 10, where nothing makes unit 1, nothing reads units 2 and 3, and nothing of either is of unit 4."""
    torch.manual_seed(1)
    module = build_layers([linear(64, 6), {"type": activation}, linear(6, 10)])
    with torch.no_grad():
        module[0].weight[[1, 4]] = 0.0  # type: ignore[operator]
        module[0].bias[[1, 4]] = 0.0  # type: ignore[operator]
        module[2].weight[:, [2, 3, 4]] = 0.0  # type: ignore[operator]
    return module


def build_layers(layers: Layers) -> nn.Sequential:
    return build(Architecture.model_validate({"layers": layers}).layers).eval()


def found(module: nn.Sequential, layers: Layers, folder: Path, coded: nn.Module | None = None) -> Narrowing | None:
    context = context_for(uploaded(module, layers, folder), digits_data(), folder)
    coded = copy.deepcopy(context.model.module) if coded is None else coded
    large = len(packed(coded.state_dict())[0])
    return narrowing(context, (), Attempt(1.0, large, snapshot(coded), coded, 8))


def test_what_is_dead_is_seen_in_the_weights() -> None:
    module = sparse("ReLU")
    (group,) = structure_of(module, (torch.randn(2, 64),)).groups
    assert dead(module, group, silent=False).tolist() == [False, False, True, True, True, False]
    assert dead(module, group, silent=True).tolist() == [False, True, True, True, True, False]
    with torch.no_grad():
        module[0].bias[1] = 0.5  # type: ignore[operator]
        module[2].weight[3, 3] = 1e-9  # type: ignore[operator]
    assert dead(module, group, silent=True).tolist() == [False, False, True, False, True, False]


@pytest.mark.parametrize(("activation", "stay"), [("ReLU", [0, 5]), ("Sigmoid", [0, 1, 5])])
def test_what_nothing_makes_goes_where_it_does_nothing(activation: str, stay: list[int], tmp_path: Path) -> None:
    """Behind a sigmoid it is a half."""
    module = sparse(activation)
    less = found(module, [linear(64, 6), {"type": activation}, linear(6, 10)], tmp_path)
    assert less is not None
    assert less.kept == {"0.weight": len(stay)}
    assert torch.equal(less.module[0].weight, module[0].weight[stay])  # type: ignore[index]
    assert torch.equal(less.module[2].weight, module[2].weight[:, stay])  # type: ignore[index]


def test_only_what_is_dead_before_and_behind_the_sharing_of_values_goes(tmp_path: Path) -> None:
    module = sparse("ReLU")
    coded = copy.deepcopy(module)
    with torch.no_grad():
        coded[2].weight[0, 3] = 0.25  # type: ignore[operator]
        coded[2].weight[:, 0] = 0.0  # type: ignore[operator]
    less = found(module, [linear(64, 6), {"type": "ReLU"}, linear(6, 10)], tmp_path, coded)
    assert less is not None
    assert torch.equal(less.module[0].weight, module[0].weight[[0, 3, 5]])  # type: ignore[index]


def test_one_unit_stays_where_all_are_dead(tmp_path: Path) -> None:
    module = sparse("ReLU")
    with torch.no_grad():
        module[2].weight.zero_()  # type: ignore[operator]
    less = found(module, [linear(64, 6), {"type": "ReLU"}, linear(6, 10)], tmp_path)
    assert less is not None
    assert less.kept == {"0.weight": 1}


def test_a_norm_over_units_looks_at_dead_ones_too(tmp_path: Path) -> None:
    layers = [linear(64, 6), {"type": "LayerNorm", "normalized_shape": [6]}, linear(6, 10)]
    torch.manual_seed(0)
    module = build_layers(layers)
    with torch.no_grad():
        module[2].weight[:, 2] = 0.0  # type: ignore[operator]
    assert found(module, layers, tmp_path) is None


def test_filters_leave_convolutions_with_their_norms_and_all_places_that_read_them(tmp_path: Path) -> None:
    layers: Layers = [
        {"type": "Conv2d", "in_channels": 1, "out_channels": 5, "kernel_size": 3},
        {"type": "BatchNorm2d", "num_features": 5},
        {"type": "ReLU"},
        {"type": "Flatten"},
        linear(5 * 36, 10),
    ]
    torch.manual_seed(0)
    module = build_layers(layers)
    with torch.no_grad():
        module[4].weight[:, 36:72] = 0.0  # type: ignore[operator]
        module[4].weight[:, 72:100] = 0.0  # type: ignore[operator]  # not all of them
    save_file(module.state_dict(), tmp_path / "upload.safetensors")
    context = context_for(uploaded(module, layers, tmp_path, (1, 8, 8)), digits_data((1, 8, 8)), tmp_path)
    coded = copy.deepcopy(module)
    less = narrowing(context, (), Attempt(1.0, 10**9, snapshot(coded), coded, 8))
    assert less is not None
    assert less.kept == {"0.weight": 4}
    assert less.module[1].running_var.shape == (4,)  # type: ignore[index]
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(less.module(x), module(x), atol=1e-5)
    assert narrowing(context, (), Attempt(1.0, 10, snapshot(coded), coded, 8)) is None  # a larger file


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_units_of_recurrent_layers_leave(kind: str, tmp_path: Path) -> None:
    layers: Layers = [{"type": kind, "input_size": 8, "hidden_size": 6, "output": "last"}, linear(6, 10)]
    torch.manual_seed(0)
    module = build_layers(layers)
    with torch.no_grad():
        module[0].weight_hh_l0[:, 2] = 0.0  # type: ignore[operator]
        module[1].weight[:, 2:4] = 0.0  # type: ignore[operator]  # the layer itself still reads unit 3
    context = context_for(uploaded(module, layers, tmp_path, (8, 8)), digits_data((8, 8)), tmp_path)
    coded = copy.deepcopy(module)
    less = narrowing(context, (), Attempt(1.0, 10**9, snapshot(coded), coded, 8))
    assert less is not None
    assert list(less.kept.values()) == [5]
    x = torch.randn(3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(less.module(x), module(x), atol=1e-5)


STEP = Compress(training=BRIEF, patience=1, rounds=1, **FEW)


def test_what_is_delivered_is_read_by_its_spec(trained: nn.Module, tmp_path: Path) -> None:
    data = part_of(digits_data(), {"train": 800, "validation": 200, "test": 200})
    request = job(tmp_path / "job", trained, MLP, (64,), data, (STEP,), export=("native", "packed"))
    report = run_job(request, Recorder()).report
    told: Any = report.steps[0].details
    assert groups(told)["0.weight"][1] < 64
    native, small = (request.output / one.name for one in report.artifacts)
    assert all(one.measurement.parameters == told["parameters"] for one in report.artifacts)
    again = load_model(native, native.name, json.loads(told["spec"]), tmp_path)
    state = load(small)
    assert state.keys() == again.module.state_dict().keys()
    assert all(torch.equal(own, again.module.state_dict()[name]) for name, own in state.items())
    assert small.stat().st_size == told["packed_bytes"]


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_a_program_and_a_graph_are_written_anew(
    trained: nn.Module, digits: Data, own: Callable[[], Context], kind: str, tmp_path: Path
) -> None:
    path = tmp_path / f"program.{kind}"
    if kind == "pt2":
        path.write_bytes(exported(copy.deepcopy(trained).eval(), torch.randn(2, 64)))
    else:
        export_onnx(trained, own().model, path)
    model = load_model(path, path.name, {"task": "image-classification"}, tmp_path)
    context = context_for(model, digits, tmp_path)
    told: Any = compress(context, rounds=1, **FEW)
    assert told["parameters"] < told["parameters_before"]
    (tmp_path / "out").mkdir()
    module = baked(context.model.module)
    written = context.model.save(module, tmp_path / "out")
    again = load_model(written, written.name, {"task": "image-classification"}, tmp_path)
    assert sum(one.numel() for one in again.module.parameters()) == told["parameters"]
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert torch.allclose(again.module.eval()(x), module(x), atol=1e-5)


@pytest.mark.parametrize(
    ("format", "dtype", "expected"),
    [
        ("pt2", torch.float32, True),
        ("onnx", torch.float32, True),
        ("onnx", torch.float16, False),
        ("huggingface", torch.float32, False),
    ],
)
def test_networks_stay_that_could_not_be_written_again(
    own: Callable[[], Context], format: ModelFormat, dtype: torch.dtype, expected: bool
) -> None:
    model = own().model
    assert rewritable(model)
    facts = model.facts.model_copy(update={"format": format})
    other = replace(model, plan=None, facts=facts, stored=dict.fromkeys(model.stored, dtype))
    assert rewritable(other) is expected
