"""Runs commands of the recipe as several processes, and what may befall those.

A test adds a case by a call of a ``Server`` (the fixture ``server`` of ``test_recipe_processes.py``)::

    done = server(2, server.argv("generate", out), events=[
        {"rank": 1, "function": "generate.complete", "call": 2, "what": "kill"},
    ])
    assert done["status"] == [1, -signal.SIGKILL], done["output"]

which runs ``topr generate`` as two processes, the second of which is killed at its second call of
``topr_kernels.recipe.generate.complete``. ``befall`` lists what else can happen.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

from pipeline import prepare_for_commands
from processes import free_port, receive, send

from topr_kernels.recipe.cli import main
from topr_kernels.recipe.tasks import Task

TASK = [
    *("--task", "chain_sum", "--questions", "24", "--held-out", "5", "--max-new-tokens", "6"),
    *("--task-config", '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}'),
]
#: Each command with its flags; {model} and {out} are folders. 12 batches, 8 parts, 3 batches.
COMMANDS = {
    "generate": [
        *TASK,
        *("--samples", "4", "--sample-batch", "8"),
        *("--model", "{model}", "--out", "{out}/samples.parquet"),
    ],
    "score": [
        *("--batch-size", "1", "--model", "{model}"),
        *("--records", "{out}/samples.parquet", "--out", "{out}/scored.jsonl"),
    ],
    "curate": [
        *("--no-dedupe", "--size", "20", "--method", "anna-karenina", "--positive-share", "0"),
        *("--records", "{out}/scored.jsonl", "--out", "{out}/curated.parquet"),
    ],
    "train": [
        *("--batch-size", "4", "--lr", "1e-4", "--save-steps", "1", "--epochs", "2"),
        *("--model", "{model}", "--records", "{out}/curated.parquet", "--out", "{out}/trained"),
    ],
    "evaluate": [
        *TASK,
        *("--eval-samples", "4", "--votes", "3", "--sample-batch", "8"),
        *("--model", "{model}", "--out", "{out}/evaluation.json"),
    ],
    "verify": [
        *("--samples", "2", "--sample-batch", "8", "--max-new-tokens", "4", "--solutions", "1"),
        *("--template", "{prompt}{completion}?", "--one-line", "--model", "{model}"),
        *("--records", "{out}/samples.parquet", "--out", "{out}/judgements.parquet"),
    ],
    "vote": [
        *TASK,
        *("--judgements", "2", "--sample-batch", "8", "--max-new-tokens", "4", "--votes", "3"),
        *("--template", "{prompt}{completion}?", "--one-line", "--model", "{model}"),
        *("--records", "{out}/evaluation.parquet", "--out", "{out}/vote.json"),
    ],
}
#: A function at one of whose calls something befalls a process, for each command.
BUSY = {
    "generate": "generate.complete",
    "score": "score._token_log_probs",
    "evaluate": "generate.complete",
}


def run_job(
    *,
    world: int,
    commands: list[list[str]],
    folder: str,
    events: list[dict[str, Any]] | None = None,
    kill_when: int = 0,
    limit: float = 60,
    patience: float = 0,
    env: dict[str, str] | None = None,
    judge_in_workers: bool = False,
) -> dict[str, Any]:
    """Runs commands in ``world`` processes, and kills them all when ``kill_when`` of them wait.

    In the process that ``processes.started`` has started.

    Returns:
        "status" of each process (negative: the signal; None: it had to be killed at the limit), "output"
        of each, and the "seconds" it took.
    """
    prepare_for_commands()
    start, port, children = time.monotonic(), free_port(), []
    notes = Path(folder)
    notes.mkdir(parents=True)
    for rank in range(world):
        child = os.fork()
        if child == 0:
            status = 70
            try:
                output = os.open(notes / f"output-{rank}", os.O_WRONLY | os.O_CREAT)
                os.dup2(output, 1), os.dup2(output, 2)
                if world > 1:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
                    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                os.environ.update(env or {})
                # Each would start workers of its own, which takes a second of the processor.
                Task.in_process = not judge_in_workers  # type: ignore[attr-defined]
                for event in events or []:
                    if event["rank"] in (rank, "all"):
                        befall(notes / f"waits-{rank}", **event)
                if patience:
                    module = importlib.import_module("topr_kernels.recipe.processes")
                    module.joined = functools.partial(module.joined, timedelta(seconds=patience))
                status = next((s for argv in commands if (s := main(argv))), 0)
            except SystemExit as error:
                status = error.code
            except BaseException:
                traceback.print_exc()
                status = 71
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        children.append(child)
    statuses: dict[int, int | None] = {}
    killed = False
    while len(statuses) < world:
        for child in set(children) - set(statuses):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                statuses[child] = os.waitstatus_to_exitcode(status)
        if kill_when and not killed and len(list(notes.glob("waits-*"))) == kill_when:
            for child in set(children) - set(statuses):
                os.kill(child, signal.SIGKILL)
            killed = True
        if time.monotonic() - start > limit:
            for child in set(children) - set(statuses):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                statuses[child] = None
        time.sleep(0.005)
    return {
        "status": [statuses[child] for child in children],
        "output": [(notes / f"output-{rank}").read_text() for rank in range(world)],
        "seconds": time.monotonic() - start,
    }


def befall(
    note: Path,
    *,
    rank: int | str,
    function: str,
    call: int,
    what: str,
    after: int | None = None,
) -> None:
    """At the ``call``-th call of a function of the recipe something happens to this process.

    With ``after`` not before that process has made its first call: which is first is up to the machine.
    """
    begun = note.with_name(note.name.replace("waits", "begun"))
    module_name, *owners, name = function.split(".")
    module = importlib.import_module(f"topr_kernels.recipe.{module_name}")
    module = functools.reduce(getattr, owners, module)
    original, calls = getattr(module, name), []

    def befallen(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        begun.touch()
        if len(calls) == call:
            while after is not None and not begun.with_name(f"begun-{after}").exists():
                time.sleep(0.005)
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif what == "slow":
                time.sleep(1.5)
            elif what == "wait":
                note.touch()
                time.sleep(1000)
            elif what == "bug":
                raise ZeroDivisionError("a bug")
            elif what == "full":
                raise OSError("disk is full")
            elif what == "interrupt":
                raise KeyboardInterrupt
        return original(*args, **kwargs)

    setattr(module, name, befallen)


class Server:
    """Asks for jobs of one model.

    Args:
        model: its folder.
        folder: for what the processes of a job write about themselves.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        self.model = model
        self.folder = folder

    def argv(self, command: str, out: Path, *more: str) -> list[str]:
        flags = [
            f.format(model=self.model, out=out) if "{m" in f or "{o" in f else f
            for f in COMMANDS.get(command, [])
        ]
        return [command, *flags, *more]

    def __call__(self, world: int, *commands: list[str], **options: Any) -> dict[str, Any]:
        self.send(world, *commands, **options)
        return self.receive()

    def send(self, world: int, *commands: list[str], **options: Any) -> None:
        job = {"world": world, "commands": list(commands), "folder": str(self.folder), **options}
        shutil.rmtree(self.folder, ignore_errors=True)
        self.sent = send("recipe_server.run_job", **job)

    def receive(self) -> dict[str, Any]:
        return dict(receive(self.sent))

    def succeed(self, world: int, *commands: list[str], **options: Any) -> dict[str, Any]:
        result = self(world, *commands, **options)
        assert result["status"] == [0] * world, result["output"]
        return result
