"""Tensors of every kind that a packed file is for."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from app.contract.packed import Stored
from app.contract.packed.stored import DTYPES, WORDS, words_of_floats

Array = NDArray[np.generic]


@st.composite
def tensors(draw: st.DrawFn) -> Stored:
    """Any dtype and shape; dense, sparse, few values, n:m, blocks, dead rows, or nothing but noise."""
    dtype = draw(st.sampled_from(list(DTYPES)))
    shape = draw(
        st.sampled_from([(), (0,), (3, 0), (1,), (7,), (40,), (6, 8), (16, 32), (5, 3, 3, 3), (8, 4, 5), (33, 9)])
    )
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    count = int(np.prod(shape))
    word = WORDS[DTYPES[dtype]]
    words = random.integers(0, np.iinfo(word).max, count, word, endpoint=True)
    if draw(st.booleans()):  # few values
        words = random.choice(random.integers(0, 256, draw(st.integers(1, 20)), np.uint8), count).astype(word)
    if draw(st.booleans()) and dtype == "F32":
        words = random.normal(size=count).astype(draw(st.sampled_from([np.float16, np.float32]))).astype(np.float32)
        words = words.view(np.uint32)
    if draw(st.booleans()) and dtype in ("F32", "F16", "BF16") and count:
        most, length = (
            draw(st.sampled_from([7, 127, 255])),
            draw(st.sampled_from([count, count // max(1, shape[0] if shape else 1)])),
        )
        words = words_of_floats(on_a_grid(np.random.RandomState(seed), shape, length, most).reshape(-1), dtype)
    return Stored(dtype, shape, words * mask(draw, shape, random).reshape(-1).astype(word))


def mask(draw: st.DrawFn, shape: tuple[int, ...], random: np.random.Generator) -> NDArray[np.bool_]:
    density = draw(st.sampled_from([0.0, 0.02, 0.3, 0.9, 1.0]))
    whole = random.random(shape) < density
    match draw(st.sampled_from(["random", "rows", "blocks", "groups"])):
        case "rows" if len(shape) > 1:
            whole = whole & (random.random(shape[0]) < 0.5).reshape(-1, *[1] * (len(shape) - 1))
        case "blocks" if shape in ((16, 32), (8, 4, 5)):
            small = whole[: shape[0] // 4, : shape[1] // 4]
            whole = np.repeat(np.repeat(small, 4, 0), 4, 1)
        case "groups" if shape == (16, 32):
            order = np.argsort(random.random((16, 8, 4)), -1)
            whole = (order < 2).reshape(shape)
    return np.asarray(whole)


def on_a_grid(random: np.random.RandomState, shape: tuple[int, ...], length: int, most: int) -> NDArray[np.float32]:
    """Normal numbers rounded to whole ones, -most to most, times a step for each `length` of them."""
    runs = random.standard_normal(shape or 1).astype(np.float32).reshape(-1, length)
    steps = np.abs(runs).max(1, keepdims=True) / np.float32(most)
    return (np.rint(runs / steps) * steps + np.float32(0)).reshape(shape)  # without -0.0


def networks() -> dict[str, Stored]:
    """A small network with all that there is in it; the same for ever."""
    random = np.random.RandomState(5)  # its numbers are frozen
    sparse = np.where(random.rand(12, 20) < 0.2, random.randn(12, 20), 0.0).astype(np.float32)
    few = np.array([0, -0.5, 0.25, 1.75], np.float32)[random.randint(0, 4, (10, 3, 3, 3))]
    half = random.randn(16, 16).astype(np.float16)
    groups = random.randn(8, 16).astype(np.float32)
    groups.reshape(-1, 4)[:, :2] = 0
    kept = np.repeat(np.repeat(random.rand(4, 4) < 0.5, 4, 0), 4, 1)
    blocks = np.where(kept, random.randn(16, 16), 0.0).astype(np.float32)
    return {
        "sparse.weight": Stored.of(sparse),
        "sparse.bias": Stored.of(random.randn(12).astype(np.float16).astype(np.float32)),
        "few.weight": Stored.of(few),
        "half.weight": Stored.of(half),
        "brain.weight": Stored(
            "BF16", (4, 4), (random.randn(16).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        ),
        "groups.weight": Stored.of(groups),
        "blocks.weight": Stored.of(blocks),
        "eight.weight": Stored.of(random.randint(-127, 128, (16, 24)).astype(np.int8)),
        "four.weight": Stored.of(random.randint(-8, 8, (16, 24)).astype(np.int8)),
        "again.weight": Stored.of(sparse),
        "signed.weight": Stored.of(np.where(random.rand(20, 20) < 0.5, 0.0, -0.0)),
        "dead.weight": Stored.of(np.zeros((30, 30), np.float32)),
        "steps": Stored.of(np.array(1234, np.int64)),
        "none": Stored.of(np.zeros((0, 3), np.float64)),
        "rows.weight": Stored.of(on_a_grid(random, (12, 40), 40, 127)),
        "brain-runs.weight": Stored(
            "BF16", (8, 64), words_of_floats(on_a_grid(random, (8, 64), 32, 7).reshape(-1), "BF16")
        ),
        "runs.weight": Stored.of(np.where(random.rand(8, 64) < 0.5, on_a_grid(random, (8, 64), 32, 7), np.float32(0))),
    }
