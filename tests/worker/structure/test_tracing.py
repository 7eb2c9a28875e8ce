"""Units that a labelled pass finds: a network without some computes what it does where nobody reads them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.worker.structure.nets import OWN, PUBLIC, Attention, Logits, Recurrent, found, lenet
from worker.data.batch import Inputs
from worker.structure.groups import Group, structure_of
from worker.structure.sound import standing, without

MANY = 12  # groups, of which only some are looked at
NORMS = ("LayerNorm", "RMSNorm", "GroupNorm")  # which look at all units at once

# Units of every group, in order, by hand.
GROUPS = {
    "lenet": [20, 50, 500],
    "chain": [8, 12, 14],
    "residual": [8, 6],
    "depthwise": [8, 6],  # of the second depthwise layer two outputs go with an input
    "grouped": [4, 6, 6],  # 16 and 24 channels in four groups
    "transposed": [8, 3, 3],
    "concatenated": [6, 4, 5],
    "excited": [8, 4, 6],
    "group_norm": [2, 6],  # 8 channels in four groups, and 6 in as many
    "shuffled": [4, 2, 4],  # 12 in three groups; 18, of which a group is read as two channels of each of three; 12
    "lstm": [12, 8],
    "lstm_deep": [12, 8],
    "lstm_projected": [12, 6],
    "gru": [12, 8],
    "gru_both_ways": [12, 8],
    "tied": [12, 16],
    "gated": [12, 7],
    "attention": [4],
    "attention_gqa": [2],
    "attention_rotary": [4],
    "padded": [6],
    "bert": [32, 4, 24, 4, 24, 32],
    "distilbert": [32, 4, 24, 4, 24, 32],
    "gpt2": [32, 4, 128, 4, 128],
    "llama": [32, 2, 24, 2, 24],
    "vit": [32, 4, 24, 4, 24],
    "swin": [16, 2, 64, 2, 64, 32, 4, 128, 4, 128],
    "convnext": [16, 64, 32, 128],
    "whisper": [32, 32, 4, 24, 4, 24, 16],
    "wav2vec2": [16, 16, 8, 4, 24, 4, 24, 256],
}


def unread(module: nn.Module, group: Group, gone: Sequence[int]) -> nn.Module:
    """A copy in which nobody reads what is gone."""
    copied = copy.deepcopy(module)
    tensors = dict(copied.named_parameters())
    # A table that is the head too reads what it makes.
    cuts = [cut for cut in group.cuts if not cut.made] or group.cuts
    tied = [cut for cut in group.cuts if cut.made and "table" in cut.parameter]
    with torch.no_grad():
        for cut in [*cuts, *tied]:
            tensors[cut.parameter].index_fill_(cut.dim, cut.places[list(gone)].reshape(-1), 0.0)
    return copied


def normed(module: nn.Module, group: Group) -> bool:
    """Whether a norm, or torch's norm of each channel over time, runs over the units together."""
    layers = [module.get_submodule(cut.parameter.rpartition(".")[0]) for cut in group.cuts]
    return any(
        norm in type(layer).__name__ and getattr(layer, "num_groups", 0) != group.units
        for layer in layers
        for norm in NORMS
    )


def gone_of(group: Group) -> list[list[int]]:
    """One unit, the first, and several."""
    drawn = torch.randperm(group.units, generator=torch.Generator().manual_seed(group.units)).tolist()
    some = drawn[: max(1, min(3, group.units // 2))]
    return [[group.units // 2], [0], some]


def representatives(groups: Sequence[Group]) -> list[Group]:
    """One of each kind; of many kinds some."""
    kinds = list({group.kind: group for group in reversed(groups)}.values())
    return kinds[:: max(1, len(kinds) // 6)]


@torch.no_grad()
def assert_same(made: nn.Module, expected: nn.Module, inputs: Sequence[Inputs]) -> None:
    for own in inputs:
        ours, theirs = made(*own), expected(*own)
        assert torch.allclose(ours, theirs, atol=1e-5 * max(1.0, float(theirs.abs().max())), rtol=1e-5)


@pytest.mark.parametrize("name", [*OWN, *PUBLIC])
def test_without_units_it_computes_what_it_does_where_nobody_reads_them(name: str) -> None:
    own = found(name)
    module, inputs, structure, groups = own.module, own.inputs, own.structure, own.groups
    assert groups
    for group in groups if name in OWN else representatives(groups):
        parted, moved = normed(module, group), False
        for gone in gone_of(group)[0 if name in OWN else 2 :]:
            kept = torch.tensor([unit for unit in range(group.units) if unit not in gone])
            made, _ = without(module, structure, [group], {group.name: kept})
            expected = unread(module, group, gone)
            if not parted:
                assert_same(made, expected, inputs)
            for one in inputs:
                with torch.no_grad():
                    assert made(*one).shape == module(*one).shape
            with torch.no_grad():
                moved |= not torch.equal(expected(*inputs[0]), module(*inputs[0]))
        assert moved or len(groups) > MANY  # else it says nothing; in deep networks a few units may be dead


@pytest.mark.parametrize("name", [*OWN, *PUBLIC])
def test_of_all_groups_at_once_units_leave(name: str) -> None:
    own = found(name)
    module, inputs, structure, groups = own.module, own.inputs, own.structure, own.groups
    kept = {group.name: torch.arange(group.units)[1:] for group in groups}
    made, _ = without(module, structure, groups, kept)
    expected = module
    for group in groups:
        expected = unread(expected, group, [0])
    if not any(normed(module, group) for group in groups):
        assert_same(made, expected, inputs)
    with torch.no_grad():
        assert all(made(*one).shape == module(*one).shape for one in inputs)
    assert sum(one.numel() for one in made.parameters()) < sum(one.numel() for one in module.parameters())


@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_those_by_hand(name: str) -> None:
    assert [group.units for group in found(name).groups] == GROUPS[name]
    assert found(name).why == {} or name == "lstm_projected"


@pytest.mark.parametrize(("name", "kinds"), [("resnet", 9), ("mobilenet_v2", 25), ("efficientnet", 22)])
def test_every_width_of_a_convolutional_network_may_shrink(name: str, kinds: int) -> None:
    groups = found(name).groups
    assert len(groups) == kinds
    convolutions = [
        f"{path}.weight" for path, layer in found(name).module.named_modules() if isinstance(layer, nn.Conv2d)
    ]
    made = {cut.parameter for group in groups for cut in group.cuts if cut.made and cut.dim == 0}
    assert set(convolutions) <= made


def test_names_are_of_what_makes_units_and_places_are_all_of_them() -> None:
    for group in found("lenet").groups:
        assert group.cuts[0].made
        assert group.cuts[0].parameter == group.name
        assert torch.equal(group.cuts[0].places, torch.arange(group.units)[:, None])
    *_, flattened = found("lenet").groups[1].cuts
    assert (flattened.parameter, flattened.dim, flattened.made) == ("5.weight", 1, False)
    assert torch.equal(flattened.places, torch.arange(800).view(50, 16))


def test_heads_are_entries_in_a_row_and_channels_are_not() -> None:
    assert [group.in_blocks for group in found("bert").groups] == [False, True, False, True, False, False]
    assert [group.in_blocks for group in found("grouped").groups] == [False, False, False]


def test_blocks_of_one_shape_have_one_pattern() -> None:
    patterns = [group.pattern for group in found("llama").groups]
    assert patterns[1:3] == patterns[3:5]
    assert len(set(patterns)) == 3


@pytest.mark.parametrize("name", ["lenet", "bert", "gpt2"])
def test_outputs_stay_and_say_why(name: str) -> None:
    structure = found(name).structure
    assert set(structure.kept_whole.values()) <= {"the network gives it out", "it is looked up in"}
    assert structure.kept_whole


class Attending(nn.Module):
    """Torch's own attention, whose heads are of the size that its constructor says."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention = nn.Linear(10, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.between, self.head = nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(self.between(self.attention(x, x, x)[0])))


class Strided(nn.Module):
    """Even and odd channels are read by different layers."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.even, self.odd = nn.Linear(10, 12), nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.both(x))
        return self.even(x[..., ::2]) + self.odd(x[..., 1::2])


def refused(module: nn.Module) -> tuple[list[str], dict[str, str]]:
    torch.manual_seed(0)
    inputs = (torch.randn(2, 9, 10),)
    groups, why = standing(module.eval(), inputs, structure_of(module, inputs))
    return [group.name for group in groups], why


def test_heads_of_torchs_own_attention_are_refused_with_the_reason() -> None:
    names, why = refused(Attending())
    assert "between.weight" in names
    assert not any(name.startswith("attention.in_proj") for name in names)
    assert "does not run: passed-in embed_dim 16" in why["stem.weight"]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Attention(heads=4), "does not run: shape '[2, 9, 4, 4]' is invalid"),
        (Attention(heads=4, size=-1), "computes something else"),
        (Attention(heads=2, size=-1), "computes something else"),
    ],
)
def test_a_number_of_heads_in_the_code_is_refused(module: nn.Module, reason: str) -> None:
    names, why = refused(module)
    assert names == []
    assert reason in why["q.weight"]


def test_an_lstm_that_shows_fewer_than_its_units_keeps_them() -> None:
    """With as many torch takes the layer for one that shows all."""
    own = found("lstm_projected")
    assert "projection" in own.why["layer.weight_ih_l0"]


def test_code_that_counts_places_is_refused() -> None:
    assert refused(Strided())[0] == []


class Cut(nn.Module):
    """Shows a unit outside, or joins it with inputs element by element."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.head = how, nn.Linear(10, 10), nn.Linear(10, 5)
        self.register_buffer("factors", torch.rand(10))

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        match self.how:
            case "given out":
                return self.head(y), y
            case "added to inputs":
                return self.head(x + y)
            case "times a buffer":
                return self.head(y * self.factors)
            case "sorted":
                return self.head(y.sort(-1).values)
            case "in a row":
                return self.head(y.cumsum(-1))
            case _:
                return self.head(y @ torch.linalg.inv(y.mT @ y + torch.eye(10)))


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("given out", "the network gives it out"),
        ("added to inputs", "add needs all of it"),
        ("times a buffer", "mul needs all of it"),
        ("sorted", "sort needs all of it"),
        ("in a row", "cumsum needs all of it"),
        ("inverted", "needs all of it"),
    ],
)
def test_units_that_something_else_counts_on_stay_and_say_why(how: str, why: str) -> None:
    module = Cut(how).eval()
    structure = structure_of(module, (torch.randn(2, 9, 10),))
    assert structure.groups == ()
    assert why in structure.kept_whole["first.weight"]


def test_parameters_that_are_not_used_are_no_units() -> None:
    module = lenet()
    module.add_module("unused", nn.Identity())
    module.get_submodule("unused").register_parameter("weight", nn.Parameter(torch.zeros(7, 9)))
    structure = structure_of(module, (torch.randn(2, 1, 28, 28),))
    assert [group.units for group in structure.groups] == [20, 50, 500]


def test_a_layer_that_is_called_twice_is_one_group() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.head = nn.Linear(10, 6), nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.again(torch.relu(self.again(torch.relu(self.first(x))))))

    (group,) = structure_of(Twice(), (torch.randn(2, 10),)).groups
    assert [(cut.parameter, cut.dim) for cut in group.cuts] == [
        ("first.weight", 0), ("first.bias", 0), ("again.weight", 0), ("again.weight", 1), ("again.bias", 0),
        ("head.weight", 1),
    ]  # fmt: skip


def test_the_network_is_left_as_it_was() -> None:
    module = Logits(Recurrent(nn.LSTM)).train()
    before = copy.deepcopy(module.state_dict())
    inputs = (torch.randint(1, 50, (2, 9)),)
    standing(module, inputs, structure_of(module, inputs))
    assert module.training
    assert all(torch.equal(own, before[name]) for name, own in module.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in module.modules())


def test_what_the_network_raises_is_raised() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        structure_of(nn.Linear(4, 2), (torch.randn(2, 5),))
