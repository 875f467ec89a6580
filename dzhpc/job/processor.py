"""The instructions that this process uses: those of its processor, less what torch's own switch hides.

``ATEN_CPU_CAPABILITY`` (default, avx2, avx512), read by torch at its start, keeps a process from wider vectors; torch.cpu's list
of what the processor has takes no notice of it, and nor do the libraries below torch (oneDNN has ``ONEDNN_MAX_CPU_ISA``).
"""

import functools
import platform

import torch

WITHOUT = {  # the widest vectors that torch uses -> how the names of instructions begin that then are not to be used
    "AVX2": ("avx512", "avx10", "amx"),
    "DEFAULT": ("avx", "amx", "fma", "f16c"),
}


@functools.cache
def capabilities() -> frozenset[str]:
    """Names, as in torch.cpu.get_capabilities, of what is there and not hidden; bfloat16 products go with the vectors."""
    hidden = WITHOUT.get(torch.backends.cpu.get_cpu_capability(), ())
    found = torch.cpu.get_capabilities().items()
    return frozenset(name for name, present in found if present is True and not name.startswith(hidden))


@functools.cache
def instruction_set() -> str:
    """What bits depend on, in a word: "avx2", "avx512", "avx512+bf16", "avx512+bf16+amx", "neon", "neon+bf16", "default", ..."""
    vectors, have = torch.backends.cpu.get_cpu_capability().lower().replace(" ", ""), capabilities()
    if vectors == "default" and "neon" in have:
        vectors = "neon"
    products = "bf16" if have & {"avx512_bf16", "bf16", "sve_bf16"} else ""
    return "+".join(filter(None, (vectors, products, "amx" if "amx_bf16" in have else "")))


def name() -> str:
    """What the processor is called, "Intel Xeon" say; what kind of machine it is, where torch does not know."""
    return torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
