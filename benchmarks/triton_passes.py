"""The Triton kernels compiled for GPUs that are not here: registers, shared memory, spills; and what bytes and FLOPs allow.

``python benchmarks/triton_passes.py`` needs no GPU: ``ptxas`` and ``cuobjdump`` come with Triton.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dzhpc.engines.kernels import triton_passes as passes

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {"bf16": "*bf16", "fp32": "*fp32"}
#: card -> (bytes/s of its memory, FLOP/s of dense bf16 products, of fp32 ones), the manufacturer's
CARDS = {"A100 80 GB": (2.04e12, 312e12, 19.5e12), "H100 SXM": (3.35e12, 989e12, 67e12), "H200": (4.8e12, 989e12, 67e12)}
STAGES = ((16, 32, 7), (32, 16, 6), (64, 8, 6))  # ResNet-20: channels, pixels on a side, 3 x 3 convolutions


def compiled(kernel, pointers: dict[str, str], constants: dict[str, object], capability: int) -> dict[str, int]:
    """Registers and bytes of spills of a thread, bytes of shared memory of a block."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    even = {*pointers, "rows", *(["columns"] if constants["COLUMNS"] % 16 == 0 else [])}  # as the launcher finds them to be
    aligned = {(k,): [["tt.divisibility", 16]] for k, n in enumerate(names) if n in even}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": passes.WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        told = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}
    return {"registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"], "shared": made.metadata.shared}


def table() -> list[str]:
    """A line a kernel, type, number of channels, and architecture."""
    lines = ["| kernel | type | channels | sm | registers | spilled bytes | shared bytes | blocks an SM |", "|---" * 8 + "|"]
    for name, kernel, flags in (
        ("sums", passes.sums_kernel, {"STEPS": passes.STEPS}),
        ("carry, ReLU", passes.carry_kernel, {"RESIDUAL": False, "RELU": True}),
        ("carry, sum, ReLU", passes.carry_kernel, {"RESIDUAL": True, "RELU": True}),
    ):
        for type_, pointer in TYPES.items():
            for channels in (3, 16, 64):
                for capability in (80, 90):
                    rows, columns = passes.tile(channels)
                    pointers = {n: pointer for n in kernel.arg_names if n.endswith("_at")}
                    pointers |= {
                        n: "*fp32" for n in ["coefficients_at", *(["out_at"] if name == "sums" else [])] if n in pointers
                    }
                    found = compiled(kernel, pointers, {"ROWS": rows, "COLUMNS": columns, **flags}, capability)
                    fit = 65536 // (32 * passes.WARPS * found["registers"])
                    cells = [name, type_, channels, capability, found["registers"], found["spilled"], found["shared"], fit]
                    lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def estimate(batch: int = 512, width: int = 2) -> list[str]:
    """Microseconds a coordinate of the work around a 3 x 3 layer: of bytes at the card's speed, or of FLOPs if they last longer.

    Changes of a layer are B C H W ``width`` bytes; every second one ends in a sum with a residual. Base values come from caches.
    """
    lines = ["| card | layer | convolution | (its FLOPs) | sums | pass | sums' share |", "|---" * 7 + "|"]
    for card, (speed, products, _) in CARDS.items():
        whole = [0.0, 0.0, 0.0]
        for channels, size, count in STAGES:
            moved = batch * channels * size * size * width / speed
            flops = 2 * 9 * channels * channels * size * size * batch / products
            parts = [max(2 * moved, flops), moved, 2.5 * moved]  # in and out; in; in, out, and in again for each second one
            whole = [a + count * b for a, b in zip(whole, parts, strict=True)]
            cells = [f"{1e6 * t:.1f}" for t in (parts[0], flops, *parts[1:])]
            lines.append(f"| {card} | {channels} x {size}^2 | " + " | ".join(cells) + f" | {100 * parts[1] / sum(parts):.0f} % |")
        cells = [f"{1e6 * whole[0]:.0f}", "", f"{1e6 * whole[1]:.0f}", f"{1e6 * whole[2]:.0f}"]
        lines.append(
            f"| {card} | all {sum(s[2] for s in STAGES)} | " + " | ".join(cells) + f" | {100 * whole[1] / sum(whole):.0f} % |"
        )
    return lines


if __name__ == "__main__":
    print(f"triton {triton.__version__}\n")
    print("\n".join([*table(), "", *estimate()]))
