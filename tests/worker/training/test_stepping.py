"""One step: gradients in parts are those of the whole, clipping, precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.contract.errors import Unsupported
from app.contract.training import Training
from tests.worker.helpers import mlp
from worker.data.batch import IGNORED, Batch
from worker.objectives.base import Task
from worker.objectives.classification import Classification
from worker.objectives.language import CausalLm, MaskedLm
from worker.objectives.speech import Ctc, Transcription
from worker.objectives.tokens import TokenClassification
from worker.objectives.values import MultiLabel, Regression
from worker.ranks.ranks import Ranks
from worker.training.divergence import Diverged
from worker.training.objective import Objective
from worker.training.precision import dtype_of
from worker.training.sharing import lesson_of
from worker.training.stepping import Stepper

CPU = torch.device("cpu")
SAMPLES, TOKENS, CLASSES = 7, 5, 4
Made = tuple[Task, Batch]


def stepper(module: nn.Module, task: Task, **training: Any) -> Stepper:
    return Stepper(module, task, lesson_of(module, Objective(module, task), Ranks()), Training(**training), CPU)


def uneven(generator: torch.Generator) -> Tensor:
    """Targets of which every sample has another number, the first none at all."""
    targets = torch.randint(CLASSES, (SAMPLES, TOKENS), generator=generator)
    return targets.where(torch.arange(TOKENS) < torch.tensor([0, 5, 1, 2, 5, 3, 1])[:, None], IGNORED)


def _ctc() -> Ctc:
    return Ctc(lambda texts: [], lambda ids: [], lambda inputs, given: torch.full((len(inputs[0]),), given), blank=0)


# Each task with the targets that it learns from; outputs are [batch, tokens, classes] or [batch, classes].
TASKS: dict[str, Callable[[torch.Generator], tuple[Task, Tensor, bool]]] = {
    "classification": lambda g: (Classification(), torch.randint(CLASSES, (SAMPLES,), generator=g), False),
    "regression": lambda g: (Regression(), torch.randn(SAMPLES, CLASSES, generator=g), False),
    "multi-label": lambda g: (MultiLabel(), torch.randint(2, (SAMPLES, CLASSES), generator=g).float(), False),
    "tokens": lambda g: (TokenClassification(), uneven(g), True),
    "causal": lambda g: (CausalLm(), uneven(g), True),
    "masked": lambda g: (MaskedLm(mask=0, special=(), vocabulary=CLASSES), uneven(g), True),
    "transcription": lambda g: (Transcription(lambda ids: [], lambda texts: [], (0,), 1, TOKENS), uneven(g), True),
    "ctc": lambda g: (_ctc(), uneven(g).clamp(min=1).where(torch.arange(TOKENS) < 2, IGNORED), True),
}


class Network(nn.Module):
    """Linear layers on every token, or on their mean."""

    def __init__(self, sequence: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sequence = sequence
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x if self.sequence else x.mean(1))
        return out


@pytest.mark.parametrize("micro", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("name", TASKS)
def test_gradients_in_parts_are_those_of_the_whole_batch(name: str, micro: int) -> None:
    generator = torch.Generator().manual_seed(1)
    task, targets, sequence = TASKS[name](generator)
    inputs = torch.randn(SAMPLES, TOKENS, 3, generator=generator)
    moved = []
    for training in ({}, {"micro_batch_size": micro}):
        network = Network(sequence)
        step = stepper(network, task, optimizer="sgd", momentum=0, batch_size=64, lr=1.0, **training)
        loss = step.step(Batch((inputs,), targets), 1.0)
        moved.append([torch.tensor(loss), *(parameter.detach() for parameter in network.parameters())])
    for whole, parts in zip(*moved, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_batch_norm_gets_no_part_of_one() -> None:
    network = mlp(norm=True)
    sizes: list[int] = []
    network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    step = stepper(network, Classification(), micro_batch_size=2)
    for samples in (3, 4, 5):
        step.step(Batch((torch.randn(samples, 64),), torch.zeros(samples, dtype=torch.int64)), 0.1)
    assert sizes == [3, 2, 2, 3, 2]


def test_a_batch_of_which_nothing_counts_moves_nothing() -> None:
    network = Network(sequence=True)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    batch = Batch((torch.randn(4, TOKENS, 3),), torch.full((4, TOKENS), IGNORED))
    loss = stepper(network, TokenClassification(), micro_batch_size=2).step(batch, 1.0)
    assert loss == 0
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


@pytest.mark.parametrize("micro", [None, 2])
def test_gradients_are_clipped_by_their_norm_together(micro: int | None) -> None:
    moved = []
    for clip in (None, 0.01):
        network = Network(sequence=False)
        before = [parameter.detach().clone() for parameter in network.parameters()]
        step = stepper(
            network, Classification(), optimizer="sgd", momentum=0, lr=1.0, clip_norm=clip, micro_batch_size=micro
        )
        torch.manual_seed(0)
        step.step(Batch((torch.randn(SAMPLES, TOKENS, 3),), torch.zeros(SAMPLES, dtype=torch.int64)), 1.0)
        moved.append(torch.cat([(a - b).flatten() for a, b in zip(before, network.parameters(), strict=True)]).detach())
    whole, clipped = moved
    assert whole.norm() > 0.01
    torch.testing.assert_close(clipped, whole * (0.01 / whole.norm()), rtol=1e-3, atol=1e-7)


def test_a_loss_that_is_no_number_moves_nothing() -> None:
    network = Network(sequence=False)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    step = stepper(network, Classification())
    with pytest.raises(Diverged, match="became nan"):
        step.step(Batch((torch.full((2, TOKENS, 3), torch.nan),), torch.zeros(2, dtype=torch.int64)), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_passes_in_bf16_move_float32_weights() -> None:
    seen: list[torch.dtype] = []
    moved = []
    batch = Batch((torch.randn(SAMPLES, TOKENS, 3),), torch.zeros(SAMPLES, dtype=torch.int64))
    for precision in ("float32", "bf16"):
        network = Network(sequence=False)
        network.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        step = stepper(network, Classification(), optimizer="sgd", precision=precision)
        step.step(batch, 0.1)
        assert step.precision == {"float32": "float32", "bf16": "bfloat16"}[precision]
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
        moved.append(torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))
    assert seen == [torch.float32, torch.bfloat16]
    assert not torch.equal(moved[0], moved[1])
    torch.testing.assert_close(moved[0], moved[1], atol=2e-3, rtol=0.02)


def test_fp16_is_for_cuda() -> None:
    with pytest.raises(Unsupported, match="needs a CUDA device"):
        dtype_of("fp16", CPU)
    assert dtype_of("auto", CPU) in (torch.float32, torch.bfloat16)
    assert dtype_of("fp16", torch.device("cuda")) == torch.float16


def test_scaled_gradients_are_unscaled_before_they_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scaler as fp16 has it, on the CPU in float32, where scaling by a power of two costs nothing."""
    moved = []
    for scaled in (False, True):
        monkeypatch.setattr(
            "worker.training.precision.scaler",
            lambda dtype, device, on=scaled: torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=on),
        )
        network = Network(sequence=False)
        step = stepper(network, Classification(), clip_norm=0.01, micro_batch_size=2)
        torch.manual_seed(0)
        for _ in range(3):
            step.step(Batch((torch.randn(SAMPLES, TOKENS, 3),), torch.zeros(SAMPLES, dtype=torch.int64)), 0.1)
        moved.append(torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))
        again = stepper(network, Classification(), clip_norm=0.01)
        again.load(step.state())
        assert again.state()["scaler"] == step.state()["scaler"]
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-5, atol=1e-7)
