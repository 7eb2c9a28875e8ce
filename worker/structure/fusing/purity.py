"""Which nodes of a graph compute the same whenever they run, and which tensors are written to after they were made."""

from __future__ import annotations

import torch
from torch import fx, nn

_OWN = ("worker.loading.onnx_ops.", "worker.loading.heads")  # functions of tensors and numbers alone
_PLAIN = ("_operator", "operator", "math", "builtins")
# Layers that draw numbers or count what they have seen, in training.
_IMPURE = (nn.modules.batchnorm._NormBase, nn.RNNBase, nn.modules.dropout._DropoutNd)
_DRAWS = ("dropout", "rand", "normal", "bernoulli", "multinomial", "poisson")
_LAYERS = "torch.nn.modules."


def is_pure(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether two such nodes give the same, in training too."""
    if node.op == "get_attr":
        return True
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        return type(layer).__module__.startswith(_LAYERS) and not isinstance(layer, _IMPURE) and not _in_place(layer)
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        random = torch.Tag.nondeterministic_seeded in node.target.tags
        return not node.target._schema.is_mutable and not random and "dropout" not in node.target._schema.name
    home, name = (getattr(node.target, own, None) or "" for own in ("__module__", "__name__"))
    if home.startswith(_OWN) or home in _PLAIN:
        return True
    # Of torch's own functions, whose C ones say no module.
    return (home.startswith("torch") or not home) and not name.endswith("_") and not any(one in name for one in _DRAWS)


def mutated(module: fx.GraphModule) -> set[fx.Node]:
    """What is written to in place, with all that may share memory with it."""
    root: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while (above := root.get(node, node)) is not node:
            root[node] = root.get(above, above)
            node = above
        return node

    written = []
    for node in module.graph.nodes:
        if _may_share(module, node):
            for one in node.all_input_nodes:
                root[find(one)] = find(node)
        if _writes(module, node):
            written.append(node)
    groups = {find(node) for node in written}
    return {node for node in module.graph.nodes if groups and find(node) in groups}


def _writes(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return _in_place(module.get_submodule(str(node.target)))
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _may_share(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether what a node gives may lie where what comes in does."""
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        return _in_place(layer) or next(layer.parameters(), None) is None
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema
        return schema.is_mutable or any(one.alias_info is not None for one in schema.returns)
    return True


def _in_place(layer: nn.Module) -> bool:
    return bool(getattr(layer, "inplace", False))
