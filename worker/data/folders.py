"""Pictures or sounds in a zip or tar: `<split>/<label>/<file>`, or with a `metadata.jsonl` or `.csv` beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from app.contract.errors import DatasetRejected
from app.contract.facts import DataKind, split_named
from worker.data.base import Data
from worker.data.collect import Collector, Sample
from worker.data.rows import split_of_row, target_of
from worker.data.splits import DEFAULT, SplitNames
from worker.data.targets import Labels, Target
from worker.data.text import buffered, csv_rows, numbered, parse_object
from worker.vetting.archive import Archive, Member

PICTURE = re.compile(r".+\.(png|jpe?g|bmp|webp)", re.IGNORECASE)
SOUND = re.compile(r".+\.(wav|flac)", re.IGNORECASE)
_OTHER_PICTURE = re.compile(r".+\.(gif|tiff?|hei[cf]|avif|jp2|svg|raw|ppm|pgm)", re.IGNORECASE)
_OTHER_SOUND = re.compile(r".+\.(mp3|ogg|oga|opus|m4a|aac|wma|aiff?|au|amr)", re.IGNORECASE)
METADATA = ("metadata.jsonl", "metadata.csv")
TRANSCRIPTS = ("transcription", "text")
_EXPECTED: dict[DataKind, str] = {
    "images": "Expected are pictures (.png, .jpg, .bmp, .webp) at <split>/<label>/<name>.png with split train, "
    "validation, test or calibration; without labels at <split>/<name>.png; or a metadata.jsonl or metadata.csv with "
    "`file_name` and `label`.",
    "audio": "Expected are sounds (.wav, .flac) with a metadata.jsonl or metadata.csv of `file_name` and "
    "`transcription` or `label`, or at <split>/<label>/<name>.wav with split train, validation, test or calibration; "
    "without labels at <split>/<name>.wav.",
}


def media_kind(names: dict[str, Any]) -> DataKind | None:
    """What an archive's files are; None where it holds neither pictures nor sounds. Raises DatasetRejected for both."""
    picture = next(filter(PICTURE.fullmatch, names), None)
    sound = next(filter(SOUND.fullmatch, names), None)
    if picture is not None and sound is not None:
        raise DatasetRejected(f"The archive holds pictures ({picture!r}) and sounds ({sound!r}): a dataset holds one.")
    return "images" if picture else "audio" if sound else None


def refuse_other_media(names: dict[str, Any]) -> None:
    """Raises DatasetRejected for pictures and sounds of formats that are not read."""
    for name in names:
        if _OTHER_PICTURE.fullmatch(name):
            raise DatasetRejected(f"{name!r} is no PNG, JPEG, BMP or WebP picture. {_EXPECTED['images']}")
        if _OTHER_SOUND.fullmatch(name):
            raise DatasetRejected(f"{name!r} is no WAV or FLAC sound. {_EXPECTED['audio']}")


def open_folder(archive: Archive, kind: DataKind, scratch: Path) -> Data:
    """The files of an archive, which stays open as long as the data. Raises DatasetRejected, naming the file."""
    refuse_other_media(archive.members)
    wanted = PICTURE if kind == "images" else SOUND
    files = {name: member for name, member in archive.members.items() if wanted.fullmatch(name)}
    tables = {name: m for name, m in archive.members.items() if name.rpartition("/")[2] in METADATA}
    samples = _described(files, tables, kind) if tables else _placed(files, kind)
    # A folder's name is a name, even if it is a number; a row's number is a class number.
    collector = Collector(scratch, Labels(names=not tables))
    for sample in samples:
        collector.add(sample)
    return collector.finish(f"The archive holds no files. {_EXPECTED[kind]}")


def _placed(files: dict[str, Member], kind: DataKind) -> Iterator[Sample]:
    """Split and label out of the path."""
    places = dict(_places(list(files), kind))
    labelled = {split for split, label in places.values() if label is not None}
    for name, (split, label) in places.items():
        if label is None and split in labelled:
            raise DatasetRejected(
                f"Split {split!r} has labels, but {name!r} lies in no label's folder. {_EXPECTED[kind]}"
            )
        yield Sample(kind, files[name], None if label is None else Target("classes", label), split, repr(name))


def _places(files: list[str], kind: DataKind) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """Split and label of each file. Where one file lies in a split's folder, all have to."""
    splits = SplitNames()
    named = any(split_named(name.partition("/")[0]) for name in files if "/" in name)
    for name in files:
        folders = name.split("/")[:-1]
        split: str | None = DEFAULT
        if named:
            split = splits.split(folders.pop(0)) if folders else None
        if split is None or len(folders) > 1:
            raise DatasetRejected(f"The archive holds {name!r}. {_EXPECTED[kind]}")
        yield name, (split, folders[0] if folders else None)


def _described(files: dict[str, Member], tables: dict[str, Member], kind: DataKind) -> Iterator[Sample]:
    """Targets out of the tables, one row a file; the split out of the path or the row."""
    splits = SplitNames()
    waiting = dict(files)
    bare: str | None = None
    named = False
    for table, member in tables.items():
        folder = table.rpartition("/")[0]
        for row, place in _table_rows(member, _EXPECTED[kind]):
            name = _file_of(row, folder, files, place, kind)
            if waiting.pop(name, None) is None:
                raise DatasetRejected(f"{place} describes {name!r}, which a row before it does already.")
            split = _split(row, name, splits, place)
            named, bare = named or split is not None, bare if split is not None else name
            if named and bare is not None:
                raise DatasetRejected(f"{place}: {bare!r} lies in no split's folder and its row has no `split`.")
            target = target_of(row, place, textual=table.endswith(".csv"), transcripts=_transcripts(kind))
            yield Sample(kind, files[name], target, split or DEFAULT, place)
    if waiting:
        raise DatasetRejected(f"{next(iter(waiting))!r} has no row in {' or '.join(tables)}. {_EXPECTED[kind]}")


def _transcripts(kind: DataKind) -> tuple[str, ...]:
    """Fields that hold what is said; beside a picture a text is a caption, which no task takes."""
    return TRANSCRIPTS if kind == "audio" else ()


def _table_rows(member: Member, expected: str) -> Iterator[tuple[dict[str, Any], str]]:
    with buffered(member) as stream:
        lines = numbered(stream, member.name)
        if member.name.endswith(".csv"):
            yield from csv_rows(lines, member.name, "file_name", expected)
            return
        for number, line in lines:
            if line.strip():
                place = f"{member.name!r}, line {number}"
                yield parse_object(line, place, expected), place


def _file_of(row: dict[str, Any], folder: str, files: dict[str, Member], place: str, kind: DataKind) -> str:
    """The file that a row describes: its `file_name` counts from the table's own folder."""
    name = row.get("file_name")
    if not isinstance(name, str):
        raise DatasetRejected(f"{place} has no string `file_name`. {_EXPECTED[kind]}")
    full = f"{folder}/{name.removeprefix('./')}".removeprefix("/")
    if full not in files:
        raise DatasetRejected(f"{place} describes {name[:80]!r}; the archive holds no such file beside the table.")
    return full


def _split(row: dict[str, Any], name: str, splits: SplitNames, place: str) -> str | None:
    """The split by the file's top folder or by the row; None where neither names one."""
    own = splits.split(name.partition("/")[0]) if "/" in name else None
    told = split_of_row(row, own or "", place) or None
    if own is not None and told != own:
        raise DatasetRejected(f"{place} has the split {told!r}, and {name!r} lies in the folder of {own!r}.")
    return told
