"""What layers give, taken during a forward pass."""

from __future__ import annotations

import torch

from tests.worker.helpers import convnet
from tests.worker.nets import bert
from worker.training.distilling.recording import Tap, recording


def test_outputs_and_inputs_are_those_of_the_pass() -> None:
    network = convnet().eval()
    inputs = torch.randn(2, 1, 8, 8)
    with recording(network, [Tap("2"), Tap("8", "input")]) as taken, torch.no_grad():
        network(inputs)
        assert torch.equal(taken[Tap("2")], network[:3](inputs))
        assert torch.equal(taken[Tap("8", "input")], network[:8](inputs))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in network.modules())


def test_attention_probabilities_are_those_that_transformers_gives() -> None:
    network = bert()
    ids = torch.tensor([[3, 4, 5, 0], [6, 7, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    config = network.inner.config
    assert config._attn_implementation == "sdpa"
    tap = Tap("inner.bert.encoder.layer.1.attention.self", "attention")
    with torch.no_grad():
        plain = network(ids, mask)
        with recording(network, [tap]) as taken:
            torch.testing.assert_close(network(ids, mask), plain)
        assert config._attn_implementation == "sdpa"
        config._attn_implementation = "eager"
        expected = network.inner(input_ids=ids, attention_mask=mask, output_attentions=True).attentions[1]
    torch.testing.assert_close(taken[tap], expected)
    torch.testing.assert_close(taken[tap].sum(-1), torch.ones(2, 2, 4))
