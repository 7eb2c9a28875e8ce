"""Where factors can be moved: found by trying, on networks whose answer is known by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from worker.constraints import impose_mask
from worker.techniques.quantization.folding import Fold, folds


class Logits(nn.Module):
    """A network of transformers whose answer is one tensor."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.network(input_ids=ids).logits
        return found


IDS = (torch.arange(36).reshape(2, 18),)
ROWS = (torch.randn(16, 12, generator=torch.Generator().manual_seed(0)),)


def llama(key_value_heads: int, tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=key_value_heads, vocab_size=60, tie_word_embeddings=tied,
    )  # fmt: skip
    module = Logits(LlamaForCausalLM(config)).eval()
    for name, parameter in module.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return module


def names_of(module: nn.Module, found: list[Fold]) -> set[tuple[str, ...]]:
    names = {layer: name.rpartition("layers.")[2] for name, layer in module.named_modules()}
    return {(names[fold.source], *(names[target] for target in fold.targets)) for fold in found}


def linears(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def block(number: int, values: bool) -> set[tuple[str, ...]]:
    attention, mlp = f"{number}.self_attn", f"{number}.mlp"
    expected: set[tuple[str, ...]] = {
        (f"{number}.input_layernorm", *(f"{attention}.{one}_proj" for one in "qkv")),
        (f"{number}.post_attention_layernorm", f"{mlp}.gate_proj", f"{mlp}.up_proj"),
        (f"{mlp}.up_proj", f"{mlp}.down_proj"),
    }
    return expected | ({(f"{attention}.v_proj", f"{attention}.o_proj")} if values else set())


@pytest.mark.parametrize("heads", [4, 2])
def test_folds_of_a_llama(heads: int) -> None:
    """Values reach the output projection as they are, unless several heads of queries share one of values."""
    module = llama(heads)
    inside = [layer for layer in linears(module) if layer.out_features != 60]
    expected = set.union(*(block(number, heads == 4) for number in range(3)))
    assert names_of(module, folds(module, IDS, inside)) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_reads_the_last_norm(tied: bool) -> None:
    """As long as its weight is not the embedding's too."""
    module = llama(4, tied)
    head = [layer for layer in linears(module) if layer.out_features == 60]  # type: ignore[union-attr]
    expected = set() if tied else {("network.model.norm", "network.lm_head")}
    assert names_of(module, folds(module, IDS, head)) == expected


def test_what_a_sum_reads_too_is_left_alone() -> None:
    """The norms of a BERT also feed the next sum, and GELU lets no factor through."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=60)
    module = Logits(BertForSequenceClassification(config)).eval()
    found = names_of(module, folds(module, IDS, linears(module)))
    names = {(source.rpartition("layer.")[2], *own) for source, *own in found}
    assert {source for source, *_ in names} == {"0.attention.self.value", "1.attention.self.value"}


@pytest.mark.parametrize(("activation", "expected"), [(nn.ReLU(), {("0", "2"), ("2", "4")}), (nn.GELU(), set())])
def test_relu_lets_factors_through_and_gelu_does_not(activation: nn.Module, expected: set[tuple[str, ...]]) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 24), activation, nn.Linear(24, 24), activation, nn.Linear(24, 5)).eval()
    assert names_of(module, folds(module, ROWS, linears(module))) == expected


def test_a_layer_that_is_used_twice_is_left_alone() -> None:
    torch.manual_seed(0)
    twice = nn.Linear(12, 12)
    module = nn.Sequential(twice, nn.ReLU(), twice, nn.ReLU(), nn.Linear(12, 5)).eval()
    assert folds(module, ROWS, linears(module)) == []


def test_trying_leaves_the_network_as_it_was() -> None:
    module = llama(4)
    before = copy.deepcopy(module.state_dict())
    folds(module, IDS, linears(module))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_moved_factors_cancel_each_other() -> None:
    module = llama(4)
    with torch.no_grad():
        expected = module(*IDS)
    for fold in folds(module, IDS, linears(module)):
        fold.move(torch.rand(fold.targets[0].weight.shape[1]) + 0.5)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        torch.testing.assert_close(module(*IDS), expected, rtol=1e-4, atol=1e-5)


def test_masks_hold() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5)).eval()
    mask = torch.rand(5, 24) > 0.5
    impose_mask(module, "2.weight", mask)
    (fold,) = folds(module, ROWS, linears(module))
    fold.move(torch.full((24,), 2.0))
    weight = module[2].weight
    assert isinstance(weight, Tensor)
    assert torch.equal(weight != 0, mask)


@pytest.mark.parametrize("channel", range(12))
def test_a_channel_that_is_read_elsewhere_forbids_it(channel: int) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 5)

        def forward(self, given: Tensor) -> Tensor:
            hidden = self.a(given).relu()
            out: Tensor = self.b(hidden) + hidden[:, channel : channel + 1].sigmoid()
            return out

    torch.manual_seed(channel)
    module = Gated().eval()
    assert folds(module, ROWS, linears(module)) == []
