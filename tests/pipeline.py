"""Runs of the pipeline in tests: what they leave, and how they are killed."""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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


def kill_until_done(
    case: str, run: Callable[[list[str]], int], argv: list[str], *, moves: int, seconds: float
) -> None:
    """Runs a command in one process after another, until one is not killed; prints how many were.

    Forked, so that no run pays for the imports; this process itself computes nothing.

    Args:
        case: "time-SEED", killed after random times, ten runs at most; "moves-SEED", killed before or
            after random files take their place; anything else, never.
        run: returns the exit status of the command.
        argv: of ``run``.
        moves: the most files that a run puts in place before it is killed.
        seconds: the longest time before a run is killed.
    """
    how, _, seed = case.partition("-")
    draw, kills = random.Random(seed), 0
    while True:
        at = (draw.randint(1, moves), draw.random() < 0.5) if how == "moves" else None
        end = draw.uniform(0.02, seconds) if how == "time" and kills < 10 else math.inf
        child = os.fork()
        if child == 0:
            status = 70
            try:
                if at:
                    kill_at_move(*at)
                status = run(argv)
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        status = _awaited(child, end)
        if status != signal.SIGKILL:
            break
        kills += 1
        assert kills < 200
    assert status == 0, (case, status)
    print("kills", case, kills)


def _awaited(child: int, seconds: float) -> int:
    """How a process ended, by itself or killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def killed_runs(driver: str, *args: str | Path) -> dict[str, int]:
    """Runs a script that calls ``kill_until_done``; returns how often each case was killed.

    Raises:
        AssertionError: with what it printed, if a case failed.
    """
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", driver, *map(str, args)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests.parent}:{tests}"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    words = [line.split() for line in done.stdout.splitlines() if line.startswith("kills ")]
    return {case: int(count) for _, case, count in words}
