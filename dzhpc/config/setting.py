"""Single values of an input for a shell: ``python -m dzhpc.info setting INPUT KEY[,KEY...] -- ARGUMENTS``."""

import sys

from dzhpc.config.input import PATHS, known_keys, load, value_of
from dzhpc.config.paths import expanded
from dzhpc.errors import InputError

USAGE = "python -m dzhpc.info setting INPUT KEY[,KEY...] [-- ARGUMENTS]"


def setting(words: list[str]) -> str:
    """The values that a run of an input would see, a line a key, "" where unset; paths are expanded.

    words: input file, keys, and after them the arguments of that run, of which ``--set KEY=VALUE`` counts. Raises InputError.
    """
    if len(words) < 2:
        raise InputError(f"expected {USAGE}")
    source, keys, *arguments = words
    known = {key for key, _, _ in known_keys()}
    for key in keys.split(","):
        if key not in known:
            raise InputError(f"unknown key {key} (`python -m dzhpc.info keys` lists every key)")
    config = load(source, _overrides(arguments))
    return "\n".join(_text(key, value_of(config, key)) for key in keys.split(","))


def main(words: list[str]) -> int:
    """Print them; the exit code."""
    try:
        print(setting(words))
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _overrides(arguments: list[str]) -> list[str]:
    """What ``--set KEY=VALUE`` and ``--set=KEY=VALUE`` say among the words of a command line."""
    found, before = [], ""
    for word in arguments:
        if before == "--set":
            found.append(word)
        elif word.startswith("--set="):
            found.append(word.removeprefix("--set="))
        before = word
    return found


def _text(key: str, value: object) -> str:
    if value is None:
        return ""
    return " ".join((expanded(value, f'{key} = "{value}"') if key in PATHS else str(value)).splitlines())
