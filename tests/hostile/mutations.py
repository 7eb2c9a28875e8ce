"""Real files and hostile ones, spoiled by a seeded generator: bytes flipped, cut, doubled, also inside of archives."""

from __future__ import annotations

import io
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.contract.records import UploadKind
from tests.hostile.member import IMAGES, INSIDE, Make, made
from tests.worker import test_fuzz_programs as fuzz_programs
from tests.worker.loading.files import Bomb, linear_spec, tarred, torch_saved, zipped
from tests.worker.loading.programs import packed, unpacked
from tests.worker.test_fuzz_uploads import DATASETS, MODELS, spoiled
from tests.worker.vetting import test_onnx as onnx_files
from tests.worker.vetting import test_pt2 as programs

EDITS = ("flip", "flip", "flip", "cut", "double", "zero", "end")
ARCHIVED = 0.7  # of the mutations of an archive go into a member, since checksums and directories catch the others


class Seed:
    """A file to be spoiled."""

    def __init__(self, kind: UploadKind, make: Make, spec: dict[str, Any], cost: int = 1) -> None:
        self.kind, self.make, self.spec, self.cost = kind, make, spec, cost

    def mutant(self, content: bytes, number: int) -> bytes:
        """The mutation of that number."""
        rng = random.Random(number)
        if zipfile.is_zipfile(io.BytesIO(content)) and rng.random() < ARCHIVED:
            return self._inside(content, rng)
        if content[257:262] == b"ustar" and rng.random() < ARCHIVED:
            return _tar_inside(content, rng)
        return _edited(content, rng)

    def _inside(self, content: bytes, rng: random.Random) -> bytes:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = archive.namelist()
            files = {name: archive.read(name) for name in names}
            stored = all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        name = rng.choice(names)
        files[name] = _edited(files[name], rng)
        if not stored:
            return zipped(files)
        return packed({name.partition("/")[2]: held for name, held in files.items()})


class ProgramSeed(Seed):
    """A program, half of whose mutations are of its JSON trees."""

    def mutant(self, content: bytes, number: int) -> bytes:
        if number % 2:
            return super().mutant(content, number)
        return fuzz_programs.spoiled(unpacked(content), number)


def _tar_inside(content: bytes, rng: random.Random) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        files = {info.name: archive.extractfile(info).read() for info in archive if info.isfile()}  # type: ignore[union-attr]
    name = rng.choice(list(files))
    files[name] = _edited(files[name], rng)
    return tarred(files, "w")


def _edited(content: bytes, rng: random.Random) -> bytes:
    head = rng.random() < 0.3  # headers lie at the start, and are a small part of most files
    edits = [
        (rng.choice(EDITS), rng.random() * (min(1.0, 512 / max(1, len(content))) if head else 1), rng.randint(1, 255))
        for _ in range(rng.randint(1, 4))
    ]
    return spoiled(content, edits)


def _small_onnx() -> bytes:
    return onnx_files.good().SerializeToString()


def _external() -> bytes:
    return onnx_files.packed(zipped, "w.bin", **{"w.bin": onnx_files.WEIGHT.tobytes()})


def _models() -> dict[str, Seed]:
    found = {
        name: Seed(
            "model", made(make), {} if name == "huggingface" else linear_spec(), 5 if name == "huggingface" else 1
        )
        for name, make in MODELS.items()
    }
    found |= {
        f"program of {name}": ProgramSeed("model", made(lambda name=name: fuzz_programs.programs()[name]), IMAGES, 5)
        for name in ("convolutions", "recurrent")
    }
    found["onnx"] = Seed("model", made(_small_onnx), IMAGES)
    found["onnx with external data"] = Seed("model", made(_external), IMAGES)
    return found


def _hostile() -> dict[str, Seed]:
    """Files with code in them, which a mutation might let past the check that refuses them."""
    attacks = {
        f"attack by {name}": ProgramSeed("model", lambda canary, make=make: make(INSIDE), IMAGES, 5)
        for name, (make, _) in programs.ATTACKS.items()
    }
    costumes: dict[str, Callable[[Path], bytes]] = {
        "pickle in torch.save": lambda canary: torch_saved({"0.weight": Bomb(INSIDE)}),
        "pickle in old torch.save": lambda canary: torch_saved(
            {"0.weight": Bomb(INSIDE)}, _use_new_zipfile_serialization=False
        ),
    }
    return attacks | {name: Seed("model", make, linear_spec()) for name, make in costumes.items()}


SEEDS = _models() | _hostile() | {name: Seed("dataset", made(make), {}) for name, make in DATASETS.items()}
