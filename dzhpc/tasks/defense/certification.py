"""Certification on all ranks: what an image is as a piece of work, the record, its going on after a stop or a kill."""

import argparse
import dataclasses
import hashlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from dzhpc.config import path_of
from dzhpc.config.paths import shown
from dzhpc.errors import CheckpointError, InputError
from dzhpc.files.runfolder import RunFolder
from dzhpc.job.lock import Lock
from dzhpc.job.log import duration, say_first
from dzhpc.job.shared_work import share_out
from dzhpc.job.stopping import Reason, Requests
from dzhpc.job.world import World
from dzhpc.models import identity
from dzhpc.tasks.defense import certificates
from dzhpc.tasks.defense.inference import Defense
from dzhpc.tasks.defense.smoothing import ABSTAIN, Certificate, Plan, Smoothed

log = logging.getLogger("dzhpc")
BITS = ("threads", "device", "torch")  # what counts may depend on beside the parameters; a change is a warning


def spread(images: int | None, total: int) -> list[int]:
    """So many indices of ``total``, evenly spaced from 0; all without a number. Raises InputError if there are not so many.

    Their order (van der Corput's) spreads the first of them evenly, too: what a stop leaves is no sample of the first classes.
    """
    images = total if images is None else images
    if images > total:
        raise InputError(f"--images {images}: the test set has {total}")
    digits = max(1, (images - 1).bit_length())
    order = sorted(range(images), key=lambda k: f"{k:0{digits}b}"[::-1])
    return [k * total // images for k in order]


def classifier_of(defense: Defense) -> str:
    """What tells one classifier from another: its name; of a file, or the newest one of a run folder, also its content."""
    task, path = defense.config.task, path_of(defense.config, "task.classifier")
    name = task.classifier or " ".join(task.command)
    if path is not None and path.is_dir():
        path = next(iter(RunFolder(path).checkpoint_files()), path)
    if path is None or not path.is_file():
        return name
    with open(path, "rb") as file:
        return f"{name} (SHA-256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]})"


def pixels_of(defense: Defense) -> dict[str, str]:
    """What tells the test set from another, and how a classifier from a file normalises its images."""
    test, network = defense.data.test, defense.box.network
    values = [round(float(v), 6) for v in torch.cat([network.mean, network.std]).flatten()] if network is not None else ""
    return {"test_set": identity.fingerprint({"images": test.images, "labels": test.labels}), "normalisation": str(values)}


def fingerprint(model: torch.nn.Module | None) -> str:
    """What tells one denoiser from another: a hash of its parameters and buffers; "" without denoiser."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())} if model is not None else {}
    return identity.tensors_sha256(tensors, content=True) if tensors else ""


class Certification:
    """Certifies images of one defence; a piece of work (:class:`dzhpc.job.shared_work.Campaign`) is an image.

    The root keeps the record, from what the ranks tell it of the counts so far. So there is one file, one writer, and a kill
    costs some seconds.
    """

    def __init__(self, world: World, defense: Defense, args: argparse.Namespace, source: Path, path: Path, requests: Requests):
        self.world, self._data, self._requests, self._quiet = world, defense.data, requests, args.quiet
        self.path, self._name = path, path.stem
        self._lock = Lock(path.parent, f"{path.stem}.lock.json", "-o")
        sigma = args.sigma or defense.config.task.sigma
        make = Plan.adaptive if args.adaptive else Plan.fixed
        self._plan = make(sigma, args.n0, args.n, args.alpha, *([args.grid] if args.adaptive else []))
        self._try_out = defense.try_out
        self._smoothed = Smoothed(defense.classify, len(defense.classes), sigma, defense.seed, args.batch)
        self._numbers = spread(args.images, len(self._data.test))
        self.about = {
            "name": self._name, "source": str(source.resolve()), "sigma": sigma, "n0": args.n0, "n": args.n,
            "alpha": args.alpha, "adaptive": args.adaptive, "grid": args.grid, "seed": defense.seed, "batch": args.batch,
            "precision": args.precision, "data": defense.config.data.name, "classifier": classifier_of(defense),
            "denoiser": fingerprint(defense.model), "threads": torch.get_num_threads(),
            "device": self._data.test.images.device.type, "torch": str(torch.__version__), **pixels_of(defense),
        }  # fmt: skip
        self._rows: dict[int, Certificate] = {}  # on the root all that is known, on others what was known before
        self._asked = 0  # samples, of this rank in this launch
        self._before, self._start, self._changed = 0, time.monotonic(), False

    @property
    def progressed(self) -> bool:
        """Whether this launch has asked for anything. Collective."""
        return self.world.maximum(self._asked) > 0

    def run(self) -> Reason:
        """Certify what is not certified yet; why that ended, NONE when all is done. Collective."""
        return share_out(self.world, self, self._lock, self._requests, self._quiet)

    def pieces(self, known: dict[int, Certificate]) -> list[Certificate]:
        """The images that are not done. Raises InputError where denoiser or classifier cannot be certified."""
        self._rows = known
        self._before, self._start = self._samples, time.monotonic()
        todo = [row for k in self._numbers if not (row := known.get(k) or self._new(k)).done]
        samples = f"n0 = {self.about['n0']:,}, n = {self.about['n']:,}{' at most' if self.about['adaptive'] else ''}"
        done = f", {len(self._numbers) - len(todo)} done already" if len(todo) < len(self._numbers) else ""
        say_first("%s: %d images, %s, sigma %g%s", self._name, len(self._numbers), samples, self._plan.sigma, done)
        with self.world.together():
            if todo:
                self._try_out()
        return todo

    def _new(self, k: int) -> Certificate:
        return Certificate(k, int(self._data.test.labels[k]))

    def open(self) -> dict[int, Certificate]:
        """What the record holds already, by image. Raises LaunchError, InputError or CheckpointError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{shown(self.path.parent)}: cannot be made ({error.strerror}); choose another folder with -o"
            ) from None
        if stale := self._lock.acquire():
            log.info("took over %s from %s, which has ended", shown(self.path), stale)
        if not self.path.exists():
            return {}
        rows, about = certificates.load(self.path)
        for key, new in self.about.items():
            if (old := about.get(key, new)) == new or key in ("name", "source"):  # earlier versions wrote fewer
                continue
            if key not in BITS:
                raise CheckpointError(
                    f"{shown(self.path)} was written with {key} = {old!r}, now {new!r}: certificates in one file share all "
                    f"parameters; choose another --label or -o, or delete the file"
                )
            log.warning("%s was %s, now %s: counts may differ from an undisturbed run", key, old, new)
        return {row.idx: row for row in rows}

    def work(self, row: Certificate) -> Iterator[None]:
        """Certify an image; it may be left between two batches."""
        image = self._data.normalise(self._data.test.images[row.idx : row.idx + 1])[0]
        start = time.perf_counter()
        for asked in self._smoothed.certify(image, row, self._plan):
            now = time.perf_counter()
            row.seconds, start, self._asked = row.seconds + now - start, now, self._asked + asked
            yield

    def news(self, row: Certificate) -> Certificate:
        """The counts so far."""
        return dataclasses.replace(row)

    def keep(self, row: Certificate) -> None:
        """Nothing: the root does."""

    def receive(self, news: list[Certificate]) -> None:
        """Take note of counts."""
        self._rows |= {row.idx: row for row in news}
        self._changed = True

    def save(self) -> None:
        """Write the record where it has changed. Raises CheckpointError if that cannot be done."""
        if self._changed:
            certificates.save(self.path, sorted(self._rows.values(), key=lambda row: row.idx), self.about)
            self._changed = False

    def close(self) -> bool:
        """The last of the record, and its TSV; whether all images are done."""
        self.save()
        certificates.write_tsv(certificates.read(self.path), self.path.with_suffix(".tsv"))
        log.info("%s", self.progress())
        return all(k in self._rows and self._rows[k].done for k in self._numbers)

    def _cost(self, row: Certificate) -> int:
        return row.n + (self._plan.n0 if row.selected != ABSTAIN else 0)

    @property
    def _samples(self) -> int:
        """Asked for so far, in all launches, as far as this rank knows."""
        return sum(self._cost(row) for row in self._rows.values())

    def progress(self) -> str:
        """``defense: image 52/200, 45.1 % certified at radius 0, 12,000 samples (54 % of the fixed plan), 98/s, ETA 0:12:10``."""
        rows = [self._rows.get(k) or self._new(k) for k in self._numbers]
        done = [row for row in rows if row.done]
        samples, seconds = self._samples, time.monotonic() - self._start
        rate, full = (samples - self._before) / max(seconds, 1e-9), self._plan.n0 + self._plan.looks[-1]
        mean = sum(map(self._cost, done)) / len(done) if done else full
        left = sum(max(0, mean - self._cost(row)) for row in rows if not row.done)
        parts = [f"{self._name}: image {len(done)}/{len(rows)}"]
        if done:
            parts.append(f"{100 * sum(row.correct for row in done) / len(done):.1f} % certified at radius 0")
        share = f" ({100 * mean / full:.0f} % of the fixed plan)" if self.about["adaptive"] and done else ""
        parts += [f"{samples:,} samples{share}", f"{rate:,.0f}/s"]
        return ", ".join([*parts, f"ETA {duration(left / rate)}" if rate and left else duration(seconds)])
