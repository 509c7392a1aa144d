"""Implementations of the operators, loaded lazily by name."""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec

import torch

#: Name of an implementation -> the module that registers it when imported.
MODULES = {
    "torch": "portable",
    "triton": "triton_logits",
    "triton_staged": "triton_logits",
}


def resolve(impl: str, device: torch.device) -> str:
    """Name of the implementation that serves ``impl`` on a device; loads it.

    Args:
        impl: "auto" or one of :data:`MODULES`. An explicit name never falls back to another.
        device: device of the logits.

    Raises:
        ValueError: if ``impl`` is unknown, or needs a device the tensors are not on.
        ImportError: if the package behind an explicit ``impl`` is not installed.
    """
    if impl != "auto" and impl not in MODULES:
        raise ValueError(f"impl: expected 'auto' or one of {sorted(MODULES)}, got {impl!r}")
    if impl == "auto":
        impl = "triton" if device.type == "cuda" and find_spec("triton") else "torch"
    if impl.startswith("triton") and device.type == "cpu" and not _interpreted():
        raise ValueError(
            f"impl: {impl!r} needs tensors on a GPU, got {device}; move them, use impl='torch', or set "
            "TRITON_INTERPRET=1 before the first import of triton to run it in the interpreter"
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
