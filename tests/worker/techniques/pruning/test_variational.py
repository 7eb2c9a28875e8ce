"""Sparse variational dropout: its formulas beside integrals, its noise beside drawn weights, and what it keeps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor, nn

from app.contract.pruning import Prune
from app.contract.training import Training
from tests.worker.helpers import context_for, digits_data, tiny_model
from tests.worker.techniques.pruning.test_patterns import WEIGHTS, accuracy, prune
from worker.constraints import impose_mask
from worker.context import Context
from worker.data.batch import Batch
from worker.objectives.classification import Classification
from worker.techniques.pruning import variational_math
from worker.techniques.pruning.noise import WeightNoise, noisy, observations
from worker.techniques.pruning.prune import PruneTechnique
from worker.techniques.pruning.weights import prunable
from worker.training.loop import train

TRAINING = Training(epochs=6, lr=3e-3)


def divergence(alpha: float) -> float:
    """KL of N(1, alpha) from the log-uniform prior, but for a constant that makes it 0 for infinite alpha:
    -log(alpha) / 2 + E log|x|, x ~ N(1, alpha), less what that is for alpha without end."""
    spread = math.sqrt(alpha)

    def density(x: float) -> float:
        return math.log(abs(x)) * math.exp(-((x - 1) ** 2) / (2 * alpha)) / (spread * math.sqrt(2 * math.pi))

    low, high = 1 - 12 * spread, 1 + 12 * spread
    points = [point for point in (0.0, 1.0) if low < point < high]
    found, _ = integrate.quad(density, low, high, points=points, limit=500)
    euler = 0.5772156649
    return -math.log(alpha) / 2 + found + (math.log(2) + euler) / 2  # E log|z| of a normal z is -(log 2 + gamma) / 2


@pytest.mark.parametrize("log_alpha", [-6.0, -3.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 6.0])
def test_the_cost_of_a_weight_is_the_integral(log_alpha: float) -> None:
    found = float(variational_math.divergence(torch.tensor(log_alpha)))
    assert found == pytest.approx(divergence(math.exp(log_alpha)), abs=0.01)


def test_log_alpha_is_the_variance_in_squares_of_the_weight() -> None:
    weight, variance = torch.tensor([0.5, -2.0, 0.0, 1e3]), torch.tensor([0.25, 1.0, 1.0, 1e-6])
    found = variational_math.log_alpha(weight, variance.log())
    assert found.tolist() == pytest.approx([0.0, math.log(0.25), 10.0, -10.0], abs=1e-5)
    noise = variational_math.signal_to_noise(weight, variance.log())
    assert noise.tolist() == pytest.approx([1.0, 4.0, 0.0, 1e12], rel=1e-4)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "linear over steps": (lambda: nn.Linear(6, 5), (4, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding="valid", dilation=2), (3, 11, 11)),
    "conv2d that reflects": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 4, 4, 4)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_noise_on_outputs_is_that_of_weights_that_are_drawn(layer: str) -> None:
    """The mean and the variance of each output over many weights w + s * z, which layers compute with one by one."""
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    own = make()
    noise = WeightNoise(own, prunable(own), observations=100, wanted=1)
    with torch.no_grad():
        noise.moved[0].copy_(torch.randn_like(noise.moved[0]))
    noise.weaken(0, 1)
    x = torch.randn(2, *shape)
    draws = 4000
    own.train()
    with noise.heard(), torch.no_grad():
        heard = torch.stack([own(x) for _ in range(draws)])
    weight, spread = own.weight.detach().clone(), (noise._log_variance(0) / 2).exp().detach()
    told = []
    with torch.no_grad():
        for _ in range(draws):
            own.weight.copy_(weight + spread * torch.randn_like(weight))
            told.append(own(x))
    drawn = torch.stack(told)
    error = drawn.std(0) / math.sqrt(draws)
    assert ((heard.mean(0) - drawn.mean(0)).abs() < 6 * error).all()
    assert torch.allclose(heard.std(0), drawn.std(0), rtol=0.12)


def test_an_embedding_is_drawn_anew_at_every_place() -> None:
    own = nn.Embedding(3, 4)
    noise = WeightNoise(own, prunable(own), observations=100, wanted=1)
    noise.weaken(0, 1)
    with noise.heard():
        heard = own(torch.tensor([[1] * 2000])).detach()
    assert torch.allclose(heard.std(1), (noise._log_variance(0) / 2).exp()[1].detach(), rtol=0.1)


def test_nothing_is_heard_of_pruned_weights_nor_in_eval_mode_nor_at_the_end() -> None:
    own = nn.Linear(3, 2)
    impose_mask(own, "weight", torch.tensor([[True, True, False], [False, False, False]]))
    noise = WeightNoise(own, prunable(own), observations=10, wanted=1)
    noise.weaken(9, 10)
    x = torch.ones(50, 3)
    with noise.heard():
        first, second = own(x).std(0).tolist()
        assert first > 1e-3 > 2e-4 > second  # a root of the least variance is left
        own.eval()
        assert not own(x).std(0).any()
        own.train()
        noise.weaken(10, 10)
        assert not own(x).std(0).any()
        assert float(noise()) == 0
    noise.weaken(0, 10)
    assert not own(x).std(0).any()


def test_the_cost_grows_and_stops_where_few_enough_weights_are_left() -> None:
    own = nn.Linear(4, 4)
    noise = WeightNoise(own, prunable(own), observations=8, wanted=4)
    alpha = variational_math.log_alpha(own.weight, noise._log_variance(0))
    whole = float(variational_math.divergence(alpha).sum()) / 8
    noise.weaken(14, 100)
    assert float(noise()) == pytest.approx(whole / 2, rel=1e-5)
    noise.weaken(50, 100)
    assert float(noise()) == pytest.approx(whole, rel=1e-5)
    with torch.no_grad():
        noise.moved[0][:, 1:] = 30.0  # four weights are not only noise: as many as are wanted
    assert float(noise()) == 0


def test_the_start_goes_by_the_weights_that_are_left_and_those_that_are_not_count_for_nothing() -> None:
    torch.manual_seed(0)
    own, none = nn.Linear(100, 100), nn.Linear(4, 4)
    mask = torch.rand(100, 100) < 0.01
    impose_mask(own, "weight", mask)
    nn.init.zeros_(none.weight)
    module = nn.Sequential(own, none)
    noise = WeightNoise(module, prunable(module), observations=8, wanted=1)
    alpha = variational_math.log_alpha(own.weight.detach(), noise._log_variance(0).detach())[mask]
    square = own.weight.detach()[mask].square().mean()
    assert float(noise._log_variance(0).detach()[0, 0] - square.log()) == pytest.approx(-5, abs=1e-4)
    assert float((alpha <= -10).float().mean()) == 0
    noise.weaken(50, 100)
    noise().backward()  # type: ignore[no-untyped-call]
    assert all(torch.isfinite(score).all() for score in noise.scores())
    assert not noise.scores()[1].any()
    assert not noise.moved[1].grad.any()
    noise.wanted = int(mask.sum())
    assert float(noise().detach()) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_do_not_leave_the_range_of_narrow_floats(dtype: torch.dtype) -> None:
    own = nn.Linear(64, 8)
    noise = WeightNoise(own, prunable(own), observations=8)
    noise.weaken(0, 1)
    with noise.heard(), torch.autocast("cpu", dtype):
        heard = own(torch.full((4, 64), 300.0))
    assert heard.dtype == dtype
    assert torch.isfinite(heard).all()


class Odd(nn.Embedding):
    """Scales what it gives, as embeddings of some networks do."""

    def forward(self, ids: Tensor) -> Tensor:
        return 4 * super().forward(ids)


def test_layers_with_a_way_of_their_own_and_called_by_name_are_left_alone(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scaled, self.named, self.plain = Odd(3, 4), nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.plain(self.named(input=x)) + self.scaled(x[:, 0].long().clamp(0, 2)).sum()
            return found

    model = tiny_model(Own())
    assert [weight.name for weight in noisy(model, prunable(model.module))] == ["plain.weight"]


def test_a_task_whose_targets_are_not_there_has_its_samples_observed(context: Context) -> None:
    assert context.feed is not None
    labelled = observations(context.feed, 0)
    assert labelled == context.feed.size("train")
    context.feed.task = Counting()
    assert observations(context.feed, 0) == labelled


class Counting(Classification):
    def terms(self, batch: Batch) -> int:
        return 0


def test_its_variances_do_not_decay(context: Context) -> None:
    """Decay in Adam's gradient outweighs what the loss says of a single weight."""
    moved = []
    for decay in (0.0, 0.1):
        own = context_for(tiny_model(copy.deepcopy(context.model.module)), digits_data(), context.scratch)
        noise = WeightNoise(own.model.module, prunable(own.model.module), observations=800, wanted=1)
        noise.weaken(50, 100)
        with noise.heard():
            train(own, Training(steps=60, lr=3e-3, weight_decay=decay), penalty=noise)
        moved.append(float(torch.cat([one.detach().flatten() for one in noise.moved]).mean()))
    assert moved[1] == pytest.approx(moved[0], rel=0.5)


def test_it_prunes_to_the_weight_and_keeps_more_accuracy_than_magnitude(context: Context, tmp_path: Path) -> None:
    """At 2 % of the weights of a network for 8 x 8 digits."""
    found = {}
    for criterion in ("magnitude", "variational"):
        own = context_for(tiny_model(copy.deepcopy(context.model.module)), digits_data(), tmp_path)
        details = prune(
            own, sparsity=0.98, criterion=criterion, schedule="cubic", training=Training(steps=1500, lr=3e-3)
        )
        assert details["removed_weights"] == round(0.98 * WEIGHTS)
        found[criterion] = accuracy(own)
    assert found["variational"] > found["magnitude"]


def test_layers_that_are_not_called_or_no_products_are_left_alone(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.recurrent = nn.GRU(8, 8, batch_first=True)
            self.out = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            steps = x.reshape(len(x), 8, 8)
            attended: Tensor = self.recurrent(self.attention(steps, steps, steps)[0])[0]
            return self.out(attended.flatten(1))

    context = context_for(tiny_model(Attention()), digits_data(), tmp_path)
    assert [weight.name for weight in noisy(context.model, prunable(context.model.module))] == ["out.weight"]
    details = prune(context, sparsity=0.5, criterion="variational", schedule="cubic", training=TRAINING)
    left: Any = details["layers_left_alone"]
    assert {row["name"] for row in left} == {
        "attention.in_proj_weight", "attention.out_proj.weight",
        "recurrent.weight_ih_l0", "recurrent.weight_hh_l0",
    }  # fmt: skip
    step = Prune(sparsity=0.5, criterion="variational", schedule="cubic", training=TRAINING, exclude=("out",))
    why = PruneTechnique().applies(step, context.model)
    assert why is not None
    assert "variational needs" in why


def test_the_noise_begins_at_the_scale_of_a_layer_and_short_trainings_move_it_as_far() -> None:
    own = nn.Linear(50, 50)
    with torch.no_grad():
        own.weight.mul_(7)
    noise = WeightNoise(own, prunable(own), observations=8, wanted=4)
    square = float(np.square(own.weight.detach().numpy()).mean())
    assert noise._log_variance(0).detach()[0, 0].item() == pytest.approx(math.log(square) - 5, abs=1e-4)
    noise.rate = 0.005
    noise.suit(100)
    with torch.no_grad():
        noise.moved[0].fill_(0.5)
    assert noise._log_variance(0).detach()[0, 0].item() == pytest.approx(math.log(square) - 5 + 10, abs=1e-4)
