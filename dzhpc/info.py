"""Verb: ranks, hosts, devices, libraries (under mpirun); what an .h5 file of ours holds; every key of an input file.

For job scripts: ``python -m dzhpc.info setting INPUT KEY[,KEY...] -- ARGUMENTS`` prints the values that a run would see.
"""

if __name__ == "__main__":
    import sys

    if sys.argv[1:2] == ["setting"]:  # before torch loads, which takes seconds
        from dzhpc.config.setting import main as print_setting

        sys.exit(print_setting(sys.argv[2:]))

import argparse

from dzhpc import config as configuration
from dzhpc.config import paths
from dzhpc.config.setting import USAGE
from dzhpc.job.launch import run_verb
from dzhpc.job.log import show
from dzhpc.job.world import World


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser("dzhpc.info", description="What this job, a file, or an input key is.")
    p.add_argument(
        "what", nargs="?", metavar="FILE|keys", help="an .h5 file written by dzhpc, or the word keys; nothing: this job"
    )
    p.epilog = f"{USAGE} prints the values that a run with these arguments would see, a line a key."
    return p


def main(world: World, args: argparse.Namespace) -> int:
    """Run the verb; the exit code."""
    if args.what is None:
        from dzhpc.job.inventory import inventory  # needs torch

        text = inventory(world)
    else:
        text = world.on_root(keys if args.what == "keys" else lambda: described(args.what))
    if world.is_root:
        show(text)
    return 0


def described(what: str) -> str:
    """What a file holds."""
    from dzhpc.files import h5

    return h5.describe(paths.absolute(what))


def keys() -> str:
    """Every key with default and meaning, as a Markdown table a section; [task] has one for each kind."""
    lines = []
    for heading, _, section in configuration.tables():
        lines += ["", f"## {heading}", section.__doc__, "", "| key | default | meaning |", "|---|---|---|"]
        for name, field in section.model_fields.items():
            default = "unset" if field.default is None else repr(field.default)
            lines.append(f"| {name} | {default} | {field.description} |".replace(" | | ", " | "))
    return "\n".join(lines[1:])


if __name__ == "__main__":
    run_verb(parser(), main, parallel=False)
