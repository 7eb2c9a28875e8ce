from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.contract.packed import Stored, pack, unpack
from app.contract.packed.stored import floats_of, words_of_floats
from tests.contract.packed.made import networks, on_a_grid, tensors

GOLDEN = Path(__file__).parent / "golden"


def same(one: dict[str, Stored], other: dict[str, Stored]) -> bool:
    return list(one) == list(other) and all(
        (a.dtype, a.shape, a.words.tobytes()) == (b.dtype, b.shape, b.words.tobytes())
        for a, b in zip(one.values(), other.values(), strict=True)
    )


@settings(max_examples=400, deadline=None)
@given(st.lists(tensors(), max_size=4))
def test_what_is_packed_comes_back_bit_for_bit(made: list[Stored]) -> None:
    network = {f"layer.{number}": tensor for number, tensor in enumerate(made)}
    data, sizes = pack(network)
    assert same(unpack(data), network)
    assert sizes.total == len(data)
    assert sizes.header > 0
    assert sum(sizes.tensors.values()) <= len(data)


def test_a_golden_file_of_version_1_decodes_for_ever() -> None:
    assert same(unpack((GOLDEN / "version-1.tsr").read_bytes()), networks())


def entropy(counts: np.ndarray) -> float:
    """Bytes of symbols that occur so often, by Shannon 1948."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(counts[counts > 0] * np.log2(shares)).sum() / 8)


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("entries", [2, 8, 32, 256])
def test_sparse_codebooks_take_three_percent_more_than_their_entropy_at_most(density: float, entries: int) -> None:
    random = np.random.default_rng(entries)
    book = random.normal(size=entries).astype(np.float32)
    values = book[random.choice(entries, (512, 1024), p=random.dirichlet(np.ones(entries)))]
    weight = np.where(random.random(values.shape) < density, values, np.float32(0))
    nonzero = weight[weight != 0]
    least = entropy(np.array([nonzero.size, weight.size - nonzero.size]))
    least += entropy(np.unique(nonzero, return_counts=True)[1])
    data, sizes = pack({"weight": Stored.of(weight)})
    assert len(data) <= 1.03 * least + 5 * entries + 64
    assert sizes.positions + sizes.values <= 1.03 * least + 8


def test_n_of_m_takes_the_logarithm_of_its_patterns() -> None:
    random = np.random.default_rng(0)
    groups = random.normal(size=(1 << 14, 4)).astype(np.float32)
    np.put_along_axis(groups, np.argsort(random.random(groups.shape), 1)[:, :2], 0, 1)
    sizes = pack({"weight": Stored.of(groups.reshape(256, 256))})[1]
    assert sizes.positions == pytest.approx(np.log2(6) * len(groups) / 8, rel=0.001, abs=8)


def test_blocks_take_one_bit_or_less_each() -> None:
    random = np.random.default_rng(0)
    blocks = random.random((64, 64)) < 0.25
    weight = np.where(np.repeat(np.repeat(blocks, 4, 0), 4, 1), random.normal(size=(256, 256)), 0.0)
    sizes = pack({"weight": Stored.of(weight.astype(np.float32))})[1]
    assert sizes.positions <= 1.03 * entropy(np.bincount(blocks.reshape(-1))) + 8


def test_dead_rows_and_columns_are_left_out() -> None:
    random = np.random.default_rng(0)
    alive = np.ix_(random.random(300) < 0.3, random.random(784) < 0.3)
    mask = np.zeros((300, 784), bool)
    mask[alive] = random.random(mask[alive].shape) < 0.2
    sizes = pack({"weight": Stored.of(mask.astype(np.float32))})[1]
    inside = entropy(np.bincount(mask[alive].reshape(-1)))
    around = entropy(np.bincount(mask.any(1))) + entropy(np.bincount(mask.any(0)))
    assert sizes.positions <= 1.03 * (inside + around) + 16
    assert sizes.positions < 0.6 * entropy(np.bincount(mask.reshape(-1)))


def test_a_tensor_that_is_there_twice_is_written_once() -> None:
    tensor = Stored.of(np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32))
    once, twice = pack({"a": tensor})[0], pack({"a": tensor, "b": tensor})[0]
    assert len(twice) < len(once) + 32


def test_noise_takes_no_more_than_its_bytes() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 1 << 16, np.uint8)
    assert len(pack({"noise": Stored.of(noise)})[0]) < noise.nbytes + 64


def test_float32_that_float16_holds_is_written_as_that() -> None:
    exact = np.random.default_rng(0).normal(size=4096).astype(np.float16)
    narrow = pack({"bias": Stored.of(exact.astype(np.float32))})[0]
    assert len(narrow) == pytest.approx(len(pack({"bias": Stored.of(exact)})[0]), abs=8)


@pytest.mark.parametrize(("length", "most"), [(1 << 18, 127), (512, 127), (512, 7), (128, 7), (32, 7)])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_what_was_rounded_to_eight_or_four_bits_takes_no_more(length: int, most: int, density: float) -> None:
    """Floats on a grid: their whole numbers, a step for each run, and nothing of what float32 makes of them."""
    random = np.random.RandomState(length)
    weight = np.where(random.rand(512, 512) < density, on_a_grid(random, (512, 512), length, most), np.float32(0))
    tops = np.abs(weight.reshape(-1, length)).max(1, keepdims=True).clip(1e-9)
    codes = np.rint(weight.reshape(-1, length) / tops * most)
    kept = weight != 0
    least = entropy(np.bincount((codes[kept.reshape(codes.shape)] + most).astype(int)))
    least += 4 * len(tops)
    least += entropy(np.bincount(kept.reshape(-1)))
    data, _ = pack({"weight": Stored.of(weight)})
    assert len(data) <= 1.03 * least + 5 * most + 64
    assert same(unpack(data), {"weight": Stored.of(weight)})


@pytest.mark.parametrize(
    ("dtype", "most"), [("F32", 1), ("F32", 127), ("F16", 1), ("F16", 7), ("F16", 127), ("BF16", 1), ("BF16", 7)]
)
def test_grids_are_found_in_every_float(dtype: str, most: int) -> None:
    """Although the dtype has rounded what a whole number times its step is."""
    random = np.random.RandomState(most)
    exact = on_a_grid(random, (256, 512), 64, most)
    weight = Stored(dtype, (256, 512), words_of_floats(exact.reshape(-1), dtype))
    codes = np.rint(exact.reshape(-1, 64) / np.abs(exact.reshape(-1, 64)).max(1, keepdims=True) * most)
    least = entropy(np.bincount((codes.reshape(-1) + most).astype(int))) + 4 * exact.size / 64
    data, _ = pack({"weight": weight})
    assert len(data) <= 1.03 * least + 5 * most + 64
    assert same(unpack(data), {"weight": weight})


def test_rounding_to_bfloat16_is_that_of_torch() -> None:
    values = np.random.default_rng(0).normal(size=1 << 16).astype(np.float32)
    values[:4] = [3.4e38, 1e-40, -0.0, np.inf]
    words = words_of_floats(values, "BF16")
    assert np.array_equal(words, torch.from_numpy(values).bfloat16().view(torch.uint16).numpy())
    assert np.array_equal(floats_of(words, "BF16"), torch.from_numpy(values).bfloat16().float().numpy())


def test_a_zero_point_and_negative_zeros_are_on_a_grid() -> None:
    random = np.random.default_rng(0)
    weight = (random.integers(-20, 235, (64, 256)) * np.float32(0.0123)).astype(np.float32)
    weight[random.random(weight.shape) < 0.01] = -0.0
    data, _ = pack({"weight": Stored.of(weight)})
    assert len(data) < 1.01 * weight.size + 1024
    assert same(unpack(data), {"weight": Stored.of(weight)})


@pytest.mark.parametrize("kept", [2, 6, 14, 24, 30, 96])
@pytest.mark.parametrize("shape", [(256, 256), (20, 128), (192, 96)])
def test_blocks_are_in_no_other_blocks(shape: tuple[int, int], kept: int) -> None:
    """Masks whose blocks have a pattern again: every second column, the first ones, rows of rows."""
    noise = np.random.default_rng(kept).integers(1, 255, shape, np.uint8)
    places = np.arange(shape[1])
    for columns in (places % 2 == 0, places >= kept, places // kept % 2 == 0):
        network = {"weight": Stored.of(noise * columns), "other": Stored.of((noise * columns).T.copy())}
        assert same(unpack(pack(network)[0]), network)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_say_nothing_of_a_grid(zero: float) -> None:
    """Dead columns beside weights on one, and beside weights on none."""
    random = np.random.RandomState(3)
    for weight in (on_a_grid(random, (64, 256), 256, 127), random.standard_normal((64, 256)).astype(np.float32)):
        weight[:, ::2] = zero
        weight[3] = zero
        assert same(unpack(pack({"w": Stored.of(weight)})[0]), {"w": Stored.of(weight)})


@pytest.mark.parametrize("shape", [(0, 1 << 40, 1 << 40), (1 << 41, 0), (1 << 31, 0, 1 << 31)])
def test_shapes_that_no_array_has_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="too large dimensions"):
        pack({"nothing": Stored("F32", shape, np.zeros(0, np.uint32))})


def test_the_sizes_add_up() -> None:
    data, sizes = pack(networks())
    assert sizes.positions + sizes.values + sizes.codebooks + sizes.biases + sizes.header == pytest.approx(len(data))
    assert min(sizes.positions, sizes.values, sizes.codebooks, sizes.biases, sizes.header) > 0
