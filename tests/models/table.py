"""The table of other people's models: a row a model, a column a question."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from tests.models.checks import COLUMNS, SPARSITY, TOLERANCE, Row

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
LIBRARIES = ("torch", "transformers", "onnx", "onnxruntime")
HEAD = f"""# Models of other people

What packages bring ([requirements](../tests/models/requirements.txt)), uploaded as the last column says, and asked:

- does it load, and give the outputs of its own runtime on the same samples (within {TOLERANCE:g} of the largest);
- do some steps of training lower the loss;
- is exactly {SPARSITY:.0%} of its weights zero after pruning, in the file that is written;
- does its int8 form load in ONNX Runtime, and how far are its outputs from those of float32 (signal to noise).

`make models` installs the packages and prints this page; a slow test asks again and compares the answers.
"""


def page(rows: Sequence[Row]) -> str:
    """The page in Markdown."""
    lines = [HEAD, f"| model | parameters | {' | '.join(COLUMNS)} | uploaded as |", "|---" * (len(COLUMNS) + 3) + "|"]
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
    cells = [_cell(row, column) for column in COLUMNS]
    return f"| {row.subject.name} | {parameters} | {' | '.join(cells)} | {row.subject.upload} |"


def _cell(row: Row, column: str) -> str:
    figure = row.figures.get(column, "")
    return row.words.get(column, "") + (f" ({figure})" if figure else "")
