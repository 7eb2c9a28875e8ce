"""WebDataset: tar files in which the files of one sample share a key (`0001.jpg`, `0001.cls`), alone or in shards.

Source: "The WebDataset Format", version 0.2: a key is the path up to the first dot of the file's name.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.contract.errors import DatasetRejected
from app.contract.facts import split_named
from worker.data.base import Data
from worker.data.collect import Collector, Sample
from worker.data.folders import TRANSCRIPTS
from worker.data.rows import checked_label, row_sample, target_of
from worker.data.splits import DEFAULT, SplitNames, split_of_file
from worker.data.targets import Target
from worker.vetting.archive import Archive, Member, tar_members
from worker.vetting.section import Section

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp")
SOUNDS = ("wav", "flac")
EXPECTED = (
    "Expected are files that share a key: <key>.jpg (or .png, .webp) or <key>.wav (or .flac) or <key>.txt, with "
    "<key>.cls or <key>.json beside it, in a tar, or in a tar or zip of shards (train-000000.tar, …)."
)
MAX_FIELD_BYTES = 1 << 20  # of a label, a text or a JSON document

Group = dict[str, Member]  # the files of one key, by what follows the key


def is_webdataset(members: dict[str, Member]) -> bool:
    """Whether files belong together by a key: a `.cls` beside its content, a sound's `.txt` or `.json`, or a picture's
    `.json` where no folder could be the label.
    """
    keys: dict[str, set[str]] = {}
    for name in members:
        key, field = _parts(name)
        keys.setdefault(key, set()).add(field)
    return any(_belong(key, fields) for key, fields in keys.items() if len(fields) > 1)


def _belong(key: str, fields: set[str]) -> bool:
    if fields & {*PICTURES, *SOUNDS, "txt", "json"} and "cls" in fields:
        return True
    folder = key.rpartition("/")[0]
    labelled = bool(folder) and split_named(folder) is None
    return bool(fields & {*SOUNDS} and fields & {"txt", "json"}) or bool(
        fields & {*PICTURES} and "json" in fields and not labelled
    )


def is_sharded(members: dict[str, Member]) -> bool:
    """Whether an archive holds archives."""
    return any(name.endswith((".tar", ".tar.gz", ".tgz")) for name in members)


def open_webdataset(archive: Archive, filename: str, scratch: Path) -> Data:
    """A tar or zip of such files; the split is the top folder, else what the upload's name begins with, else train."""
    collector = Collector(scratch)
    for sample in _samples(archive.members, split_of_file(filename), SplitNames()):
        collector.add(sample)
    return collector.finish(f"The archive holds no samples. {EXPECTED}")


def open_shards(archive: Archive, scratch: Path) -> Data:
    """A tar or zip of such tar files, in the order of their names; the split is what a shard's path says, else train.

    Shards of a tar are read where they lie; those of a zip are unpacked. Raises DatasetRejected, naming shard and file.
    """
    shards = {name: member for name, member in sorted(archive.members.items()) if is_sharded({name: member})}
    splits = SplitNames()
    places = {name: _split_of_shard(name, splits) for name in shards}
    if None in places.values() and len(set(places.values())) > 1:
        bare = next(name for name, split in places.items() if split is None)
        raise DatasetRejected(f"The shard {bare!r} names no split, and others do. {EXPECTED}")
    collector = Collector(scratch)
    folder = Path(tempfile.mkdtemp(prefix="shards-", dir=scratch))
    for number, (name, member) in enumerate(shards.items()):
        if not name.endswith(".tar"):
            raise DatasetRejected(f"The shard {name!r} is compressed: put plain tar files into the archive.")
        members = {own.name: own for own in tar_members(_section(member, folder / str(number)), DatasetRejected)}
        for sample in _samples(members, places[name], splits, f"{name}/"):
            collector.add(sample)
    return collector.finish(f"The shards hold no samples. {EXPECTED}")


def _split_of_shard(name: str, splits: SplitNames) -> str | None:
    folder = name.partition("/")[0] if "/" in name else ""
    return splits.of_file(name) or splits.split(folder)


def _section(member: Member, path: Path) -> Section:
    """Where a shard lies; one that is compressed is written to `path`."""
    if member.section is not None:
        return member.section
    member.extract(path)
    return Section(path, 0, member.size)


def _samples(members: dict[str, Member], split: str | None, splits: SplitNames, shard: str = "") -> Iterator[Sample]:
    """One sample a key that has content; files whose names say nothing here are passed over."""
    groups: dict[str, Group] = {}
    for name, member in members.items():
        key, field = _parts(name)
        if field not in (*PICTURES, *SOUNDS, "cls", "txt", "json"):
            continue
        group = groups.setdefault(key, {})
        if field in group:
            raise DatasetRejected(f"The key {shard + key!r} has two files {field!r}.")
        group[field] = replace(member, name=shard + name)
    named = split is None and any(split_named(key.partition("/")[0]) for key in groups if "/" in key)
    for key, group in groups.items():
        own = splits.split(key.partition("/")[0]) if named else split or DEFAULT
        if own is None:
            raise DatasetRejected(f"The archive holds {key!r} outside of the splits' folders. {EXPECTED}")
        yield _sample(shard + key, group, own)


def _parts(name: str) -> tuple[str, str]:
    """Key and field of a file's name."""
    folder, slash, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return f"{folder}{slash}{stem}", field.lower()


def _sample(key: str, group: Group, split: str) -> Sample:
    media = [field for field in group if field in (*PICTURES, *SOUNDS)]
    if len(media) > 1:
        raise DatasetRejected(f"The key {key!r} has {' and '.join(media)}: a sample has one picture or one sound.")
    place = f"the key {key!r}"
    row = _document(group["json"]) if "json" in group else {}
    if media and media[0] in PICTURES:
        return Sample("images", group[media[0]], _target(group, row, place), split, place)
    if media:
        if "txt" in group:  # the transcript, whatever the document says besides
            row = {name: value for name, value in row.items() if name not in TRANSCRIPTS}
            row["transcription"] = _text(group["txt"])
        target = _target(group, row, place, transcripts=TRANSCRIPTS)
        return Sample("audio", group[media[0]], target, split, place)
    if "txt" in group:
        return Sample("text", _text(group["txt"]), _target(group, row, place), split, place)
    if "json" in group:
        return row_sample({**row, **_class(group)}, split, place)
    raise DatasetRejected(f"The key {key!r} has a label and no content. {EXPECTED}")


def _target(group: Group, row: dict[str, Any], place: str, transcripts: tuple[str, ...] = ()) -> Target | None:
    return target_of({**row, **_class(group)}, place, transcripts=transcripts)


def _class(group: Group) -> dict[str, Any]:
    """The label of a `.cls` file: a class number, or a name."""
    if "cls" not in group:
        return {}
    text = _text(group["cls"]).strip()
    if not text:
        raise DatasetRejected(f"{group['cls'].name!r} is empty; it holds a class number or a name.")
    numeric = text.isascii() and text.removeprefix("-").isdecimal() and len(text) < 12
    return {"label": checked_label(int(text) if numeric else text, repr(group["cls"].name))}


def _text(member: Member) -> str:
    try:
        return member.read(MAX_FIELD_BYTES, DatasetRejected).decode()
    except UnicodeDecodeError as failure:
        raise DatasetRejected(f"{member.name!r} is not UTF-8: save it as UTF-8 text.") from failure


def _document(member: Member) -> dict[str, Any]:
    try:
        value = json.loads(_text(member))
    except (ValueError, RecursionError) as failure:
        raise DatasetRejected(f"{member.name!r} is no JSON. {EXPECTED}") from failure
    if not isinstance(value, dict):
        raise DatasetRejected(f"{member.name!r} is no JSON object. {EXPECTED}")
    return value
