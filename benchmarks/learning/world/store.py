"""Figures of the cells: one JSON file, one line a cell."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

from topr_kernels.recipe.files import atomic_path

#: Figures by the name of their cell.
Figures = dict[str, dict[str, Any]]


def read(path: Path) -> Figures:
    """All of them; none if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def add(path: Path, name: str, figures: dict[str, Any]) -> None:
    """Writes a cell's figures into the file, which other processes may write too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cells = {**read(path), name: figures}
        lines = (f"{json.dumps(n)}: {json.dumps(cells[n], allow_nan=False)}" for n in sorted(cells))
        with atomic_path(path) as temporary:
            temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
