"""The input file: TOML -> validated sections. Every key is documented here, and printed by ``python -m dzhpc.info keys``.

Precedence: defaults < file < ``--set KEY=VALUE``. The defaults are those of ``inputs/resnet20.toml``.
"""

from dzhpc.config.idle import idle, lines, unmeant
from dzhpc.config.input import (
    FREE,
    PATHS,
    Config,
    frozen_changes,
    known_keys,
    load,
    parse,
    parse_written,
    path_of,
    tables,
    value_of,
)
from dzhpc.config.names import called, import_object, is_function, look_in
from dzhpc.config.sections import Data, Model, Optim, Run, Zo
from dzhpc.config.tasks import SolKeys

__all__ = [
    "FREE", "PATHS", "Config", "Data", "Model", "Optim", "Run", "SolKeys", "Zo", "called",
    "frozen_changes", "idle", "import_object", "is_function",
    "known_keys", "lines", "load", "look_in", "parse", "parse_written", "path_of", "tables", "unmeant", "value_of",
]  # fmt: skip
