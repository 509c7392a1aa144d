"""Runs of the pipeline in tests: what they leave, and how they are killed."""

from __future__ import annotations

import importlib
import json
import os
import signal
from pathlib import Path
from typing import Any

from topr_kernels.recipe import files

#: What commands of the recipe import when they come to it, some seconds in every process.
LATE = (
    *("datasets", "pyarrow.parquet", "reasoning_gym", "transformers.generation"),
    *(
        "transformers.models.llama.modeling_llama",
        "transformers.trainer",
        "topr_kernels.hf.trainer",
    ),
)


def import_all() -> None:
    """Imports it now, in the process that others are forked from."""
    for name in LATE:
        importlib.import_module(name)


def contents(folder: Path) -> dict[str, Any]:
    """Every file, without the seconds of the manifests."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        value: Any = path.read_bytes()
        if path.parent == folder and path.suffix == ".json":
            value = {k: v for k, v in json.loads(value).items() if k != "seconds"}
        found[path.relative_to(folder).as_posix()] = value
    return found


def kill_at_move(count: int, after: bool) -> None:
    """Kills this process before or after the ``count``-th file of the pipeline takes its place."""
    left = [count]
    replace = os.replace

    def replaced(source: Any, target: Any) -> None:
        left[0] -= 1
        if left[0] == 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    files.os.replace = replaced
