"""Which coordinates are perturbed: pruning scores, layer-wise pruning ratios (LPR), and patterns drawn from them.

GraSP (Wang et al. 2020) scores a weight by what its removal does to the gradient flow: S = -theta * (H g)        (eq. 2)
ZO-GraSP by queries: S = -theta * [g(theta + mu g) - g(theta)] / mu, with g an RGE of q directions                (eq. 3)
Both RGEs use the same directions and the same batch, so that the noise of the estimate does not enter the difference.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from dzhpc.errors import InputError, NumericalError
from dzhpc.method.coordinates import ParameterIndex
from dzhpc.method.estimators import rge_slopes, rge_sum
from dzhpc.method.seeds import derive, generator

Split = Callable[[int, Callable[[range], np.ndarray]], np.ndarray]


@dataclass
class LPR:
    """Layer-wise pruning ratios: for each prunable layer its name, size, and how many coordinates are kept."""

    layers: list[str]
    sizes: np.ndarray
    kept: np.ndarray
    model_sha256: str
    attrs: dict = field(default_factory=dict)  # scores, rule, mu, q, seed, sparsity
    scores: Tensor | None = None  # [d], for patterns that need more than ratios

    @property
    def ratios(self) -> np.ndarray:
        """The pruned fraction of each layer."""
        return 1 - self.kept / self.sizes

    def table(self) -> str:
        """A Markdown table, a layer a row."""
        rows = [
            f"| {n} | {s} | {k} | {r:.3f} |" for n, s, k, r in zip(self.layers, self.sizes, self.kept, self.ratios, strict=True)
        ]
        return "\n".join(["| layer | size | kept | pruned |", "|---|---|---|---|", *rows])


def prunable_layers(model: nn.Module, index: ParameterIndex, which: str = "weights") -> list[str]:
    """The parameters that may be pruned: "weights" (of convolutions and linear layers, as in the paper) or "all"."""
    if which == "all":
        return list(index.names)
    kinds = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear)
    weights = {id(m.weight) for m in model.modules() if isinstance(m, kinds)}
    return [name for name, p in zip(index.names, index.parameters, strict=True) if id(p) in weights]


def zo_grasp(engine, bind: Callable[[], float], q: int, mu: float, seed: int, split: Split) -> Tensor:
    """ZO-GraSP scores [d] by 2q + 2 queries (eq. 3).

    bind: binds the scoring batch to the engine; called at theta and at theta + mu g.
    split: ``World.split`` or a serial stand-in; each rank evaluates some directions, only q scalars travel.
    """
    index, coords = engine.index, np.arange(engine.index.size)
    theta = index.flatten(p.detach().clone() for p in index.parameters)

    def estimate() -> Tensor:
        bind()
        slopes = split(q, lambda mine: rge_slopes(engine, mine, mu, derive(seed, "grasp"), coords).cpu().numpy())
        return rge_sum(torch.from_numpy(slopes).to(index.device), derive(seed, "grasp"), coords, index)

    first = estimate()
    try:
        _assign(index, theta + mu * first)
        second = estimate()
    finally:
        _assign(index, theta)
        engine.unbind()  # it still held theta + mu g
    return -theta * (second - first) / mu


def fo_grasp(engine, bind: Callable[[], float], temperature: float = 1.0) -> Tensor:
    """GraSP scores [d] by a Hessian-vector product through autograd (eq. 2), of the loss of outputs / ``temperature``."""
    bind()
    index = engine.index
    through = None if temperature == 1 else lambda inputs: engine.model(inputs) / temperature
    return -index.flatten(p.detach() for p in index.parameters) * index.flatten(engine.hessian_gradient(through))


def random_scores(index: ParameterIndex, seed: int) -> Tensor:
    """Scores [d] uniform in [0, 1): every layer is pruned alike, up to chance."""
    return torch.rand(index.size, generator=generator(seed, "random scores"), dtype=index.dtype).to(index.device)


def lpr_from_scores(
    scores: Tensor, index: ParameterIndex, layers: list[str], ratio: float, rule: str, sha: str, attrs: dict | None = None
) -> LPR:
    """Prune the fraction ``ratio`` of all prunable weights by one global threshold; what stays of each layer is its ratio.

    rule "signed": the largest signed scores go; "magnitude": the smallest |score| go. At least one coordinate stays a layer.
    Raises InputError if there is nothing to prune, NumericalError if a score is not finite.
    """
    if not layers:
        raise InputError(
            f'sparsity.ratio = {ratio:g}: the model has no conv or linear weight to prune; use 0 or sparsity.prune = "all"'
        )
    if not torch.isfinite(scores).all():
        raise NumericalError(
            'the pruning scores are not finite: lower zo.mu, raise sparsity.q, or use sparsity.scores = "random"; if the first '
            "scores were, lower optim.lr"
        )
    coords = np.concatenate([index.range(name) for name in layers])
    sizes = np.array([len(index.range(name)) for name in layers])
    order = np.argsort(_badness(scores, rule)[coords], kind="stable")
    keep = np.zeros(index.size, bool)
    keep[coords[order[: round((1 - ratio) * len(coords))]]] = True
    kept = np.array([max(1, keep[index.range(name)].sum()) for name in layers])
    return LPR(layers, sizes, kept, sha, {**(attrs or {}), "rule": rule, "sparsity": ratio}, scores)


def draw(lpr: LPR | None, index: ParameterIndex, seed: int, number: int) -> np.ndarray:
    """The ``number``-th dynamic pattern S: ``kept`` coordinates of each layer, without replacement, and all others; sorted."""
    if lpr is None:
        return np.arange(index.size)
    active = np.ones(index.size, bool)
    for k, name in enumerate(lpr.layers):
        coords = index.range(name)
        active[coords] = False
        choice = torch.randperm(len(coords), generator=generator(seed, "pattern", number, k))[: int(lpr.kept[k])]
        active[coords[choice.numpy()]] = True
    return np.flatnonzero(active)


def adapted(lpr: LPR, index: ParameterIndex, seed: int, number: int, sizes: Tensor, share: float) -> np.ndarray:
    """As :func:`draw`, but ``share`` of each layer's coordinates are those of the largest ``sizes`` [d]; 0: never evaluated."""
    sizes, active = sizes.cpu().numpy(), np.ones(index.size, bool)
    for k, name in enumerate(lpr.layers):
        coords, kept = index.range(name), int(lpr.kept[k])
        first = min(round(share * kept), int((sizes[coords] > 0).sum()))
        largest = coords[np.argsort(-sizes[coords], kind="stable")[:first]]
        order = coords[torch.randperm(len(coords), generator=generator(seed, "pattern", number, k)).numpy()]
        active[coords] = False
        active[largest] = True
        active[order[~active[order]][: kept - first]] = True
    return np.flatnonzero(active)


def running(sizes: Tensor, coords: np.ndarray, values: Tensor) -> Tensor:
    """``sizes`` [d] where those of ``coords`` have moved half way to ``values`` [n], the first time all of it."""
    where, out = torch.from_numpy(coords).to(sizes.device), sizes.clone()
    out[where] = torch.where(sizes[where] > 0, (sizes[where] + values) / 2, values)
    return out


def best(lpr: LPR, index: ParameterIndex) -> np.ndarray:
    """The static pattern S: the coordinates that the scores themselves keep, and all that are not prunable; sorted."""
    badness, active = _badness(lpr.scores, lpr.attrs["rule"]), np.ones(index.size, bool)
    for name, kept in zip(lpr.layers, lpr.kept, strict=True):
        coords = index.range(name)
        active[coords] = False
        active[coords[np.argsort(badness[coords], kind="stable")[: int(kept)]]] = True
    return np.flatnonzero(active)


def _badness(scores: Tensor, rule: str) -> np.ndarray:
    return (scores if rule == "signed" else -scores.abs()).detach().cpu().numpy()


def _assign(index: ParameterIndex, flat: Tensor) -> None:
    with torch.no_grad():
        for p, value in zip(index.parameters, index.split(flat).values(), strict=True):
            p.copy_(value)
