"""Tasks: what is trained. The trainer sees only the protocol."""

import inspect

import torch

from dzhpc.config import Config, called, import_object
from dzhpc.errors import InputError
from dzhpc.tasks.protocol import Cost, Task

__all__ = ["TASKS", "Cost", "Task", "make_task"]
TASKS = {  # by name, so that no task imports what another one needs
    "classification": "dzhpc.tasks.classification:Classification",
    "objective": "dzhpc.tasks.objective:ObjectiveTask",
    "defense": "dzhpc.tasks.defense.task:DefenseTask",
    "sol": "dzhpc.tasks.sol.task:SolTask",
}


def read(config: Config) -> object:
    """What the constructor of the input's task takes as ``data_set``, from files: one rank may read it for all.

    None for a class that takes none. Raises InputError as :func:`make_task` does.
    """
    cls = _class_of(config)
    return cls.read(config) if _takes_data(cls) else None


def make_task(config: Config, device: torch.device, data_set: object = None) -> Task:
    """The task of ``task.kind``, one of TASKS or a class of the user's own, which gets the further keys of [task] as arguments.

    data_set: what :func:`read` gave. Raises InputError for a class that is no task, keys that it does not take, and data, models
    or functions that do not fit.
    """
    cls, kind, keys = _class_of(config), config.task.kind, config.task.fields
    if _takes_data(cls):
        keys = {**keys, "data_set": cls.read(config) if data_set is None else data_set}
    task = cls(config, device, **keys) if kind in TASKS else called(f'task.kind = "{kind}"', cls, config, device, **keys)
    missing = [name for name in Task.__annotations__ if not hasattr(task, name)]  # the user's class may have forgotten some
    if missing:
        raise InputError(f'task.kind = "{kind}": its constructor sets no {", ".join(missing)}; see dzhpc.tasks.Task')
    return task


def _class_of(config: Config) -> type[Task]:
    kind, keys = config.task.kind, config.task.fields
    cls = import_object(TASKS.get(kind, kind), "task.kind")
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        raise InputError(f'task.kind = "{kind}": expected a class derived from dzhpc.tasks.Task')
    if cls.__abstractmethods__:
        raise InputError(f'task.kind = "{kind}": has no {", ".join(sorted(cls.__abstractmethods__))}; see dzhpc.tasks.Task')
    if config.data.shards > 1 and not cls.in_shards:
        raise InputError(f'data.shards = {config.data.shards}: task.kind = "{kind}" does not cut its batch; leave the key out')
    try:
        inspect.signature(cls).bind(config, torch.device("cpu"), **keys, **({"data_set": None} if _takes_data(cls) else {}))
    except TypeError as error:
        known = ", ".join(name for name in list(inspect.signature(cls).parameters)[2:] if name != "data_set") or "none"
        raise InputError(f'task.kind = "{kind}": {error}; its own keys of [task]: {known}') from None
    return cls


def _takes_data(cls: type[Task]) -> bool:
    return "data_set" in inspect.signature(cls).parameters
