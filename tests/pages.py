"""The pages of the documentation, their blocks, and the commands in them: what the tests of the documentation share.

A block is ``bash``, ``python``, ``toml`` or ``text``. A block with a title is a file of that name. A bash block that has a
command which tests cannot run is marked in its source, on the line before: ``<!-- not run: WHY -->``, WHY being one of NOT_RUN.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NOT_RUN = {  # why -> the commands: their first words, or a verb and what its arguments have to hold
    "needs Slurm": ("sbatch", "scontrol", "#SBATCH"),
    "needs Slurm or hours": ("bash slurm/",),
    "installs": ("make", "pip", "python3 -m venv", "module", ".", "apt", "export", "MPICC=", "git"),
    "needs a network, or data of yours": ("dzhpc.fetch",),
    "needs a GPU": ("python benchmarks/gpu.py",),
    "needs a program of others": ("dzhpc.train examples/amplifier/", "dzhpc.train examples/plate/", "python examples/"),
    "a benchmark: tests/mpi/test_bench.py runs it": ("dzhpc.bench",),
    "tests/mpi/test_new.py runs it": ("sh spring/job.sh",),
    "a loop over jobs": ("trap", "while", "until", "if"),
}
FENCE = re.compile(r"(?:^<!-- not run: ([^\n]*) -->\n)?^( *)```([a-z]*)(?: title=\"([^\"]+)\")?\n(.*?)^\2```$", re.M | re.S)
SNIPPET = re.compile(r'^--8<-- "([^"]+)"$', re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    language: str
    title: str
    text: str
    reason: str  # that it is marked with, "" if it is not


def pages(project: Path) -> dict[str, str]:
    """Name -> text of all pages that people have written."""
    found = [project / "README.md", project / "INSTALL.md", *sorted((project / "docs").rglob("*.md"))]
    found += sorted((project / "examples").glob("*/README.md"))
    return {path.relative_to(project).as_posix(): path.read_text(encoding="utf-8") for path in found}


def blocks(project: Path, *languages: str) -> Iterator[Block]:
    """All blocks of these languages; of all, if none is given."""
    for page, text in pages(project).items():
        for reason, indent, language, title, inside in FENCE.findall(text):
            inside = SNIPPET.sub(lambda m: (project / m[1]).read_text(encoding="utf-8"), inside)
            if not languages or language in languages:
                yield Block(page, language, title, re.sub(f"^{indent}", "", inside, flags=re.M), reason)


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a bash block. Of a ``for`` loop the first round; $(...) stays as it is written.

    A block with a title is a job script: the command is to submit it.
    """
    values: dict[str, str] = {}
    for line in [f"sbatch {block.title}"] if block.title else block.text.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$(\w+)", lambda m: values.get(m[1], m[0]), line.strip())
        if loop := re.match(r"for (\w+) in (\S+).*; do$", line):
            values[loop[1]] = loop[2]
        elif line.startswith("#SBATCH"):
            yield ["#SBATCH"]
        elif line != "done" and (words := shlex.split(line, comments=True)):
            yield words


def verb(words: list[str]) -> tuple[str, list[str]] | None:
    """(verb, its arguments) of a command of ours, with or without a launcher; else None."""
    at = next((k for k, word in enumerate(words) if word == "-m" and words[k + 1].startswith("dzhpc.")), None)
    if at is None or words[0] in ("until", "while", "trap"):
        return None
    return words[at + 1].removeprefix("dzhpc."), words[at + 2 :]


def why_not(words: list[str]) -> str:
    """Why a command is not run; "" if it is."""
    if "&" in words:
        return "a loop over jobs"
    words = [word.removeprefix("job=$(") for word in words]
    ours = verb(words)
    text = f"dzhpc.{ours[0]} {' '.join(ours[1])}" if ours else " ".join(w for w in words if "=" not in w or w.startswith("MPICC"))
    for reason, starts in NOT_RUN.items():
        if any(text.startswith(start if start[-1] in "/=" else f"{start} ") or text == start for start in starts):
            return "" if text == "bash slurm/studies/fig5.sh list" else reason
    return ""
