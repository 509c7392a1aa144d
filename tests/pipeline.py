"""Runs of the pipeline in tests: what they leave, and how they are killed."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from processes import named, prepare
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

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


def prepare_for_commands() -> None:
    """Does now, in the process that others are forked from, what each would do before it computes."""
    prepare(*LATE)
    # 950 regular expressions, at the first model that is loaded.
    get_checkpoint_conversion_mapping("llama")


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
    case: str, function: str, argv: list[str], moves: int, seconds: float, limit: float = 120
) -> int:
    """Runs a command in one process after another, until one is not killed; returns how many were.

    In the process that ``processes.started`` has started: no run pays for the imports.

    Args:
        case: "time-SEED", killed after random times, ten runs at most; "moves-SEED", killed before or
            after random files take their place; anything else, never.
        function: "module.name" of what runs the command; it returns the exit status.
        argv: its argument.
        moves: the most files that a run puts in place before it is killed.
        seconds: the longest time before a run is killed.
        limit: seconds after which one that is not to be killed by the clock hangs.

    Raises:
        AssertionError: a run failed, or hung; with what all have printed.
    """
    run = named(function)
    prepare_for_commands()
    how, _, seed = case.partition("-")
    draw, kills, output = random.Random(seed), 0, tempfile.TemporaryFile()  # noqa: SIM115
    while True:
        at = (draw.randint(1, moves), draw.random() < 0.5) if how == "moves" else None
        end = draw.uniform(0.02, seconds) if how == "time" and kills < 10 else limit
        child = os.fork()
        if child == 0:
            status = 70
            try:
                os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
                if at:
                    kill_at_move(*at)
                status = run(argv)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        status = _awaited(child, end)
        planned = status == signal.SIGKILL if at else status is None and end < limit
        if not planned:
            break
        kills += 1
        assert kills < 200
    output.seek(0)
    assert status == 0, f"{case}: status {status} (None: it hung)\n{output.read().decode()}"
    return kills


def _awaited(child: int, seconds: float) -> int | None:
    """How a process ended; None if it had to be killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
