"""Attention and rotary positions as the operators of opset 23."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from worker.loading.onnx_ops.errors import Unsupported
from worker.loading.onnx_ops.node import Node


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    heads: tuple[int, int],
    scale: float | None,
    causal: bool,
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017) on [batch, heads, steps, width], or [batch, steps, all heads].

    Fewer heads of keys and values than of queries are shared between groups (Ainslie et al. 2023).
    """
    flat = query.ndim == 3
    if flat:
        counts = (heads[0], heads[1], heads[1])
        query, key, value = (
            part.reshape(*part.shape[:2], count, -1).transpose(1, 2)
            for part, count in zip((query, key, value), counts, strict=True)
        )
    if query.shape[1] != key.shape[1]:
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    answer = functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale)
    return answer.transpose(1, 2).flatten(2) if flat else answer


def rotary(
    a: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, *, heads: int, interleaved: bool, width: int
) -> Tensor:
    """Rotary position embedding (Su et al. 2021) on [batch, heads, steps, width] or [batch, steps, all heads]."""
    flat = a.ndim == 3
    x = a.reshape(*a.shape[:2], heads, -1) if flat else a.transpose(1, 2)
    turned, rest = (x, None) if width in (0, x.shape[-1]) else (x[..., :width], x[..., width:])
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    real, imaginary = first * cos - second * sin, first * sin + second * cos
    turned = torch.stack((real, imaginary), -1).flatten(-2) if interleaved else torch.cat((real, imaginary), -1)
    x = turned if rest is None else torch.cat((turned, rest), -1)
    return x.flatten(2) if flat else x.transpose(1, 2)


# --- builders ---------------------------------------------------------------------------------------------------


def build_attention(node: Node) -> Any:
    if node.has(4) or node.has(5) or any(node.wants(position) for position in (1, 2, 3)):
        raise Unsupported("keeps keys and values of earlier steps, or gives its scores")
    if node.attribute("softcap", 0.0):
        raise Unsupported("caps its scores")
    causal = bool(node.attribute("is_causal", 0))
    if causal and node.has(3):
        raise Unsupported("is causal and has a mask as well")
    mask = node.tensor(3) if node.has(3) else None
    heads = (node.attribute("q_num_heads", 0), node.attribute("kv_num_heads", 0))
    parts = [node.tensor(position) for position in range(3)]
    return node.call(attention, *parts, mask, heads=heads, scale=node.attribute("scale"), causal=causal)


def build_rotary(node: Node) -> Any:
    positions = node.tensor(3) if node.has(3) else None
    return node.call(
        rotary,
        *(node.tensor(position) for position in range(3)),
        positions,
        heads=node.attribute("num_heads", 0),
        interleaved=bool(node.attribute("interleaved", 0)),
        width=node.attribute("rotary_embedding_dim", 0),
    )
