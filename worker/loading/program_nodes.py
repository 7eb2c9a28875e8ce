"""Reading fx nodes of aten operators: by name, with arguments by the names of the operator's schema."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def operator_name(node: fx.Node) -> str:
    """ "conv2d" of aten.conv2d.default; empty for a node of another kind."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return node.target._schema.name.removeprefix("aten::")


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments by name, those left out with their defaults."""
    assert isinstance(node.target, torch._ops.OpOverload)
    found = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            found[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        else:
            found[argument.name] = argument.default_value
    return found


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Gives an argument of `node`, which must have been given before, another value."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    index = names.index(name)
    if index < len(node.args):
        node.update_arg(index, value)
    else:
        node.update_kwarg(name, value)


def is_plain(value: Any) -> bool:
    """Whether a value is known before the program runs."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return not isinstance(value, fx.Node)


def attribute(value: Any) -> str | None:
    """The name of the weight or buffer that a value is, if it is one."""
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else None
