"""Functions of tensors as compiled programs: exact shapes, equal code compiled once, plain where there is no compiler."""

import importlib.util
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from dzhpc.job import processor

SMALL = 2**17  # elements: less work than this is not worth a compiler's second
WORTH = 4e12  # queries of a run times bytes of a base pass's values that pay for a compiler: two million queries of the digits
COMPILERS = (os.environ.get("CXX", "g++"), "g++", "clang++")


@dataclass
class Program:
    """A function of the ``used`` ones of its tensors; ``constants`` are what its trace found beside them."""

    function: Callable
    used: list[int]
    constants: list[Tensor]

    def __call__(self, tensors: Callable[[int], Tensor]) -> list[Tensor]:
        """Outputs, given ``tensors(k)`` for the k-th input."""
        return self.function(*[tensors(k) for k in self.used], *self.constants)


class Programs:
    """Compiles for one device. ``say`` gets one line when there is no compiler, or when it fails.

    Shapes are static (``dynamic=False``): bits never depend on what was computed before.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, say: Callable[[str], None]):
        self._say = say
        self._reason = _obstacle(device, dtype)
        self.seconds = 0.0  # spent on making programs
        self._shared: dict[tuple, Callable] = {}
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
        """Whether a function whose largest tensor has so many elements should be compiled."""
        return elements > SMALL and self.compiling

    def build(self, function: Callable[..., list[Tensor]], tensors: list[Tensor]) -> Program:
        """The program of a function for tensors like these."""
        start = time.perf_counter()
        traced = make_fx(function)(*tensors)
        placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
        used = [k for k, node in enumerate(placeholders) if node.users]
        for node in [node for node in placeholders if not node.users]:
            traced.graph.erase_node(node)
        constants = _lift_constants(traced)
        given = [tensors[k] for k in used] + constants
        key = (traced.code, tuple((t.shape, t.stride(), t.dtype) for t in given))
        if key not in self._shared:
            self._shared[key] = self.compile(traced, given) if self.is_worth_it(largest(traced)) else traced.forward
        self.seconds += time.perf_counter() - start
        return Program(self._shared[key], used, constants)

    def call(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """``function(*tensors)``, compiled at the first call; one function object, one program for each kind of tensors."""
        if self._reason:  # a trace would only be run
            return function(*tensors)
        key = (function, *((t.shape, t.stride(), t.dtype) for t in tensors))
        if key not in self._called:
            self._called[key] = self.build(lambda *given: [function(*given)], list(tensors))
        return self._called[key](tensors.__getitem__)[0]

    def compile(self, traced: fx.GraphModule, tensors: list[Tensor]) -> Callable:
        """A trace as a program for tensors like these; torch.compile would look at every argument again at every call."""
        options = {
            "cpp.vec_isa_ok": True,  # the processor's own word on its vectors, not seconds of test compilations
            "realize_reads_threshold": 64,  # memory between operations is what costs, not a few of them done twice
            "realize_acc_reads_threshold": 64,
            "realize_opcount_threshold": 256,
            "cpp.enable_floating_point_contract_flag": "fast",  # a product and a sum in one instruction
            "assert_indirect_indexing": False,  # channels come from coordinates, which were checked
            "fx_graph_cache": False,  # its keys know nothing of instruction sets; those of the compiled code behind it do
        }
        if half_filled(tensors):
            options["cpp.simdlen"] = 256
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where a CUDA build meets no GPU
        try:
            import torch._inductor  # seconds that only those pay who compile

            return torch._inductor.compile(traced, tensors, options)
        except Exception as error:  # a compiler may fail in any way; the plain function is right in any case
            self._reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return traced.forward


def compiler() -> str | None:
    """The first C++ compiler that is found."""
    return next(filter(shutil.which, COMPILERS), None)


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
    """Elements of the largest tensor that a trace makes."""
    values = [node.meta.get("val") for node in traced.graph.nodes if node.op == "call_function"]
    return max((v.numel() for v in values if isinstance(v, Tensor)), default=0)


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
