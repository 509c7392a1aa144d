"""The process that forks others for the tests."""

from __future__ import annotations

import json
import select
import signal
import sys
import time
from pathlib import Path

import pytest
from processes import TESTS, call, end, send, started

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")


def test_an_answer_that_nobody_waited_for_is_not_taken_for_the_next() -> None:
    send("processes.free_port")
    assert TESTS.samefile(call("os.getcwd"))


def test_one_that_hangs_ends_with_its_children(tmp_path: Path) -> None:
    server = started.__wrapped__()
    assert server.stdin is not None and server.stdout is not None
    job = {"world": 1, "function": "signal.pause", "args": [], "timeout": 100, "env": {}}
    line = [0, "processes.run", {**job, "imports": [], "folder": str(tmp_path)}]
    server.stdin.write(json.dumps(line) + "\n")
    server.stdin.flush()
    while not (tmp_path / "0").exists():
        time.sleep(0.01)
    end(server, seconds=0.1)
    assert server.returncode == -signal.SIGKILL
    # Nobody holds the pipe.
    assert select.select([server.stdout], [], [], 10)[0] and not server.stdout.read()
