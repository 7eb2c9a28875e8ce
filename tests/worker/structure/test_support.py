"""The table of what works on which network is what the code does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.worker.structure.support import rows

PAGE = Path(__file__).parents[3] / "docs" / "structure.md"


@pytest.mark.slow  # some networks have dozens of groups, each of which is tried
def test_the_page_has_the_table_that_the_code_gives() -> None:
    text = PAGE.read_text()
    missing = [row for row in rows() if f"| {' | '.join(row)} |" not in text]
    assert not missing
