"""Starts a program as several processes of one torch.distributed group on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(
    world: int, code: str, *args: str, timeout: float = 150, env: dict[str, str] | None = None
) -> list[str]:
    """Runs ``python -c code args`` as ``world`` ranks; returns their output, raises if one fails."""
    common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
    common |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", **(env or {})}
    common |= {"MASTER_PORT": str(free_port())}
    common["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent), *sys.path])
    # Not by way of the interpreter's end: about once in ten runs (torch 2.13) the last reference to a
    # process group waits there, with the GIL, for a thread of gloo that wants it.
    code += "\nimport os, sys\nsys.stdout.flush(); sys.stderr.flush(); os._exit(0)"
    processes = []
    try:
        for rank in range(world):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", code, *args],
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs
