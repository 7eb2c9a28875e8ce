"""Layers that lost units say their new sizes, and told again the loss makes the same shapes."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.worker.structure.nets import OWN, found
from worker.structure import edits
from worker.structure.groups import Group, structure_of
from worker.structure.sound import standing, without


def halved(name: str, *which: int) -> tuple[nn.Module, dict[str, Any], nn.Module]:
    """A network without the first half of the units of its groups, or of some, the edit, and the network as it was."""
    own = found(name)
    chosen = [own.groups[place] for place in which] or own.groups
    made, edit = without(own.module, own.structure, chosen, {group.name: kept(group) for group in chosen})
    return made, edit, own.module


def kept(group: Group) -> Tensor:
    return torch.arange(group.units)[group.units // 2 :]


def test_layers_say_their_new_sizes() -> None:
    made, _, _ = halved("chain", 0, 1)
    first, norm, _, _, second, _, _, linear = list(made)[:8]  # type: ignore[call-overload]
    assert (first.in_channels, first.out_channels) == (3, 4)
    assert norm.num_features == 4
    assert norm.running_mean.shape == norm.running_var.shape == norm.weight.shape == (4,)
    assert (second.in_channels, second.out_channels) == (4, 6)
    assert (linear.in_features, linear.out_features) == (6 * 16, 14)


def test_depthwise_and_grouped_convolutions_keep_what_they_are() -> None:
    made, _, _ = halved("depthwise")
    one, two, last = made[1], made[4], made[5]  # type: ignore[index]
    assert (one.in_channels, one.out_channels, one.groups) == (4, 4, 4)
    assert (two.in_channels, two.out_channels, two.groups) == (4, 8, 4)
    assert (last.in_channels, last.out_channels, last.groups) == (8, 3, 1)
    made, _, _ = halved("grouped")
    own = made[2]  # type: ignore[index]
    assert (own.in_channels, own.out_channels, own.groups) == (8, 12, 4)


def test_transposed_convolutions_have_their_inputs_first() -> None:
    made, _, _ = halved("transposed")
    first, second = made[2], made[4]  # type: ignore[index]
    assert (first.in_channels, first.out_channels, first.groups) == (4, 4, 1)
    assert (second.in_channels, second.out_channels, second.groups) == (4, 4, 2)


def test_group_norms_keep_their_groups_or_one_a_channel() -> None:
    made, _, _ = halved("group_norm")
    assert [(made[place].num_groups, made[place].num_channels) for place in (1, 4)] == [(4, 4), (3, 3)]  # type: ignore[index]


@pytest.mark.parametrize(("name", "gates"), [("lstm_deep", 4), ("gru_both_ways", 3)])
def test_recurrent_layers_have_fewer_units(name: str, gates: int) -> None:
    made, _, module = halved(name, 0, 1)
    own, before = made.layer, module.layer
    assert (before.input_size, before.hidden_size) == (12, 8)
    assert (own.input_size, own.hidden_size) == (6, 4)
    assert own.weight_hh_l0.shape[0] == gates * 4
    # Torch computes with this list, not with the attributes.
    assert all(
        flat is getattr(own, named) for flat, named in zip(own._flat_weights, own._flat_weights_names, strict=True)
    )


def test_a_projection_of_a_recurrent_layer_shrinks() -> None:
    made, _, _ = halved("lstm_projected", 1)
    assert (made.layer.hidden_size, made.layer.proj_size) == (8, 3)


def test_an_embedding_and_a_norm_of_layers_shrink() -> None:
    made, _, _ = halved("bert")
    embeddings = made.get_submodule("inner.bert.embeddings")
    assert embeddings.word_embeddings.embedding_dim == 16
    assert embeddings.word_embeddings.num_embeddings == 50
    assert embeddings.LayerNorm.normalized_shape == (16,)


@pytest.mark.parametrize(
    ("name", "path", "before", "after"),
    [
        ("bert", "inner.bert.encoder.layer.0.attention.self", {"num_attention_heads": 4, "all_head_size": 32},
         {"num_attention_heads": 2, "all_head_size": 16}),
        ("gpt2", "inner.transformer.h.1.attn", {"num_heads": 4, "split_size": 32}, {"num_heads": 2, "split_size": 16}),
    ],
)  # fmt: skip
def test_attention_says_how_many_heads_it_has(
    name: str, path: str, before: dict[str, int], after: dict[str, int]
) -> None:
    made, edit, module = halved(name)
    was, now = vars(module.get_submodule(path)), vars(made.get_submodule(path))
    assert {key: was[key] for key in before} == before
    assert {key: now[key] for key in after} == after
    assert edit["attributes"][path].items() >= after.items()


def test_layers_that_keep_all_keep_their_attributes() -> None:
    own = found("bert")
    (heads, *_) = (group for group in own.groups if group.in_blocks)
    _, edit = without(own.module, own.structure, [heads], {heads.name: torch.arange(heads.units)})
    assert edit["lengths"] == {}
    assert edit["attributes"] == {}


@pytest.mark.parametrize(("name", "one", "other"), [("tied", "table", "head")])
def test_parameters_that_are_shared_stay_shared(name: str, one: str, other: str) -> None:
    made, _, module = halved(name, 0)
    first, second = made.get_submodule(one), made.get_submodule(other)
    assert first.weight is second.weight
    assert first.weight.shape == (50, 6)
    assert second.in_features == 6
    assert sum(1 for _ in made.parameters()) == sum(1 for _ in module.parameters())


@pytest.mark.parametrize("name", [*OWN, "bert", "distilbert", "gpt2", "llama", "convnext", "swin"])
def test_told_again_on_the_upload_it_makes_the_same_shapes(name: str) -> None:
    made, edit, module = halved(name)
    told = json.loads(json.dumps(edit))
    assert told == edit
    again = copy.deepcopy(module)
    edits.apply(again, [told])
    shapes = {name: own.shape for name, own in made.state_dict().items()}
    assert {name: own.shape for name, own in again.state_dict().items()} == shapes
    assert shapes != {name: own.shape for name, own in module.state_dict().items()}
    again.load_state_dict(made.state_dict())
    with torch.no_grad():
        assert all(torch.equal(again.eval()(*inputs), made(*inputs)) for inputs in found(name).inputs)


def test_edits_follow_each_other() -> None:
    once, first, module = halved("lenet", 0)
    inputs = (torch.randn(2, 1, 28, 28),)
    structure = structure_of(once, inputs)
    (group, *_) = standing(once, inputs, structure)[0]
    twice, second = without(once, structure, [group], {group.name: torch.tensor([1, 4, 9])})
    again = copy.deepcopy(module)
    edits.apply(again, [first, second])
    assert [own.shape for own in again.parameters()] == [own.shape for own in twice.parameters()]
    assert again[0].out_channels == again[2].in_channels == 3  # type: ignore[index]


def test_what_is_kept_keeps_its_values_and_the_network_its_own() -> None:
    made, _, module = halved("lenet", 1)
    assert torch.equal(made[2].weight, module[2].weight[25:])  # type: ignore[index]
    assert torch.equal(made[5].weight, module[5].weight[:, 25 * 16 :])  # type: ignore[index]
    assert module[2].out_channels == 50  # type: ignore[index]


@pytest.mark.parametrize("other", [nn.Sequential(nn.Linear(3, 3)), nn.Sequential(), nn.Linear(20, 20)])
def test_an_edit_of_another_network_is_refused_as_a_checkpoint_counts_on(other: nn.Module) -> None:
    """With what `retake` takes for a structure that is not of this network."""
    _, edit, _ = halved("lenet", 0)
    with pytest.raises((AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)):
        edits.apply(copy.deepcopy(other), [edit])
