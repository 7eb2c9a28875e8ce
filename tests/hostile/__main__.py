"""Prints the corpus as a table, with -v also what is said to each file.

python -m tests.hostile [-v] [word of a family]...
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.hostile.corpus import FAMILIES
from tests.hostile.service import Service, Verdict


def main(arguments: list[str]) -> None:
    words = [word for word in arguments if word != "-v"]
    with tempfile.TemporaryDirectory() as folder:
        service = Service(Path(folder))
        sys.stdout.write("| family | files | refused | most CPU time | most memory |\n|---|---|---|---|---|\n")
        for family, make in FAMILIES.items():
            if words and not any(word in family for word in words):
                continue
            verdicts = {member.name: service.inspect(member) for member in make()}
            sys.stdout.write(row(family, list(verdicts.values())))
            if "-v" in arguments:
                for name, verdict in verdicts.items():
                    sys.stdout.write(
                        f"    {name}: {verdict.record.status}, {verdict.figures}\n        {verdict.said}\n"
                    )
            sys.stdout.flush()


def row(family: str, verdicts: list[Verdict]) -> str:
    refused = sum(verdict.record.status == "rejected" for verdict in verdicts)
    figures = [verdict.figures for verdict in verdicts if verdict.figures is not None]
    seconds, memory = max(told.seconds for told in figures), max(told.bytes for told in figures) >> 20
    return f"| {family} | {len(verdicts)} | {refused} | {seconds:.1f} s | {memory} MiB |\n"


if __name__ == "__main__":
    main(sys.argv[1:])
