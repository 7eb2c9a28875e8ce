"""The forms that decomposition leaves, written as the operators that they came from.

`program.run_decompositions()`, and the export of older versions, give `native_layer_norm`, `addmm` on a transposed
weight and the like. The public operators compute the same and, unlike those, check the shapes of what they are given.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from app.contract.errors import ModelRejected
from worker.loading.program_nodes import arguments, attribute, operator_name

aten = torch.ops.aten
Arguments = dict[str, Any]
Call = tuple[torch._ops.OpOverload, tuple[Any, ...], dict[str, Any]]


def to_public_operators(graph: fx.Graph) -> None:
    """Rewrites in place. Raises ModelRejected where something uses the statistics that such a form also gives."""
    for node in list(graph.nodes):
        name = operator_name(node)
        if name in _FIRST_OF_SEVERAL:
            _replace_first(graph, node, _FIRST_OF_SEVERAL[name](arguments(node)))
        elif name in ("addmm", "mm") and (call := _linear(node)) is not None:
            _replace(graph, node, call)
    graph.eliminate_dead_code()


def _batch_norm(given: Arguments) -> Call:
    training = given.get("training", False)
    return (
        aten.batch_norm.default,
        (
            *(given["input"], given["weight"], given["bias"]),
            *(given.get("running_mean"), given.get("running_var")),
            *(training, given["momentum"], given["eps"], False),
        ),
        {},
    )


def _layer_norm(given: Arguments) -> Call:
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    return aten.layer_norm.default, tuple(given[name] for name in names), {}


def _group_norm(given: Arguments) -> Call:
    return aten.group_norm.default, tuple(given[name] for name in ("input", "group", "weight", "bias", "eps")), {}


def _rms_norm(given: Arguments) -> Call:
    return aten.rms_norm.default, tuple(given[name] for name in ("input", "normalized_shape", "weight", "eps")), {}


def _dropout(given: Arguments) -> Call:
    return aten.dropout.default, (given["input"], given["p"], bool(given["train"])), {}


def _attention(given: Arguments) -> Call:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    return (
        aten.scaled_dot_product_attention.default,
        tuple(given[name] for name in names),
        {"scale": given["scale"]},
    )


# Operators that give several tensors, of which networks use the first.
_FIRST_OF_SEVERAL: dict[str, Callable[[Arguments], Call]] = {
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "_native_batch_norm_legit_functional": _batch_norm,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "_fused_rms_norm": _rms_norm,
    "native_dropout": _dropout,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
}


def _linear(node: fx.Node) -> Call | None:
    """addmm(bias, x, weight.t()) and mm(x, weight.t()) as linear(x, weight, bias)."""
    given = arguments(node)
    bias = given["self"] if operator_name(node) == "addmm" else None
    if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1 or (bias is not None and attribute(bias) is None):
        return None
    weight = _untransposed(given["mat2"])
    if weight is None:
        return None
    inputs = given["mat1"] if bias is not None else given["self"]
    return aten.linear.default, (inputs, weight, bias), {}


def _untransposed(value: Any) -> fx.Node | None:
    """The weight of which `value` is the transpose."""
    if not isinstance(value, fx.Node):
        return None
    name = operator_name(value)
    if name not in ("t", "permute", "transpose"):
        return None
    given = arguments(value)
    swapped = {
        "t": True,
        "permute": list(given.get("dims", ())) in ([1, 0], [-1, 0]),
        "transpose": {given.get("dim0"), given.get("dim1")} in ({0, 1}, {0, -1}, {-2, -1}),
    }[name]
    source = given["self"]
    return source if swapped and attribute(source) is not None else None


def _replace(graph: fx.Graph, node: fx.Node, call: Call) -> fx.Node:
    target, args, kwargs = call
    with graph.inserting_before(node):
        made = graph.call_function(target, args, kwargs)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    return made


def _replace_first(graph: fx.Graph, node: fx.Node, call: Call) -> None:
    first = _first(node, list(node.users))
    made = _replace(graph, node, call)
    for item in first:
        made.meta |= {key: item.meta[key] for key in item.meta}
        item.replace_all_uses_with(made)
        graph.erase_node(item)


def _first(node: fx.Node, users: Sequence[fx.Node]) -> list[fx.Node]:
    """The `node[0]` of a node; others must be used by nobody."""
    first = []
    for user in users:
        taken = user.target is operator.getitem and user.args[1] == 0
        if taken:
            first.append(user)
        elif user.users or user.target is not operator.getitem:
            raise ModelRejected(
                f"The program uses the statistics that {node.target} gives beside its result, which is not taken."
            )
    return first
