"""What lies in the tree of a graph's module and is named by no node."""

from __future__ import annotations

from torch import fx, nn


def unnamed(module: nn.Module) -> list[str]:
    """Layers and tensors, each by the shortest name below which nothing is needed."""
    assert isinstance(module, fx.GraphModule)
    layers = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    tensors = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    needed = {above for name in (*layers, *tensors) for above in _parents(name)} | layers | tensors
    found: list[str] = []
    _search(module, "", layers, needed, found)
    return found


def _search(holder: nn.Module, path: str, layers: set[str], needed: set[str], found: list[str]) -> None:
    if path in layers:
        return
    for name in (*holder._parameters, *holder._buffers):
        own = f"{path}.{name}".lstrip(".")
        if own not in needed and getattr(holder, name) is not None:
            found.append(own)
    for name, child in holder.named_children():
        own = f"{path}.{name}".lstrip(".")
        if own in needed:
            _search(child, own, layers, needed, found)
        elif any(True for _ in (*child.parameters(), *child.buffers())):
            found.append(own)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
