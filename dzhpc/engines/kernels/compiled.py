"""Functions of tensors as compiled programs for any number of coordinates; plain where there is no compiler.

Of the sizes in a program one is an argument: the number of coordinates P of a chunk. A program is traced and compiled with a
symbol in its place, before it is known which numbers will come, so that a coordinate's bits depend on no company.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from dzhpc.engines.kernels.symbolic import Range, alone, any_count, for_count, form, sample
from dzhpc.job import processor

SMALL = 2**11  # elements a coordinate: less work than this is not worth a compiler's second
WORTH = 1e12  # queries of a run times bytes of a base pass's values that pay for a compiler: see benchmarks/results/delta.md
COMPILERS = (os.environ.get("CXX", "g++"), "g++", "clang++")


@dataclass
class Program:
    """A function of the ``used`` ones of its tensors; ``constants`` are what its trace found beside them.

    holds: whether it is right for a number of coordinates.
    """

    function: Callable
    used: list[int]
    constants: list[Tensor]
    holds: Callable[[int], bool]

    def __call__(self, tensors: Callable[[int], Tensor]) -> list[Tensor]:
        """Outputs, given ``tensors(k)`` for the k-th input."""
        return self.function(*[tensors(k) for k in self.used], *self.constants)


class Code:
    """A trace, as it stands until it is compiled."""

    def __init__(self, traced: fx.GraphModule, samples: list[Tensor]):
        self.function = self._plain = traced.forward
        self.given = traced, samples

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        return self.function(*tensors)

    def forget(self) -> None:
        """Be as if never compiled."""
        self.function = self._plain


class Programs:
    """Compiles for one device. ``say`` gets one line when there is no compiler, or when it fails.

    All sizes but the number of coordinates are static: bits never depend on what was computed before.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, say: Callable[[str], None]):
        self._say = say
        self._reason = _obstacle(device, dtype)
        self.seconds = 0.0  # spent on making programs
        self._shared: dict[tuple, tuple[Callable, Range]] = {}
        self._waiting: list[Code] | None = None  # what is to be compiled later
        self._called: dict[tuple, Program] = {}

    def weigh(self, queries: float, size: int) -> None:
        """Leave the compiler alone where so many queries (inf: unknown), of ``size`` bytes each, do not pay for it."""
        if queries * size < WORTH and not self._reason:
            few = f"{queries:,.0f} queries of {size / 2**20:.2g} MiB do not pay for a compiler"
            self._reason = few if queries else "no compiler is asked for"

    @property
    def compiling(self) -> bool:
        """Whether functions are compiled; says once why not."""
        if self._reason:
            self._say(f"not compiled: {self._reason}")
        return not self._reason

    def is_worth_it(self, elements: int) -> bool:
        """Whether a function whose largest tensor has so many elements a coordinate should be compiled."""
        return elements > SMALL and self.compiling

    def build(self, function: Callable[..., list[Tensor]], tensors: list[Tensor], axes: Sequence[int | None]) -> Program:
        """The program of a function for tensors like these; axes: where each has its coordinates, None if it has none."""
        start = time.perf_counter()
        try:
            return self._build(function, tensors, axes)
        finally:
            self.seconds += time.perf_counter() - start

    def call(self, function: Callable[..., Tensor], *tensors: Tensor, common: Sequence[int] = ()) -> Tensor:
        """``function(*tensors)``, compiled at the first call; one function object, one program for each kind of tensors.

        Their first axis is the coordinates', but for the ``common`` ones, which belong to all of them.
        """
        if self._reason:  # a trace would only be run
            return function(*tensors)
        axes = [None if k in common else 0 for k in range(len(tensors))]
        count = next(len(t) for t, axis in zip(tensors, axes, strict=True) if axis == 0)
        kind = (function, *(form(t, axis) for t, axis in zip(tensors, axes, strict=True)))
        make = lambda axes: self.build(lambda *given: [function(*given)], list(tensors), axes)  # noqa: E731
        return for_count(self._called, kind, count, make, axes)(tensors.__getitem__)[0]

    @contextmanager
    def waiting(self) -> Iterator[list[Code]]:
        """Within, nothing is compiled; what would have been is in the list, for :meth:`finish`."""
        self._waiting = []
        try:
            yield self._waiting
        finally:
            self._waiting = None

    def finish(self, code: Code) -> None:
        """Compile what waited."""
        start = time.perf_counter()
        if self.compiling and code.given:
            code.function, code.given = self.compile(*code.given), None
        self.seconds += time.perf_counter() - start

    def give_up(self, reason: str) -> None:
        """Use no compiled code, not even what there is."""
        self._reason = self._reason or reason
        for made, _ in self._shared.values():
            if isinstance(made, Code):
                made.forget()

    def _code(self, traced: fx.GraphModule, samples: list[Tensor]) -> Code:
        code = Code(traced, samples)
        if self._waiting is None:
            code.function = self.compile(*code.given)
        else:
            self._waiting.append(code)
        return code

    def _build(self, function: Callable[..., list[Tensor]], tensors: list[Tensor], axes: Sequence[int | None]) -> Program:
        from torch._dispatch.python import enable_python_dispatcher

        mode, count = any_count()
        symbol = count.node.expr
        samples = [sample(mode, t, axis, count) for t, axis in zip(tensors, axes, strict=True)]
        with mode, enable_python_dispatcher():  # C++ alone would ask some operations for a number
            traced = make_fx(function)(*samples)
        placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
        used = [k for k, node in enumerate(placeholders) if node.users]
        for node in [node for node in placeholders if not node.users]:
            traced.graph.erase_node(node)
        constants = _lift_constants(traced)
        given = [samples[k] for k in used] + [sample(mode, t, None, count) for t in constants]
        key = (traced.code, *(f"{tuple(t.shape)} {t.stride()} {t.dtype}".replace(str(symbol), "P") for t in given))
        if key not in self._shared:
            compiles = self.is_worth_it(largest(traced))
            self._shared[key] = self._code(traced, given) if compiles else traced.forward, Range(mode.shape_env, symbol)
        made, holds = self._shared[key]
        return Program(made, used, constants, holds)

    def compile(self, traced: fx.GraphModule, samples: list[Tensor]) -> Callable:
        """A trace as a program for tensors like these; torch.compile would look at every argument again at every call.

        samples: tensors without values, with a symbol for the number of coordinates.
        """
        options = {
            "cpp.vec_isa_ok": True,  # the processor's own word on its vectors, not seconds of test compilations
            "realize_reads_threshold": 64,  # memory between operations is what costs, not a few of them done twice
            "realize_acc_reads_threshold": 64,
            "realize_opcount_threshold": 256,
            "cpp.enable_floating_point_contract_flag": "fast",  # a product and a sum in one instruction
            "assert_indirect_indexing": False,  # channels come from coordinates, which were checked
            "fx_graph_cache": True,
        }
        if half_filled(samples):
            options["cpp.simdlen"] = 256
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where a CUDA build meets no GPU
        try:
            import torch._inductor  # seconds that only those pay who compile
            import torch.compiler.config

            torch.compiler.config.cache_key_tag = tag()  # of which the cache's keys know nothing
            return torch._inductor.compile(traced, samples, options)
        except Exception as error:  # a compiler may fail in any way; the plain function is right in any case
            self._reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return traced.forward


def compiler() -> str | None:
    """The first C++ compiler that is found."""
    return next(filter(shutil.which, COMPILERS), None)


@functools.cache
def tag() -> str:
    """What compiled code depends on beside its source: "avx512+bf16-torch-2.9.1-g++-12"."""
    name, version = compiler() or "none", ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        version = subprocess.run([name, "-dumpversion"], capture_output=True, text=True, timeout=60).stdout.strip()
    torch_version = str(torch.__version__).split("+")[0]
    return f"{processor.instruction_set()}-torch-{torch_version}-{os.path.basename(name)}-{version or 'unknown'}"


def _obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why nothing is compiled, if nothing is."""
    if dtype == torch.float64:
        return "float64 is for comparisons, and not worth a compiler's seconds"
    if device.type == "cpu" and compiler() is None:
        return "no C++ compiler (g++ or clang++) was found"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton is missing"
    return ""


def largest(traced: fx.GraphModule) -> int:
    """Elements of the largest tensor that a trace makes for a single coordinate."""
    values = [node.meta.get("val") for node in traced.graph.nodes if node.op == "call_function"]
    return max((alone(v.numel()) for v in values if isinstance(v, Tensor)), default=0)


def half_filled(tensors: list[Tensor]) -> bool:
    """Whether rows of bfloat16 fill half a 512-bit register only: loading parts is five times slower than narrow registers."""
    rows = [t.shape[t.stride().index(1)] for t in tensors if t.dtype == torch.bfloat16 and 1 in t.stride()]
    wide = tensors[0].device.type == "cpu" and "avx512_f" in processor.capabilities()
    return wide and any(n % 32 == 16 for n in rows)


def _lift_constants(traced: fx.GraphModule) -> list[Tensor]:
    """Turn the tensors that a trace holds (parameters) into inputs behind the others, so that equal code is equal."""
    graph, constants = traced.graph, []
    last = next((node for node in reversed(graph.nodes) if node.op == "placeholder"), None)
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        constants.append(getattr(traced, node.target))
        with graph.inserting_after(last) if last else graph.inserting_before(next(iter(graph.nodes))):
            last = graph.placeholder(f"constant_{len(constants)}")
        node.replace_all_uses_with(last)
        graph.erase_node(node)
    traced.recompile()
    return constants
