"""What a checkpoint's file takes and gives back, and what becomes of one that is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from worker.checkpoints import file
from worker.training.states import Unusable

PARTS = {
    "module": {"0.weight": torch.randn(3, 2), "count": torch.tensor(7), "mask": torch.tensor([True, False])},
    "stopper": {"best": float("-inf"), "epoch": None, "kept.0.weight": torch.zeros(0)},
    "place": {"step": 12, "means": [0.1, 1 / 3], "order": torch.arange(5, dtype=torch.uint8)},
    "empty": {},
}


def test_it_gives_back_what_it_took(tmp_path: Path) -> None:
    path = tmp_path / "one"
    file.write(path, PARTS)
    read = file.read(path)
    assert list(tmp_path.iterdir()) == [path]
    assert read.keys() == PARTS.keys()
    for part, state in PARTS.items():
        assert read[part].keys() == state.keys()
        for name, value in state.items():
            found = read[part][name]
            if isinstance(value, torch.Tensor):
                assert found.dtype == value.dtype
                assert torch.equal(found, value)
            else:
                assert found == value


def test_views_and_transposed_tensors_are_stored_as_they_look(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    file.write(tmp_path / "one", {"module": {"row": base[1], "turned": base.T, "same": base}})
    read = file.read(tmp_path / "one")["module"]
    assert torch.equal(read["row"], base[1])
    assert torch.equal(read["turned"], base.T)


def test_a_writer_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "one"
    file.write(path, PARTS)
    with pytest.raises(TypeError):
        file.write(path, {"module": {"no json": object()}})
    assert file.read(path)["place"]["step"] == 12


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_file_that_was_cut_short_is_of_no_use(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "one"
    file.write(path, PARTS)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(Unusable, match="cannot be read"):
        file.read(path)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"tersor": "no json"},
        {"tersor": "[1]"},
        {"tersor": json.dumps({"format": 1})},
        {"tersor": json.dumps({"format": 1, "parts": {"module": 3}})},
        {"tersor": json.dumps({"format": 1, "parts": {"other": {}}})},
    ],
)
def test_a_file_of_another_kind_is_of_no_use(tmp_path: Path, metadata: dict[str, str]) -> None:
    save_file({"module/weight": torch.zeros(2)}, tmp_path / "one", metadata=metadata)
    with pytest.raises(Unusable):
        file.read(tmp_path / "one")


def test_a_file_of_another_version_is_of_no_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "FORMAT", 2)
    file.write(tmp_path / "one", PARTS)
    monkeypatch.undo()
    with pytest.raises(Unusable, match="the format 2, and this version reads 1"):
        file.read(tmp_path / "one")


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    torch.save(PARTS, tmp_path / "one")
    with pytest.raises(Unusable):
        file.read(tmp_path / "one")
