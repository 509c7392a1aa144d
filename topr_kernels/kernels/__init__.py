"""Implementations of the operators, loaded lazily by name."""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec

import torch
from torch import Tensor

#: Name of an implementation -> the module that registers it when imported.
MODULES = {
    "torch": "portable",
    "triton": "triton_logits",
    "triton_staged": "triton_logits",
}


def resolve(impl: str, logits: Tensor) -> str:
    """Name of the implementation that serves ``impl`` for some logits; loads it.

    Args:
        impl: "auto" or one of :data:`MODULES`. An explicit name never falls back to another.
        logits: the logits; their device and dtype decide what "auto" is.

    Raises:
        ValueError: if ``impl`` is unknown, or needs a device the tensors are not on.
        ImportError: if the package behind an explicit ``impl`` is not installed.
    """
    if impl != "auto" and impl not in MODULES:
        raise ValueError(f"impl: expected 'auto' or one of {sorted(MODULES)}, got {impl!r}")
    if impl == "auto":
        served = logits.is_cuda and logits.dtype != torch.float64 and find_spec("triton")
        impl = "triton" if served else "torch"
    device = logits.device
    if impl.startswith("triton") and device.type != "cuda" and not _interpreted():
        raise ValueError(
            f"impl: {impl!r} needs tensors on a GPU, got {device}; move them, use impl='torch', or set "
            "TRITON_INTERPRET=1 before the first import of triton to run it in the interpreter"
        )
    if device.type == "mps":
        raise ValueError(
            "logits: on mps, which has no float64 for the sums of log-ratios; use a CPU or CUDA device"
        )
    load(impl)
    return impl


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def load(name: str) -> bool:
    """Imports the module that registers an implementation; runs once, also while compiling."""
    importlib.import_module(f"{__name__}.{MODULES[name]}")
    return True
