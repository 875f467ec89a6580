"""Files of layer-wise pruning ratios (LPR), with or without the scores they come from."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dzhpc.errors import InputError
from dzhpc.files import h5
from dzhpc.files.tensors import get_tensors, put_tensors
from dzhpc.method.scores import LPR

KIND = "dzhpc-lpr"


def save_lpr(path: Path, lpr: LPR, scores: Mapping[str, Tensor] | None = None) -> None:
    """Write an LPR file; ``scores`` (parameter name -> its scores) adds ``/scores``.

    Raises InputError if it cannot be written; then the old file, if any, is whole.
    """

    def fill(file: h5.File) -> None:
        put_lpr(file, lpr)
        put_tensors(file.create_group("scores"), scores or {})

    h5.write(path, KIND, fill, InputError)


def load_lpr(path: str | Path) -> tuple[LPR, dict[str, Tensor]]:
    """(ratios, scores by parameter name). Raises InputError if the file is missing, damaged, or no LPR file."""
    with h5.opened(Path(path), KIND, InputError) as file:
        return get_lpr(file), get_tensors(file["scores"])


def put_lpr(group: h5.Group, lpr: LPR) -> None:
    """Write the ratios into a group, of an LPR file or of a checkpoint."""
    group["layer"] = lpr.layers
    group["size"], group["kept"], group["ratio"] = lpr.sizes, lpr.kept, lpr.ratios
    group.attrs.update(lpr.attrs, model_sha256=lpr.model_sha256)


def get_lpr(group: h5.Group) -> LPR:
    """The ratios of :func:`put_lpr`."""
    own = ("model_sha256", "format", "format_version", "creator", "created", "complete")
    attrs = {k: v for k, v in h5.attributes(group).items() if k not in own}
    layers = [str(name) for name in group["layer"].asstr()[()]]
    return LPR(layers, group["size"][()], group["kept"][()], str(group.attrs["model_sha256"]), attrs)
