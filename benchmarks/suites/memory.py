"""Peak memory of one forward and backward beyond inputs and gradients, each in a process of its own.

- ``counted``: the largest number of bytes of torch tensors alive at once (LiveBytes), less the
  gradients, whether or not they exist at the peak. The same from run to run; blind to scratch inside
  an operator, so not shown for peers, who hide their work in one.
- ``resident``: growth of the peak resident set (VmHWM, reset before the step), less the gradients,
  after a warm-up on a small case. Sees all scratch, and pages the allocator keeps; moves by some MiB.
- ``allocator`` (CUDA): torch.cuda's peak less what was held before and the gradients.

A case whose estimate is beyond the free memory is listed as not fitting, never measured by swapping.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import data, providers
from benchmarks.case import Case, LinearCase, LogitsCase, Loss, Provider, gradient_bytes
from benchmarks.engine import Bench, Job, summary
from topr_kernels import kernels
from topr_kernels.linear import workspace
from topr_kernels.ops import linear as linear_ops
from topr_kernels.ops import logits as logits_ops

EAGER_COPIES = 5  # of fp32 logits, with room: only decides whether a case is tried
ROWS = {
    "cpu": (1024, 4096),
    "cpu, full": (2048, 8192, 32768),
    "cuda": (2048, 8192, 32768),
}
TEMPERATURE = 0.75
#: Peers hide their work in operators of their own: their resident set, at the smallest size.
LINEAR = ("topr exact", "topr tau 2^-10", "torch eager")
LOGITS = ("topr torch", "topr torch inplace", "topr native", "topr native inplace", "torch eager")
LOGITS_SHAPES = {
    "cpu": ((1024, 49152, "float32"), (1024, 49152, "bfloat16")),
    "cpu, full": (
        *((2048, 49152, "float32"), (2048, 49152, "bfloat16")),
        (512, 151936, "bfloat16"),
    ),
}


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of every storage that appears while active; ``peak`` is their maximum."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.seen = {x.untyped_storage()._cdata for x in known}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and counts the storages of its results."""
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self._follow(x)
        return out

    def _follow(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def step(case: Case, loss: Loss) -> int:
    """One forward and backward; bytes of the gradients."""
    leaves = case.leaves(trained=True)
    loss(case, *leaves).backward()
    return gradient_bytes(leaves)


def counted(case: Case, small: Case, loss: Loss, impl: str) -> int:
    """Peak bytes of torch tensors beyond inputs and gradients."""
    known = [x for x in vars(case).values() if isinstance(x, Tensor)]
    known += [x for x in getattr(case, "data", ()) if isinstance(x, Tensor)]
    memory = LiveBytes(*known)
    linear = isinstance(case, LinearCase)
    ops: Any = linear_ops if linear else logits_ops
    path = kernels.LINEAR if linear else kernels.LOGITS

    def followed(kernel: Callable[..., Any]) -> Callable[..., Any]:
        # A mode is off inside a custom operator; enter it again, or its temporaries go unseen.
        def call(*args: Any) -> Any:
            with memory:
                return kernel(*args)

        return call

    name = kernels.resolve(impl, known[0], path)
    ops.register(name, ops.Kernels(*map(followed, ops._KERNELS[name])))
    with memory:
        gradients = step(case, loss)
    return memory.peak - gradients


def _status(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def resident(case: Case, small: Case, loss: Loss, impl: str) -> int:
    """Growth of the peak resident set beyond the gradients; Linux."""
    step(small, loss)
    workspace._HELD.memory = None  # our workspace is part of what is measured
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present resident set
    before = _status("VmRSS")
    gradients = step(case, loss)
    return _status("VmHWM") - before - gradients


def resident_bytes(device: str) -> Callable[[], float]:
    """From now on: a function that says by how many bytes the peak has grown; on CUDA the whole peak."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return lambda: float(torch.cuda.max_memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present resident set
    before = _status("VmRSS")
    return lambda: float(_status("VmHWM") - before)


def allocator(case: Case, small: Case, loss: Loss, impl: str) -> int:
    """Peak of the CUDA allocator beyond what was held before and the gradients."""
    step(case, loss)
    case.aside = {}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = step(case, loss)
    return torch.cuda.max_memory_allocated() - before - gradients


METHODS = {"counted": counted, "resident": resident, "allocator": allocator}


def build(path: str, device: str, quick: bool, rows: int, vocab: int, dtype: str) -> Case:
    """The case of a job, or with few rows its warm-up."""
    if path == "logits":
        return LogitsCase(rows, vocab, device, getattr(torch, dtype))
    return data.linear_case(device, dtype, quick, rows, temperature=TEMPERATURE)


def in_child(
    method: str, provider: str, path: str, device: str, quick: bool, describe: bool, *shape: Any
) -> tuple[int, dict[str, Any]]:
    """One measurement and, where asked for, the facts of its case; runs in a fresh process."""
    rows, vocab, dtype = shape
    small = build(path, device, quick, min(64, rows), vocab, dtype)
    case = build(path, device, quick, rows, vocab, dtype)
    found = providers.find(path, device, provider)
    words = provider.replace(",", " ").split()
    impl = next((word for word in words if word in ("torch", "native")), "auto")
    loss = next(iter(found.settings.values()))
    value = METHODS[method](case, small, loss, impl if found.ours else "auto")
    # Facts need fp64 and entropy passes; last, so that they leave nothing in the allocator before.
    return value, case.facts() if describe else {}


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a fresh process.

    Raises:
        RuntimeError: if it raises, or if the process ends without an answer, as one does that the
            system kills because memory ran out.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(send, function, *args), daemon=True)
    child.start()
    send.close()  # the child's copy is the only one: its end is the end of the pipe
    try:
        good, value = receive.recv()
    except EOFError:
        child.join()
        code = child.exitcode or 0
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        raise RuntimeError(f"its process ended with {how}; out of memory?") from None
    finally:
        child.kill()  # it has answered, or nobody waits for it any more
        child.join()
    if not good:
        raise RuntimeError(value)
    return value


def _answer(send: Any, function: Callable[..., Any], *args: Any) -> None:
    try:
        send.send((True, function(*args)))
    except Exception as error:
        send.send((False, summary(error)))


def fits(provider: Provider, rows: int, vocab: int, device: str) -> bool:
    """Whether a provider that makes logits has room for EAGER_COPIES of them."""
    if not provider.makes_logits:
        return True
    return EAGER_COPIES * 4 * rows * vocab < free_bytes(device)


def free_bytes(device: str) -> int:
    """Memory that nobody uses."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def jobs(device: str, quick: bool, full: bool = False) -> list[Job]:
    """Hidden states by rows, and on a CPU logits by shape; on CUDA the other suites measure those."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    vocab = data.TINY["vocab"] if quick else 49152
    size = data.size_of(device, full)
    found = []
    for rows in (data.TINY["rows"],) if quick else ROWS[size]:
        shape = (rows, vocab, dtype)
        weight = 2.0 if rows < 2048 else 4.0
        found.append(Job(f"memory linear {rows}", _job("linear", LINEAR, shape), weight))
    if device == "cpu":
        for shape in ((16, 97, "float32"),) if quick else LOGITS_SHAPES[size]:
            name = "memory logits " + "x".join(map(str, shape))
            found.append(Job(name, _job("logits", LOGITS, shape), 2.5))
    return found


def _job(path: str, names: tuple[str, ...], shape: tuple[int, int, str]) -> Callable:
    def measure(bench: Bench) -> None:
        _measure(bench, path, names, shape)

    return measure


def _measure(bench: Bench, path: str, names: tuple[str, ...], shape: tuple[int, int, str]) -> None:
    rows, vocab, dtype = shape
    facts: dict[str, Any] = {"path": path, "rows": rows, "vocab": vocab, "dtype": dtype}
    facts["mode"] = "trained" if path == "linear" else ""
    methods = ["allocator"] if bench.device == "cuda" else ["counted", "resident"]
    described: dict[str, Any] = {}
    for name, provider in bench.select(
        {n: providers.find(path, bench.device, n) for n in names}
    ).items():
        if provider.missing or name in bench.red:
            why = ("missing", provider.missing) if provider.missing else ("red", "earlier")
            bench.drop(facts, name, *why)
            continue
        if not fits(provider, rows, vocab, bench.device):
            bench.drop(facts, name, "does not fit", "estimate beyond the free memory")
            continue
        cells = []
        for method in methods:
            bench.tick(f"{name} {method}")
            try:
                # The facts are those of the case, the same for all, and cost more than some losses.
                first = (method, name, path, bench.device, bench.quick, not described)
                value, told = alone(in_child, *first, *shape)
            except Exception as error:
                bench.drop(facts, name, "failed", str(error), provider.ours)
                break
            described |= told
            about = facts | described
            columns = {"setting": next(iter(provider.settings)), "repetitions": 1}
            bench.add(about, name, f"{method}_bytes", value, **columns)
            bench.add(about, name, "logits_bytes", _logits_bytes(about), **columns)
            cells.append(f"{method} {value / 2**20:.1f} MiB ({value / _logits_bytes(about):.1%})")
        if cells:
            bench.say(f"  {rows:6} rows  {name:24} " + ", ".join(cells) + " of the logits")
    bench.flush()


def _logits_bytes(about: dict[str, Any]) -> int:
    # Of hidden states in fp32, in which the logits are needed; else of those that are there.
    size = 4 if about["path"] == "linear" else getattr(torch, about["dtype"]).itemsize
    return int(size * about["rows"] * about["vocab"])
