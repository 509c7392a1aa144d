"""Runs of the pipeline in tests: what they leave, and how they are killed."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

from topr_kernels.recipe import files
from topr_kernels.recipe.cli import main

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


#: What makes the commands that README and --help show small; the flags of a command that has them.
_ASKED = ["--held-out", "3", "--max-new-tokens", "4"]
SMALL = {
    "generate": [*_ASKED, "--questions", "8", "--samples", "2"],
    "evaluate": _ASKED,
    "iterate": [
        *(*_ASKED, "--questions", "4", "--samples", "2", "--iterations", "1"),
        *("--eval-samples", "2", "--votes", "1"),
    ],
    "verify": ["--samples", "2", "--max-new-tokens", "4"],
    "vote": ["--held-out", "3", "--max-new-tokens", "4"],
}


def shown_commands(text: str) -> list[list[str]]:
    """The arguments of each ``topr`` command in a text, lines that go on joined."""
    joined = text.replace("\\\n", " ")
    found = re.findall(r"^ *(?:example: |then: +)?topr (\S.*)$", joined, re.MULTILINE)
    return [shlex.split(line) for line in found]


def run_shown(commands: list[list[str]], model: Path, folder: Path, patch: Any) -> None:
    """Runs commands as they are shown, but small and with a tiny model for those of their names."""
    models = importlib.import_module("topr_kernels.recipe.models")
    patch.setattr(models, "_smollm2_folder", lambda: model)
    patch.chdir(folder)
    chatty = Path(shutil.copytree(model, folder / "Qwen" / "Qwen2.5-0.5B-Instruct"))
    (chatty / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    lines = [{"question": f"{i} + 1 =", "answer": str(i + 1)} for i in range(9)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for command in commands:
        assert main([*command, *SMALL.get(command[0], [])]) == 0, command


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
