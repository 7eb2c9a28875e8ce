"""Rounding forth and gradients back, against torch's own learnable fake quantization and against the formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from worker.evaluation.cost import saved_bytes
from worker.techniques.quantization.qat.lsq import FakeInput, FakeQuantized, rounded

LOW, HIGH = -7, 7
SMALL = 1024  # bytes of steps and zero points


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("zero", "low", "high"), [(0.0, LOW, HIGH), (5.0, 0, 15)])
def test_values_and_gradients_are_those_of_torch(zero: float, low: int, high: int) -> None:
    given, step = values(40, 9).requires_grad_(), torch.tensor([0.13]).requires_grad_()
    other, scale = given.detach().clone().requires_grad_(), torch.tensor([0.13]).requires_grad_()
    upstream = values(40, 9).flip(0)
    (rounded(given, step, torch.tensor([zero]), low, high) * upstream).sum().backward()  # type: ignore[no-untyped-call]
    reference = torch._fake_quantize_learnable_per_tensor_affine(other, scale, torch.tensor([zero]), low, high, 1.0)
    (reference * upstream).sum().backward()
    torch.testing.assert_close(rounded(given, step, torch.tensor([zero]), low, high), reference)
    torch.testing.assert_close(given.grad, other.grad)
    torch.testing.assert_close(step.grad, scale.grad)


def test_each_output_has_a_step_of_its_own() -> None:
    steps = torch.tensor([[0.1], [0.4]])
    own = FakeQuantized(steps, torch.zeros(2, 1), LOW, HIGH)
    weight = values(2, 3, 3, 3)
    found = own(weight).detach().numpy()
    for row, step in enumerate((0.1, 0.4)):
        expected = np.clip(np.round(weight[row].numpy() / step), LOW, HIGH) * step
        np.testing.assert_allclose(found[row], expected, atol=1e-6)


def test_groups_lie_along_the_inputs_of_an_output() -> None:
    steps = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    weight = values(2, 8)
    expected = torch.cat([(part / s).round().clamp(LOW, HIGH) * s for part, s in pairs(weight, steps)]).view(2, 8)
    torch.testing.assert_close(FakeQuantized(steps, torch.zeros(2, 2), LOW, HIGH, groups=2)(weight), expected)
    turned = FakeQuantized(steps, torch.zeros(2, 2), LOW, HIGH, groups=2, inputs_first=True)
    torch.testing.assert_close(turned(weight.T.contiguous()), expected.T)


def pairs(weight: Tensor, steps: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(weight.view(-1, 4), steps.flatten(), strict=True))


def test_the_gradient_of_a_step_is_scaled_and_of_its_logarithm() -> None:
    """d/d(log s) = s d/ds, divided by the root of the values that share the step times the greatest code."""
    own = FakeQuantized(torch.tensor([[0.2]]), torch.zeros(1, 1), LOW, HIGH)
    weight = values(1, 50)
    own(weight).sum().backward()
    at = weight.numpy() / 0.2
    inside = (np.round(at) >= LOW) & (np.round(at) <= HIGH)
    of_step = np.where(inside, np.round(at) - at, np.clip(np.round(at), LOW, HIGH)).sum()
    assert own.log_step.grad is not None
    assert float(own.log_step.grad) == pytest.approx(0.2 * of_step / np.sqrt(50 * HIGH), rel=1e-4)


def test_steps_that_are_fixed_have_no_gradient() -> None:
    own = FakeQuantized(torch.ones(3, 2), torch.zeros(3, 2), LOW, HIGH, groups=2, fixed=True)
    assert not own.log_step.requires_grad


def test_zero_stays_zero_and_is_never_negative() -> None:
    own = FakeQuantized(torch.tensor([[0.5]]), torch.tensor([[3.0]]), 0, 7)
    found = own(torch.tensor([[0.0, -0.1, 0.1, -9.0, 9.0]]))
    assert found.tolist() == [[0.0, 0.0, 0.0, -1.5, 2.0]]
    assert not torch.signbit(found[:, :3]).any()


def test_inputs_keep_their_dtype() -> None:
    own = FakeInput(torch.tensor([0.25]), torch.tensor([2.0]), 0, 255)
    given = values(4, 6).to(torch.bfloat16).requires_grad_()
    found = own(given)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert given.grad is not None
    assert torch.equal(given.grad == 0, (given.detach().float() / 0.25 + 2).round() < 0)


def test_nothing_is_kept_but_what_came_in() -> None:
    """Which the layer in front mostly keeps as well; a rounded weight is computed of its parameter again."""
    given = values(16, 100).requires_grad_()
    own = FakeInput(torch.tensor([0.25]), torch.tensor([2.0]), 0, 255)
    assert saved_bytes(own, (given,)) <= given.nbytes + SMALL
    weight = FakeQuantized(torch.ones(16, 1), torch.zeros(16, 1), LOW, HIGH)
    assert saved_bytes(weight, (given,)) <= given.nbytes + SMALL


def test_a_step_that_learns_comes_to_fit() -> None:
    """Far too wide in the beginning; the weights stay as they are."""
    weight = values(1, 400)
    own = FakeQuantized(torch.tensor([[2.0]]), torch.zeros(1, 1), LOW, HIGH)
    optimizer = torch.optim.Adam(own.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(own(weight), weight)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    tried = np.linspace(0.05, 2, 400)
    errors = [np.square(np.clip(np.round(weight.numpy() / s), LOW, HIGH) * s - weight.numpy()).mean() for s in tried]
    assert float(loss) < 1.1 * min(errors)
