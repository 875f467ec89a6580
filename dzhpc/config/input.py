"""An input file or a checkpoint's text -> a Config; what was wrong with it; which keys are frozen."""

import copy
import difflib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from dzhpc.config import paths, tasks
from dzhpc.config.names import is_function
from dzhpc.config.sections import Checkpoint, Data, Eval, Model, Optim, Run, Sparsity, Stop, Zo
from dzhpc.config.values import Section
from dzhpc.errors import InputError

FROZEN = ("task", "model", "data", "zo", "sparsity", "optim", "stop.epochs", "run.seed")
FREE = (
    "data.root", "task.retries", "task.max_queries", "task.timeout", "task.concurrency", "task.scratch", "zo.emulate_bf16",
)  # fmt: skip
FIRST_START = ("model.weights", "sparsity.lpr")  # files that only the start from nothing reads: a checkpoint has what they held
PATHS = ("run.dir", "data.root", "data.path", "task.classifier", "task.scratch", *FIRST_START)
SYNONYMS = {  # what other codes call a key, where spelling alone would not find it
    "step_size": "zo.mu", "smoothing": "zo.mu", "epsilon": "zo.mu", "eps": "zo.mu", "learning_rate": "optim.lr",
    "batchsize": "data.batch_size", "optimizer": "optim.name", "epochs": "stop.epochs", "sparsity": "sparsity.ratio",
    "network": "model.name", "dataset": "data.name", "queries": "zo.q",
}  # fmt: skip


class Config(Section):
    """All sections of one input file."""

    run: Run = Run()
    task: tasks.AnyTask = tasks.ClassificationKeys()
    model: Model = Model()
    data: Data = Data()
    zo: Zo = Zo()
    sparsity: Sparsity = Sparsity()
    optim: Optim = Optim()
    stop: Stop = Stop()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()

    def to_toml(self) -> str:
        """The resolved input; unset keys are left out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def load(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """Read an input file and apply ``KEY=VALUE`` overrides.

    Raises InputError with file, key, value found and what was expected.
    """
    source = paths.shown(path) if path is not None else "defaults"
    table = _read(Path(path)) if path is not None else {}
    given, from_command_line = copy.deepcopy(table.get("task", {})), set()
    for text in overrides or []:
        key, equals, value = text.partition("=")
        if not equals or key.count(".") != 1:
            raise InputError(f"--set {text}: expected SECTION.KEY=VALUE, for example --set zo.mu=1e-3")
        section, name = key.strip().split(".")
        if not isinstance(table.setdefault(section, {}), dict):
            raise InputError(f"{source}: {section} must be a [section]")
        table[section][name] = _value(value.strip(), _is_text(section, name))
        from_command_line.add((section, name))
    for name in tasks.idle(given, table["task"]) if isinstance(given, dict) and "task" in table else []:
        if ("task", name) not in from_command_line:
            del table["task"][name]
    config = parse(table, source, from_command_line)
    if config.run.name is None:
        name = Path(path).stem if path is not None else config.model.name
        config.run.name = name.encode(errors="backslashreplace").decode()
    _check_text(config, source)
    return config


def path_of(config: Config, key: str) -> Path | None:
    """The file or folder that a key of PATHS names, as an absolute path; None where it names none. Raises InputError."""
    value = value_of(config, key)
    if not value or (key == "task.classifier" and is_function(value)):
        return None
    return paths.absolute(value, f'{key} = "{value}"')


def value_of(config: Config, key: str) -> Any:
    """What a config has for SECTION.KEY; None where its [task] or [model] has no such key."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name, None)


def _check_text(config: Config, source: str) -> None:
    """Raise InputError for text that no file could hold, names that are none, and paths that cannot be expanded."""
    for key, value in _flatten(config).items():
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{source}: {key} = {value!r}: is no UTF-8 text; rename the file, or set your locale to it"
            ) from None
    parts = Path(config.run.name).parts
    if not parts or ".." in parts or config.run.name.startswith("/") or "\0" in config.run.name:
        raise InputError(f"{source}: run.name = {config.run.name!r}: expected the name of a folder below run.dir")
    if not config.run.dir:
        raise InputError(f'{source}: run.dir = "": expected a folder')
    for key in PATHS:
        path_of(config, key)


def parse(table: dict[str, Any], source: str, from_command_line: set | frozenset = frozenset()) -> Config:
    """Validate a table of sections; raises InputError that names ``source`` and the first key at fault."""
    try:
        config = Config.model_validate(table)
    except ValidationError as failure:
        # an unknown key is usually the cause of the others, so it is named first
        error = min(failure.errors(), key=lambda e: e["type"] != "extra_forbidden")
        at_fault = _place(error)
        where = "--set" if any(place[: len(at_fault)] == at_fault for place in from_command_line) else source
        raise InputError(f"{where}: {_explain(error, at_fault, table)}") from None
    for section in Config.model_fields:
        for fault in getattr(config, section).conflicts(config):
            raise InputError(f"{source}: {fault}")
    return config


def parse_written(text: str, source: str) -> Config:
    """The Config of :meth:`Config.to_toml`, as a checkpoint of this or an earlier version holds it. Raises InputError.

    0.1 wrote the keys of all kinds into [task]; those of other kinds never had an effect.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{source}: not valid TOML: {error}") from None
    if isinstance(task := table.get("task"), dict):
        for name in tasks.foreign(task):
            del task[name]
    return parse(table, source)


def _read(path: Path) -> dict[str, Any]:
    if path == Path():  # $INPUT, with INPUT unset
        raise InputError('an empty name or "." is no file; give the path of a TOML input file')
    try:
        content = paths.content(path)
        if content.startswith(b"dzhpc sha256 "):
            raise InputError(
                f"{paths.shown(path)}: is a file that dzhpc wrote (`python -m dzhpc.info` shows it), no TOML input file"
            )
        text = content.decode("utf-8-sig")
        return tomllib.loads(text.replace("\r\n", "\n").replace("\r", "\n"))
    except OSError as error:
        raise InputError(f"{paths.shown(path)}: cannot be read ({error.strerror}); give the path of a TOML input file") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, brackets in brackets in brackets ...
        raise InputError(f"{paths.shown(path)}: not valid TOML: {error}") from None


def _value(text: str, is_text: bool) -> Any:
    """A value of the command line: TOML, or a bare string; for a key that takes text, all but a quoted string is bare."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
    return text if is_text and not isinstance(value, str) else value


def _is_text(section: str, name: str) -> bool:
    """Whether a key takes any text, so that 42 and 2024-05-01 may be names."""
    if name == "kind":
        return False
    fields = (keys.model_fields.get(name) for _, own, keys in tables() if own == section)
    return any(field is not None and field.annotation in (str, str | None) for field in fields)


def _place(error: dict[str, Any]) -> tuple[str, ...]:
    """(section, key) at fault, or a section alone. Within [task], pydantic names the kind, too."""
    if error["type"] == "union_tag_invalid":
        return "task", "kind"
    place = error["loc"]
    return (place[0], *place[2:3]) if place[0] == "task" else place[:2]


def _explain(error: dict[str, Any], place: tuple[str, ...], table: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in place)
    if error["type"] == "union_tag_invalid":
        kinds = ", ".join(f'"{kind}"' for kind in tasks.KINDS)
        return f"task.kind = {table['task']['kind']!r}: expected one of {kinds}"
    if error["type"] == "extra_forbidden":
        if place[0] == "task" and (names := tasks.foreign(table["task"])):
            return _of_other_kinds(names, table["task"])
        return f"unknown key {key}{_suggestion(key)} (`python -m dzhpc.info keys` lists every key)"
    if error["type"] == "model_type":
        return f"{key} = {error['input']!r}: expected one [{key}]"
    expected = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    found = error["input"]
    if error["type"] == "string_type" and not isinstance(found, (dict, list)):
        expected = f'{expected}; put it into quotes: "{found}"'
    return f"{key} = {found!r}: expected {expected}" if not isinstance(found, dict) else f"{key}: expected {expected}"


def _of_other_kinds(names: list[str], table: dict[str, Any]) -> str:
    if len(names) > 1:
        return f'task.{", task.".join(names)}: belong to other kinds than "{tasks.tag(table)}"; remove them'
    *others, last = (f'"{kind}"' for kind in tasks.belongs_to(names[0]) if kind != tasks.OWN)
    kinds = f"{', '.join(others)} or {last}" if others else last
    return f"task.{names[0]}: belongs to task.kind = {kinds}{'; use stop.queries' if names == ['max_queries'] else ''}"


def _suggestion(key: str) -> str:
    known = [name for name, _, _ in known_keys()]
    last = key.split(".")[-1]
    same_name = [name for name in known if name.split(".")[-1] == last]
    near = difflib.get_close_matches(key, [*known, *Config.model_fields], n=1, cutoff=0.7)
    near_name = [n for n in known if difflib.SequenceMatcher(None, n.split(".")[-1], last).ratio() > 0.75]
    best = [*([SYNONYMS[last]] if last in SYNONYMS else []), *same_name, *near, *near_name]
    return f"; did you mean {best[0]}?" if best else ""


def tables() -> Iterator[tuple[str, str, type[Section]]]:
    """(heading, name, class) of every section; [task] comes once for each kind."""
    for name, info in Config.model_fields.items():
        if name == "task":
            yield from ((f'[task], kind = "{kind}"', name, keys) for kind, keys in tasks.KINDS.items())
        else:
            yield f"[{name}]", name, info.annotation


def known_keys() -> Iterator[tuple[str, Any, str]]:
    """(dotted key, default, meaning) of every key, in the order of the sections; keys of several kinds come several times."""
    for _, section, keys in tables():
        for name, field in keys.model_fields.items():
            yield f"{section}.{name}", field.default, field.description or ""


def frozen_changes(old: Config, new: Config, free: tuple[str, ...] = (*FREE, *FIRST_START)) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of frozen keys that differ, but for ``free`` ones; those must not change on restart."""
    a, b = _flatten(old), _flatten(new)
    frozen = (key for key in [*a, *(set(b) - set(a))] if key.startswith(FROZEN) and key not in free)
    return [(key, a.get(key), b.get(key)) for key in frozen if a.get(key) != b.get(key)]


def _flatten(config: Config) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, table in config.model_dump().items() for key, value in table.items()}
