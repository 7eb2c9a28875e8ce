"""What a step lowers: every loss on real networks, by itself and with others, and what is learned besides."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from app.contract.distillation import Distill
from app.contract.errors import InvalidSpec, Unsupported
from app.contract.training import Training
from tests.worker.helpers import context_for, convnet, digits_data, memory_data, mlp, tiny_model
from tests.worker.nets import IDS, MASK, bert, model_of
from worker.context import Context
from worker.data.base import Data
from worker.data.batch import Batch
from worker.objectives.values import Regression
from worker.training.distilling.feature_math import attention_map
from worker.training.loop import _Run, train
from worker.training.objective import Objective, objective

OFF = {"max_bytes": 0}


@pytest.fixture(scope="module")
def digits() -> Data:
    return digits_data((1, 8, 8))


def narrow(*, seed: int = 1) -> nn.Sequential:
    """A fifth of `convnet`."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 12, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )


def context_of(digits: Data, scratch: Path, student: nn.Module | None = None) -> Context:
    student = narrow() if student is None else student
    return context_for(tiny_model(student, shape=(1, 8, 8)), digits, scratch, teacher=convnet())


def made(context: Context, **distill: Any) -> Objective:
    return objective(
        context, context.model.task, Distill.model_validate({"cache": OFF, "alpha": 1.0} | distill), samples=0
    )


def batch_of(context: Context, size: int = 16) -> Batch:
    assert context.feed is not None
    return next(iter(context.feed.batches("train", size)))


LOSSES: list[dict[str, Any]] = [
    {"kind": "soft_targets"},
    {"kind": "decoupled"},
    {"kind": "hidden_states"},
    {"kind": "attention_maps"},
    {"kind": "relational"},
    {"kind": "contrastive"},
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss["kind"])
def test_every_loss_teaches_a_narrower_network(loss: dict[str, Any], digits: Data, tmp_path: Path) -> None:
    context = context_of(digits, tmp_path)
    summary = train(
        context,
        Training(epochs=3, lr=3e-3, distill=Distill.model_validate({"losses": [loss], "alpha": 1.0, "cache": {}})),
    )
    assert summary.last_epoch_loss < 0.95 * summary.first_epoch_loss
    details = summary.details()
    assert details["distill_losses"] == loss["kind"]
    assert details["teacher_answers"] == "computed once, kept as float16"
    assert details["teacher_answers_kept"] == 1000
    assert ("distill_layers" in details) == (loss["kind"] not in ("soft_targets", "decoupled"))


def test_losses_are_summed_by_weight_beside_the_tasks(digits: Data, tmp_path: Path) -> None:
    context = context_of(digits, tmp_path)
    batch = batch_of(context)
    kinds = [{"kind": "soft_targets", "weight": 2.0}, {"kind": "attention_maps", "weight": 5.0}]
    both = made(context, losses=kinds, alpha=0.25)(batch)
    outputs = context.model.module(*batch.inputs)
    soft = context.model.task.divergence(outputs, context.teacher(*batch.inputs), batch, 4.0)
    inputs = batch.inputs[0]
    at = torch.zeros(())
    for ours, theirs in ((1, 2), (4, 5)):  # the last maps of 8 x 8 and of 4 x 4
        student, teacher = context.model.module[: ours + 1], context.teacher[: theirs + 1]  # type: ignore[index]
        at = at + (attention_map(student(inputs)) - attention_map(teacher(inputs))).square().sum() / len(inputs) / 2
    expected = 0.25 * (2 * soft + 5 * at) + 0.75 * context.model.task.loss(outputs, batch)
    torch.testing.assert_close(both, expected)


def test_hints_are_compared_through_a_learned_projection(digits: Data, tmp_path: Path) -> None:
    context = context_of(digits, tmp_path)
    batch = batch_of(context)
    loss = made(context, losses=[{"kind": "hidden_states", "layers": [["3", "4"]]}])
    (weight,) = loss.parameters()
    assert weight.shape == (32, 12)
    ours = context.model.module[:4](*batch.inputs)  # type: ignore[index]
    theirs = context.teacher[:5](*batch.inputs)  # type: ignore[index]
    expected = functional.mse_loss(torch.einsum("oc,bchw->bohw", weight, ours), theirs)
    torch.testing.assert_close(loss(batch), expected)


def test_the_projection_is_trained_and_not_delivered(digits: Data, tmp_path: Path) -> None:
    context = context_of(digits, tmp_path)
    names = list(context.model.module.state_dict())
    seen: list[Tensor] = []

    def watch(step: int, total: int) -> bool:
        seen.append(run.loss.modules[0].projections[0].linear.weight.detach().clone())
        return True

    training = Training(steps=3, distill=Distill.model_validate({"losses": [{"kind": "hidden_states"}], "cache": OFF}))
    run = _Run(context, training.settled(), watch)
    run.train()
    assert not torch.equal(seen[0], seen[2])
    assert list(context.model.module.state_dict()) == names


def test_equal_widths_need_no_projection_unless_asked(digits: Data, tmp_path: Path) -> None:
    context = context_of(digits, tmp_path, convnet(seed=5))
    assert not list(made(context, losses=[{"kind": "hidden_states"}]).parameters())
    asked = made(context, losses=[{"kind": "hidden_states", "projection": "linear"}])
    assert [tuple(weight.shape) for weight in asked.parameters()] == [(16, 16), (32, 32)]


def test_an_ensemble_teaches_the_mean_of_its_probabilities(digits: Data, tmp_path: Path) -> None:
    context = context_of(digits, tmp_path)
    other = "mdl_" + "1" * 26
    second = convnet(seed=9).eval()
    context.named = {other: replace(context.model, module=second)}
    batch = batch_of(context)
    loss = made(context, teacher=["uploaded", other], temperature=3.0)(batch)
    soft = [torch.softmax(one(*batch.inputs) / 3, -1) for one in (context.teacher, second)]
    student = torch.log_softmax(context.model.module(*batch.inputs) / 3, -1)
    expected = 9 * functional.kl_div(student, (soft[0] + soft[1]) / 2, reduction="batchmean")
    torch.testing.assert_close(loss, expected)


def test_without_labels_the_teachers_class_is_the_target_of_decoupled_distillation(
    digits: Data, tmp_path: Path
) -> None:
    context = context_of(digits, tmp_path)
    batch = batch_of(context)
    said = context.teacher(*batch.inputs).argmax(-1)
    loss = made(context, losses=[{"kind": "decoupled"}])
    torch.testing.assert_close(loss(replace(batch, targets=None)), loss(replace(batch, targets=said)))


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        ({"kind": "hidden_states", "layers": [["0", "nowhere"]]}, InvalidSpec, "teacher has no layer 'nowhere'"),
        ({"kind": "hidden_states", "layers": [["0", "8"]]}, Unsupported, "more than their features"),
        ({"kind": "attention_maps", "layers": [["7", "8"]]}, Unsupported, "no map of attention"),
        ({"kind": "sequence"}, Unsupported, "models that write"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    loss: dict[str, Any], error: type[Exception], words: str, digits: Data, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        made(context_of(digits, tmp_path), losses=[loss])


def test_outputs_of_other_widths_are_compared_by_their_relations_alone(digits: Data, tmp_path: Path) -> None:
    context = context_of(digits, tmp_path)
    narrower = nn.Sequential(*convnet()[:8], nn.Linear(32, 4)).eval()
    context.teacher = narrower
    with pytest.raises(Unsupported, match="10 values where the teacher gives 4"):
        made(context)
    assert made(context, losses=[{"kind": "relational"}])(batch_of(context)).item() > 0


def test_decoupled_needs_classes(tmp_path: Path) -> None:
    model = tiny_model(mlp())
    model = replace(model, task=Regression(), facts=model.facts.model_copy(update={"task": "regression"}))
    context = context_for(model, memory_data({"train": (torch.zeros(2, 64), None)}), tmp_path)
    with pytest.raises(Unsupported, match="one right class"):
        made(context, losses=[{"kind": "decoupled"}])


def test_padding_does_not_count_in_a_transformers_hints(tmp_path: Path) -> None:
    """Two students that differ at padded positions alone lose the same."""
    student = model_of(bert(hidden=16, layers=1), IDS, MASK, classes=3)
    context = context_for(student, None, tmp_path, teacher=bert(layers=2))
    loss = made_unfed(context, losses=[{"kind": "hidden_states"}, {"kind": "attention_maps"}])
    ids = torch.tensor([[3, 4, 5, 9], [6, 7, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    other = torch.where(mask.bool(), ids, 12)
    targets = torch.tensor([0, 2])
    first, second = (loss(Batch((one, mask), targets)) for one in (ids, other))
    torch.testing.assert_close(first, second)
    assert not torch.isclose(first, loss(Batch((ids, torch.ones_like(mask)), targets)))


def made_unfed(context: Context, **distill: Any) -> Objective:
    data = memory_data({"train": (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))})
    fed = context_for(context.model, data, context.scratch, teacher=context.teacher)
    return made(fed, **distill)


def test_hard_targets_alone_have_nothing_besides(digits: Data, tmp_path: Path) -> None:
    context = context_of(digits, tmp_path)
    loss = objective(context, context.model.task, None, samples=0)
    batch = batch_of(context)
    torch.testing.assert_close(
        loss(batch), functional.cross_entropy(context.model.module(*batch.inputs), batch.targets)
    )
    assert not list(loss.parameters())
    assert loss.details() == {}


def test_neither_networks_hooks_nor_teachers_weights_are_left_changed(digits: Data, tmp_path: Path) -> None:
    context = context_of(digits, tmp_path)
    before = copy.deepcopy(context.teacher.state_dict())
    train(context, Training(steps=3, distill=Distill.model_validate({"losses": LOSSES})))
    assert all(torch.equal(before[name], tensor) for name, tensor in context.teacher.state_dict().items())
    for network in (context.model.module, context.teacher):
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in network.modules())
