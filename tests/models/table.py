"""The table of other people's models: a row a model, a column a question."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from tests.models.checks import COLUMNS, LEAST_SQNR, SPARSITY, TOLERANCE, Row
from tests.models.packages import version

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
LIBRARIES = ("torch", "transformers", "onnx", "onnxruntime")
HEAD = f"""# Models of other people

What packages bring ([requirements](../tests/models/requirements.txt)), uploaded as the table says, and asked:

- does it load, and give the outputs of its own runtime on the same samples (within {TOLERANCE:g} of the largest);
- do some steps of training lower the loss;
- is exactly {SPARSITY:.0%} of its weights zero after pruning, in the file that is written;
- does its int8 form load in ONNX Runtime, with outputs whose distance to those of float32 leaves {LEAST_SQNR:g} dB
  (signal to noise) or more.

Samples are real: emails, prose, speech, photos, printed words, files. Training is a handful of steps on the half that
pruning left, on labels or by distillation from the upload; the loss is that of the training samples. `make models`
installs the packages, asks, and writes this page; a slow test asks again and compares the answers.
"""


def page(rows: Sequence[Row]) -> str:
    """The page in Markdown."""
    titles = ["model", "parameters", *COLUMNS, "uploaded as", "own runtime"]
    lines = [HEAD, f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    lines += [_line(row) for row in rows]
    scored = [row for row in rows if row.metrics]
    lines += ["", "The task's metric on real samples, by runtime:", "", "| model | metric by runtime |", "|---|---|"]
    lines += [
        f"| {row.subject.name} | {', '.join(f'{name} {value:.4g}' for name, value in row.metrics.items())} |"
        for row in scored
    ]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)
    return "\n".join([*lines, "", f"Python {platform.python_version()}, {versions}", ""])


def words_of(text: str, name: str) -> dict[str, str] | None:
    """The answers on a page for the model of this name: "yes" or "no" by column; None where it is not on the page."""
    line = next((line for line in text.splitlines() if line.startswith(f"| {name} |")), None)
    if line is None:
        return None
    cells = [cell.strip() for cell in line.strip("|").split("|")][2 : 2 + len(COLUMNS)]
    return {column: cell.split(" ")[0].rstrip(":") for column, cell in zip(COLUMNS, cells, strict=True)}


def _line(row: Row) -> str:
    parameters = "" if row.parameters is None else f"{row.parameters:,}"
    subject = row.subject
    origin = f"{subject.package} {version(subject.package)}: {subject.upload}"
    cells = [subject.name, parameters, *(_cell(row, column) for column in COLUMNS), origin, subject.runtime]
    return f"| {' | '.join(cells)} |"


def _cell(row: Row, column: str) -> str:
    figure = row.figures.get(column, "")
    return row.words.get(column, "") + (f" ({figure})" if figure else "")
