"""Upload bytes to Data: which reader, by content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.contract.architecture import dataset_spec
from app.contract.errors import DatasetRejected
from worker.data.arrays import open_npz, open_safetensors
from worker.data.base import Data
from worker.data.images import open_images
from worker.data.text import SUFFIXES, open_text, open_text_archive
from worker.vetting.archive import open_archive
from worker.vetting.boundary import refusing
from worker.vetting.sniff import HEAD, refuse, sniff

ADVICE = (
    "A dataset is arrays (.npz or .safetensors with train_inputs, train_targets, …), a zip of an image folder "
    "(train/<label>/*.png), or text as JSON Lines or CSV with `text` and `label`."
)


def open_data(path: Path, filename: str, spec: dict[str, Any], scratch: Path) -> Data:
    """Opens an uploaded dataset; what is unpacked goes under `scratch` and is needed as long as the data is.

    Raises DatasetRejected with a sentence that says what came and what to send instead, whatever the file
    provokes. A full or failing disk stays an OSError.
    """
    with refusing(DatasetRejected, filename, "a dataset"):
        dataset_spec(spec, DatasetRejected)
        kind = sniff(path)
        if kind == "npz":
            return open_npz(path, scratch)
        if kind == "safetensors":
            return open_safetensors(path)
        if kind in ("zip", "tar"):
            return _open_folder(path, scratch)
        if kind == "json" or (kind == "unknown" and _is_text(path)):
            return open_text(path, filename, scratch)
        raise refuse(kind, filename, ADVICE, DatasetRejected)


def _open_folder(path: Path, scratch: Path) -> Data:
    archive = open_archive(path, scratch, DatasetRejected)
    if any(name.endswith(SUFFIXES) and "/" not in name for name in archive.members) and not _pictures(archive.members):
        try:
            return open_text_archive(archive, scratch)
        finally:
            archive.close()
    return open_images(archive)


def _pictures(names: dict[str, Any]) -> bool:
    return any(name.lower().endswith((".png", ".jpg", ".jpeg", ".bmp", ".webp")) for name in names)


def _is_text(path: Path) -> bool:
    """Whether a file starts like text: no NUL, and few bytes that no text has."""
    with path.open("rb") as stream:
        head = stream.read(HEAD)
    control = sum(byte < 9 or 13 < byte < 32 for byte in head)
    return b"\0" not in head and control * 100 < len(head) and _is_mostly_utf8(head)


def _is_mostly_utf8(head: bytes) -> bool:
    """Text in another encoding is text, so that the refusal can name the line; random bytes are not."""
    decoded = head.decode("utf-8", "replace")
    return decoded.count("�") * 10 < len(decoded)
