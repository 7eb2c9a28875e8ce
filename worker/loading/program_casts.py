"""Weights of a program stored in fewer bits than it computes in: a cast behind each, written and read again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from worker.loading.program_graph import NARROW

_CAST = torch.ops.aten.to.dtype


def store_narrow(exported: torch.export.ExportedProgram, casts: Mapping[str, torch.dtype]) -> None:
    """Stores weights and buffers in the dtypes of `casts`, in place, and widens them to what they were where they are
    used: the program computes as before."""
    graph, signature = exported.graph, exported.graph_signature
    names: Mapping[str, str] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    narrow: dict[tuple[Any, ...], Tensor] = {}  # a weight that has several names is stored once
    for node in inputs:
        name = names.get(node.name, "")
        if name not in casts or name not in exported.state_dict:
            continue
        wide, tensor, readers = node.meta["val"], exported.state_dict[name], list(node.users)
        with graph.inserting_after(inputs[-1]):
            cast = graph.call_function(_CAST, (node, wide.dtype))
        for reader in readers:
            reader.replace_input_with(node, cast)
        cast.meta["val"], node.meta["val"] = wide, wide.to(casts[name])
        place = tensor.data_ptr(), tensor.shape, tensor.stride(), casts[name]
        if place not in narrow:
            own = tensor.detach().to(casts[name])
            narrow[place] = nn.Parameter(own, False) if isinstance(tensor, nn.Parameter) else own
        exported.state_dict[name] = narrow[place]
    exported.graph_module.recompile()


def take_casts(graph: fx.Graph, stored: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Takes the casts out of a graph whose weights have all become float32, in place; the dtypes of what had one.

    `stored` are those of the file. A weight that anything uses as it is stored keeps its casts.
    """
    found = {}
    for node in graph.find_nodes(op="get_attr"):
        narrow = stored.get(str(node.target), torch.float32) in (torch.float16, torch.bfloat16)
        if not narrow or not node.users or not all(map(_widens, node.users)):
            continue
        found[str(node.target)] = stored[str(node.target)]
        for cast in list(node.users):
            cast.replace_all_uses_with(node)
            graph.erase_node(cast)
    return found


def _widens(node: fx.Node) -> bool:
    """Whether the file itself says float32: a narrow dtype that it says has become float32 in reading, with a note."""
    return node.target == _CAST and tuple(node.args[1:]) == (torch.float32,) and NARROW not in node.meta
