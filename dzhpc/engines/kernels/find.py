"""Which kernel serves a layer: the first of its kind's providers that fits.

A kernel of one's own joins by ``PROVIDERS["conv2d"].insert(0, MyKernel)``, MyKernel a class as :class:`Convolution` describes it.
"""

import time
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from dzhpc.engines.kernels.compiled import Programs
from dzhpc.engines.kernels.convolutions import Direct, Winograd
from dzhpc.engines.kernels.gpu import TritonPasses
from dzhpc.engines.kernels.library import Library
from dzhpc.engines.kernels.plain import Torch


class Convolution(Protocol):
    """Passes changes through a Conv2d layer, without its bias. Made at first need, once for each engine.

    Its constructor takes nothing, and raises OSError with one line that says why where it cannot be made.
    """

    name: ClassVar[str]

    @staticmethod
    def types(device: torch.device) -> list[torch.dtype]:
        """What it may serve on this machine; a run's bits depend on that."""

    @staticmethod
    def fits(conv: nn.Conv2d, like: Tensor) -> bool:
        """Whether changes like these [P, B, C, H, W] pass so, and faster than by the providers behind this one."""

    @staticmethod
    def weights(conv: nn.Conv2d, dtype: torch.dtype) -> Tensor:
        """The layer's weights as the kernel reads them; made once a batch."""

    def convolve(
        self, conv: nn.Conv2d, data: Tensor, weights: Tensor, centred: Callable[[], Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Changes D [P, B, C, H, W] -> (those of the outputs [P, B, O, H', W'], means).

        centred: gives the base outputs less their mean over batch and pixels, x_c [B, O, H', W'], where a BatchNorm behind
        wants mean(D) and mean(D (2 x_c + D)) [2, P, O]; a kernel that does not know these answers None.
        """


class Pass(Protocol):
    """Carries dense changes through BatchNorm [- sum with others] [- ReLU]; without one that fits, programs do it.

    Its constructor is as :class:`Convolution` says. Changes come as P images of N = B H W rows and C columns, base values as one.
    """

    name: ClassVar[str]

    @staticmethod
    def types(device: torch.device) -> list[torch.dtype]:
        """What it may serve on this machine; a run's bits depend on that."""

    @staticmethod
    def fits(norm: nn.Module, like: Tensor) -> bool:
        """Whether changes like these [P, B, C, H, W] pass so, and faster than by a program."""

    def sums(self, data: Tensor, centred: Tensor) -> Tensor:
        """D [P, N, C] beside x_c [N, C] -> mean(D) and mean(D (2 x_c + D)) over the rows [2, P, C] float32."""

    def carry(self, data: Tensor, centred: Tensor, coefficients: Tensor, residual: Tensor | None, value: Tensor | None) -> Tensor:
        """(D - m) a - x_c b [+ residual], and through a ReLU that takes ``value`` [N, C] at theta; (m, a, b) [P, 3, C]."""


#: kind -> its providers, the first that fits serves; of a "conv2d" torch, the last one, always does
PROVIDERS: dict[str, list[type]] = {"conv2d": [Winograd, Direct, Torch], "pass": [TritonPasses]}

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Kernels:
    """What one engine computes with: compiled passes (:attr:`programs`), and kernels for single layers.

    device, dtype: of the parameters. say: gets one line where there is no compiler, and where a kernel cannot be made.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, say: Callable[[str], None]):
        self.programs = Programs(device, dtype, say)
        self._device, self._dtype, self._say = device, dtype, say
        self._made: dict[type, object | None] = {}  # None: it could not be
        self._seconds = 0.0

    @property
    def compiling(self) -> bool:
        """Whether a compiler is at work; says once why not."""
        return self.programs.compiling

    def weigh(self, queries: float, size: int) -> None:
        """Decide, before anything is asked for, whether a compiler is at work: see :meth:`Programs.weigh`."""
        self.programs.weigh(queries, size)

    @property
    def seconds(self) -> float:
        """Spent so far on making kernels and programs."""
        return self._seconds + self.programs.seconds

    @property
    def library(self) -> Library | None:
        """Our own passes over changes, for float32 on a CPU; None where there is no compiler, or where it fails."""
        if self._device.type != "cpu" or self._dtype != torch.float32 or not self.compiling:
            return None
        return self._make(Library)

    def call(self, function: Callable[..., Tensor], *tensors: Tensor, common: Sequence[int] = ()) -> Tensor:
        """``function(*tensors)``, compiled at the first call: see :meth:`Programs.call`."""
        return self.programs.call(function, *tensors, common=common)

    def find(self, kind: str, layer: nn.Module, like: Tensor):
        """The kernel for a layer and tensors like this one; None where no provider of its kind fits."""
        fitting = (provider for provider in PROVIDERS[kind] if provider.fits(layer, like))
        return next((kernel for kernel in map(self._make, fitting) if kernel is not None), None)

    @property
    def names(self) -> str:
        """What bits depend on, such as "winograd fp32, bf16", or "none"; makes all that this machine could use."""
        if not self.compiling:
            return "none"
        providers = [(p, p.types(self._device)) for of_kind in PROVIDERS.values() for p in of_kind]
        here = [(p, types) for p, types in providers if types and self._make(p) is not None]
        return "; ".join(f"{p.name} {', '.join(_TYPES.get(t, str(t)) for t in types)}" for p, types in here) or "none"

    def _make(self, provider: type):
        if provider not in self._made:
            start = time.perf_counter()
            try:
                self._made[provider] = provider()
            except OSError as error:
                self._made[provider] = None
                self._say(f"kernel {provider.name} is not used: {error}")
            self._seconds += time.perf_counter() - start
        return self._made[provider]
