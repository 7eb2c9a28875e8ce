"""One file of the corpus: what it is sent as, how its bytes are made, and what is said about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.contract.records import UploadKind
from tests.worker.loading.files import linear_spec

CANARY = "executed"
# Whoever executes a file in a child does it in the scratch folder, where the sandbox lets it write.
INSIDE = Path(CANARY)

READY = None

Make = Callable[[Path], bytes]
"""The bytes; the path is the canary that a file with code in it is to touch, where it can touch one at all."""


@dataclass(frozen=True)
class Member:
    """`says` is a pattern of the refusal, or READY where the file is taken and its hostile part is not used."""

    name: str
    make: Make
    says: str | None
    kind: UploadKind = "model"
    filename: str = "upload.bin"
    spec: dict[str, Any] = field(default_factory=dict)
    touches: bool = False  # whether there is code in it, which touches the canary


IMAGES = {"task": "image-classification"}


def made(content: Callable[[], bytes]) -> Make:
    return lambda canary: content()


def model(name: str, content: Callable[[], bytes], says: str | None, filename: str = "upload.bin") -> Member:
    """A model that says itself what it is."""
    return Member(name, made(content), says, "model", filename)


def weights(name: str, content: Callable[[], bytes], says: str | None) -> Member:
    """Weights of the smallest architecture."""
    return Member(name, made(content), says, "model", "model.safetensors", linear_spec())


def data(name: str, content: Callable[[], bytes], says: str | None, filename: str = "data.zip") -> Member:
    return Member(name, made(content), says, "dataset", filename)


def touching(name: str, make: Make, says: str | None, **fields: Any) -> list[Member]:
    """A file with code in it, twice: once for a canary in the scratch folder, once for one outside of it."""
    return [
        Member(f"{name}, in scratch", lambda canary: make(INSIDE), says, touches=True, **fields),
        Member(f"{name}, outside", make, says, touches=True, **fields),
    ]
