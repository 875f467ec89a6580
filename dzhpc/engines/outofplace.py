"""In-place operations of a traced network, and tensors by keyword, rewritten.

In-place operations would overwrite kept features, so they are replaced by their out-of-place forms, and later readers of the
overwritten value read the result instead.
"""

import copy
import inspect
import operator

import torch
from torch import Tensor, fx
from torch.fx.operator_schemas import get_signature_for_torch_op

from dzhpc.errors import InputError

OUT_OF_PLACE = {
    getattr(operator, f"i{name.rstrip('_')}"): getattr(operator, name)
    for name in ["add", "sub", "mul", "truediv", "floordiv", "mod", "matmul", "pow", "and_", "or_", "xor", "lshift", "rshift"]
}


def remove_in_place(module: fx.GraphModule, name: str, engine: str) -> None:
    """Replace in-place operations; raise InputError for those that have no out-of-place form."""
    graph = module.graph
    for node in list(graph.nodes):
        if not _make_out_of_place(module, node, name, engine):
            continue
        overwritten, seen = node.args[0], False
        for later in graph.nodes:
            if seen:
                later.replace_input_with(overwritten, node)
            seen = seen or later is node
    graph.lint()
    module.recompile()


def take_by_position(module: fx.GraphModule) -> None:
    """Tensors that an operation takes by keyword become positional, where its arguments are known: rules find them at one place.

    Hooks see arguments as the user gave them.
    """
    for node in module.graph.nodes:
        if all(a in _nodes_in(node.args) for a in node.all_input_nodes):
            continue
        for signature in _signatures(module, node):
            try:
                bound = signature.bind(*node.args, **node.kwargs)
            except TypeError:
                continue
            node.args, node.kwargs = bound.args, bound.kwargs
            break
    module.recompile()


def _signatures(module: fx.GraphModule, node: fx.Node) -> list[inspect.Signature]:
    """What an operation may be called with; [] where that is not known, or not to be changed."""
    target = node.target
    if node.op == "call_module":
        leaf = module.get_submodule(target)
        return [] if leaf._forward_hooks or leaf._forward_pre_hooks else [inspect.signature(leaf.forward)]
    if node.op == "call_method":
        target = getattr(torch, target, None)
    if not callable(target):
        return []
    try:
        return [inspect.signature(target)]
    except (TypeError, ValueError):  # it is written in C++
        return get_signature_for_torch_op(target) or []


def _nodes_in(arguments: object) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(arguments, found.append)
    return found


def _is_state(node: object) -> bool:
    """Whether a node is a buffer, or what an in-place method left of it."""
    if not isinstance(node, fx.Node):
        return False
    return node.op == "get_attr" or (node.op == "call_method" and node.target.endswith("_") and _is_state(node.args[0]))


def _make_out_of_place(module: fx.GraphModule, node: fx.Node, name: str, engine: str) -> bool:
    """Rewrite one node; True if it was in-place. A buffer may be overwritten: that is the network's own bookkeeping."""
    if node.args and _is_state(node.args[0]):
        return False
    if node.op == "call_module":
        leaf = module.get_submodule(node.target)
        if not getattr(leaf, "inplace", False):
            return False
        leaf = copy.copy(leaf)  # shares parameters and buffers with the user's module, which stays as it is
        leaf.inplace = False
        module.set_submodule(node.target, leaf)
        return True
    if node.op == "call_function" and node.target in OUT_OF_PLACE:
        node.target = OUT_OF_PLACE[node.target]
        return True
    if node.op == "call_function" and node.kwargs.get("inplace"):
        node.update_kwarg("inplace", False)
        return True
    if node.op not in ("call_method", "call_function"):
        return False
    method = node.op == "call_method"
    target = node.target if method else getattr(node.target, "__name__", "")
    out = node.kwargs.get("out") is not None
    if target != "setitem" and not out and (not target.endswith("_") or target.endswith("__")):
        return False
    homes = [Tensor] if method else [torch, torch.nn.functional]
    plain = next((getattr(home, target[:-1]) for home in homes if callable(getattr(home, target[:-1], None))), None)
    if plain is None or out:
        raise InputError(
            f'{name} overwrites a tensor by {target} (node {node.name}), which engine "{engine}" cannot undo; use engine = "full"'
        )
    node.target = target[:-1] if method else plain
    return True
