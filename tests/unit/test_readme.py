"""README, INSTALL and docs/: every command, input and name in them is one that exists. tests/mpi/test_docs.py runs them."""

import ast
import importlib
import re
import subprocess
import tomllib

import pages
import pytest

from dzhpc import config, errors

GENERATED = ("docs/reference/keys.md", "docs/reference/options.md", "docs/reference/inputs.md")  # scripts/docs_hook.py
PLACES = r"(?:inputs|examples|scripts|slurm|benchmarks|dzhpc|tests|docs)"
SBATCH = {"--ntasks", "--array", "--parsable", "--dependency"}


@pytest.fixture(scope="module")
def written(project):
    return pages.pages(project)


def read(place, words):
    """The arguments of a verb, read by its own parser; its input and keys, by the schema."""
    verb, given = pages.verb(words)
    if (verb, given[:1]) == ("info", ["setting"]):
        return
    args = importlib.import_module(f"dzhpc.{verb}").parser().parse_args(given)
    source = getattr(args, "input", None)
    if source and (place / source).exists():
        config.load(place / source, getattr(args, "set", []))
    else:  # a file of the page itself
        assert source is None or "/" not in source or source.startswith("spring/"), source


def test_readme_fits_two_screens(written):
    assert len(written["README.md"].splitlines()) <= 100


def test_blocks_are_valid(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    for number, block in enumerate(pages.blocks(project)):
        assert block.language in ("bash", "python", "toml", "text"), f"{block.page}: a block without a language:\n{block.text}"
        if block.language == "python":
            ast.parse(block.text, block.page)
        elif block.language == "toml":
            config.parse(tomllib.loads(block.text), block.page)
        elif block.language == "bash":
            (tmp_path / f"{number}.sh").write_text(f"{block.text}\n")
    scripts = "for f in *.sh; do bash -n $f || exit 1; done"
    done = subprocess.run(["bash", "-c", scripts], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_commands_are_ours_or_known_and_marked_where_they_are_not_run(project):
    used = set()
    for block in pages.blocks(project, "bash"):
        reasons = {why for words in pages.commands(block) if (why := pages.why_not(words))}
        assert bool(reasons) == bool(block.reason), f"{block.page}: mark this block <!-- not run: {reasons} -->\n{block.text}"
        assert not reasons or block.reason in reasons, f"{block.page}: {block.reason}, expected one of {reasons}"
        used |= reasons
        for words in pages.commands(block):
            if not pages.why_not(words):
                assert pages.verb(words) or words[0] in ("mkdir", "touch") or words[:2] == ["bash", "slurm/studies/fig5.sh"], (
                    words
                )
    assert used == set(pages.NOT_RUN)


def test_arguments_of_verbs_are_read(project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setenv("SLURM_JOB_ID", "")
    commands = [words for block in pages.blocks(project, "bash") for words in pages.commands(block) if pages.verb(words)]
    assert len(commands) > 40
    for words in commands:
        read(project, words[: words.index("&")] if "&" in words else words)


def test_arguments_of_job_scripts_are_read(project, monkeypatch):
    monkeypatch.chdir(project)
    scripts = set()
    for block in pages.blocks(project, "bash"):
        for words in pages.commands(block):
            at = next((k for k, word in enumerate(words) if word.startswith("slurm/")), None)
            if at is None:
                continue
            scripts.add(words[at])
            options, rest = [w for w in words[:at] if w.startswith("--")], [w.rstrip(")") for w in words[at + 1 :]]
            assert {option.split("=")[0] for option in options} <= SBATCH
            if rest[:1] not in (["list"], ["report"], ["submit"]):
                verb = "prune" if words[at] == "slurm/prune.sh" else "train"
                read(project, ["-m", f"dzhpc.{verb}", "inputs/resnet20.toml", *rest])
    assert len(scripts) >= 5
    for script in scripts:
        subprocess.run(["bash", "-n", script], cwd=project, check=True, timeout=10)


def test_links_lead_to_files(project, written):
    results = (project / "benchmarks" / "results").glob("*.md")
    texts = written | {path.relative_to(project).as_posix(): path.read_text(encoding="utf-8") for path in results}
    dead = []
    for page, text in texts.items():
        for target in re.findall(r"\]\(([^)\s:#]+)(?:#[^)\s]*)?\)", text):
            path = (project / page).parent / target
            if not path.is_file() and path.resolve().relative_to(project).as_posix() not in GENERATED:
                dead.append(f"{page}: {target}")
    assert dead == []


def test_every_page_is_in_the_navigation(project, written):
    nav = (project / "mkdocs.yml").read_text().split("\nnav:")[1]
    assert [page for page in written if page.startswith("docs/") and f" {page.removeprefix('docs/')}\n" not in f"{nav}\n"] == []


def test_paths_that_are_named_exist(project, written):
    missing = []
    for page, text in written.items():
        text = pages.FENCE.sub("", text)
        named = set(re.findall(rf"`({PLACES}/[\w./-]*\w)/?`", text)) | set(re.findall(rf"\b{PLACES}/[\w/-]+\.\w+", text))
        missing += [f"{page}: {name}" for name in sorted(named) if not (project / name).exists() and name not in GENERATED]
    assert missing == []


def test_keys_that_are_named_exist(written):
    known = {key for key, _, _ in config.known_keys()} | {"model.depth", "model.width", "model.classes"}
    sections = "|".join(config.Config.model_fields)
    named = set(re.findall(rf"`(?:--set )?((?:{sections})\.\w+)\b[^`/]*`", "".join(written.values())))
    assert len(named) >= 60
    assert named - known - {"data.h5"} == set()


def test_every_verb_is_named(project, written):
    verbs = {path.stem for path in (project / "dzhpc").glob("*.py") if "run_verb(" in path.read_text()}
    assert {verb for verb in verbs if f"| `{verb}" not in written["docs/reference/verbs.md"]} == set()


def test_every_exit_code_is_named(written):
    codes = re.findall(r"^\| (\d+) \|", errors.__doc__, re.M)
    assert re.findall(r"^\| (\d+) \|", written["docs/reference/exit-codes.md"], re.M) == codes


def test_messages_are_those_of_the_program(project, written):
    code = "".join(path.read_text() for path in (project / "dzhpc").rglob("*.py"))
    code = re.sub(r"['\"]\s*\n\s*f?['\"]", "", code).replace('\\"', '"')  # strings that go on in the next line
    messages = re.findall(r"^### `(.+)`$", written["docs/troubleshooting.md"], re.M)
    assert len(messages) > 40
    parts = [(message, part.strip()) for message in messages for part in message.split("…")]
    assert [f"{message}: {part}" for message, part in parts if part.strip(" .:;`") and part not in code] == []
