"""Rows of named fields, as JSON Lines, CSV and Parquet hold them, as samples: which fields count and what they mean."""

from __future__ import annotations

from typing import Any

from app.contract.errors import DatasetRejected
from app.contract.facts import SPLITS, split_named
from worker.data.batch import IGNORED
from worker.data.collect import Sample
from worker.data.targets import MAX_VALUES, Label, Target

MAX_LABEL = 256  # characters, as of the labels of a model
MAX_WORDS = 65_536  # of one row; models take a few thousand tokens
EXPECTED = (
    'Expected are rows with `text` and `label` ({"text": "…", "label": 1}), or `tokens` and `tags`, or `text` and '
    "`value` or `values`, as JSON Lines or as CSV with a header; a zip holds one file a split (train.jsonl, test.csv, "
    "…), a single file may have a `split` field."
)
_SHOWN = 80  # characters of a value that a sentence repeats


def row_sample(row: dict[str, Any], split: str, place: str, *, textual: bool = False) -> Sample:
    """A row of `text` or of `tokens`, of the split that it names or of `split`. Raises DatasetRejected by its place.

    `textual` rows are those of CSV: everything is a string, and an empty one is nothing.
    """
    own = split_of_row(row, split, place)
    if row.get("tokens") is not None and row.get("text") is None and not textual:
        words = _words(row["tokens"], place)
        return Sample("tokens", words, _tags(row, len(words), place), own, place)
    text = row.get("text")
    if not isinstance(text, str):
        raise DatasetRejected(f"{place} has no string `text`. {EXPECTED}")
    return Sample("text", text, target_of(row, place, textual=textual), own, place)


def split_of_row(row: dict[str, Any], split: str, place: str) -> str:
    """The split that a row's own `split` field names, else the one given."""
    name = row.get("split")
    if name is None or name == "":
        return split
    own = split_named(name) if isinstance(name, str) else None
    if own is None:
        raise DatasetRejected(f"{place} has the split {str(name)[:_SHOWN]!r}; splits are {', '.join(SPLITS)}.")
    return own


def target_of(
    row: dict[str, Any], place: str, *, textual: bool = False, transcripts: tuple[str, ...] = ()
) -> Target | None:
    """The one target of a row: `label`, `value`, `values` or a field of `transcripts`; None without any."""
    fields = ("label", "value", "values", *transcripts)
    given = [name for name in fields if row.get(name) is not None and not (textual and row[name] == "")]
    if len(given) > 1:
        raise DatasetRejected(f"{place} has `{given[0]}` and `{given[1]}`: a sample has one target. Leave one out.")
    if not given:
        return None
    value = row[given[0]]
    if given[0] == "label":
        return Target("classes", checked_label(value, place))
    if given[0] == "value":
        return Target("values", _number(value, place, textual=textual), scalar=True)
    if given[0] == "values":
        return Target("values", _numbers(value, place))
    if not isinstance(value, str):
        raise DatasetRejected(f"{place} has the `{given[0]}` {str(value)[:_SHOWN]!r}; a transcript is a string.")
    return Target("transcripts", value)


def checked_label(label: Any, place: str) -> Label:
    """A whole number or a string of moderate length. Raises DatasetRejected for anything else."""
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise DatasetRejected(f"{place} has the label {str(label)[:_SHOWN]!r}; a label is a whole number or a string.")
    if isinstance(label, str) and len(label) > MAX_LABEL:
        raise DatasetRejected(f"{place} has a label of {len(label)} characters; at most {MAX_LABEL} are taken.")
    if isinstance(label, int) and not -(1 << 31) <= label < 1 << 31:
        raise DatasetRejected(f"{place} has the label {str(label)[:30]}; class numbers start at 0.")
    return label


def _words(value: Any, place: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(word, str) for word in value):
        raise DatasetRejected(f"{place} has `tokens` that are no list of words. {EXPECTED}")
    if len(value) > MAX_WORDS:
        raise DatasetRejected(f"{place} has {len(value)} tokens; at most {MAX_WORDS} are taken.")
    return value


def _tags(row: dict[str, Any], words: int, place: str) -> Target | None:
    """One label a word; -100 marks a word that does not count."""
    tags = row.get("tags")
    if tags is None:
        if target_of(row, place) is not None:
            raise DatasetRejected(f"{place} has `tokens` and no `tags`: a target of tokens is a list of tags.")
        return None
    if not isinstance(tags, list) or len(tags) != words:
        said = f"{len(tags)} tags" if isinstance(tags, list) else "`tags` that are no list"
        raise DatasetRejected(f"{place} has {words} tokens and {said}: give every token one tag.")
    for tag in tags:
        if isinstance(checked_label(tag, place), int) and tag < 0 and tag != IGNORED:
            raise DatasetRejected(
                f"{place} has the tag {tag}; tags start at 0, and {IGNORED} marks what does not count."
            )
    return Target("tags", tags)


def _number(value: Any, place: str, *, textual: bool = False) -> float:
    if isinstance(value, str) and not textual:
        raise DatasetRejected(f"{place} has the value {value[:_SHOWN]!r}; a value is a number.")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as failure:
        raise DatasetRejected(f"{place} has the value {str(value)[:_SHOWN]!r}; a value is a number.") from failure


def _numbers(values: Any, place: str) -> list[float]:
    if not isinstance(values, list) or not 0 < len(values) <= MAX_VALUES:
        raise DatasetRejected(f"{place} has `values` that are no list of 1 to {MAX_VALUES} numbers.")
    return [_number(value, place) for value in values]
