"""Matrix products of the fused-linear path: into a given tensor, added or not, by the faster library.

torch sends fp32 products on a CPU to MKL, which uses AVX-512 on Intel's processors alone; oneDNN, which
torch carries too, uses it on all of them. On an AMD processor with AVX-512 it is up to twice as fast.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

# Rows of a product at a time, as oneDNN's goes through a buffer; work that is not worth its overhead.
BLOCK_ROWS, SMALL = 2048, 1 << 24


def mm(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """Writes a b to out or adds it, accumulated and written in the dtype of out."""
    if a.dtype != out.dtype:
        if accumulate:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif _served_by_onednn(a, b):
        _onednn_mm(a, b, out, accumulate)
    elif accumulate:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def _served_by_onednn(a: Tensor, b: Tensor) -> bool:
    # By type, shape and layout alone: equal rows of equal shapes must take the same way.
    return (
        a.device.type == "cpu"
        and a.dtype == torch.float32
        and a.shape[0] * a.shape[1] * b.shape[1] >= SMALL
        # Other layouts fall back to a loop in oneDNN that is a thousand times slower.
        and (b.is_contiguous() or b.t().is_contiguous())
        and bool(torch.backends.mkldnn.enabled)
        and onednn_is_faster()
    )


def _onednn_mm(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    for r in range(0, len(a), BLOCK_ROWS):
        block = a[r : r + BLOCK_ROWS]
        if block.stride(1) != 1:
            block = block.contiguous()
        product = torch.ops.mkldnn._linear_pointwise(block, b.t(), None, "none", [], "")
        target = out[r : r + BLOCK_ROWS]
        if accumulate:
            target.add_(product)
        else:
            target.copy_(product)


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512 and a torch that has oneDNN."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    # What torch.compile calls for a linear layer; not public, so it is asked for.
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return "AuthenticAMD" in _processor()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        with cpuinfo.open(encoding="utf-8") as f:
            return f.read(4096)
    return platform.processor()
