"""Families of data: archives that lead out or unpack without end, pictures, arrays, sounds, tables, text."""

from __future__ import annotations

import functools
import gzip
import io
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from safetensors.numpy import save

from tests.hostile.member import Member, data, touching
from tests.worker.data import test_parquet as parquet
from tests.worker.data import test_webdataset as webdataset
from tests.worker.data.files import flac, jsonl, png, raw_wav, table, wav
from tests.worker.data.test_arrays import header, npz
from tests.worker.data.test_folders import png_of
from tests.worker.loading.files import Bomb, tarred, zipped
from tests.worker.vetting.test_archive import NAMES, tar_member, zip_entry

PICTURE = png()


def traversal() -> Iterator[Member]:
    """Names that lead out of an archive, in zip, tar and tar.gz."""
    packs = {"zip": zipped, "tar": webdataset.shard, "tar.gz": tarred}
    for kind, pack in packs.items():
        for name, says in NAMES.items():
            content = functools.partial(pack, {"train/a/1.png": PICTURE, name: PICTURE})
            yield data(f"{name[:20]!r} in {kind}", content, says, f"data.{kind}")


def links() -> Iterator[Member]:
    """Links and devices."""
    kinds = {
        "symlink": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        "symlink to a folder above": {"type": tarfile.SYMTYPE, "linkname": "../.."},
        "hard link": {"type": tarfile.LNKTYPE, "linkname": "../../etc/passwd"},
        "character device": {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3},
        "block device": {"type": tarfile.BLKTYPE, "devmajor": 8, "devminor": 0},
        "pipe": {"type": tarfile.FIFOTYPE},
        "sparse": {"type": tarfile.GNUTYPE_SPARSE},
    }
    for name, fields in kinds.items():
        yield data(f"{name} in a tar", functools.partial(tar_member, **fields), "a link or a device|cut short", "d.tar")
    yield data("symlink in a zip", lambda: zip_entry(b"/etc/passwd", external_attr=0o120777 << 16), "'member', a link")
    for name, (content, says) in webdataset.HOSTILE.items():
        yield data(f"shard: {name}", functools.partial(bytes, content), says, "train-000000.tar")


def archive_bombs() -> Iterator[Member]:
    """Archives that unpack to far more than came, or to far more files."""
    zeros = bytes(300 << 20)
    yield data("300 MB of zeros in a zip", lambda: zipped({"train/a/x.png": zeros}), "zip bomb")
    yield data("300 MB of zeros in a tar.gz", lambda: tarred({"train/a/x.png": zeros}), "zip bomb", "data.tar.gz")
    yield data("a tar header of 200 MB", _header_bomb, "zip bomb|header of more", "data.tar.gz")
    yield data("overlapping entries", _overlapping, "zip bomb|damaged|overlap|readable picture|unpack")
    yield data("200,000 files in a zip", lambda: _many(200_000), "more than 100000 files")
    yield data("a zip in a zip in a zip", lambda: zipped({"a.zip": zipped({"b.zip": zipped({"c": b""})})}), "holds no")
    yield data("a gzip of a gzip", lambda: gzip.compress(gzip.compress(zeros[: 1 << 20])), "gzip and holds no tar")
    yield data("a size that lies", _understated, "damaged|readable picture|cut short")


def _header_bomb() -> bytes:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 200 << 20
    return gzip.compress(info.tobuf() + bytes(200 << 20), 1)


def _overlapping() -> bytes:
    """Many entries of the directory that share the bytes of one file (Fifield, 2019)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/a/0.png", bytes(10 << 20))
        (first,) = archive.infolist()
        for number in range(1, 1000):
            other = zipfile.ZipInfo(f"train/a/{number}.png")
            for field in ("header_offset", "CRC", "compress_size", "file_size", "compress_type"):
                setattr(other, field, getattr(first, field))
            archive.filelist.append(other)
    return buffer.getvalue()


def _many(count: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in range(count):
            archive.writestr(zipfile.ZipInfo(f"{number}"), b"")
    return buffer.getvalue()


def _understated() -> bytes:
    content = bytearray(zipped({"train/a/x.png": b"\x89PNG" + bytes(10 << 20)}))
    central = content.index(b"PK\1\2")
    content[central + 24 : central + 28] = (10).to_bytes(4, "little")
    return bytes(content)


def pictures() -> Iterator[Member]:
    """Pictures of few bytes and many pixels, and pictures that are none."""
    kinds: dict[str, tuple[Callable[[], bytes], str]] = {
        "PNG of 30,000 x 30,000": (lambda: png_of(30_000, 30_000), "more than 64000000 pixels"),
        "PNG of 2^31 x 2^31": (lambda: png_of((1 << 31) - 1, (1 << 31) - 1), "pixels|readable picture"),
        "PNG of 10,000 x 10,000": (lambda: png_of(10_000, 10_000), "pixels"),
        "PNG of zeros": (_black, "pixels|damaged"),
        "PNG with 100 MB of text": (_texts, "readable picture|damaged|zip bomb|x.png"),
        "PNG that is none": (lambda: b"\x89PNG\r\n\x1a\nnot really", "no readable picture"),
        "GIF": (lambda: b"GIF89a" + bytes(100), "no readable picture|are taken"),
        "SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "no readable picture"),
        "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no readable picture"),
    }
    for name, (content, says) in kinds.items():
        yield data(name, lambda content=content: zipped({"train/a/x.png": content()}), says)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, pixels: bytes, *extra: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (_chunk(b"IHDR", head), *extra, _chunk(b"IDAT", pixels), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _black() -> bytes:
    """7,900 x 7,900 black pixels, all of them there: 187 MB in 180 kB."""
    return _png(7_900, 7_900, zlib.compress(bytes((7_900 * 3 + 1) * 7_900), 1)[:-2000])


def _texts() -> bytes:
    text = _chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(100 << 20), 9))
    return _png(2, 2, zlib.compress(bytes(14)), text)


def arrays() -> Iterator[Member]:
    """Arrays of objects, and headers that claim more than any file holds."""
    yield from touching(
        "objects",
        lambda canary: npz(train_inputs=np.array([Bomb(canary)], dtype=object)),
        "object",
        kind="dataset",
        filename="data.npz",
    )
    yield from touching(
        "a pickle named as an array",
        lambda canary: zipped({"train_inputs.npy": pickle.dumps(Bomb(canary))}),
        "no NumPy array",
        kind="dataset",
        filename="data.npz",
    )
    claims = {
        "a billion numbers": "(1000000000,)",
        "2^62 numbers": f"({1 << 62},)",
        "a product that overflows": f"({1 << 32}, {1 << 32})",
        "a negative size": "(-1,)",
        "a thousand dimensions": "(" + "1, " * 1000 + ")",
    }
    for name, shape in claims.items():
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
        yield _array(name, header(text), "needs|no NumPy array|of shape|1000 dimensions")
    yield _array("code in a header", header("__import__('os').system('touch executed')"), "no NumPy array")
    yield _array("a deep header", header("(" * 5000), "no NumPy array")
    yield _array("a header of a megabyte", header(" " * (60 << 10)), "no NumPy array")
    yield data("zeros", lambda: npz(True, train_inputs=np.zeros((1 << 26,), np.float32)), "zip bomb|unpack", "d.npz")
    many = {f"train_inputs.{number}": np.zeros((1, 1), np.float32) for number in range(2000)}
    yield data("two thousand inputs", lambda: save(many), None, "data.safetensors")


def _array(name: str, content: bytes, says: str) -> Member:
    return data(name, lambda: zipped({"train_inputs.npy": content}), says, "data.npz")


def tables() -> Iterator[Member]:
    """Parquet: pages, dictionaries and lists that unpack without end, and footers that lie."""
    for name, (content, says) in parquet.BOMBS.items():
        yield data(name, content, says, "data.parquet")
    rows = [{"text": "a", "label": 1}]
    spoiled = {
        "no footer": (b"PAR1PAR1", "no whole Parquet"),
        "a footer of 2 GB": (b"PAR1" + bytes(9) + b"\xff\xff\xff\x7fPAR1", "claims a footer"),
        "a footer of garbage": (b"PAR1" + b"x" * 20 + b"\x14\0\0\0PAR1", "footer cannot be read"),
        "cut short": (table(rows)[:-9], "no whole Parquet"),
        "a path in place of bytes": (table([{"image": {"bytes": None, "path": "/etc/passwd"}}]), "never opened|image"),
        "a picture bomb": (table([{"image": png_of(30_000, 30_000)}]), "pixels"),
        "a list of 70,000 words": (table([{"tokens": ["a"] * 70_000}]), "70000 entries"),
    }
    for name, (held, says) in spoiled.items():
        yield data(name, functools.partial(bytes, held), says, "data.parquet")


def recordings() -> Iterator[Member]:
    """Sounds whose headers lie, or that are none."""
    rows = jsonl({"file_name": "x.wav", "text": "eins"})
    kinds = {
        "promises a gigabyte": (raw_wav(b"ab", size=1 << 30), "promises 1073741824 bytes"),
        "a thousand chunks": (b"RIFF\0\0\0\0WAVE" + b"junk\0\0\0\0" * 2000, "more than 1000 chunks"),
        "frames of no bytes": (raw_wav(b"ab", frame=0), "in 0 bytes"),
        "33 channels": (raw_wav(b"ab" * 40, channels=33), "33 channels"),
        "compressed": (raw_wav(b"ab", coding=17), "coding 17"),
        "a rate of 2 GHz": (raw_wav(b"ab", rate=1 << 31), "at 2147483648 Hz"),
        "not a number": (raw_wav(struct.pack("<f", float("nan")), coding=3, bits=32), "NaN"),
        "MP3": (b"ID3\3" + bytes(50), "no WAV or FLAC"),
        "FLAC cut short": (flac()[:-8], "cut short"),
        "FLAC of zeros": (flac(np.zeros(1 << 27, np.int16)), "long|zip bomb|samples|x.wav"),
    }
    for name, (content, says) in kinds.items():
        yield data(name, functools.partial(webdataset.shard, {"x.wav": content, "metadata.jsonl": rows}), says, "d.tar")
    yield data("garbage after RIFF", lambda: webdataset.shard({"a.wav": b"RIFF" + wav()[9:], "a.cls": b"0"}), "WAV")


def texts() -> Iterator[Member]:
    """JSON nested without end, lines without end, numbers without end, and no text at all."""
    deep = b"[" * 100_000
    yield data("deep JSON Lines", lambda: b'{"text": ' + deep, "line 1", "data.jsonl")
    yield data("deep and closed", lambda: b'{"text": ' + deep + b"]" * 100_000 + b"}", "line 1", "data.jsonl")
    yield data("deep object", lambda: b'{"a":' * 100_000, "line 1", "data.jsonl")
    yield data("deep beside pictures", lambda: webdataset.shard({"a.png": PICTURE, "a.json": deep}), "JSON", "t.tar")
    yield data("a line of 100 MB", lambda: b'{"text": "' + b"a" * (100 << 20), "line 1", "data.jsonl")
    yield data(
        "a number of a million digits",
        lambda: b'{"text": "a", "label": ' + b"9" * 1_000_000 + b"}",
        "line 1",
        "d.jsonl",
    )
    yield data("a field of 100 MB", lambda: b"text,label\n" + b"a" * (100 << 20), "line|CSV", "data.csv")
    yield data("an open quote", lambda: b'text,label\n"' + b"a\n" * 1_000_000, "line|CSV|quote", "data.csv")
    yield data("a million columns", lambda: b"text" + b",x" * 1_000_000 + b"\na", "column|line|CSV", "data.csv")
    yield data("twice the same name", lambda: b'{"text": "a", "text": {"b": 1}}\n', "line 1", "data.jsonl")
    yield data("no UTF-8", lambda: b'{"text": "\xff\xfe"}\n', "UTF-8", "data.jsonl")
    yield data("NUL", lambda: bytes(1 << 20), "no file of a known kind|dataset", "data.jsonl")
    yield data("JSON of 100,000 rows of nothing", lambda: b"{}\n" * 100_000, "line 1", "data.jsonl")
    yield data("paragraphs of one letter", lambda: zipped({"train.txt": b"a\n\n" * 1_000_000}), None)


def shapes() -> Iterator[Member]:
    """Models in place of data."""
    yield data("weights", lambda: save({"w": np.ones((2, 2), np.float32)}), "array 'w'", "d.safetensors")
    buffer = io.BytesIO()
    torch.save({"train_inputs": torch.ones(2, 2)}, buffer)
    yield data("torch.save", buffer.getvalue, "torch.save", "data.pt")


FAMILIES: dict[str, Callable[[], Iterator[Member]]] = {
    "archives that lead out": traversal,
    "links and devices": links,
    "archive bombs": archive_bombs,
    "pictures": pictures,
    "arrays": arrays,
    "Parquet": tables,
    "sounds": recordings,
    "text": texts,
    "models in place of data": shapes,
}
