"""A new problem from a skeleton: an input, a stub of what is the user's own, and a job script, which run at once.

``python -m dzhpc.new NAME --kind objective|classification|defense|sol|command``
"""

import argparse
import importlib.util
import keyword
from pathlib import Path

from dzhpc.config import paths
from dzhpc.errors import InputError
from dzhpc.job.launch import run_verb
from dzhpc.job.log import show
from dzhpc.job.world import World

SKELETONS = Path(__file__).with_name("skeletons")
KINDS = ("objective", "classification", "defense", "sol", "command")
SIMULATE = """# the reference, once; where it was stopped it goes on
mkdir -p data
[ -e data/NAME.h5 ] || mpirun -n "${SLURM_NTASKS:-2}" python -m dzhpc.simulate NAME/NAME.toml -o data/NAME.h5 || exit
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("dzhpc.new", description="Write NAME/: an input, a stub of your own part, a job script.")
    p.add_argument("name", help="a Python name; the folder NAME is made here")
    p.add_argument("--kind", choices=KINDS, default="objective", help="command: the black box is a program (default: objective)")
    return p


def main(world: World, args: argparse.Namespace) -> int:
    """Run the verb; the exit code."""
    text = world.on_root(lambda: write(args.name, args.kind))
    if world.is_root:
        show(text)
    return 0


def write(given: str, kind: str) -> str:
    """Write the folder; what to do next. Raises InputError where it cannot be."""
    if not given.isidentifier():
        raise InputError(f"{given}: expected a name that Python can import: letters, digits, underscores, no digit first")
    if paths.absolute(given).exists():
        raise InputError(f"{given}: is there already; choose another name")
    if keyword.iskeyword(given) or given == "dzhpc" or importlib.util.find_spec(given):
        raise InputError(
            f"{given}: is a word or a module of Python's, which yours would hide or be hidden by; choose another name"
        )
    folder = paths.absolute(given)
    texts = {path.name.removesuffix(".in"): path.read_text(encoding="utf-8") for path in (SKELETONS / kind).iterdir()}
    files = {name.replace("NAME", given): text for name, text in texts.items()}
    files["job.sh"] = (SKELETONS / "job.sh").read_text(encoding="utf-8").replace("BEFORE\n", SIMULATE if kind == "sol" else "")
    try:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text.replace("NAME", given), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{given}: cannot be written ({error.strerror})") from None
    run = next(line for line in files[f"{given}.toml"].splitlines() if line.startswith("# Run")).removeprefix("# Run").strip()
    return f"written: {', '.join(f'{given}/{name}' for name in sorted(files))}\nrun: {run.replace('NAME', given)}"


if __name__ == "__main__":
    run_verb(parser(), main, parallel=False)
