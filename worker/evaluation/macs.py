"""Multiply-accumulates of a torch module, counted while it runs."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from worker.data.batch import Inputs
from worker.export.quiet import quiet

FLOPS_PER_MAC = 2  # torch counts a multiplication and an addition as two


def module_macs(module: nn.Module, inputs: Inputs) -> int:
    """MACs of convolutions, matrix products, attention and recurrent layers in one forward pass; biases, norms and
    activations are not counted, as is usual. Zeros count: the figure says what a dense runtime computes."""
    return int(_counted(module, inputs).get_total_flops()) // FLOPS_PER_MAC


def layer_macs(module: nn.Module, inputs: Inputs) -> dict[str, int]:
    """The same by the name of each module, with those of the modules inside it; "" is the whole."""
    found = {}
    for name, counts in _counted(module, inputs).get_flop_counts().items():
        # The counter calls modules by the root's class: "Sequential.0.1".
        path = "" if name == "Global" else name.partition(".")[2]
        found[path] = sum(counts.values()) // FLOPS_PER_MAC
    return found


def _counted(module: nn.Module, inputs: Inputs) -> FlopCounterMode:
    counter = FlopCounterMode(display=False)
    was_fast = torch.backends.mha.get_fastpath_enabled()
    # Fused kernels (recurrent layers in oneDNN, the encoder layer's fast path, flash attention) hide their products
    # from the counter; their plain forms compute the same ones in the open.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            quiet(),  # switching oneDNN off warns about Intel GPUs
            torch.no_grad(),
            torch.backends.mkldnn.flags(enabled=False),
            sdpa_kernel(SDPBackend.MATH),
            counter,
        ):
            module(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fast)
    return counter
