"""What a file is, by its content: names lie, and a refusal should say what came."""

from __future__ import annotations

import gzip
import re
import zipfile
import zlib
from pathlib import Path

from app.contract.errors import TersorError

HEAD = 4096  # every signature lies within this
_TAR_MAGIC = slice(257, 262)

# (kind, signature at the start), first match wins.
_SIGNATURES: tuple[tuple[str, re.Pattern[bytes]], ...] = (
    ("gguf", re.compile(rb"GGUF")),
    # The header's length, which is no text, and its JSON.
    ("safetensors", re.compile(rb"(?![\t\n\r -~]{8}).{8}\s*\{", re.DOTALL)),
    ("legacy-torch", re.compile(rb"\x80[\x02-\x05]\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19")),
    ("pickle", re.compile(rb"\x80[\x02-\x05]|\(dp|\(lp|c(__builtin__|builtins|os|posix|nt)\n")),
    ("hdf5", re.compile(rb"\x89HDF\r\n\x1a\n")),
    ("npy", re.compile(rb"\x93NUMPY")),
    ("tflite", re.compile(rb".{4}TFL3", re.DOTALL)),
    ("parquet", re.compile(rb"PAR1|ARROW1")),
    ("gzip", re.compile(rb"\x1f\x8b")),
    ("archive", re.compile(rb"BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd")),
    ("image", re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|BM.{4}\0\0\0\0|RIFF.{4}WEBP", re.DOTALL)),
    ("pdf", re.compile(rb"%PDF")),
    ("lfs", re.compile(rb"version https://git-lfs")),
    ("html", re.compile(rb"\s*(<!doctype html|<html|<head|<\?xml)", re.IGNORECASE)),
    # Field 1 (ir_version) of a ModelProto, then its producer, domain, graph or opset.
    ("onnx", re.compile(rb"\x08[\x01-\x20][\x12\x1a\x22\x28\x32\x3a\x42]")),
    ("json", re.compile(rb"(\xef\xbb\xbf)?\s*[\[{]")),
)

_SAYS = {
    "empty": "The file is empty: 0 bytes came.",
    "pickle": "The file is a bare pickle, which runs code when it is read.",
    "gguf": "The file is GGUF, weights already quantized for llama.cpp, which this version does not read.",
    "hdf5": "The file is HDF5 (Keras), which this version does not read.",
    "keras": "The file is a Keras archive, which this version does not read.",
    "torchscript": "The file is TorchScript, which holds code.",
    "pt2": "The file is a program of torch.export, which this version does not read.",
    "tensorflow": "The file is a TensorFlow SavedModel, which this version does not read.",
    "tflite": "The file is TensorFlow Lite, which this version does not read.",
    "onnx": "The file is ONNX, a model.",
    "npy": "The file is a single array (.npy), which has no splits.",
    "npz": "The file holds NumPy arrays.",
    "parquet": "The file is Parquet or Arrow, which this version does not read.",
    "gzip": "The file is compressed with gzip and holds no tar.",
    "archive": "The file is an archive of another kind than zip, tar or tar.gz.",
    "image": "The file is a single picture.",
    "pdf": "The file is a PDF.",
    "lfs": "The file is a pointer of git-lfs, not the file itself: run `git lfs pull` first.",
    "html": "The file is a web page (HTML or XML): the download that made it went wrong.",
    "json": "The file is JSON.",
    "cut-zip": "The file starts as a zip archive or a torch.save file and was cut short: its end is missing.",
    "torch-zip": "The file was written by torch.save.",
    "legacy-torch": "The file was written by an old torch.save.",
    "safetensors": "The file is safetensors.",
    "zip": "The file is a zip archive.",
    "tar": "The file is a tar archive.",
}


def sniff(path: Path) -> str:
    """The kind of a file: a key of `_SAYS`, or "unknown"."""
    with path.open("rb") as stream:
        head = stream.read(HEAD)
    if not head:
        return "empty"
    if zipfile.is_zipfile(path):
        return _zip_kind(path)
    if head.startswith(b"PK\x03\x04"):
        return "cut-zip"
    if head[_TAR_MAGIC] == b"ustar":
        return "tar"
    for kind, signature in _SIGNATURES:
        if signature.match(head):
            return "tar" if kind == "gzip" and _gzip_holds_tar(path) else kind
    return "unknown"


def refuse(kind: str, filename: str, advice: str, error: type[TersorError]) -> TersorError:
    """The refusal of a file of that kind: what came, then what to send instead."""
    suffix = Path(filename).suffix
    unknown = f"{filename!r} is no file of a known kind" + (
        f": its content is not that of a {suffix} file." if suffix else "."
    )
    return error(f"{_SAYS.get(kind, unknown)} {advice}")


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):
        return "zip"  # opening it for reading says what is wrong
    tails = {name.partition("/")[2] for name in names} | set(names)
    if "data.pkl" in tails:
        scripted = "constants.pkl" in tails or any(tail.startswith("code/") for tail in tails)
        return "torchscript" if scripted else "torch-zip"
    if any(tail.endswith(("models/model.json", "serialized_exported_program.json")) for tail in tails):
        return "pt2"
    if "model.weights.h5" in tails:
        return "keras"
    if "saved_model.pb" in tails:
        return "tensorflow"
    return "npz" if names and all(name.endswith(".npy") for name in names) else "zip"


def _gzip_holds_tar(path: Path) -> bool:
    try:
        with gzip.open(path) as stream:
            return stream.read(512)[_TAR_MAGIC] == b"ustar"
    except (OSError, EOFError, zlib.error):
        return False
