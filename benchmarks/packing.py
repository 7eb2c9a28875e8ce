"""The packed artifact: bytes beside the entropy and zstd, and decoding

Tensors as steps leave them: random values in the patterns that the format is for, 4 million weights each. The entropy
is Shannon's of the bitmap and of the values that are not zero, as if nothing were known of where they lie. zstd is
level 19 on the dense bytes, and on a byte a weight where the values are few. Decoding: one thread, MB of dense output.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
import zstandard

from app.contract.packed import Stored, pack, unpack
from benchmarks.harness import seconds, table, where

SIDE = 2048
ROUNDS = 5

Array = np.ndarray


def made() -> dict[str, Array]:
    """Weights by what they are called."""
    random = np.random.default_rng(0)
    normal = (random.normal(size=(SIDE, SIDE)) * 0.02).astype(np.float32)
    book = random.normal(size=16).astype(np.float32)
    shared = book[random.choice(16, normal.shape, p=random.dirichlet(np.ones(16)))]
    groups = normal.reshape(-1, 4).copy()
    np.put_along_axis(groups, np.argsort(np.abs(groups), 1)[:, :2], 0, 1)
    blocks = np.repeat(np.repeat(random.random((SIDE // 4, SIDE // 4)) < 0.1, 4, 0), 4, 1)
    rows, columns = random.random(SIDE) ** 4, random.random(SIDE) ** 4
    uneven = np.outer(rows, columns)
    alive = random.random(normal.shape) < uneven * (0.02 / uneven.mean())
    return {
        "dense float32": normal,
        "dense bfloat16 in float32": (normal.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32),
        "codebook of 16": shared,
        "codebook of 16, 90 % zero": np.where(random.random(normal.shape) < 0.1, shared, np.float32(0)),
        "codebook of 16, 98 % zero": np.where(random.random(normal.shape) < 0.02, shared, np.float32(0)),
        "codebook of 16, 98 % zero, uneven rows and columns": np.where(alive, shared, np.float32(0)),
        "2:4 float32": groups.reshape(normal.shape),
        "4x4 blocks of float32, 90 % zero": np.where(blocks, normal, np.float32(0)),
        "int8": np.clip(np.rint(normal * 1500), -127, 127).astype(np.int8),
        "int4 (as int8)": np.clip(np.rint(normal * 120), -8, 7).astype(np.int8),
        "float32 rounded to 8 bits, a step a row": rounded(normal, SIDE, 127),
        "float32 rounded to 4 bits, a step for 128": rounded(normal, 128, 7),
    }


def rounded(weights: Array, length: int, most: int) -> Array:
    """Whole numbers, -most to most, times a step for each `length` weights."""
    runs = weights.reshape(-1, length)
    steps = np.abs(runs).max(1, keepdims=True) / np.float32(most)
    return (np.rint(runs / steps) * steps + np.float32(0)).reshape(weights.shape)


def entropy(weights: Array) -> float:
    """Bytes."""
    flat = weights.reshape(-1)
    nonzero = flat[flat != 0]
    return (
        _bits(np.array([nonzero.size, flat.size - nonzero.size])) / 8
        + _bits(np.unique(nonzero, return_counts=True)[1]) / 8
    )


def _bits(counts: Array) -> float:
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def zstd(weights: Array) -> int:
    """Bytes, of the better way."""
    ways = [weights.tobytes()]
    values, places = np.unique(weights, return_inverse=True)
    if len(values) <= 256:
        ways.append(places.astype(np.uint8).tobytes())
    return min(len(zstandard.compress(way, 19)) for way in ways)


def speed(action: Callable[[], object], size: int) -> float:
    """Megabytes of output a second, the median."""
    return size / statistics.median(seconds(action) for _ in range(ROUNDS)) / 1e6


def main() -> None:
    """The table."""
    rows = []
    for name, weights in made().items():
        data = pack({"weight": Stored.of(weights)})[0]
        assert unpack(data)["weight"].words.tobytes() == weights.tobytes()
        least, other = entropy(weights), zstd(weights)
        known = len(np.unique(weights)) < weights.size // 10  # else it is the entropy of this sample and no more
        rows.append(
            [
                name,
                f"{weights.nbytes:,}",
                f"{len(data):,}",
                f"{len(data) / least:.4f}" if known else "-",
                f"{other:,}",
                f"{len(data) / other:.2f}",
                f"{speed(lambda data=data: unpack(data), weights.nbytes):.0f}",  # type: ignore[misc]
            ]
        )
    table(["weights", "dense bytes", "packed", "/ entropy", "zstd", "packed / zstd", "decoding, MB/s"], rows)
    where("constriction", "numpy", "zstandard")
