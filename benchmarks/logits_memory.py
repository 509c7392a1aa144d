"""Peak memory of the logits path beyond the logits and their gradient, beside eager torch.

    python benchmarks/logits_memory.py

Each case runs once, forward and backward, under a dispatch mode that follows every tensor storage
made by torch operators from birth to release; the figure is the largest number of bytes alive at once,
the logits (allocated before) left out and one gradient of their size subtracted. It does not move from
run to run; it does not see scratch inside a torch operator. ``--rss`` adds the growth of the peak
resident set of a child process per case, measured after a warm-up on a small batch and one touched
gradient buffer, then released. That includes operator scratch, but also libraries that allocate on
first use and pages the allocator keeps, and it moves by several MiB from run to run. The goal is
judged on the counted figure.

``eager`` is what a training loop writes: fp32 log_softmax of the shifted logits, gather, and the same
sequence stage in autograd.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from topr_kernels import kernels, topr_loss
from topr_kernels.ops import logits as ops

CASES = {
    "fp32 4x512x49152": (torch.float32, 4, 512, 49152),
    "bf16 4x512x49152": (torch.bfloat16, 4, 512, 49152),
    "bf16 2x256x151936": (torch.bfloat16, 2, 256, 151936),
}
GOAL = 0.05


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


def inputs(dtype: torch.dtype, b: int, t: int, v: int) -> tuple[Tensor, ...]:
    """Logits [B, T, V] that require grad, labels, log mu and rewards; an eighth is prompt."""
    g = torch.Generator().manual_seed(0)
    logits = torch.empty(b, t, v, dtype=dtype)
    for row in logits.view(-1, v):  # row by row: no fp32 twin of bf16 logits in the baseline
        row.copy_(3 * torch.randn(v, generator=g))
    labels = torch.randint(0, v, (b, t), generator=g)
    labels[:, : t // 8] = -100
    mu = torch.full((b, t), -12.0)
    reward = torch.where(torch.arange(b) % 2 == 0, 1.0, -1.0)
    return logits.requires_grad_(), labels, mu, reward


def step(provider: str, logits: Tensor, labels: Tensor, mu: Tensor, reward: Tensor) -> None:
    """One forward and backward."""
    if provider == "torch":
        topr_loss(logits, labels, mu, reward, ratio="geometric", impl="torch").loss.backward()
        return
    if provider == "torch inplace":
        # The identity stands for the model: logits that are no leaf.
        out = topr_loss(logits.view_as(logits), labels, mu, reward, ratio="geometric", inplace=True)
        out.loss.backward()
        return
    target = labels[:, 1:]
    scored = target != -100
    rows = logits[:, :-1].float().log_softmax(-1)
    log_pi = rows.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    ratio = torch.where(scored, log_pi - mu[:, 1:], 0.0).sum(-1) / scored.sum(-1)
    weight = torch.where(reward > 0, 1.0, ratio.detach().exp().clamp(max=1.0))
    per_sequence = torch.where(scored, log_pi, 0.0).sum(-1) / scored.sum(-1)
    (-(weight * reward * per_sequence).mean()).backward()


def counted(provider: str, case: str) -> float:
    """Peak bytes beyond logits and gradient, as a share of the bytes of the logits."""
    arguments = inputs(*CASES[case])
    size = arguments[0].nbytes
    kernels.load("portable")
    memory = LiveBytes(*arguments)

    def followed(kernel: Callable[..., Any]) -> Callable[..., Any]:
        # A mode is off inside a custom operator; enter it again, or its temporaries go unseen.
        def call(*args: Any) -> Any:
            with memory:
                return kernel(*args)

        return call

    ops.register("torch", ops.Kernels(*map(followed, ops._KERNELS["torch"])))
    with memory:
        step(provider, *arguments)
    gradient = 0 if provider == "torch inplace" else size
    return (memory.peak - gradient) / size


def resident(provider: str, case: str) -> float:
    """The same by growth of the peak resident set of this process; run in a fresh one."""
    dtype, *shape = CASES[case]
    step(provider, *inputs(dtype, 2, 9, 1024))
    arguments = inputs(dtype, *shape)
    size = arguments[0].nbytes
    if provider != "torch inplace":
        torch.zeros_like(arguments[0]).fill_(1)  # touched, then released: a gradient's worth
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(provider, *arguments)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / size


def main() -> int:
    """Prints the table; returns 1 when ``impl="torch"`` is over the goal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument(
        "--providers",
        nargs="+",
        default=["torch", "torch inplace", "eager"],
        choices=["torch", "torch inplace", "eager"],
    )
    parser.add_argument("--rss", action="store_true", help="also measure the resident set")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print(f"torch {torch.__version__}; peak beyond logits and their gradient, share of the logits")
    print(f"{'case':20} {'provider':14} {'logits MiB':>10} {'counted':>9}", end="")
    print(f" {'resident':>9}" if options.rss else "")
    over = False
    for case in options.cases:
        dtype, b, t, v = CASES[case]
        for provider in options.providers:
            measures = [counted, resident] if options.rss else [counted]
            shares = []
            for measure in measures:
                with context.Pool(1) as child:
                    shares.append(child.apply(measure, (provider, case)))
            over |= provider.startswith("torch") and shares[0] > GOAL
            columns = " ".join(f"{share:9.2%}" for share in shares)
            mib = b * t * v * dtype.itemsize / 2**20
            print(f"{case:20} {provider:14} {mib:10.0f} {columns}", flush=True)
    print(f"goal: at most {GOAL:.0%} for impl='torch': {'MISSED' if over else 'held'}")
    return int(over)


if __name__ == "__main__":
    raise SystemExit(main())
