"""torch.fx at a network that others wrote: what tracing runs of it leaves no trace in it, and what it raises has a line."""

import os
import traceback
from collections.abc import Container, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import fx, nn

from dzhpc.errors import InputError


class _Tracer(fx.Tracer):
    """Buffers are part of the graph: what the forward pass writes to them must happen in each run, not while tracing.

    Nobody can look into a scripted module.
    """

    proxy_buffer_attributes = True

    def __init__(self, whole: Container[type]):
        super().__init__()
        self._whole = whole

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, torch.jit.ScriptModule) or type(m) in self._whole
        return known or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, name: str, engine: str, whole: Container[type]) -> fx.GraphModule:
    """A module as a graph. name, engine: for the errors. whole: layers of users that are kept whole, too. Raises InputError."""
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(f'engine "{engine}": torch.fx cannot trace {name}, a scripted module; use engine = "full"')
    with _as_found(model) as assigned:
        try:
            with _of_inputs_alone(model):
                graph = _Tracer(whole).trace(model)
            module = fx.GraphModule(model, graph)
        except Exception as error:  # tracing runs the user's forward, which may raise anything
            text = f"{' '.join(str(error).split())}{_place(error)}"
            raise InputError(f'engine "{engine}": torch.fx cannot trace {name} ({text}); use engine = "full"') from None
    if assigned:
        raise InputError(
            f'{name} assigns its buffer {assigned[0]} in forward, which engine "{engine}" cannot repeat; use engine = "full"'
        )
    return module


@contextmanager
def _of_inputs_alone(model: nn.Module) -> Iterator[None]:
    """Within, ``forward`` takes the batch and nothing else: torch.fx would trace values for ``labels=None``, ``*args``, too."""
    kind = type(model)
    call = lambda self, inputs: vars(self).get("forward", partial(kind.forward, self))(inputs)  # noqa: E731
    model.__class__ = type(kind.__name__, (kind,), {"forward": call, "__module__": kind.__module__})
    try:
        yield
    finally:
        model.__class__ = kind


@contextmanager
def _as_found(model: nn.Module) -> Iterator[list[str]]:
    """Afterwards the attributes of all modules are what they were; the list then names the buffers that were assigned.

    So is what dicts, lists and sets among the attributes hold: a network that keeps its last features would keep a trace's.
    """
    own = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    found, assigned = [(m, dict(vars(m)), dict(m._buffers)) for m in own], []
    holders = [(v, v.copy()) for m in own for v in vars(m).values() if type(v) in (dict, list, set)]
    try:
        yield assigned
    finally:
        for module, attributes, buffers in found:
            assigned += [key for key, b in module._buffers.items() if buffers.get(key, module) is not b]
            module._buffers.clear()
            module._buffers.update(buffers)
            vars(module).clear()
            vars(module).update(attributes)
        for holder, content in holders:
            holder.clear()
            holder.extend(content) if isinstance(holder, list) else holder.update(content)


def _place(error: Exception) -> str:
    """The line of the user's code that raised an error, if it was the user's."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{os.sep}torch{os.sep}" not in f.filename]
    at = frames[-1] if frames else None
    return f": {at.line!r}, {os.path.basename(at.filename)} line {at.lineno}" if at and at.filename != __file__ else ""
