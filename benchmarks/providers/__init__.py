"""What is compared, a file each: settings, a link to its own benchmark, or why it is missing."""

from __future__ import annotations

from types import ModuleType

from benchmarks.case import Provider, absent
from benchmarks.providers import (
    cut_cross_entropy,
    eager,
    liger,
    ours,
    quack,
    torch_compile,
    torch_linear_cross_entropy,
    trl,
    verl,
)

#: In the order of the tables.
MODULES = (
    ours,
    eager,
    torch_compile,
    torch_linear_cross_entropy,
    trl,
    cut_cross_entropy,
    liger,
    quack,
    verl,
)


def linear(device: str) -> dict[str, Provider]:
    """Every provider of a loss from hidden states."""
    return _collect("linear", device)


def logits(device: str) -> dict[str, Provider]:
    """Every provider of a loss from logits."""
    return _collect("logits", device)


def find(path: str, device: str, name: str) -> Provider:
    """One provider; imports no peer that stands behind it."""
    for module in MODULES:
        found = _of(module, path, device)
        if name in found:
            return found[name]
    raise ValueError(f"name: expected a provider of {path} on {device}, got {name!r}")


def _collect(path: str, device: str) -> dict[str, Provider]:
    found: dict[str, Provider] = {}
    for module in MODULES:
        found |= _of(module, path, device)
    return found


def _of(module: ModuleType, path: str, device: str) -> dict[str, Provider]:
    if not hasattr(module, path):
        return {}
    try:
        found: dict[str, Provider] = getattr(module, path)(device)
    except Exception as error:
        if module is ours:
            raise
        # What a peer raises while it is imported must not cost the others their figures.
        found = {module.__name__.rpartition(".")[2]: absent(error)}
    return {name: provider._replace(link=module.LINK) for name, provider in found.items()}
