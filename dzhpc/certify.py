"""Verb: certified accuracy by randomized smoothing. ``mpirun -n 4 python -m dzhpc.certify runs/defense --images 200 --n 1000``"""

if __name__ == "__main__":  # before torch loads, which takes seconds: a rank may lose its launcher, or be warned, in that time
    from dzhpc.job import process, stopping

    process.die_with_launcher()
    stopping.listen()

import argparse
import logging
import socket
import sys
from pathlib import Path

from dzhpc.errors import InputError
from dzhpc.job import device as devices
from dzhpc.job import log as metrics
from dzhpc.job.stopping import Reason, Requests, listen, tell_job_script
from dzhpc.job.world import World, run_verb
from dzhpc.tasks.defense import certificates
from dzhpc.tasks.defense.certification import Certification
from dzhpc.tasks.defense.inference import load_defense

log = logging.getLogger("dzhpc")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        "dzhpc.certify", description="Certify test images by randomized smoothing; go on where a record was left."
    )
    p.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="run folder, checkpoint or input file; several: one after the other"
    )
    p.add_argument(
        "-o", "--out", type=Path, help="folder of the results, or LABEL.h5 (default: certify/ in the run folder, else here)"
    )
    p.add_argument("--label", help="the method's name in files, table and plot (default: that of the source)")
    p.add_argument("--images", type=int, metavar="N", help="so many, spread evenly over the test set (default: all)")
    p.add_argument("--n0", type=int, default=100, help="noisy copies that choose the class (100)")
    p.add_argument("--n", type=int, default=10_000, help="noisy copies that bound its probability (10,000)")
    p.add_argument("--alpha", type=float, default=0.001, help="the risk, for each image, that its certificate is wrong (0.001)")
    p.add_argument("--sigma", type=float, help="the noise's standard deviation, for pixels in [0, 1] (default: the input's)")
    p.add_argument("--adaptive", action="store_true", help="stop an image's sampling once the next radius of the grid is decided")
    p.add_argument("--grid", type=float, default=0.25, help="radii of the table and of --adaptive: 0, GRID, 2 GRID, ... (0.25)")
    p.add_argument("--no-denoiser", action="store_true", help="certify the bare classifier")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the denoiser's inference")
    p.add_argument("--batch", type=int, default=100, help="noisy copies in one call (100)")
    p.add_argument("--quiet", action="store_true", help="warnings and errors only")
    return p


def main(world: World, args: argparse.Namespace) -> int:
    """Run the verb on every rank; the exit code."""
    listen()
    metrics.set_up_log(world.is_root, args.quiet)
    world.on_root(lambda: check(args))
    if world.is_root:  # after a collective: all ranks listen
        tell_job_script("LISTENING")
    device = devices.choose(world.local_rank, 1)
    out = args.out or default_folder(args.sources)
    if out.suffix == ".h5":
        out, args.label = out.parent, out.stem
    requests, progressed, reason = None, False, Reason.NONE
    for source in args.sources:
        world.crash_folder = out
        with world.together():
            if source.endswith(".toml"):
                sys.path.insert(0, str(Path(source).resolve().parent))  # the user's own modules may lie beside the input
            defense = load_defense(source, device, without_denoiser=args.no_denoiser, precision=args.precision)
            if defense.box is None:
                raise InputError(f"{source}: names no task.classifier, so there is nothing to certify")
            devices.cpu(defense.config.run.threads)
        ranks = world.gather((world.rank, socket.gethostname(), devices.describe(device), devices.uuid(device)))
        world.on_root(lambda ranks=ranks, defense=defense: devices.check_binding(ranks, defense.config.run.share_gpu))
        requests = requests or Requests(defense.config, out if world.is_root else None)
        name = args.label or label_of(source, args.no_denoiser)
        job = Certification(world, defense, args, source, out / f"{name}.h5", requests)
        reason = job.run()
        progressed |= job.progressed
        if reason:
            break
    return end(world, reason, progressed, out)


def check(args: argparse.Namespace) -> None:
    """Raise InputError for options that mean nothing."""
    for name in ("n0", "n", "batch", "images"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: expected at least 1")
    for name in ("sigma", "grid"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name} {value:g}: expected a number above 0, in units of pixels in [0, 1]")
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


def default_folder(sources: list[str]) -> Path:
    """``certify/``, in the run folder where there is just one."""
    return Path(sources[0] if len(sources) == 1 and Path(sources[0]).is_dir() else ".") / "certify"


def label_of(source: str, without_denoiser: bool) -> str:
    """A method's name: the run folder's, the run folder's with the step, or the input file's."""
    path = Path(source).resolve()
    name = path.name if path.is_dir() else path.stem
    if path.parent.name == "checkpoints":
        name = f"{path.parent.parent.name}-{name}"
    return f"{name}-no-denoiser" if without_denoiser else name


def end(world: World, reason: Reason, progressed: bool, out: Path) -> int:
    """Table and plot of all methods in the folder, unless time is short; the job script's question; the exit code."""
    if world.is_root:
        if reason in (Reason.DEADLINE, Reason.WALLTIME) and not progressed:
            log.warning("no time for a single batch before %s: give the job more, or lower run.deadline_margin", reason.text)
        elif reason:
            tell_job_script(reason.name)
        if reason:
            log.info("stopped: %s; the same command goes on", reason.text)
        if not reason.exit_code:
            files = [path for path in sorted(out.glob("*.h5")) if path.with_suffix(".tsv").exists()]
            log.info("%s\n%s", certificates.write(files, out), f"written: {out / 'certified.md'}, {out / 'certified.png'}")
    return reason.exit_code


if __name__ == "__main__":
    run_verb(parser(), main)
