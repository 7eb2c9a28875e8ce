"""The file: magic, version, digest, and four parts. See docs/packed.md."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from math import prod

import numpy as np
from numpy.typing import NDArray

from app.contract.packed import positions, values
from app.contract.packed.coder import Decoder
from app.contract.packed.draft import Draft, Source
from app.contract.packed.sizes import Sizes
from app.contract.packed.stored import DTYPES, WORDS, Stored
from app.contract.packed.wire import Damaged, Reader, Writer

MAGIC = b"TSR"
VERSION = 1
DIGEST = 8  # bytes of the SHA-256 of all that follows: against damage, not against forgery
BARE, SAME, CODED = range(3)
MAX_BYTES = 4 << 30  # of all tensors together, unless the caller allows more
MAX_NAMES_BYTES = 1 << 24
MAX_TENSORS = 1 << 18
MAX_NAME = 1024
MAX_DIMENSIONS = 16
MAX_PART = 1 << 40

# Where most elements are not zero, zero may be a value like others: as short where nothing is known of its places, and
# decoded in half the time.
FEW_ZEROS = 0.4
SOONER = 1.002

_NAMES = tuple(DTYPES)


def pack(tensors: Mapping[str, Stored]) -> tuple[bytes, Sizes]:
    """The file of these tensors, and what its bytes are for."""
    names, whole, sizes = Writer(), Draft(), Sizes()
    earlier: dict[tuple[str, tuple[int, ...], bytes], int] = {}
    for place, (name, tensor) in enumerate(tensors.items()):
        _write_name(name, tensor, names)
        key = (tensor.dtype, tensor.shape, hashlib.sha256(tensor.words.tobytes()).digest())
        before = whole.bits
        same = earlier.setdefault(key, place)
        if same < place:
            whole.header.raw(bytes([SAME]))
            whole.header.number(same)
        else:
            whole.extend(_shortest(tensor, sizes))
        sizes.tensors[name] = (whole.bits - before) / 8
    data = _file(tensors, bytes(names.data), whole)
    sizes.total = len(data)
    return data, sizes


def unpack(data: bytes | memoryview, max_bytes: int = MAX_BYTES) -> dict[str, Stored]:
    """The tensors of a file, bit for bit.

    Raises Damaged, with a sentence, for whatever is no such file, was damaged, or holds more than `max_bytes`; not
    before that is known is memory taken for them.
    """
    view = memoryview(data)
    if bytes(view[:3]) != MAGIC:
        raise Damaged("This is no packed artifact: its first bytes are not TSR.")
    if len(view) < 4 + DIGEST:
        raise Damaged("The file ends within its first bytes. Fetch it again.")
    if view[3] != VERSION:
        raise Damaged(f"The file is of version {view[3]} of the format, and this Tersor reads {VERSION}. Upgrade it.")
    body = view[4 + DIGEST :]
    if hashlib.sha256(body).digest()[:DIGEST] != view[4 : 4 + DIGEST]:
        raise Damaged("The file's digest is not that of its bytes: it was damaged on its way. Fetch it again.")
    return _unpack(Reader(body), max_bytes)


def _file(tensors: Mapping[str, Stored], names: bytes, whole: Draft) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    deflated = deflate.compress(names) + deflate.flush()
    parts = [deflated, bytes(whole.header.data), bytes(whole.bare.data), whole.coded.finish()]
    body = Writer()
    body.number(sum(tensor.nbytes for tensor in tensors.values()))
    body.number(len(tensors))
    body.number(len(names))
    for part in parts[:-1]:
        body.number(len(part))
    for part in parts:
        body.raw(part)
    return MAGIC + bytes([VERSION]) + hashlib.sha256(body.data).digest()[:DIGEST] + bytes(body.data)


def _unpack(body: Reader, max_bytes: int) -> dict[str, Stored]:
    stated = body.number(MAX_PART)
    if stated > max_bytes:
        raise Damaged(
            f"The file states {stated:,} bytes of tensors, and {max_bytes:,} are allowed. Allow more (max_bytes) if "
            "it is what you expect."
        )
    count, names_bytes = body.number(MAX_TENSORS), body.number(MAX_NAMES_BYTES)
    lengths = [body.number(MAX_PART) for _ in range(3)]
    deflated, header, bare = (body.raw(length) for length in lengths)
    described = _read_names(_inflated(deflated, names_bytes), count)
    if sum(prod(shape) * DTYPES[dtype] for _, dtype, shape in described) != stated:
        raise Damaged("The tensors of the file are not as large as it states. It is damaged: fetch it again.")
    source = Source(Reader(header), Reader(bare), Decoder(body.raw(body.left)))
    found: list[Stored] = []
    for _, dtype, shape in described:
        found.append(_read_tensor(dtype, shape, source, found))
    source.coded.finish()
    if source.header.left or source.bare.left:
        raise Damaged("Bytes are left over at the end of a part. The file is damaged: fetch it again.")
    return dict(zip((name for name, _, _ in described), found, strict=True))


def _inflated(data: memoryview, size: int) -> bytes:
    inflate = zlib.decompressobj(-15)
    try:
        names = inflate.decompress(data, size + 1)
    except zlib.error:
        names = b""
    if len(names) != size or not inflate.eof or inflate.unused_data:
        raise Damaged("The names of the tensors cannot be read. The file is damaged: fetch it again.")
    return names


def _write_name(name: str, tensor: Stored, names: Writer) -> None:
    if len(name.encode()) > MAX_NAME or not _shaped(tensor.shape):
        raise ValueError(f"{name[:80]!r} is too long a name, or has too many or too large dimensions, to be packed")
    names.string(name)
    names.raw(bytes([_NAMES.index(tensor.dtype), len(tensor.shape)]))
    for side in tensor.shape:
        names.number(side)


def _shaped(shape: tuple[int, ...]) -> bool:
    """Whether arrays can have such a shape: where one side is zero the others could be anything."""
    return len(shape) <= MAX_DIMENSIONS and prod(max(side, 1) for side in shape) <= MAX_PART


def _read_names(names: bytes, count: int) -> list[tuple[str, str, tuple[int, ...]]]:
    reader = Reader(names)
    found = []
    for _ in range(count):
        name, dtype, dimensions = reader.string(MAX_NAME), reader.byte(), reader.byte()
        if dtype >= len(_NAMES) or dimensions > MAX_DIMENSIONS:
            raise Damaged(f"{name!r} is of a kind that this version does not know, or the file is damaged.")
        shape = tuple(reader.number(MAX_PART) for _ in range(dimensions))
        if not _shaped(shape):
            raise Damaged(f"{name!r} has a shape that no tensor has. The file is damaged: fetch it again.")
        found.append((name, _NAMES[dtype], shape))
    if reader.left or len({name for name, _, _ in found}) != count:
        raise Damaged("The names of the tensors are damaged: fetch the file again.")
    return found


def _shortest(tensor: Stored, sizes: Sizes) -> Draft:
    """Coded, or as it is where that is no longer. Adds to the sizes."""
    mask = tensor.words.reshape(tensor.shape) != 0
    draft, places, codebook = _coded(tensor, mask)
    if FEW_ZEROS * mask.size < mask.sum() < mask.size:
        plain, few, other = _coded(tensor, np.ones_like(mask))
        if plain.bits < SOONER * draft.bits:
            draft, places, codebook = plain, few, other
    if draft.bits >= 8 * (1 + tensor.nbytes):
        draft, places, codebook = Draft(), 8.0, 0.0
        draft.header.raw(bytes([BARE]))
        draft.bare.raw(tensor.tobytes())
    if len(tensor.shape) < 2:
        sizes.biases += draft.bits / 8
    else:
        sizes.positions += places / 8
        sizes.codebooks += codebook / 8
        sizes.values += (draft.bits - places - codebook) / 8
    return draft


def _coded(tensor: Stored, mask: NDArray[np.bool_]) -> tuple[Draft, float, float]:
    """Positions and values; with how many bits are for positions, and how many for a codebook."""
    draft = Draft()
    draft.header.raw(bytes([CODED]))
    kept = positions.write(mask, draft)
    places = draft.bits
    codebook = values.write(tensor.words[kept.reshape(-1)], tensor.dtype, draft, kept) if kept.any() else 0.0
    return draft, places, codebook


def _read_tensor(dtype: str, shape: tuple[int, ...], source: Source, earlier: list[Stored]) -> Stored:
    word = WORDS[DTYPES[dtype]]
    count = prod(shape)
    kind = source.header.byte()
    if kind == BARE:
        bare = source.bare.raw(count * DTYPES[dtype])
        return Stored(dtype, shape, np.frombuffer(bare, np.dtype(word).newbyteorder("<")).astype(word))
    if kind == SAME:
        place = source.header.number(MAX_TENSORS)
        if place >= len(earlier) or (earlier[place].dtype, earlier[place].shape) != (dtype, shape):
            raise Damaged("A tensor is said to be like another that it is not like. The file is damaged.")
        return Stored(dtype, shape, earlier[place].words.copy())
    if kind != CODED:
        raise Damaged("A tensor is written in a way that this version does not know, or the file is damaged.")
    mask = positions.read(shape, source).reshape(-1)
    kept = int(mask.sum())
    if kept == count and count:
        return Stored(dtype, shape, values.read(count, dtype, source, mask))
    words = np.zeros(count, word)
    if kept:
        words[mask] = values.read(kept, dtype, source, mask)
    return Stored(dtype, shape, words)
