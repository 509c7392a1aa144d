"""Counts the compilation keys that 20 batches of different lengths would need, without compiling.

Run by ``test_triton_aot.py`` in a process of its own, because the interpreter is chosen at import.
Every launch is bound the way Triton binds it for a GPU; what it returns of types, alignment and
constants is the key.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from topr_kernels import TOPR
from topr_kernels.kernels import triton_linear as lin
from topr_kernels.kernels import triton_logits as tk
from topr_kernels.ops.logits import Saved
from topr_kernels.ops.options import Objective, Tokens, Transforms

KERNELS = {
    "rows_fwd_kernel": tk,
    "sequences_fwd_kernel": tk,
    "loss_fwd_kernel": tk,
    "logits_bwd_kernel": tk,
    "linear_rows_kernel": lin,
    "linear_gradient_kernel": lin,
    "linear_columns_kernel": lin,
    "linear_gather_kernel": lin,
}


class Spy:
    """Stands in for a kernel: binds a launch instead of running it."""

    def __init__(self, kernel: Any) -> None:
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        self.keys: set[str] = set()
        self.fusion: set[bool | None] = set()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            _, specialization, options = self.bind(*args, **kwargs)
            self.fusion.add(kwargs.get("enable_fp_fusion"))
            self.keys.add(repr((specialization, sorted(options.items()))))

        return launch


def step(t: int, vocab: int) -> None:
    """Both forms of the forward and the backward on a batch of t tokens per sequence."""
    b = 1 + t % 5
    logits = torch.empty(b, t, vocab, dtype=torch.bfloat16)
    tokens, mu = Tokens(torch.zeros(b, t, dtype=torch.int64), None, True), torch.zeros(b, t)
    rest = (None, *TOPR.log(), "sequence", 0.0, "sequence_mean")
    objective, transforms = Objective(mu, torch.ones(b), *rest), Transforms(1.0, None, 1.0)
    tk.topr_fwd(logits, tokens, objective, transforms, False)
    tk.topr_fwd_staged(logits, tokens, objective, transforms, False)
    scalar = torch.ones(())
    tk.logits_bwd(logits, tokens, Saved(mu, mu, mu, mu, scalar, scalar), transforms)


def linear_step(n: int, vocab: int) -> None:
    """All kernels on a tile of n rows, the way a workspace holds it."""
    transforms = Transforms(1.0, None, 0.9)
    z = torch.empty(2048, vocab)[:n]
    label = torch.zeros(n, dtype=torch.int64)
    stats = lin.rows(z, label, transforms, False, True)
    # As many groups as there are clusters of rows, which are fewer for a few rows.
    lin.columns(z, label, stats, transforms, stats.factor, torch.zeros(min(n, 8), n))
    # Active columns come in multiples of 128.
    columns = torch.zeros(128 * (1 + n % 7), dtype=torch.int64)
    lin.gather(z, label, stats, transforms, columns, torch.bfloat16)
    lin.gradient(z, label, stats, transforms, torch.bfloat16)


def main() -> None:
    for vocab in (128, 4096, 50257):
        spies = {name: Spy(getattr(module, name)) for name, module in KERNELS.items()}
        for name, spy in spies.items():
            setattr(KERNELS[name], name, spy)
        counts = []
        for t in (5, *range(15, 33), 1000):
            step(t, vocab)
            linear_step(t, vocab)
            counts.append({name: len(spy.keys) for name, spy in spies.items()})
        fusion = {name: list(spy.fusion) for name, spy in spies.items()}
        report = {"vocab": vocab, "first": counts[0], "last": counts[-1], "fusion": fusion}
        print(json.dumps(report))
        for name, module in KERNELS.items():
            setattr(module, name, ORIGINAL[name])


ORIGINAL = {name: getattr(module, name) for name, module in KERNELS.items()}

if __name__ == "__main__":
    main()
