"""`python -m tests.models [NAME …]`: asks every model, or those whose names hold one of these, and prints the page.

Where every model has answered, the page is written to docs/models.md too.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.models.checks import Row, ask
from tests.models.packages import Absent
from tests.models.subjects import SUBJECTS
from tests.models.table import PAGE, page

rows: list[Row] = []
for subject in SUBJECTS:
    if sys.argv[1:] and not any(word.lower() in subject.name.lower() for word in sys.argv[1:]):
        continue
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(ask(subject, Path(folder)))
    except Absent as absent:
        sys.stderr.write(f"{subject.name}: {absent}\n")
text = page(rows)
sys.stdout.write(text)
if len(rows) == len(SUBJECTS):
    PAGE.write_text(text)
