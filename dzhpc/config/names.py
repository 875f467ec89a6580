"""Python objects that an input file names: ``package.module:Name``."""

import importlib
import sys
from typing import Any

from dzhpc.config import paths
from dzhpc.errors import InputError


def is_function(name: str) -> bool:
    """Whether a name is that of a Python object, ``package.module:Name``, rather than of a file."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


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
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, ValueError) as error:
        raise InputError(
            f'{key} = "{name}": cannot import {module} ({error}); expected "package.module:Name" on the Python path'
        ) from None
    except AttributeError:
        raise InputError(f'{key} = "{name}": module {module} has no {attribute!r}') from None
