"""Codebooks: the mathematics against SciPy and brute force, the step on real digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2
from scipy.stats import entropy
from torch import nn

from app.contract.codebook import Codebook
from app.contract.pruning import Prune
from app.contract.spec import Finetune
from app.contract.training import Training
from tests.worker.helpers import context_for, memory_data, mlp, tiny_model
from tests.worker.techniques.pruning.nets import KINDS
from worker.constraints import baked, codebooks, masks
from worker.context import Context
from worker.packed import packed
from worker.techniques.base import Details
from worker.techniques.pruning.prune import PruneTechnique
from worker.techniques.quantization import codebook_math as maths
from worker.techniques.quantization.quantize import QuantizeTechnique
from worker.techniques.training.finetune import FinetuneTechnique

STARTS = ("linear", "density", "kmeans++")


def normal(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count)


def squared(values: np.ndarray, codes: np.ndarray, entries: np.ndarray) -> float:
    return float(np.square(values - entries[codes]).sum())


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("count", [2, 8, 16])
def test_k_means_is_as_good_as_scipys(start: Any, count: int) -> None:
    values = normal(4000)
    codes, entries = maths.shared(values, count, start, 0.0, np.random.default_rng(1))
    theirs, labels = kmeans2(values[:, None], count, iter=100, minit="++", rng=3)
    best = squared(values, labels, theirs[:, 0])
    assert squared(values, codes, entries) <= 1.15 * best
    nearest = np.abs(values[:, None] - entries).argmin(1)
    assert np.mean(nearest == codes) > 0.998
    for code, entry in enumerate(entries):
        assert entry == pytest.approx(values[codes == code].mean())


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0, 1e-9]), min_size=1, max_size=50),
    st.integers(2, 8),
    st.sampled_from(STARTS),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_any_values_are_shared(values: list[float], count: int, start: Any, price: float) -> None:
    array = np.array(values)
    codes, entries = maths.shared(array, count, start, price, np.random.default_rng(0))
    assert 1 <= len(entries) <= count
    assert set(codes) == set(range(len(entries)))
    if price == 0 and len(set(values)) <= count:
        np.testing.assert_array_equal(entries[codes], array)


def test_the_assignment_is_the_cheapest_of_all() -> None:
    values, entries, shares = normal(500), np.array([-1.0, 0.1, 0.9]), np.array([0.2, 0.7, 0.1])
    codes = maths.assign(values, entries, shares, 0.3)
    for value, code in zip(values, codes, strict=True):
        costs = [(value - e) ** 2 - 0.3 * np.log2(p) for e, p in zip(entries, shares, strict=True)]
        assert costs[code] == min(costs)


def test_a_higher_price_makes_shorter_codes_and_larger_errors() -> None:
    values = normal(20_000)
    found = [maths.shared(values, 16, "linear", price, np.random.default_rng(0)) for price in (0.0, 0.02, 0.1, 0.4)]
    bits = [maths.entropy(codes) for codes, _ in found]
    errors = [squared(values, codes, entries) for codes, entries in found]
    assert bits == sorted(bits, reverse=True)
    assert errors == sorted(errors)
    assert bits[0] - bits[-1] > 1
    assert maths.entropy(found[0][0]) == pytest.approx(entropy(np.bincount(found[0][0]), base=2))


def test_at_the_same_bits_it_errs_less_than_fewer_entries() -> None:
    """What entropy-constrained quantization is for (Chou, Lookabaugh & Gray 1989)."""
    values = normal(20_000)
    codes, entries = maths.shared(values, 4, "linear", 0.0, np.random.default_rng(0))
    plain = (maths.entropy(codes), squared(values, codes, entries))
    for price in np.geomspace(0.001, 1, 40):
        codes, entries = maths.shared(values, 16, "linear", price, np.random.default_rng(0))
        if maths.entropy(codes) <= plain[0]:
            assert squared(values, codes, entries) < plain[1]
            return
    pytest.fail("no price is high enough")


def share(context: Context, **fields: Any) -> Details:
    step = Codebook(**fields)
    assert QuantizeTechnique().applies(step, context.model) is None
    return QuantizeTechnique().apply(step, context)


def accuracy(context: Context) -> float:
    assert context.feed is not None
    module = baked(context.model.module)
    return context.feed.score(lambda inputs: module(*inputs), "test")[0]


def distinct(context: Context) -> list[int]:
    state = baked(context.model.module).state_dict()
    return [len(torch.unique(value[value != 0])) for value in state.values() if value.ndim > 1]


BRIEF = Training(epochs=3, lr=1e-3)


@pytest.mark.parametrize("assignment", ["fixed", "reestimated"])
@pytest.mark.parametrize("start", STARTS)
def test_weights_take_few_values_and_keep_them_through_training(context: Context, start: str, assignment: str) -> None:
    before = accuracy(context)
    details = share(context, entries=8, start=start, assignment=assignment, training=BRIEF)
    assert max(distinct(context)) <= 8
    assert accuracy(context) > before - (0.05 if assignment == "reestimated" else 0.2)
    FinetuneTechnique().apply(Finetune(training=BRIEF), context)
    assert max(distinct(context)) <= 8
    rows = details["layers"]
    assert isinstance(rows, list)
    assert all(0 < row["bits_a_code"] <= 3 for row in rows)  # type: ignore[operator]


def test_training_entries_gains_what_rounding_lost(context: Context) -> None:
    teacher = context.model.module.state_dict()
    found = {}
    for name, training in (("none", None), ("some", Training(epochs=6, lr=3e-3))):
        own = context_for(tiny_model(mlp()), context.feed.data, context.scratch)  # type: ignore[union-attr]
        own.model.module.load_state_dict(teacher)
        share(own, entries=3, training=training)
        found[name] = accuracy(own)
    assert found["some"] > found["none"] + 0.02


def test_the_gradient_of_an_entry_is_the_sum_of_its_weights(context: Context) -> None:
    share(context, entries=4)
    module = context.model.module
    assert context.feed is not None
    batch = next(iter(context.feed.batches("train", 64)))
    nn.functional.cross_entropy(module(*batch.inputs), batch.targets).backward()  # type: ignore[arg-type]
    plain = baked(module)
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    nn.functional.cross_entropy(plain(*batch.inputs), batch.targets).backward()  # type: ignore[arg-type]
    for name, own in codebooks(module).items():
        gradient = plain.get_parameter(name).grad
        assert gradient is not None
        assert own.entries.grad is not None
        for code in range(1, len(own.entries)):
            torch.testing.assert_close(own.entries.grad[code], gradient[own.codes == code].sum(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("first", ["prune", "share"])
def test_masks_and_codebooks_hold_whichever_comes_first(context: Context, first: str) -> None:
    prune = Prune(sparsity=0.8)
    if first == "prune":
        PruneTechnique().apply(prune, context)
        share(context, entries=8, training=BRIEF)
    else:
        share(context, entries=8)
        PruneTechnique().apply(prune, context)
    FinetuneTechnique().apply(Finetune(training=BRIEF), context)
    state = baked(context.model.module).state_dict()
    for name, mask in masks(context.model.module).items():
        assert not state[name][~mask].any()
    assert sum(int((value == 0).sum()) for value in state.values() if value.ndim > 1) >= round(0.8 * 6_464)
    assert max(distinct(context)) <= 8


def test_each_group_of_outputs_has_a_codebook_of_its_own(context: Context) -> None:
    share(context, entries=4, groups=8)
    weight = baked(context.model.module).state_dict()["0.weight"]
    for rows in weight.tensor_split(8):
        assert len(torch.unique(rows)) <= 4
    assert len(torch.unique(weight)) > 8


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_every_kind(kind: str, tmp_path: Path) -> None:
    make, inputs = KINDS[kind]
    torch.manual_seed(0)
    data = memory_data({"train": (inputs, torch.arange(len(inputs)) % 4)})
    context = context_for(tiny_model(make(), shape=tuple(inputs.shape[1:]), classes=4), data, tmp_path)
    PruneTechnique().apply(Prune(sparsity=0.5), context)
    share(context, entries=4, groups=2, training=Training(steps=3))
    assert max(distinct(context)) <= 8


def test_biases_can_share_values_too(context: Context) -> None:
    with torch.no_grad():
        context.model.module.get_parameter("0.bias")[:5] = 0.0
    before = accuracy(context)
    share(context, entries=8, biases=True, training=BRIEF)
    state = baked(context.model.module).state_dict()
    for name in ("0.bias", "2.bias", "4.bias"):
        assert len(torch.unique(state[name][state[name] != 0])) <= 8
        assert int((state[name] == 0).sum()) == (5 if name == "0.bias" else 0)
    assert not state["0.bias"][:5].any()
    assert accuracy(context) > before - 0.2


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_entries_and_biases_are_rounded_to_what_was_asked(context: Context, precision: str) -> None:
    share(context, entries=8, precision=precision, training=BRIEF)
    dtype = getattr(torch, precision)
    for value in baked(context.model.module).state_dict().values():
        assert torch.equal(value, value.to(dtype).float())


def test_it_makes_the_packed_file_small(context: Context) -> None:
    PruneTechnique().apply(Prune(sparsity=0.9), context)
    dense = packed(baked(context.model.module).state_dict())[1]
    share(context, entries=8, entropy_weight=0.05, precision="float16")
    coded = packed(baked(context.model.module).state_dict())[1]
    assert coded.values < 0.15 * dense.values
    assert coded.biases < 0.65 * dense.biases
    assert coded.positions == pytest.approx(dense.positions, rel=0.01)
