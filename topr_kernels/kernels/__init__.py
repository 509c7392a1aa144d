"""Implementations of the operators, loaded lazily by name."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

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


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _assume_constant_result(function: _Function) -> _Function:
    """``torch.compiler.assume_constant_result``, which imports the compiler: as long as torch takes."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


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
        impl = _automatic(x)
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


def _automatic(x: Tensor) -> str:
    if x.is_cuda and x.dtype != torch.float64 and find_spec("triton"):
        return "triton"
    if x.device.type == "cpu" and native_serves():
        return "native"
    return "torch"


@_assume_constant_result
def native_serves() -> bool:
    """Whether the native library is there and loads; warns once where it was wanted and is not."""
    return _native_loads()


@functools.cache  # apart from the above: torch.compile looks through this decorator
def _native_loads() -> bool:
    native = importlib.import_module(f"{__name__}.native_library")
    # Neither the library nor a reason: the install was told to build none.
    if not native.PATH.exists() and not native.REASON.exists():
        return False
    try:
        native.library()
        return True
    except ImportError as error:
        level = _frames_of_ours()
        warnings.warn(f"{error}. Until then impl='auto' is impl='torch'.", stacklevel=level)
        return False


def _frames_of_ours() -> int:
    """``stacklevel`` of a warning in the caller of this, for the line that called the package."""
    frame, level = sys._getframe(1), 1
    package = __name__.partition(".")[0]
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    return level


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@_assume_constant_result
def load(module: str) -> bool:
    """Imports a module that registers implementations; runs once, also while compiling."""
    importlib.import_module(f"{__name__}.{module}")
    return True


def linear_tile(impl: str) -> Any:
    """The ``TileKernels`` of a resolved implementation of the fused-linear path."""
    return importlib.import_module(f"{__name__}.{LINEAR[impl]}").TILE
