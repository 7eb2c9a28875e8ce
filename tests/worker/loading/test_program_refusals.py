"""Exported programs that cannot be taken: the refusal says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from app.contract.errors import ModelRejected
from tests.worker.loading.program_nets import MARKS, Wrapped, mlp, noise
from tests.worker.loading.programs import exported, load, saved

pytestmark = MARKS


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        logits: Tensor = self.head(x)
        return logits


class Spoiling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x[:, :4].mul_(2))
        return logits


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits: Tensor = self.head(x)
        return logits.float()


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x + torch.rand_like(x))
        return logits


def static() -> bytes:
    return saved(torch.export.export(mlp().eval(), (noise(2, 6),)))


def with_flag() -> bytes:
    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor, scale: float) -> Tensor:
            logits: Tensor = self.head(x) * scale
            return logits

    shapes = ({0: torch.export.Dim.DYNAMIC}, None)
    return saved(torch.export.export(Flagged().eval(), (noise(2, 4), 2.0), dynamic_shapes=shapes))


def poisoned() -> nn.Module:
    module = mlp().eval()
    with torch.no_grad():
        module[0].weight[0, 0] = float("nan")
    return module


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "fixed batch": (static, r"fixed batch \(2\)(.|\n)*torch\.export\.Dim\.DYNAMIC(.|\n)*torch\.export\.save"),
    "a number as input": (with_flag, "an argument that is no tensor"),
    "counts its calls": (lambda: exported(Counting().eval(), noise(2, 4)), "changes 'calls' whenever it runs"),
    "changes its input": (lambda: exported(Spoiling().eval(), noise(2, 4)), "changes 'x' whenever it runs"),
    "autocast": (lambda: exported(Autocast().eval(), noise(2, 4)), "under torch.autocast"),
    "random numbers": (lambda: exported(Noisy().eval(), noise(2, 4)), "draws random numbers"),
    "float64": (lambda: exported(mlp().double().eval(), noise(2, 6).double()), r"model\.float\(\)"),
    "NaN": (lambda: exported(poisoned(), noise(2, 6)), "'0.weight' holds 1 NaN"),
    "no logits": (
        lambda: exported(nn.Sequential(nn.Conv2d(1, 2, 3)).eval(), noise(2, 1, 8, 8)),
        r"gives an output of shape \[2, 2, 6, 6\]",
    ),
    "two results": (
        lambda: exported(Wrapped(lambda y, h: (y, h)).eval(), noise(2, 4)),
        "gives 2 tensors .* dictionary with the key 'logits'",
    ),
    "dictionary without logits": (
        lambda: exported(Wrapped(lambda y, h: {"a": y, "b": h}).eval(), noise(2, 4)),
        "key 'logits'",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_say_what_to_do(tmp_path: Path, kind: str) -> None:
    make, words = REFUSED[kind]
    with pytest.raises(ModelRejected, match=words):
        load(make(), tmp_path)


def test_the_spec_has_to_fit(tmp_path: Path) -> None:
    content = exported(mlp().eval(), noise(2, 6))
    layers = {"layers": [{"type": "Linear", "in_features": 6, "out_features": 3}]}
    for spec, pointer, words in (
        ({"task": None}, "/task", "give spec.task"),
        ({"labels": ["a", "b"]}, "/labels", "3 outputs and the spec names 2 labels"),
        ({"architecture": layers, "input": {"shape": [6]}}, "/architecture", "brings its own layers"),
        ({"task": "masked-lm"}, "/task", "needs its tokenizer"),
    ):
        with pytest.raises(ModelRejected, match=words) as caught:
            load(content, tmp_path, **spec)
        assert caught.value.pointer == pointer
    assert load(content, tmp_path, labels=["a", "b", "c"]).facts.labels == ("a", "b", "c")
    assert load(content, tmp_path, task="regression").facts.classes == 3
