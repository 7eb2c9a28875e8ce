"""Every model of other people that is on this machine answers as docs/models.md says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.checks import Subject, ask
from tests.models.packages import Absent
from tests.models.subjects import SUBJECTS
from tests.models.table import PAGE, page, words_of


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_a_model_answers_as_the_page_says(subject: Subject, tmp_path: Path) -> None:
    known = words_of(PAGE.read_text(), subject.name)
    if known is None:
        pytest.skip("not on the page: its answers were not measured yet")
    try:
        row = ask(subject, tmp_path)
    except Absent as absent:
        pytest.skip(str(absent))
    assert words_of(page([row]), subject.name) == known
