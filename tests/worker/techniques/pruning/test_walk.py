"""Stages of a network: each layer once, blocks by what the blocks before them give."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from worker.techniques.pruning.inputs import watching
from worker.techniques.pruning.walk import Shortcut, stages


class Logits(nn.Module):
    """What Tersor wraps networks of transformers in: one tensor comes out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = self.network(input_ids=ids, attention_mask=mask).logits
        return found


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=60, tie_word_embeddings=False,
    )  # fmt: skip
    return Logits(LlamaForCausalLM(config)).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=60)
    return Logits(BertForSequenceClassification(config)).eval()


def batches() -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(0, 60, (4, 9), generator=generator), torch.ones(4, 9, dtype=torch.long)) for _ in range(3)]


def linears(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("make", [llama, bert])
def test_blocks_see_what_the_blocks_before_them_have_become(make: object) -> None:
    module: nn.Module = make()  # type: ignore[operator]
    changed = copy.deepcopy(module)
    given = batches()
    seen: list[nn.Module] = []
    moments = {}
    sizes = []
    for stage in stages(changed, given, linears(changed)):
        with watching(stage.layers, full=False) as found:
            stage.run()
        sizes.append(len(stage.layers))
        seen += stage.layers
        for layer, own in zip(stage.layers, found, strict=True):
            moments[layer] = own.sum
        for layer in stage.layers:
            with torch.no_grad():
                layer.get_parameter("weight").mul_(0.9)
    assert sorted(map(id, seen)) == sorted(map(id, linears(changed)))
    assert len([size for size in sizes if size > 1]) == 3  # the blocks
    # By hand: each layer's inputs in a network in which all stages before its own are changed already.
    order = {id(layer): number for number, layer in enumerate(linears(changed))}
    stage_of, start = {}, 0
    for number, size in enumerate(sizes):
        for layer in seen[start : start + size]:
            stage_of[order[id(layer)]] = number
        start += size
    for number in range(len(sizes)):
        partly = copy.deepcopy(module)
        for place, layer in enumerate(linears(partly)):
            if stage_of[place] < number:
                with torch.no_grad():
                    layer.get_parameter("weight").mul_(0.9)
        own = [layer for place, layer in enumerate(linears(partly)) if stage_of[place] == number]
        theirs = [layer for place, layer in enumerate(linears(changed)) if stage_of[place] == number]
        with watching(own, full=False) as found, torch.no_grad():
            for batch in given:
                partly(*batch)
        for layer, one in zip(theirs, found, strict=True):
            torch.testing.assert_close(moments[layer], one.sum, rtol=1e-4, atol=1e-4)


def test_only_one_blocks_inputs_are_held() -> None:
    given = batches()
    module = llama()
    held = [stage.held_bytes for stage in stages(module, given, linears(module))]
    assert set(held[:3]) == {3 * 4 * 9 * 32 * 4}


def test_a_network_without_a_row_of_blocks_goes_layer_by_layer() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    found = [stage.layers for stage in stages(module, [(torch.randn(5, 4),)], linears(module))]
    assert found == [[module[0]], [module[2]]]


def test_what_lies_in_front_of_a_row_comes_first_and_what_lies_behind_it_last() -> None:
    class Row(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])

        def forward(self, given: Tensor) -> Tensor:
            given = self.stem(given)
            for block in self.blocks:
                given = block(given)
            found: Tensor = self.head(given)
            return found

    module, seen = Row().eval(), list[float]()
    order = [module.stem, *(block[0] for block in module.blocks), module.head]  # type: ignore[index]
    found = []
    for stage in stages(module, [(torch.ones(5, 4),)], order):
        found += stage.layers
        with watching(stage.layers, full=False) as moments:
            stage.run()
        seen.append(float(moments[0].sum.sum()))  # type: ignore[union-attr]
        with torch.no_grad():
            for layer in stage.layers:
                layer.get_parameter("weight").zero_()
                layer.get_parameter("bias").fill_(len(seen))
    assert found == order
    assert seen == [20, 20, 80, 180]  # each sees what those before it have become


class Shuffled(nn.Module):
    """A row of blocks that do not hand their outputs on."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(3)])

    def forward(self, given: Tensor) -> Tensor:
        return sum((block(given) for block in self.blocks), torch.zeros(()))


def test_blocks_side_by_side_are_no_row() -> None:
    module = Shuffled().eval()
    found = [len(stage.layers) for stage in stages(module, [(torch.randn(5, 4),)], linears(module))]
    assert found == [1, 1, 1]


@pytest.mark.parametrize("make", [llama, bert])
def test_passes_that_begin_at_a_block_give_what_whole_ones_give(make: Callable[[], nn.Module]) -> None:
    """Forwards, backwards and for layers of no block; what lies in front is not computed again."""
    module, given = make(), batches()
    layers = linears(module)
    passes = Shortcut(module, given, layers)
    computed: list[nn.Module] = []
    fewest = len(layers)
    for layer in layers:
        layer.register_forward_hook(lambda own, _, __: computed.append(own))
    with torch.no_grad():
        for layer in [*layers, *layers[::-1]]:
            passes.begin_at(layer)
            saved = layer.weight.clone()  # type: ignore[operator]
            layer.weight.mul_(1.5)  # type: ignore[operator]
            computed.clear()
            found = passes.run(1)
            assert layer in computed
            fewest = min(fewest, len(computed))
            torch.testing.assert_close(found, module(*given[1]), rtol=0, atol=0)
            layer.weight.copy_(saved)  # type: ignore[operator]
    assert fewest < len(layers) / 2  # from the last block on
    assert "forward" not in {name for own in module.modules() for name in vars(own)}
