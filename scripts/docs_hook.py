"""Hook of mkdocs: pages that are made when the site is built, links that leave docs/, equations as MathML.

Nothing that this makes is kept in the repository, so none of it can be out of date.
"""

import html
import importlib
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files, InclusionLevel

from dzhpc import config as configuration

ROOT = Path(__file__).resolve().parents[1]
COPIES = {  # files of the repository that are pages, too; benchmarks/results/NAME.md are results/NAME.md
    "INSTALL.md": "install.md",
    "CHANGELOG.md": "reference/changelog.md",
    "examples/amplifier/README.md": "examples/amplifier.md",
    "examples/plate/README.md": "examples/plate.md",
} | {f"benchmarks/results/{path.name}": f"results/{path.name}" for path in sorted((ROOT / "benchmarks/results").glob("*.md"))}
PAGES = {page: source for source, page in COPIES.items()}  # page -> the file that it shows
LINK = re.compile(r"\]\(([^)\s:#]+)((?:#[^)\s]*)?)\)")  # not to other sites, nor within a page
VERBS = sorted(path.stem for path in (ROOT / "dzhpc").glob("*.py") if "run_verb(" in path.read_text(encoding="utf-8"))


def on_config(config):
    """Every page of results is in the navigation, those that nobody has named there at its end."""
    section = next(entry["Results"] for entry in config.nav if "Results" in entry)
    section += [page for page in PAGES if page.startswith("results/") and page not in section]
    return config


def on_files(files: Files, config) -> Files:
    """Add the pages that are made, and every file outside docs/ that a page links to or shows."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page, make in (("reference/keys.md", keys), ("reference/options.md", options), ("reference/inputs.md", inputs)):
        files.append(File.generated(config, page, content=make()))
    for file in list(files.documentation_pages()):
        for name in sorted({name for _, name in outside(file.content_string, file.src_uri)}):
            if name not in COPIES and not files.get_file_from_path(published(name)):
                made = File.generated(config, published(name), abs_src_path=str(ROOT / name), inclusion=InclusionLevel.INCLUDED)
                files.append(made)
    return files


def outside(text: str, page: str) -> list[tuple[str, str]]:
    """(link as written, file of the repository) of the links of a page to files outside docs/. Raises FileNotFoundError."""
    folder = posixpath.dirname(PAGES.get(page, f"docs/{page}"))
    found = [(link, posixpath.normpath(posixpath.join(folder, link))) for link, _ in LINK.findall(text)]
    for link, name in found:
        if not name.startswith("docs/") and not (ROOT / name).is_file():
            raise FileNotFoundError(f"{page}: links to {link}, but {name} is no file")
    return [(link, name) for link, name in found if not name.startswith("docs/")]


def published(name: str) -> str:
    """Where a file of the repository lies in the site."""
    return COPIES.get(name, f"files/{name}")


def on_page_markdown(text: str, page, config, files) -> str:
    """Links of the repository become links of the site; a page that is a copy may link into docs/, too."""
    uri = page.file.src_uri
    folder = posixpath.dirname(PAGES.get(uri, f"docs/{uri}"))

    def moved(match: re.Match) -> str:
        name = posixpath.normpath(posixpath.join(folder, match[1]))
        target = name.removeprefix("docs/") if name.startswith("docs/") else published(name)
        return f"]({posixpath.relpath(target, posixpath.dirname(uri) or '.')}{match[2]})"

    return LINK.sub(moved, text)


def on_page_content(text: str, page, config, files) -> str:
    """Equations to MathML, which browsers draw by themselves; docstrings without roles, and with their lines."""

    def drawn(match: re.Match) -> str:
        tex, block = html.unescape(match[2]).strip(), match[1] == "div"
        return f"<{match[1]} class='equation'>{convert(tex[2:-2], display='block' if block else 'inline')}</{match[1]}>"

    if page.file.src_uri == "reference/python.md":  # a line for each argument, as in the source
        text = re.sub(r"\n(?=\w+(?:, \w+)*(?: \[[^\]\n]*\])?: |Raises )", "<br>", text)
    text = re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', drawn, text, flags=re.S)
    return re.sub(r":(?:class|func|mod|meth):(?=<code>)", "", text)


def keys() -> str:
    """Every key of an input, from the schema that reads it."""
    lines = [
        "# Keys of an input",
        "An input is a TOML file. Any key can be set on the command line: `--set zo.mu=1e-3`. Order: defaults, file, `--set`.",
        "`python -m dzhpc.info keys` prints this page. A key that is not here is refused, and the message names the nearest one.",
    ]
    seen: set[str] = set()
    for heading, section, fields in configuration.tables():
        lines += ["", f"## {heading}", fields.__doc__, "", "| key | default | meaning |", "|---|---|---|"]
        for name, field in fields.model_fields.items():
            default = "unset" if field.default is None else f"`{field.default!r}`"
            meaning = (field.description or "").replace("|", r"\|")
            key = f"{section}.{name}"
            anchor = "" if key in seen else f"{{#{key}}}"  # keys of several kinds of task come several times
            seen.add(key)
            lines.append(f"| `{key}`{anchor} | {default} | {meaning} |")
    return "\n".join(lines)


def options() -> str:
    """What ``--help`` of every verb says."""
    lines = ["# Options of the verbs", "This is what `python -m dzhpc.VERB --help` prints."]
    for verb in VERBS:
        lines += ["", f"## {verb}", "", "```text", help_of(verb), "```"]
    return "\n".join(lines)


def help_of(verb: str) -> str:
    """The help of a verb, 110 columns wide."""
    import argparse
    import functools

    parser = importlib.import_module(f"dzhpc.{verb}").parser()
    subparsers = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    texts = []
    for each in [parser, *(p for action in subparsers for p in action.choices.values())]:
        each.formatter_class = functools.partial(argparse.HelpFormatter, width=110)
        texts.append(each.format_help().strip())
    return "\n\n".join(texts)


def inputs() -> str:
    """The inputs as a table, and the comment with which each opens."""
    found = [*sorted((ROOT / "inputs").glob("*.toml")), *sorted((ROOT / "examples").glob("**/*.toml"))]
    lines = ["# Inputs", "What comes with dzhpc. Each opens with its purpose, source, run line, expected result and cost.", ""]
    lines += ["| input | purpose |", "|---|---|"]
    texts = []
    for path in found:
        name = path.relative_to(ROOT).as_posix()
        head = [line.removeprefix("#")[1:] for line in path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()]
        lines.append(f"| [{name}](#{name.replace('/', '-').replace('.', '-')}) | {head[0].removeprefix('Purpose').strip()} |")
        texts += ["", f"## {name} {{#{name.replace('/', '-').replace('.', '-')}}}", "", "```text", *head, "```", ""]
        texts.append(f"[The whole file](../../{name})")
    return "\n".join([*lines, *texts])
