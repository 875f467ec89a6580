"""CUDA tensors without a GPU: shapes, types and devices are true, values are not; whatever would make the host wait is counted.

Tensors on "cuda" are torch's FakeTensors; those on the CPU are real, so that files, NumPy and black boxes work as ever. Where
the host asks for a value it gets one with which all is well: true, but that any is false; 0, 1.0, or zeros. Autograd's backward
pass cannot be pretended: it asks the driver for streams.
"""

import contextlib
import types
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from dzhpc.engines import moved, traced
from dzhpc.engines.kernels import gpu
from dzhpc.engines.kernels.compiled import Programs

aten = torch.ops.aten
#: their result's shape, or the result itself, depends on values: the host waits for the device
WAIT = {aten.nonzero, aten.masked_select, aten.unique_dim, aten._unique2, aten.repeat_interleave, aten.bincount}
ANSWERS = {torch.float32: 1.0, torch.float64: 1.0, torch.bfloat16: 1.0}
VIEWS = {aten.lift_fresh, aten.detach, aten.alias}


class Pretended(TorchDispatchMode):
    """``with Pretended() as gpu``: ``gpu.waits`` counts what makes the host wait, ``gpu.launches`` the operations on the device.

    memory: bytes of the card. Raises RuntimeError where tensors of two devices meet.
    """

    def __init__(self, memory: int = 80 * 2**30, capability: tuple[int, int] = (9, 0)):
        super().__init__()
        self.waits, self.launches = Counter(), Counter()
        self._pinned: list[Tensor] = []
        self._fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        self._memory, self._capability = memory, capability

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(self._fake)  # first: it asks whether there is a driver
        for home, name, value in self._replacements():
            self._stack.callback(setattr, home, name, getattr(home, name))
            setattr(home, name, value)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return _device(args[0])
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        here = [t for t in tensors if isinstance(t, FakeTensor)]  # the others are the host's
        device, packet = kwargs.get("device"), func.overloadpacket
        if not here and (device is None or torch.device(device).type != "cuda"):
            with unset_fake_temporarily():
                return self._on_host(func, packet, args, kwargs)
        if packet is aten._local_scalar_dense:
            self.waits["a number for the host"] += 1
            return not getattr(args[0], "is_any", False) if args[0].dtype == torch.bool else ANSWERS.get(args[0].dtype, 0)
        if packet in (aten.equal, aten.allclose, aten.is_nonzero):
            self.waits[str(packet)] += 1
            return True
        if packet in (aten._to_copy, aten.copy_):
            return self._moved(func, packet, args, kwargs)
        if packet in WAIT or any(t.dtype == torch.bool for t in self._indices(packet, args)):
            self.waits[str(packet)] += 1
        apart = [t for t in tensors if not isinstance(t, FakeTensor) and t.ndim]
        if here and apart:
            raise RuntimeError(f"{func} of tensors on {here[0].fake_device} and {apart[0].device} {list(apart[0].shape)}")
        return self._on_device(func, packet, args, kwargs)

    def _on_host(self, func, packet, args, kwargs):
        if packet is aten._pin_memory:
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        return func(*args, **kwargs)

    def _on_device(self, func, packet, args, kwargs):
        if packet is aten.nonzero:  # none
            return torch.empty((0, args[0].ndim), dtype=torch.int64, device="cuda")
        out = func(*args, **kwargs)
        if packet is aten.any:
            out.is_any = True
        if not (isinstance(out, Tensor) and func.is_view) and packet not in VIEWS and not str(packet).startswith("prim"):
            self.launches[str(packet)] += 1
        return out

    def _moved(self, func, packet, args, kwargs):
        """A copy, from one device to another or not."""
        target = torch.device(kwargs.get("device") or _device(args[0])) if packet is aten._to_copy else _device(args[0])
        source = args[0] if packet is aten._to_copy else args[1]
        quiet = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        if _device(source).type == target.type:
            return self._on_device(func, packet, args, kwargs)
        if target.type == "cpu":
            self.waits["to the host"] += 1
            if packet is aten.copy_:
                return args[0].zero_()
            with unset_fake_temporarily():
                return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        if not (quiet and any(source is pinned for pinned in self._pinned)):
            self.waits["to the device"] += 1
        given = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device=target)
        return self._on_device(func, packet, (given, *args[1:]) if packet is aten._to_copy else (args[0], given), kwargs)

    def _made(self, provider: gpu.TritonPasses) -> None:
        """In place of kernels that would be compiled and launched."""

        def seen(name: str, given: list[Tensor | None]) -> None:
            tensors = [t for t in given if t is not None]
            assert all(t.is_contiguous() and t.device.type == "cuda" for t in tensors)
            assert len({t.dtype for t in tensors}) == 1
            self.launches[name] += 1

        def sums(data: Tensor, centred: Tensor) -> Tensor:
            seen("sums", [data, centred])
            return torch.empty(2, len(data), data.shape[2], device="cuda")

        def carry(data: Tensor, centred: Tensor, coefficients: Tensor, residual: Tensor | None, value: Tensor | None) -> Tensor:
            assert coefficients.dtype == torch.float32 and list(coefficients.shape) == [len(data), 3, data.shape[2]]
            assert coefficients.is_contiguous()
            what = ["carry", *(["sum"] if residual is not None else []), *(["relu"] if value is not None else [])]
            seen(" ".join(what), [data, centred, residual, value])
            return torch.empty_like(data)

        provider.sums, provider.carry = sums, carry

    @staticmethod
    def _indices(packet, args):
        if packet not in (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index):
            return []
        return [t for t in args[1] if isinstance(t, Tensor)]

    def _replacements(self):
        """What would ask a driver."""

        def wait(*_):
            self.waits["synchronize"] += 1

        card = types.SimpleNamespace(
            name="Pretended", uuid="0", total_memory=self._memory, multi_processor_count=132,
            major=self._capability[0], minor=self._capability[1],
        )  # fmt: skip
        cuda = torch.cuda
        answers = {
            "is_available": True, "device_count": 1, "current_device": 0, "set_device": None, "get_device_properties": card,
            "get_device_capability": self._capability, "get_device_name": card.name, "max_memory_allocated": 0,
            "memory_allocated": 0, "reset_peak_memory_stats": None, "get_rng_state": torch.get_rng_state(), "set_rng_state": None,
        }  # fmt: skip
        return [
            *((cuda, name, lambda *_, value=value: value) for name, value in answers.items()),
            (gpu.TritonPasses, "__init__", lambda provider: self._made(provider)),
            (nn.Module, "_apply", _apply), (cuda, "synchronize", wait), (cuda, "Event", Event),
            (moved, "address_of", storage_of), (traced, "address_of", storage_of),
            (Programs, "compile", lambda self, traced, tensors: traced.forward),
        ]  # fmt: skip


@torch.no_grad()
def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """As torch's, with new parameters: a FakeTensor cannot be put into a real one's place."""
    made: dict[Tensor, Tensor] = {}
    for part in module.modules():
        for home in (part._parameters, part._buffers):
            for key, t in home.items():
                if t is not None:
                    new = made.setdefault(t, function(t.detach()))
                    made[t] = home[key] = nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
    return module


def _device(tensor: Tensor) -> torch.device:
    return tensor.fake_device if isinstance(tensor, FakeTensor) else torch.device("cpu")


def storage_of(tensor: Tensor) -> int:
    """What :func:`dzhpc.engines.moved.address_of` says of real tensors: equal for those that share memory."""
    return tensor.untyped_storage()._cdata


class Event:
    """A point in the device's time."""

    def __init__(self, enable_timing: bool = False):
        pass

    def record(self) -> None:
        """It is now."""

    def synchronize(self) -> None:
        """It is over: asked after a transfer that came later."""

    def elapsed_time(self, other: "Event") -> float:
        """Milliseconds until another."""
        return 1.0
