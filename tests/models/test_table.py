"""The page of other people's models is read as it was written."""

from __future__ import annotations

from pathlib import Path

from app.contract.spec import Quantize
from app.contract.training import Training
from tests.models.checks import COLUMNS, Prepared, Row, Subject
from tests.models.table import page, words_of
from worker.data.base import Data


def _none(folder: Path, data: Data) -> Prepared:
    raise AssertionError


def row(name: str) -> Row:
    subject = Subject(
        name=name,
        package="torch",
        upload="nothing",
        runtime="torch",
        data=lambda: Data(None, {}),  # type: ignore[arg-type]  # never opened
        prepare=_none,
        training=Training(),
        quantize=Quantize(),
    )
    return Row(subject, parameters=1_234_567)


def test_answers_are_read_back() -> None:
    good, bad = row("One"), row("One more")
    for column in COLUMNS:
        good.say(column, "1e-07")
    bad.say("loads", "")
    bad.say("same output", "2e-01", "differs by 2e-01 of the largest")
    good.metrics["own runtime"] = 0.5
    text = page([bad, good])
    assert words_of(text, "One") == dict.fromkeys(COLUMNS, "yes")
    assert words_of(text, "One more") == dict.fromkeys(COLUMNS, "") | {"loads": "yes", "same output": "no"}
    assert words_of(text, "Two") is None
    assert "| 1,234,567 | yes (1e-07) |" in text
    assert "no: differs by 2e-01 of the largest (2e-01)" in text
    assert "| One | own runtime 0.5 |" in text
