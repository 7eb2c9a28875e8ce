"""How an exported program is called and what it gives: read from its treespecs, which name Python types.

torch's own reader looks those types up; here they are compared with the few that nest plain tensors, and nothing more.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from app.contract.errors import ModelRejected
from worker.vetting.pt2_schema import TreeNode

MAX_SPEC = 1 << 16  # characters
_HUGGING_FACE_OUTPUT = re.compile(r"transformers\.[a-z0-9_.]+\.[A-Z][A-Za-z0-9]*")
_DICTIONARIES = frozenset({"builtins.dict", "collections.OrderedDict"})
_KEYWORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Call:
    """How the program is called: so many positional arguments, then these keywords; and what it gives.

    `output` is the position of the logits among the graph's outputs, `wrapped` what they come in: nothing, a list, a
    tuple, or a dictionary under `key`.
    """

    positional: int
    keywords: tuple[str, ...]
    output: int
    wrapped: str | None
    key: str


def read_call(in_spec: str, out_spec: str) -> Call:
    """Raises ModelRejected unless the arguments are plain tensors and the logits can be told among the results."""
    positional, keywords = _arguments(_tree(in_spec))
    output, wrapped, key = _result(_tree(out_spec))
    return Call(positional, keywords, output, wrapped, key)


def _tree(text: str) -> TreeNode:
    """A treespec: `[1, {"type": …, "context": …, "children_spec": […]}]`. The types it names are never looked up."""
    try:
        if len(text) > MAX_SPEC:
            raise ValueError("too long")
        version, tree = json.loads(text)
        if version != 1:
            raise ValueError("unknown version")
        return TreeNode.model_validate(tree)
    except (ValueError, TypeError, RecursionError):
        raise ModelRejected("The program's treespec, which says how arguments nest, cannot be read.") from None


def _arguments(tree: TreeNode) -> tuple[int, tuple[str, ...]]:
    match tree:
        case TreeNode(
            type="builtins.tuple",
            children_spec=[TreeNode(type="builtins.tuple") as args, TreeNode(type="builtins.dict") as kwargs],
        ) if all(child.type is None for child in (*args.children_spec, *kwargs.children_spec)):
            names = _keys(kwargs)
            if all(_KEYWORD.fullmatch(name) for name in names):
                return len(args.children_spec), names
    raise ModelRejected(
        "The program takes arguments that are nested or of types of their own: export a model whose forward takes "
        "tensors, by position or by name."
    )


def _result(tree: TreeNode) -> tuple[int, str | None, str]:
    if tree.type is None:
        return 0, None, ""
    if tree.type in ("builtins.tuple", "builtins.list") and len(tree.children_spec) == 1 and _leaves(tree) == 1:
        return 0, tree.type.removeprefix("builtins."), ""
    if tree.type in _DICTIONARIES or _HUGGING_FACE_OUTPUT.fullmatch(tree.type):
        names = _keys(tree)
        # A dictionary of one needs no particular name.
        key = names[0] if len(names) == 1 else "logits"
        if key in names and tree.children_spec[names.index(key)].type is None:
            at = names.index(key)
            return sum(_leaves(child) for child in tree.children_spec[:at]), "dict", key
    raise ModelRejected(
        f"The program gives {_leaves(tree)} tensors in a {tree.type[:80]!r}: export a model that gives one tensor, or "
        "a dictionary with the key 'logits'."
    )


def _keys(tree: TreeNode) -> tuple[str, ...]:
    """The keys of a dictionary in their order, which its context holds as JSON."""
    try:
        keys = json.loads(tree.context or "null")
    except (ValueError, RecursionError):
        keys = None
    if not isinstance(keys, list) or len(keys) != len(tree.children_spec):
        raise ModelRejected("The program's treespec has a dictionary whose keys do not fit its values.")
    if not all(isinstance(key, str) and len(key) <= 256 and key.isprintable() for key in keys):
        raise ModelRejected("The program's treespec has a dictionary with keys that are no names.")
    return tuple(keys)


def _leaves(tree: TreeNode) -> int:
    return 1 if tree.type is None else sum(_leaves(child) for child in tree.children_spec)
