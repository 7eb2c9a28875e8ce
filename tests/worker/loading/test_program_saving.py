"""Exported programs are saved again: the same outputs, names, dtypes and calls, in plain torch and here."""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from app.contract.errors import DatasetMismatch, ExportFailed
from tests.worker.loading.program_nets import MARKS, Wrapped, mlp, net, noise, token_ids, train
from tests.worker.loading.programs import ConvNet, exported, image, load, outputs
from worker.constraints import baked
from worker.data.base import RawBatch
from worker.loading.program_module import Program

pytestmark = MARKS


@pytest.mark.parametrize("name", ["convolutions", "encoder", "norms", "tied", "lstm"])
def test_saved_programs_load_in_plain_torch_and_here(tmp_path: Path, name: str) -> None:
    module, example, axes = net(name)
    model = load(exported(module, example, axes=axes), tmp_path / "in")
    again = model.save(baked(model.module), tmp_path)
    assert again.name == "model.pt2"
    program = torch.export.load(again)
    larger = example.repeat(3, *[1] * (example.ndim - 1))
    assert torch.equal(outputs(program.module(), larger), outputs(module, larger))
    assert set(program.state_dict) == set(module.state_dict())
    reloaded = load(again.read_bytes(), tmp_path / "again")
    assert reloaded.facts == model.facts
    assert torch.equal(outputs(reloaded.module, larger), outputs(module, larger))
    assert train(reloaded.module, example, 3) == train(model.module, example, 3)


def test_a_saved_program_holds_no_pickle_and_no_path(tmp_path: Path) -> None:
    module, example, _ = net("convolutions")
    content = exported(module, example)
    model = load(content, tmp_path / "in")
    again = model.save(model.module, tmp_path)
    with zipfile.ZipFile(again) as archive:
        sizes = {info.filename.partition("/")[2]: info.file_size for info in archive.infolist()}
        text = archive.read("model/models/model.json").decode()
    assert sizes["data/sample_inputs/model.pt"] == 0
    assert "stack_trace" not in text
    assert str(Path(__file__).parents[3]) not in text
    assert again.stat().st_size < len(content)
    (tmp_path / "second").mkdir()
    assert model.save(model.module, tmp_path / "second").read_bytes() == again.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32_and_is_stored_as_it_came(tmp_path: Path, dtype: torch.dtype) -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x.to(dtype)) + torch.ones(3, dtype=dtype)
            return logits

    module = Casting().to(dtype).eval()
    model = load(exported(module, noise(2, 6).to(dtype)), tmp_path / "in")
    assert model.facts.inputs[0].dtype == "float32"
    assert {tensor.dtype for tensor in model.module.parameters()} == {torch.float32}
    exact = copy.deepcopy(module).float()
    exact.forward = lambda x: exact.net(x) + 1  # type: ignore[method-assign]
    assert torch.allclose(outputs(model.module, noise(5, 6)), outputs(exact, noise(5, 6)), atol=1e-6)
    again = model.save(model.round_as_stored(baked(model.module)), tmp_path)
    program = torch.export.load(again)
    assert {tensor.dtype for tensor in program.state_dict.values()} == {dtype, torch.int64}
    half = noise(5, 6).to(dtype)
    assert torch.equal(outputs(program.module(), half), outputs(module, half))
    assert torch.equal(outputs(load(again.read_bytes(), tmp_path / "again").module, half), outputs(model.module, half))


@pytest.mark.parametrize(
    ("form", "take"),
    [
        (lambda y, h: (y,), lambda found: found[0]),
        (lambda y, h: [y], lambda found: found[0]),
        (lambda y, h: {"score": y}, lambda found: found["score"]),
        (lambda y, h: {"hidden": [h, (h,)], "logits": y}, lambda found: found["logits"]),
    ],
)
def test_logits_come_back_as_they_came(
    tmp_path: Path, form: Callable[[Tensor, Tensor], Any], take: Callable[[Any], Tensor]
) -> None:
    module = Wrapped(form).eval()
    model = load(exported(module, noise(2, 4)), tmp_path / "in")
    expected = take(module(noise(3, 4)))
    assert torch.equal(model.module(noise(3, 4)), expected)
    found = torch.export.load(model.save(model.module, tmp_path)).module()(noise(3, 4))
    assert torch.equal(take(found), expected)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(10, 4)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor, features: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.cat([self.words(ids).mean(1), features], dim=1))
        return logits


def test_several_inputs_by_name(tmp_path: Path) -> None:
    module = TwoInputs().eval()
    content = exported(module, features=noise(2, 2), ids=token_ids(2, 5))
    model = load(content, tmp_path / "in", task="text-classification")
    assert [tensor.name for tensor in model.facts.inputs] == ["features", "ids"]
    raw = RawBatch({"ids": token_ids(3, 5).to(torch.int32), "features": noise(3, 2)}, None)
    expected = outputs(lambda *_: module(token_ids(3, 5), noise(3, 2)))
    assert torch.equal(outputs(model.module, *model.encode(raw)), expected)
    with pytest.raises(DatasetMismatch, match="ids from 0 to 99; the model's embedding knows 0 to 9"):
        model.encode(RawBatch({"ids": torch.tensor([[0, 99]]), "features": noise(1, 2)}, None))
    program = torch.export.load(model.save(model.module, tmp_path)).module()
    assert torch.equal(program(ids=token_ids(3, 5), features=noise(3, 2)), expected)


def test_pictures_are_scaled(tmp_path: Path) -> None:
    model = load(exported(ConvNet().eval(), image()), tmp_path)
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    (encoded,) = model.encode(RawBatch([Image.fromarray(pixels)], None))
    np.testing.assert_allclose(encoded.numpy(), pixels[None, None] / 255, rtol=1e-6)
    with pytest.raises(DatasetMismatch, match="takes arrays"):
        model.encode(RawBatch(["text"], None))


def test_the_example_is_long_enough(tmp_path: Path) -> None:
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(1, 4, 40, stride=5), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.second(self.first(x.unsqueeze(1)).mean(-1))
            return logits

    module = Waves().eval()
    content = exported(module, noise(2, 60), axes=(0, 1))
    model = load(content, tmp_path, task="audio-classification")
    assert model.example_length == 120  # half of 60 would be shorter than the kernel
    assert model.example(2)[0].shape == (2, 120)
    assert torch.equal(outputs(model.module, noise(3, 400)), outputs(module, noise(3, 400)))


def test_what_cannot_be_traced_again_is_an_export_that_failed(tmp_path: Path) -> None:
    model = load(exported(ConvNet().eval(), image()), tmp_path)
    assert isinstance(model.module, Program)
    fixed = copy.deepcopy(model.module)
    fixed.add_module("head", nn.Sequential(nn.Flatten(0), nn.Linear(2 * 8 * 16, 20), nn.Unflatten(0, (2, 10))))
    with pytest.raises(ExportFailed, match="could not export the program again"):
        model.save(fixed.eval(), tmp_path)
