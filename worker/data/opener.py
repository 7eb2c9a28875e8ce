"""Upload bytes to Data: which reader, by content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.contract.architecture import dataset_spec
from app.contract.errors import DatasetRejected
from worker.data.arrays import open_npz, open_safetensors
from worker.data.base import Data
from worker.data.folders import media_kind, open_folder, refuse_other_media
from worker.data.splits import with_splits
from worker.data.text import open_text, open_text_archive, text_members
from worker.data.webdataset import is_sharded, is_webdataset, open_shards, open_webdataset
from worker.vetting.archive import Archive, open_archive
from worker.vetting.boundary import refusing
from worker.vetting.sniff import HEAD, refuse, sniff

ADVICE = (
    "A dataset is arrays (.npz or .safetensors with train_inputs, train_targets, …); a zip or tar of pictures "
    "(train/<label>/*.png) or sounds (*.wav with metadata.jsonl); WebDataset tars; Parquet; text as JSON Lines or CSV "
    "with `text` and `label`; or plain text (.txt)."
)


def open_data(path: Path, filename: str, spec: dict[str, Any], scratch: Path) -> Data:
    """Opens an uploaded dataset; what is unpacked goes under `scratch` and is needed as long as the data is.

    Raises DatasetRejected with a sentence that says what came and what to send instead, whatever the file
    provokes. A full or failing disk stays an OSError.
    """
    with refusing(DatasetRejected, filename, "a dataset"):
        wanted = dataset_spec(spec, DatasetRejected)
        return with_splits(_open(path, filename, scratch), wanted.split)


def _open(path: Path, filename: str, scratch: Path) -> Data:
    kind = sniff(path)
    if kind == "npz":
        return open_npz(path, scratch)
    if kind == "safetensors":
        return open_safetensors(path)
    if kind == "parquet":
        from worker.data.parquet import open_parquet  # pyarrow: 60 MB of memory, for those alone who need it

        return open_parquet(path, filename, scratch)
    if kind in ("zip", "tar"):
        return _open_archive(open_archive(path, scratch, DatasetRejected), filename, scratch)
    if kind == "json" or (kind == "unknown" and _is_text(path)):
        return open_text(path, filename, scratch)
    raise refuse(kind, filename, ADVICE, DatasetRejected)


def _open_archive(archive: Archive, filename: str, scratch: Path) -> Data:
    """Media read their files from the archive as long as the data lives; all else is read here and now."""
    members = archive.members
    if is_sharded(members):
        return open_shards(archive, scratch)
    if is_webdataset(members):
        return open_webdataset(archive, filename, scratch)
    if (kind := media_kind(members)) is not None:
        return open_folder(archive, kind, scratch)
    try:
        if any(name.endswith(".parquet") for name in members):
            from worker.data.parquet import open_parquet_archive

            return open_parquet_archive(archive, scratch)
        if text_members(members):
            return open_text_archive(archive, scratch)
    finally:
        archive.close()
    refuse_other_media(members)
    raise DatasetRejected(
        "The archive holds no pictures, sounds, text or Parquet; its first files are "
        f"{', '.join(map(repr, list(members)[:3]))}. {ADVICE}"
    )


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
