"""Implementations of the operators, loaded lazily by name."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from importlib.util import find_spec

import torch
from torch import Tensor

#: Name of an implementation of the logits path -> the module that registers it when imported.
LOGITS = {
    "torch": "portable",
    "native": "native",
    "triton": "triton_logits",
    "triton_staged": "triton_logits",
}
#: The same for the fused-linear path.
LINEAR = {
    "torch": "portable_linear",
    "native": "native_linear",
    "triton": "triton_linear",
}


def resolve(impl: str, x: Tensor, path: dict[str, str] = LOGITS) -> str:
    """Name of the implementation that serves ``impl`` for some input; loads it.

    Args:
        impl: "auto" or a name in ``path``. An explicit name never falls back to another.
        x: logits or hidden states; their device and dtype decide what "auto" is.
        path: :data:`LOGITS` or :data:`LINEAR`.

    Raises:
        ValueError: if ``impl`` is unknown, or needs a device the tensors are not on.
        ImportError: if the package or library behind an explicit ``impl`` is not there.
    """
    if impl != "auto" and impl not in path:
        raise ValueError(f"impl: expected 'auto' or one of {sorted(path)}, got {impl!r}")
    if impl == "auto":
        impl = _automatic(x, path)
    device = x.device
    if impl.startswith("triton") and device.type != "cuda" and not _interpreted():
        raise ValueError(
            f"impl: {impl!r} needs tensors on a GPU, got {device}; move them, use impl='torch', or set "
            "TRITON_INTERPRET=1 before the first import of triton to run it in the interpreter"
        )
    if impl == "native" and device.type != "cpu":
        raise ValueError(
            f"impl: 'native' needs tensors on the CPU, got {device}; move them, or use impl='auto'"
        )
    if device.type == "mps":
        raise ValueError(
            "device: mps has no float64 for the sums of log-ratios; use a CPU or CUDA device"
        )
    load(path[impl])
    return impl


def _automatic(x: Tensor, path: dict[str, str]) -> str:
    if x.is_cuda and x.dtype != torch.float64 and find_spec("triton"):
        return "triton"
    if x.device.type == "cpu" and native_serves(path["native"]):
        return "native"
    return "torch"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def native_serves(module: str) -> bool:
    """Whether the native library was built and loads; warns once where it was built and does not."""
    return _native_serves(module)


@functools.cache
def _native_serves(module: str) -> bool:
    if not importlib.import_module(f"{__name__}.native_library").PATH.exists():
        return False
    try:
        importlib.import_module(f"{__name__}.{module}")
        return True
    except ImportError as error:
        warnings.warn(f"{error}; impl='auto' uses impl='torch', which is slower", stacklevel=5)
        return False


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def load(module: str) -> bool:
    """Imports a module that registers implementations; runs once, also while compiling."""
    importlib.import_module(f"{__name__}.{module}")
    return True
