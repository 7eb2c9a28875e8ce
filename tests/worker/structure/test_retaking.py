"""Behind a kill a network that was restructured is restructured again, and goes on as if nothing had been."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from app.contract.architecture import Architecture
from app.contract.budgets import TimedBudget
from app.contract.compression import Compress
from app.contract.distillation import AutoStudent, Distill
from app.contract.factorizing import Factorize
from app.contract.fusing import Fuse
from app.contract.resizing import Resize
from app.contract.rewiring import Rewire
from app.contract.spec import DistillStep, Finetune, Step
from app.contract.widths import ResizeWidth
from tests.worker.helpers import digits_data, mlp, part_of
from tests.worker.jobs import job, request_for
from tests.worker.loading.programs import ConvNet, exported, image
from tests.worker.test_resuming import DATA, LAYERS, TRAINING, Attempts, Killed, same
from worker.checkpoints import file
from worker.context import Context
from worker.loading.layers import build
from worker.request import RunRequest

FACTORIZE = Factorize(budget=TimedBudget(parameters=0.6), criterion="activations", training=TRAINING)
STEPS: tuple[Step, ...] = (FACTORIZE, FACTORIZE.model_copy(update={"training": None}), Finetune(training=TRAINING))


class Restructured(Attempts):
    steps = STEPS

    def request(self, folder: Path) -> RunRequest:
        module = mlp(norm=True, dropout=0.2)
        request = job(folder, module, LAYERS, (64,), DATA, self.steps, export=("native",))
        return replace(request, checkpoints=dict(self.stored))


def in_the_last(step: str, times: int) -> bool:
    return step == "finetune" and times == 9


def taken_up(kind: type[Attempts], folder: Path, kill: Any, restructures: str) -> Context:
    """The end of an attempt that takes up a killed one: it is that of one that was not killed, and the step that
    `restructures` runs again only where it was killed."""
    whole, attempts = kind(folder / "whole").run(), kind(folder)
    with pytest.raises(Killed):
        attempts.run(kill)
    assert set(attempts.stored) <= {"step", "training"}
    assert "training" in attempts.stored
    again = attempts.run()
    assert same(again, whole)
    assert again[0].edits == whole[0].edits
    assert again[0].model.spec == whole[0].model.spec
    assert (restructures in attempts.said) == (kill is not in_the_last)
    return again[0]


def kinds(context: Context) -> list[str]:
    """Of its edits, in order."""
    return [edit["kind"] for edit in context.edits or ()]


@pytest.mark.parametrize("kill", [in_the_last, lambda step, times: step == "factorize" and times == 12])
def test_it_ends_with_the_bits_of_one_that_was_not_killed(tmp_path: Path, kill: Any) -> None:
    taken_up(Restructured, tmp_path, kill, "factorize")


@pytest.mark.parametrize("edits", [[{"kind": "factorize", "layer": "9", "form": "svd", "ranks": [2]}], [{}], ["x"], 3])
def test_a_structure_that_is_not_of_this_network_is_not_taken_up(tmp_path: Path, edits: Any) -> None:
    attempts = Restructured(tmp_path)
    with pytest.raises(Killed):
        attempts.run(in_the_last)
    parts = file.read(attempts.stored["step"])
    parts["job"]["edits"] = edits
    file.write(attempts.stored["step"], parts)
    attempts.run()
    assert "factorize" in attempts.said


class AfterAStudent(Restructured):
    steps = (
        DistillStep(student=AutoStudent(kind="auto", parameters=0.5), training=TRAINING),
        FACTORIZE,
        Finetune(training=TRAINING.model_copy(update={"distill": Distill()})),
    )


def test_behind_a_student_nothing_is_said_that_could_not_be_taken_up(tmp_path: Path) -> None:
    attempts = AfterAStudent(tmp_path)
    with pytest.raises(Killed):
        attempts.run(in_the_last)
    assert "step" not in attempts.stored
    assert same(attempts.run(), AfterAStudent(tmp_path / "whole").run())


DEEP: list[dict[str, Any]] = [
    LAYERS[0],
    *(
        {"type": "Residual", "layers": [{"type": "Linear", "in_features": 64, "out_features": 64}, {"type": "Tanh"}]}
        for _ in range(3)
    ),
    *LAYERS[1:],
]


class Shallower(Attempts):
    """Layers go, and then one becomes a product: names are those of the network as it stands by then."""

    steps: tuple[Step, ...] = (
        Resize(layers=2, samples=32, training=TRAINING),
        Factorize(budget=TimedBudget(parameters=0.7)),
        Finetune(training=TRAINING),
    )

    def request(self, folder: Path) -> RunRequest:
        torch.manual_seed(0)
        module = build(Architecture.model_validate({"layers": DEEP}).layers).eval()
        request = job(folder, module, DEEP, (64,), DATA, self.steps, export=("native",))
        return replace(request, checkpoints=dict(self.stored))


@pytest.mark.parametrize("kill", [in_the_last, lambda step, times: step == "resize" and times == 12])
def test_layers_that_went_go_again(tmp_path: Path, kill: Any) -> None:
    assert set(kinds(taken_up(Shallower, tmp_path, kill, "resize"))) == {"drop", "factorize"}


class Narrower(Restructured):
    """All layers become narrower, by a search, and then one a product."""

    steps = (
        ResizeWidth(
            budget=TimedBudget(parameters=0.6), search="evolutionary", candidates=6, samples=32, training=TRAINING
        ),
        Factorize(budget=TimedBudget(parameters=0.8)),
        Finetune(training=TRAINING),
    )


@pytest.mark.parametrize("kill", [in_the_last, lambda step, times: step == "resize" and times == 16])
def test_widths_that_were_searched_are_taken_again(tmp_path: Path, kill: Any) -> None:
    assert set(kinds(taken_up(Narrower, tmp_path, kill, "resize"))) == {"narrow", "factorize"}


class Compressed(Restructured):
    """Dead units leave between the rounds of a search, and then what is left, with its codebooks, is trained on."""

    steps = (Compress(keep=0.05, rounds=2, training=TRAINING), Finetune(training=TRAINING))


@pytest.mark.parametrize("kill", [in_the_last, lambda step, times: step == "compress" and times == 45])
def test_units_that_were_dead_leave_again(tmp_path: Path, kill: Any) -> None:
    assert set(kinds(taken_up(Compressed, tmp_path, kill, "compress"))) == {"narrow"}


class Fused(Attempts):
    """A batch norm goes into a layer and an identity leaves; what follows trains without them."""

    layers: ClassVar[list[dict[str, Any]]] = [*LAYERS[:4], {"type": "Identity"}, *LAYERS[4:]]
    steps: tuple[Step, ...] = (Fuse(), Factorize(budget=TimedBudget(parameters=0.7)), Finetune(training=TRAINING))

    def request(self, folder: Path) -> RunRequest:
        torch.manual_seed(0)
        module = build(Architecture.model_validate({"layers": self.layers}).layers)
        module(torch.randn(32, 64))  # statistics of its own
        request = job(folder, module.eval(), self.layers, (64,), DATA, self.steps, export=("native",))
        return replace(request, checkpoints=dict(self.stored))


def test_what_was_fused_is_fused_again(tmp_path: Path) -> None:
    fused = taken_up(Fused, tmp_path, in_the_last, "fuse")
    assert kinds(fused)[:3] == ["fuse", "drop", "drop"]
    assert not any(isinstance(layer, nn.BatchNorm1d | nn.Identity) for layer in fused.model.module.modules())


class FusedProgram(Attempts):
    """Norms leave the graph of a program, and their tensors its tree."""

    def request(self, folder: Path) -> RunRequest:
        content = exported(ConvNet().eval(), image())
        data = part_of(digits_data((1, 8, 8)), {"train": 300, "validation": 60, "test": 60})
        request = request_for(
            folder, "upload.pt2", content, {"task": "image-classification"}, data,
            (Fuse(), Finetune(training=TRAINING)), export=("native",),
        )  # fmt: skip
        return replace(request, checkpoints=dict(self.stored))


def test_a_program_that_was_fused_is_fused_again(tmp_path: Path) -> None:
    taken_up(FusedProgram, tmp_path, in_the_last, "fuse")


class Rewired(Shallower):
    """Ways of an architecture go, and what is left becomes a product."""

    steps = (
        Rewire(connections=2, samples=32, training=TRAINING),
        Factorize(budget=TimedBudget(parameters=0.7)),
        Finetune(training=TRAINING),
    )


class RewiredProgram(Rewired):
    """Of a graph nodes go, by their names."""

    steps = (Rewire(connections=2, samples=32, training=TRAINING), Finetune(training=TRAINING))

    def request(self, folder: Path) -> RunRequest:
        torch.manual_seed(0)
        module = build(Architecture.model_validate({"layers": DEEP}).layers).eval()
        content, spec = exported(module, torch.randn(2, 64)), {"task": "image-classification"}
        request = request_for(folder, "upload.pt2", content, spec, DATA, self.steps, export=("native",))
        return replace(request, checkpoints=dict(self.stored))


@pytest.mark.parametrize("kind", [Rewired, RewiredProgram])
@pytest.mark.parametrize("kill", [in_the_last, lambda step, times: step == "resize" and times == 12])
def test_connections_that_went_go_again(tmp_path: Path, kind: type[Attempts], kill: Any) -> None:
    assert kinds(taken_up(kind, tmp_path, kill, "resize"))[:2] == ["cut", "cut"]


@pytest.mark.parametrize(
    "edit", [{"join": "add_9", "side": 0}, {"join": "1", "side": "rest"}, {"join": "0", "side": 1}]
)
def test_a_way_that_is_not_of_this_network_is_not_taken_up(tmp_path: Path, edit: Any) -> None:
    attempts = Rewired(tmp_path)
    with pytest.raises(Killed):
        attempts.run(in_the_last)
    parts = file.read(attempts.stored["step"])
    parts["job"]["edits"] = [{"kind": "cut", **edit}]
    file.write(attempts.stored["step"], parts)
    attempts.run()
    assert "resize" in attempts.said
