"""``python -m benchmarks --compare REV``: is this working tree slower than a revision?

The revision is checked out as a git worktree in a temporary folder. Two processes, one with the package
of each, take turns on the same inputs; what is judged is the ratio of the times of a turn, head over
base. The exit status is 1 if the 95 % interval of the median ratio of some case lies above the limit
(1.10), or if head is red against fp64; 2 if nothing could be compared.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, interleave, median_interval

REPETITIONS, QUICK_REPETITIONS = 25, 15
#: Name to (path, tolerance, trained, in place).
CASES = {
    "linear exact, trained head": ("linear", 0.0, True, False),
    "linear exact, frozen head": ("linear", 0.0, False, False),
    "linear tau 2^-10, trained head": ("linear", 2.0**-10, True, False),
    "logits": ("logits", 0.0, True, False),
    "logits, in place": ("logits", 0.0, True, True),
}
START = """
import sys
sys.path.insert(0, {package!r})
import topr_kernels
sys.path.insert(0, {benchmarks!r})
from benchmarks.compare import serve
serve({package!r}, {device!r}, {quick!r})
"""


class Worker:
    """A process with the package of one tree; ``call`` runs a command in it."""

    def __init__(self, package: Path, device: str, quick: bool) -> None:
        values = {"package": str(package), "benchmarks": str(ROOT)}
        code = START.format(**values, device=device, quick=quick)
        # Threads that spin while the other process has its turn would be measured with it.
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=package,
            env=environment,
        )

    def call(self, command: str, name: str) -> Any:
        """The answer to a command about a case.

        Raises:
            RuntimeError: with what went wrong in the process.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps([command, name]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError("the process has ended; its message stands above")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def serve(package: str, device: str, quick: bool) -> None:
    """Answers commands from standard input until it closes; the other side of Worker."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed by others must not look like an answer
    import topr_kernels
    from benchmarks import data, hidden_states
    from benchmarks.case import Case, LinearCase, LogitsCase, Provider
    from benchmarks.engine import errors, why_red
    from benchmarks.measure import Clock
    from benchmarks.providers import ours

    if Path(topr_kernels.__file__).parents[1] != Path(package):
        raise RuntimeError(f"topr_kernels came from {topr_kernels.__file__}, not from {package}")
    import torch

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    clock = Clock(device)
    made: dict[str, Case] = {}

    def case_of(path: str) -> Case:
        if path not in made:
            if path == "logits":
                size = (64, 4096) if quick else (512, 49152)
                made[path] = LogitsCase(*size, device, dtype)
            elif quick or not hidden_states.CACHE.exists():
                size = (256, 64, 2048) if quick else (512, 576, 49152)
                made[path] = LinearCase("random", data.tiny(*size, sequence=64), device, dtype)
            else:
                real = hidden_states.load(0.75, 512)
                made[path] = LinearCase("real", real, device, dtype)
        return made[path]

    def answer(command: str, name: str) -> Any:
        path, tolerance, trained, inplace = CASES[name]
        case = case_of(path)
        if path == "linear":
            provider: Provider = ours.from_hidden(tolerance)
        else:
            provider = Provider({"": ours._loss("auto", inplace)}, ours=True, inplace=inplace)
        loss = next(iter(provider.settings.values()))
        if command == "check":
            dtype_name = str(dtype).removeprefix("torch.")
            return why_red(provider, dtype_name, errors(case, provider, loss, trained))
        return case.repetition(provider, loss, clock, trained)["total_ms"]

    for line in sys.stdin:
        try:
            print(json.dumps({"value": answer(*json.loads(line))}), file=answers, flush=True)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            print(json.dumps({"error": text}), file=answers, flush=True)


@contextlib.contextmanager
def checked_out(rev: str) -> Iterator[Path]:
    """A worktree of a revision in a temporary folder, with its native library.

    Raises:
        SystemExit: if git knows no such revision.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
        )

    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "base"
        done = git("worktree", "add", "--detach", str(tree), rev)
        if done.returncode:
            raise SystemExit(f"--compare: git cannot check out {rev!r}: {done.stderr.strip()}")
        try:
            _bring_native(
                tree, not git("diff", "--quiet", rev, "--", "csrc", "setup.py").returncode
            )
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def _bring_native(tree: Path, same: bool) -> None:
    """Copies this tree's library where its sources are the same, or builds one."""
    library = ROOT / "topr_kernels" / ("_native.dll" if sys.platform == "win32" else "_native.so")
    if not library.exists() or not (tree / "csrc").exists():
        print("--compare: base has no native library, as head has none or base has no csrc")
        return
    if same:
        shutil.copy2(library, tree / "topr_kernels")
        return
    print("--compare: csrc differs, building the native library of base ...", flush=True)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL)


def judge(
    name: str,
    base: Callable[[], float],
    head: Callable[[], float],
    repetitions: int,
    limit: float,
) -> bool:
    """Times both in turns and prints the ratio; True if head is slower beyond doubt."""
    samples, interrupted = interleave({"base": base, "head": head}, repetitions)
    if interrupted:
        raise KeyboardInterrupt
    ratios = [h / b for b, h in zip(samples["base"], samples["head"], strict=True)]
    low, high = median_interval(ratios)
    slower = low > limit
    verdict = "SLOWER" if slower else "not decided" if high == math.inf or high > limit else "ok"
    medians = (statistics.median(samples[side]) for side in ("base", "head"))
    print(
        f"{name:32} {next(medians):9.2f} ms -> {next(medians):9.2f} ms  ratio "
        f"{statistics.median(ratios):5.3f}  95 % [{low:.3f}, {high:.3f}]  {verdict}",
        flush=True,
    )
    return slower


def compare(
    rev: str,
    device: str,
    words: list[str],
    quick: bool,
    repetitions: int | None,
    limit: float,
) -> int:
    """Compares every case whose name has all the words; the exit status."""
    names = [name for name in CASES if all(word in name for word in words)]
    if not names:
        raise SystemExit(f"--filter: no case of --compare has all of {words}: {list(CASES)}")
    rounds = repetitions or (QUICK_REPETITIONS if quick else REPETITIONS)
    slower, compared = [], 0
    with checked_out(rev) as tree:
        base, head = Worker(tree, device, quick), Worker(ROOT, device, quick)
        print(f"base {rev}, head this tree; {rounds} rounds each, limit {limit}")
        try:
            for name in names:
                try:
                    red = head.call("check", name)
                    if red:
                        print(f"{name:32} head is RED: {red}")
                        slower.append(name)
                        continue
                    for _ in range(2):  # warm-up
                        base.call("time", name)
                        head.call("time", name)
                    sides = (
                        lambda side=side, name=name: side.call("time", name)
                        for side in (base, head)
                    )
                    if judge(name, *sides, rounds, limit):
                        slower.append(name)
                    compared += 1
                except RuntimeError as error:
                    print(f"{name:32} not compared: {error}")
        finally:
            base.close()
            head.close()
    if slower:
        print(f"slower than {limit} times {rev}, or red: " + "; ".join(slower))
        return 1
    return 0 if compared else 2
