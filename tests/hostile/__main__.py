"""Prints the corpus as a table: python -m tests.hostile [word of a family]..."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.hostile.service import Service
from tests.hostile.test_corpus import FAMILIES


def main(words: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        service = Service(Path(folder))
        print("| family | members | refused | highest CPU | highest memory |\n|---|---|---|---|---|")
        for family, make in FAMILIES.items():
            if words and not any(word in family for word in words):
                continue
            verdicts = {member.name: service.inspect(member) for member in make()}
            refused = sum(verdict.record.status == "rejected" for verdict in verdicts.values())
            figures = [verdict.figures for verdict in verdicts.values() if verdict.figures is not None]
            seconds, memory = max(told.seconds for told in figures), max(told.bytes for told in figures) >> 20
            print(f"| {family} | {len(verdicts)} | {refused} | {seconds:.1f} s | {memory} MB |", flush=True)
            for name, verdict in verdicts.items():
                print(f"    {name}: {verdict.record.status} {verdict.figures}\n        {verdict.said}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
