"""Files that are no packed artifacts any more: refused with a sentence, and never more memory than they may have."""

from __future__ import annotations

import hashlib
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest

from app.contract.packed import Damaged, Stored, pack, unpack
from app.contract.packed.wire import Writer
from tests.contract.packed.made import networks
from tests.contract.packed.test_packed import same

HEAD = 12  # magic, version, digest
MUTATIONS = 10_000
LIMIT = 1 << 20


def sealed(body: bytes) -> bytes:
    """With the digest that it should have."""
    return b"TSR\x01" + hashlib.sha256(body).digest()[:8] + body


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """Bytes changed, cut out, doubled, or put in."""
    changed = bytearray(data)
    for _ in range(random.integers(1, 4)):
        at = int(random.integers(len(changed)))
        match random.integers(5):
            case 0:
                changed[at] ^= 1 << random.integers(8)
            case 1:
                changed[at] = random.choice([0, 1, 0x7F, 0x80, 0xFF])
            case 2:
                del changed[at : at + int(random.integers(1, 9))]
            case 3:
                changed[at:at] = random.bytes(int(random.integers(1, 9)))
            case _:
                changed[at:at] = changed[at : at + int(random.integers(1, 40))]
    return bytes(changed)


def mutations(data: bytes) -> Iterator[bytes]:
    random = np.random.default_rng(11)
    return (mutated(data, random) for _ in range(MUTATIONS // 2))


def test_mutated_files_are_refused_or_equal() -> None:
    data = pack(networks())[0]
    for changed in mutations(data):
        if changed != data:
            with pytest.raises(Damaged):
                unpack(changed)


def test_mutated_files_with_a_right_digest_never_crash() -> None:
    """Whoever forges a file can forge its digest."""
    data = pack(networks())[0]
    passed = 0
    for body in mutations(data[HEAD:]):
        try:
            found = unpack(sealed(body), LIMIT)
        except Damaged:
            continue
        passed += 1
        assert sum(tensor.nbytes for tensor in found.values()) <= LIMIT
    assert passed < MUTATIONS // 10


def test_a_good_file_passes() -> None:
    assert same(unpack(sealed(pack(networks())[0][HEAD:])), networks())


def test_every_cut_is_refused() -> None:
    data = pack(networks())[0]
    for length in range(len(data)):
        with pytest.raises(Damaged):
            unpack(data[:length])
        with suppress(Damaged):  # a forged digest may pass, but it gives no more and no less
            assert list(unpack(sealed(data[HEAD:length]))) == list(networks())


def claiming(stated: int, shape: tuple[int, ...]) -> bytes:
    """A file of one tensor of zeros, of any shape, that says how large it is."""
    names, body = Writer(), Writer()
    names.string("w")
    names.raw(bytes([9, len(shape)]))
    for side in shape:
        names.number(side)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    deflated = deflate.compress(bytes(names.data)) + deflate.flush()
    for number in (stated, 1, len(names.data), len(deflated), 2, 0):
        body.number(number)
    body.raw(deflated + bytes([2, 1]))
    return sealed(bytes(body.data))


def test_zeros_of_the_stated_size_pass() -> None:
    assert not unpack(claiming(4 * 1000 * 1000, (1000, 1000)))["w"].words.any()


@pytest.mark.parametrize("shape", [(1 << 20, 1 << 20), (1 << 39,), (1 << 40, 1 << 40, 0, 5), (1000, 1001)])
def test_a_tensor_that_is_larger_than_stated_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(Damaged, match=r"not as large as it states|a shape that no tensor has"):
        unpack(claiming(4 * 1000 * 1000, shape))


def test_more_than_is_allowed_is_refused_before_it_is_taken() -> None:
    with pytest.raises(Damaged, match=r"1,099,511,627,776 bytes of tensors, and 4,294,967,296 are allowed"):
        unpack(claiming(1 << 40, (1 << 38,)))
    with pytest.raises(Damaged, match="and 1,000 are allowed"):
        unpack(pack({"w": Stored.of(np.ones(1000, np.float32))})[0], 1000)


@pytest.mark.parametrize("kind", ["sparse", "groups", "dense", "zeros"])
def test_unpacking_takes_little_beside_the_tensors_themselves(kind: str) -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(2048, 1024)).astype(np.float32)
    match kind:
        case "sparse":
            weight = np.where(random.random(weight.shape) < 0.1, np.float32(0.5), np.float32(0))
        case "groups":
            np.put_along_axis(weight.reshape(-1, 4), np.argsort(random.random((1 << 19, 4)), 1)[:, :2], 0, 1)
        case "zeros":
            weight = np.zeros((4096, 4096), np.float32)
    data = pack({"w": Stored.of(weight)})[0]
    tracemalloc.start()
    unpack(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * weight.nbytes + len(data) + (24 << 20)  # CHUNK symbols at a time


def test_names_that_inflate_without_end_are_refused() -> None:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = deflate.compress(bytes(1 << 26)) + deflate.flush()
    body = Writer()
    for number in (0, 1, 100, len(bomb), 0, 0):
        body.number(number)
    body.raw(bomb)
    with pytest.raises(Damaged, match="names"):
        unpack(sealed(bytes(body.data)))


def test_other_files_and_versions_are_named() -> None:
    with pytest.raises(Damaged, match="no packed artifact"):
        unpack(b"PK\x03\x04 and so on")
    with pytest.raises(Damaged, match="no packed artifact"):
        unpack(b"")
    with pytest.raises(Damaged, match=r"version 9 .* reads 1"):
        unpack(b"TSR\x09" + bytes(40))
