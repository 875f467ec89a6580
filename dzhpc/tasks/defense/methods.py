"""Several defences certified one after the other: options, names, and the table of all that a folder holds."""

import argparse
import logging
import os
from pathlib import Path

import torch

from dzhpc.config import look_in, paths
from dzhpc.config.values import LARGEST
from dzhpc.errors import InputError, message_of
from dzhpc.files.runfolder import modules_beside
from dzhpc.job import device as devices
from dzhpc.job.launch import stopped, survey
from dzhpc.job.sharing import read_once
from dzhpc.job.stopping import Reason, Requests
from dzhpc.job.world import World
from dzhpc.tasks.defense import certificates
from dzhpc.tasks.defense.certification import Certification
from dzhpc.tasks.defense.inference import make_defense, read_defense

log = logging.getLogger("dzhpc")
FINEST = 1e-3  # between two radii of the table


def check(args: argparse.Namespace) -> None:
    """Raise InputError for options that mean nothing."""
    for name in ("n0", "n", "batch", "images"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: expected at least 1")
        if value is not None and value > LARGEST:
            raise InputError(f"--{name} {value}: expected at most {LARGEST:,}")
    for name in ("sigma", "grid"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name} {value:g}: expected a number above 0, in units of pixels in [0, 1]")
    if args.grid < FINEST:
        raise InputError(f"--grid {args.grid:g}: expected at least {FINEST:g}, since the table has a column for each radius")
    if not 0 < args.alpha < 1:
        raise InputError(f"--alpha {args.alpha:g}: expected a probability between 0 and 1, such as 0.001")
    if args.label is not None and Path(args.label).name != args.label:
        raise InputError(f"--label {args.label}: expected a plain name, which files are called by; -o chooses the folder")
    names = [label_of(source, args.no_denoiser) for source in args.sources]
    if len(names) > 1 and (args.label or (args.out and args.out.suffix == ".h5")):
        raise InputError("--label and -o FILE.h5 name one method, but several sources are given; certify them one by one")
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"several sources would be called {name}; certify them one by one, each with its --label")


def default_folder(sources: list[Path]) -> Path:
    """``certify/``, in the run folder where there is just one."""
    return (sources[0] if len(sources) == 1 and sources[0].is_dir() else paths.started()) / "certify"


def label_of(source: Path, without_denoiser: bool) -> str:
    """A method's name: the run folder's, the run folder's with the step, or the input file's."""
    path = Path(os.path.realpath(source))
    name = path.name if path.is_dir() else path.stem
    if path.parent.name == "checkpoints":
        name = f"{path.parent.parent.name}-{name}"
    return f"{name}-no-denoiser" if without_denoiser else name


def certify(world: World, args: argparse.Namespace, device: torch.device) -> int:
    """Certify all sources in turn, by options that :func:`check` has let pass; the exit code. Collective."""
    out = args.out or default_folder(args.sources)
    if out.suffix == ".h5":
        out, args.label = out.parent, out.stem
    requests, progressed, reason = None, False, Reason.NONE
    for source in args.sources:
        world.crash_folder = out
        look_in(*world.on_root(lambda source=source: modules_beside(source)) or [])
        found = read_once(world, lambda source=source: read_defense(source))
        with world.together():
            defense = make_defense(*found, device, args.no_denoiser, args.precision)
            if defense.box is None:
                raise InputError(f"{paths.shown(source)}: names no classifier (task.classifier), so there is nothing to certify")
            devices.cpu(defense.config.run.threads)
        survey(world, device, defense.config.run)
        requests = requests or Requests(defense.config, out if world.is_root else None)
        name = args.label or label_of(source, args.no_denoiser)
        job = Certification(world, defense, args, source, out / f"{name}.h5", requests)
        reason = job.run()
        progressed |= job.progressed
        if reason:
            break
    code = stopped(world, reason, progressed, "batch")
    if world.is_root and not code:  # else time is short
        files = [path for path in sorted(out.glob("*.h5")) if path.with_suffix(".tsv").exists()]
        try:
            text, written = certificates.write(files, out)
            log.info("%s\nwritten: %s", text, ", ".join(map(paths.shown, written)))
        except Exception as error:  # all is certified and saved
            log.warning("no table: %s", message_of(error))
    return code
