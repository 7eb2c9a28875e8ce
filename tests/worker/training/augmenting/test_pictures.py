"""Pictures that are changed at random: each is what a loop over pixels says it may be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from app.contract.augmentation import Crop, Erase, Flip, Jitter
from app.contract.errors import InvalidSpec
from worker.training.augmenting import pictures

COUNT, CHANNELS, HEIGHT, WIDTH = 400, 3, 9, 7
Change = Callable[[Tensor, torch.Generator], Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(count: int = COUNT) -> Tensor:
    return torch.randn((count, CHANNELS, HEIGHT, WIDTH), generator=generator(5))


CHANGES: dict[str, Change] = {
    "flip": lambda batch, random: pictures.flipped(batch, Flip(vertical=0.5), random),
    "crop": lambda batch, random: pictures.cropped(batch, Crop(padding=2), random),
    "jitter": lambda batch, random: pictures.jittered(batch, Jitter(saturation=0.5), random),
    "erase": lambda batch, random: pictures.erased(batch, Erase(fill="noise"), random),
}


@pytest.mark.parametrize("name", CHANGES)
def test_equal_numbers_give_equal_pictures_and_the_upload_stays(name: str) -> None:
    change, batch = CHANGES[name], drawn()
    before = batch.clone()
    one, same, other = (change(batch, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == batch.shape
    assert torch.equal(batch, before)


@pytest.mark.parametrize("name", CHANGES)
def test_pictures_of_a_batch_are_changed_each_in_its_own_way(name: str) -> None:
    batch = drawn(1).expand(COUNT, -1, -1, -1).contiguous()
    changed = CHANGES[name](batch, generator())
    assert len({picture.numpy().tobytes() for picture in changed}) > (3 if name == "flip" else 20)


def test_flips_mirror_as_often_as_asked() -> None:
    batch = drawn()
    found = pictures.flipped(batch, Flip(horizontal=0.3, vertical=0.1), generator())
    ways = {"no": batch, "h": batch.flip(3), "v": batch.flip(2), "hv": batch.flip(2, 3)}
    shares = {
        name: sum(torch.equal(a, b) for a, b in zip(found, way, strict=True)) / COUNT for name, way in ways.items()
    }
    assert sum(shares.values()) == 1
    assert shares == pytest.approx({"no": 0.63, "h": 0.27, "v": 0.07, "hv": 0.03}, abs=0.07)


@pytest.mark.parametrize("fill", ["zero", "edge", "reflect"])
def test_crops_are_windows_of_the_padded_picture(fill: str) -> None:
    batch, padding = drawn(60), 3
    found = pictures.cropped(batch, Crop.model_validate({"padding": padding, "fill": fill}), generator())
    mode = {"zero": "constant", "edge": "replicate", "reflect": "reflect"}[fill]
    padded = torch.nn.functional.pad(batch, (padding,) * 4, mode=mode)
    windows = [(top, left) for top in range(2 * padding + 1) for left in range(2 * padding + 1)]
    seen = set()
    for picture, whole in zip(found, padded, strict=True):
        places = [
            (top, left)
            for top, left in windows
            if torch.equal(picture, whole[:, top : top + HEIGHT, left : left + WIDTH])
        ]
        assert len(places) == 1
        seen |= set(places)
    assert len(seen) > 20


def test_a_padding_as_large_as_a_side_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="9 x 7"):
        pictures.cropped(drawn(2), Crop(padding=7), generator())


def test_erased_rectangles_are_as_large_as_asked() -> None:
    batch = torch.rand((COUNT, 2, 40, 30), generator=generator()) + 1
    options = Erase(probability=0.6, area=(0.1, 0.2), aspect=(0.5, 2.0), fill="zero")
    gone = pictures.erased(batch, options, generator(1)) == 0
    assert torch.equal(gone[:, 0], gone[:, 1])
    touched = [one for one in gone[:, 0] if one.any()]
    assert len(touched) / COUNT == pytest.approx(0.6, abs=0.08)
    for one in touched:
        rows, columns = one.any(1), one.any(0)
        assert torch.equal(one, rows[:, None] & columns)  # a rectangle, in one piece
        for side in (rows, columns):
            assert int(side.sum()) == int(side.nonzero().max() - side.nonzero().min()) + 1
        assert 0.07 <= float(one.float().mean()) <= 0.2
        assert 0.4 <= float(rows.sum() / columns.sum()) <= 2.5


def test_cutout_is_a_square() -> None:
    batch = torch.ones((50, 1, 32, 32))
    options = Erase(probability=1, area=(0.25, 0.25), aspect=(1, 1), fill="zero")
    gone = pictures.erased(batch, options, generator()) == 0
    assert [int(one.sum()) for one in gone] == [16 * 16] * 50


def test_erasing_paints_with_each_channels_mean() -> None:
    batch = drawn(20) + 10
    found = pictures.erased(batch, Erase(probability=1), generator())
    for picture, before in zip(found, batch, strict=True):
        painted = picture != before
        for channel in range(CHANNELS):
            values = picture[channel][painted[channel]]
            assert values == pytest.approx(float(before[channel].mean()), abs=1e-5)


def test_jitter_by_hand() -> None:
    """Brightness shifts by the spread, contrast scales about the mean, saturation about the grey."""
    batch = drawn(50)
    bright = pictures.jittered(batch, Jitter(brightness=0.3, contrast=0), generator()) - batch
    assert (bright - bright.mean((1, 2, 3), keepdim=True)).abs().max() < 1e-5
    shift = bright.mean((1, 2, 3)) / batch.std((1, 2, 3), correction=0)
    assert 0.2 < float(shift.abs().max()) <= 0.3 + 1e-6
    contrast = pictures.jittered(batch, Jitter(brightness=0, contrast=0.5), generator())
    assert contrast.mean((1, 2, 3)) == pytest.approx(batch.mean((1, 2, 3)), abs=1e-5)
    factor = contrast.std((1, 2, 3)) / batch.std((1, 2, 3))
    assert 0.5 <= float(factor.min()) < 0.6 < 1.4 < float(factor.max()) <= 1.5
    grey = pictures.jittered(batch, Jitter(brightness=0, contrast=0, saturation=1), generator())
    assert torch.allclose(grey.mean(1), batch.mean(1), atol=1e-5)


def test_a_normalized_picture_changes_as_the_raw_one_would() -> None:
    raw = drawn(30)
    options = Jitter(brightness=0.4, contrast=0.4)
    one = pictures.jittered(raw, options, generator(3))
    other = pictures.jittered((raw - 0.5) / 0.25, options, generator(3))
    assert torch.allclose((one - 0.5) / 0.25, other, atol=1e-4)
