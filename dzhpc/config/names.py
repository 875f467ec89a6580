"""Python objects that an input file names: ``package.module:Name``."""

import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from dzhpc.config import paths
from dzhpc.errors import DzhpcError, InputError, message_of


def is_function(name: str) -> bool:
    """Whether a name is that of a Python object, ``package.module:Name``, rather than of a file."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


_folders: list[str] = []  # of the inputs at work


def looked_in() -> list[str]:
    """The folders of :func:`look_in`."""
    return list(_folders)


def look_in(*folders: Path) -> None:
    """Look for the user's modules in these folders first, and no more in those of an earlier call.

    What was imported from those is forgotten: two inputs may each have a module of one name. Objects made of it stay.
    """
    new = [str(folder.resolve()) for folder in folders]
    left = [folder for folder in _folders if folder not in new]
    names = {name for name, module in list(sys.modules.items()) if "." not in name and _home(module) in left}
    for name in [name for name in sys.modules if name.split(".")[0] in names - {"dzhpc", "__main__"}]:
        del sys.modules[name]
    for folder in _folders:
        if folder in sys.path:
            sys.path.remove(folder)  # once: it may also be there for another reason
    sys.path[:0] = _folders[:] = new


def _home(module: ModuleType) -> str | None:
    """The folder in which a module, or the folder of its package, lies."""
    if file := getattr(module, "__file__", None):
        path = Path(file)
        return str(path.parent.parent if path.stem == "__init__" else path.parent)
    paths = list(getattr(module, "__path__", []))  # a folder without __init__.py
    return str(Path(paths[0]).parent) if paths else None


def import_object(name: str, key: str) -> Any:
    """The object behind ``package.module:Name``, looked up on sys.path and in the folder where the program was started.

    Raises InputError that names ``key`` if the module or the name does not exist.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise InputError(f'{key} = "{name}": expected "package.module:Name"')
    if "" not in sys.path and str(paths.started()) not in sys.path:
        sys.path.insert(0, str(paths.started()))
    try:
        found = importlib.import_module(module)
    except (ImportError, ValueError) as error:
        raise InputError(
            f'{key} = "{name}": cannot import {module} ({error}); expected "package.module:Name" on the Python path'
        ) from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module runs when it is imported, and may raise anything
        raise InputError(f'{key} = "{name}": cannot import {module}: {message_of(error)}') from None
    logging.getLogger("dzhpc").disabled = False  # logging.config silences whatever logger is there, unless it is told not to
    try:
        return getattr(found, attribute)
    except AttributeError:
        raise InputError(f'{key} = "{name}": module {module} has no {attribute!r}') from None


def called(what: str, function: Callable, *args: Any, **keys: Any) -> Any:
    """What a function of the user's gives. Raises InputError that names ``what``, and the user's line, for anything it raises."""
    try:
        return function(*args, **keys)
    except (DzhpcError, KeyboardInterrupt):
        raise
    except BaseException as error:
        inner = error.__traceback__.tb_next if error.__traceback__ else None  # this line is not the user's
        raise InputError(f"{what}: {message_of(error.with_traceback(inner))}") from None


def product(name: str, key: str) -> Any:
    """The object behind a name; of a class, or of a function that has no method ``initial``, what it gives. Raises InputError."""
    found = import_object(name, key)
    makes = isinstance(found, type) or (callable(found) and not hasattr(found, "initial"))
    return called(f"{key} = {name}", found) if makes else found
