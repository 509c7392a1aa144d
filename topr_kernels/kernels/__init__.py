"""Implementations of the operators, loaded lazily by name."""

from __future__ import annotations

import importlib

import torch

#: Name of an implementation -> the module that registers it when imported.
MODULES = {"torch": "portable"}


def resolve(impl: str, device: torch.device) -> str:
    """Name of the implementation that serves ``impl`` on a device; loads it.

    Args:
        impl: "auto" or one of :data:`MODULES`. An explicit name never falls back to another.
        device: device of the logits.

    Raises:
        ValueError: if ``impl`` is unknown.
    """
    if impl != "auto" and impl not in MODULES:
        raise ValueError(f"impl: expected 'auto' or one of {sorted(MODULES)}, got {impl!r}")
    name = "torch" if impl == "auto" else impl
    load(name)
    return name


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def load(name: str) -> bool:
    """Imports the module that registers an implementation; runs once, also while compiling."""
    importlib.import_module(f"{__name__}.{MODULES[name]}")
    return True
