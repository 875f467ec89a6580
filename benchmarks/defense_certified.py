"""Certify several defences side by side, the layers that their denoisers share computed once.

    mpirun -n 2 python benchmarks/defense_certified.py runs/given.toml runs/zo runs/autograd -o out --images 200 --n 1000

Takes the options of ``python -m dzhpc.certify`` (but --label) and gives the same counts: same noise, same calls. Where only the
last layer of a DnCNN was tuned the body's pass is shared, and each further defence costs about a tenth of the first. An image
is done for all defences before the next; OUT holds their records, as that verb writes them, and until all are done
those of each rank.
"""

import hashlib
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from dzhpc import certify
from dzhpc.job import device as devices
from dzhpc.job.launch import run_verb
from dzhpc.job.stopping import Requests
from dzhpc.job.world import World
from dzhpc.tasks.defense import certificates
from dzhpc.tasks.defense.certification import Certification, spread
from dzhpc.tasks.defense.inference import load_defense
from dzhpc.tasks.defense.methods import label_of
from dzhpc.tasks.defense.smoothing import Certificate, Plan, Smoothed


class Features:
    """What a DnCNN's body makes of the batches of one image; a batch is known by its content."""

    def __init__(self, body: nn.Module):
        self.body, self._known = body, {}

    def forget(self) -> None:
        """Before the next image."""
        self._known.clear()

    def __call__(self, images: Tensor) -> Tensor:
        key = hashlib.sha1(images.contiguous().numpy(), usedforsecurity=False).digest()
        if key not in self._known:
            self._known[key] = self.body(images)
        return self._known[key]


class Shared(nn.Module):
    """A DnCNN over features that others use, too."""

    def __init__(self, features: Features, last: nn.Module):
        super().__init__()
        self._features, self._last = features, last

    def forward(self, images: Tensor) -> Tensor:
        return images - self._last(self._features(images))


def share(defenses: list) -> list[Features]:
    """Replace denoisers by such that share bodies with equal weights; the bodies."""
    found: list[Features] = []
    for defense in defenses:
        if defense.model is None:
            continue
        body = defense.model.model[:-1]
        weights = list(body.parameters())
        same = (f for f in found if all(map(torch.equal, weights, f.body.parameters())))
        features = next(same, None)
        if features is None:
            found.append(features := Features(body))
        defense.model = Shared(features, defense.model.model[-1])
    return found


class Method:
    """One defence being certified: :class:`Certification`'s parameters, record and file, an image at a time."""

    def __init__(self, world: World, args, source: str, defense):
        name = label_of(source, args.no_denoiser)
        self.job = Certification(world, defense, args, source, args.out / f"{name}.h5", Requests(defense.config, None))
        make = Plan.adaptive if args.adaptive else Plan.fixed
        sigma = self.job.about["sigma"]
        self._plan = make(sigma, args.n0, args.n, args.alpha, *([args.grid] if args.adaptive else []))
        self._smoothed = Smoothed(defense.classify, len(defense.classes), sigma, defense.seed, args.batch)
        self._data = defense.data
        self.own = args.out / f"{name}.rank{world.rank}.h5"
        self.rows: list[Certificate] = []

    def certify(self, k: int) -> None:
        """The k-th test image."""
        row, start = Certificate(k, int(self._data.test.labels[k])), time.perf_counter()
        for _ in self._smoothed.certify(self._data.normalise(self._data.test.images[k : k + 1])[0], row, self._plan):
            pass
        row.seconds = time.perf_counter() - start
        self.rows.append(row)
        certificates.save(self.own, self.rows, self.job.about)


def main(world: World, args) -> int:
    """Certify on every rank; tables on the root."""
    devices.cpu(1)
    args.out.mkdir(parents=True, exist_ok=True)
    defenses = [load_defense(s, torch.device("cpu"), args.no_denoiser, args.precision) for s in args.sources]
    methods = [Method(world, args, s, d) for s, d in zip(args.sources, defenses, strict=True)]
    bodies = share(defenses)
    for k in spread(args.images, len(defenses[0].data.test))[world.rank :: world.size]:
        for method in methods:
            method.certify(k)
        for body in bodies:
            body.forget()
    rows = world.gather([method.rows for method in methods])
    if world.is_root:
        for i, method in enumerate(methods):
            path = method.job.path
            certificates.save(path, sorted((r for own in rows for r in own[i]), key=lambda r: r.idx), method.job.about)
            certificates.write_tsv(certificates.read(path), path.with_suffix(".tsv"))
        print(certificates.write([method.job.path for method in methods], args.out)[0])
    for method in methods:
        method.own.unlink()
    return 0


if __name__ == "__main__":
    p = certify.parser()
    p.set_defaults(out=Path("certified"))
    run_verb(p, main)
