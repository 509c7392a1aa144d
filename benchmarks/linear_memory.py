"""Peak memory of the TOPR loss from hidden states beyond inputs and gradients, beside eager torch.

    python benchmarks/linear_memory.py --out OUT                    # CPU, fp32
    python benchmarks/linear_memory.py --device cuda --dtype bfloat16 --out OUT

Each figure is one forward and backward of real hidden states (hidden_states.py; beyond the tokens
that were sampled they repeat) with gradients of hidden states and head, in a process of its own:

- ``counted``: the largest number of bytes of torch tensors alive at once (LiveBytes in
  logits_memory.py), less both gradients, whether or not they exist at the peak. The same from run
  to run; blind to scratch inside an operator, so not shown for peers, who hide their work in one.
- ``resident``: growth of the peak resident set (VmHWM, reset before the step), less both gradients,
  after a warm-up on 64 rows. Sees all scratch, and pages the allocator keeps; moves by some MiB.
- ``allocator`` (CUDA): torch.cuda's peak less what was held before and both gradients.

A case whose estimate is beyond the free memory is listed as not fitting, never measured by swapping.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hidden_states
import torch
from linear_peers import Case, Loss, providers, versions
from logits_memory import LiveBytes
from logits_throughput import environment

from topr_kernels import fused_linear, kernels
from topr_kernels.ops import linear as ops

EAGER_COPIES = 5  # of fp32 logits, with room: only decides whether a case is tried


def find(provider: str, setting: str | None, device: str) -> Loss:
    """The loss of a provider by name, such as "topr tau 2^-10"."""
    exponent = int(provider.rpartition("^")[2]) if "^" in provider else -10
    settings = providers(device, [exponent])[provider].settings
    return settings[setting or next(iter(settings))]


def step(case: Case, loss: Loss, trained: bool) -> int:
    """One forward and backward; bytes of the gradients."""
    h = case.data.hidden.detach().requires_grad_()
    w = case.data.weight.detach().requires_grad_(trained)
    loss(case, h, w).backward()
    assert h.grad is not None
    return h.grad.nbytes + (w.grad.nbytes if w.grad is not None else 0)


def counted(case: Case, loss: Loss, trained: bool) -> int:
    """Peak bytes of torch tensors beyond inputs and gradients."""
    known = [x for x in (*case.data, case.of, case.length) if isinstance(x, torch.Tensor)]
    memory = LiveBytes(*known)

    def followed(kernel: Callable[..., Any]) -> Callable[..., Any]:
        # A mode is off inside a custom operator; enter it again, or its temporaries go unseen.
        def call(*args: Any) -> Any:
            with memory:
                return kernel(*args)

        return call

    name = kernels.resolve("auto", case.data.hidden, kernels.LINEAR)
    ops.register(name, ops.Kernels(*map(followed, ops._KERNELS[name])))
    with memory:
        gradients = step(case, loss, trained)
    return memory.peak - gradients


def _status(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def resident(case: Case, loss: Loss, trained: bool) -> int:
    """Growth of the peak resident set beyond both gradients; Linux."""
    step(Case(hidden_states.first(case.data, 64), "cpu", case.data.hidden.dtype), loss, trained)
    fused_linear._HELD.memory = None  # our workspace is part of what is measured
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present resident set
    before = _status("VmRSS")
    gradients = step(case, loss, trained)
    return _status("VmHWM") - before - gradients


def allocator(case: Case, loss: Loss, trained: bool) -> int:
    """Peak of the CUDA allocator beyond what was held before and both gradients."""
    step(case, loss, trained)
    case.aside = {}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = step(case, loss, trained)
    return torch.cuda.max_memory_allocated() - before - gradients


METHODS = {"counted": counted, "resident": resident, "allocator": allocator}


def run(method: str, provider: str, setting: str | None, job: dict[str, Any]) -> int:
    """One measurement, in a fresh process."""
    data = hidden_states.load(job["temperature"], job["rows"])
    case = Case(data, job["device"], getattr(torch, job["dtype"]))
    del data
    return METHODS[method](case, find(provider, setting, job["device"]), job["mode"] == "trained")


def fits(provider: str, rows: int, vocab: int, device: str) -> bool:
    """Whether a provider that makes logits has room for EAGER_COPIES of them."""
    if "eager" not in provider and "compile" not in provider:
        return True
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return EAGER_COPIES * 4 * rows * vocab < free


def main() -> None:
    """Measures, prints the table and appends to the CSV."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--modes", nargs="+", default=["trained"])
    parser.add_argument("--temperature", type=float, default=hidden_states.TEMPERATURES[-1])
    parser.add_argument(
        "--providers",
        nargs="+",
        default=["topr exact", "topr tau 2^-10", "torch eager"],
        help='names of linear_peers.py, a setting after a colon: "TRL fused head tuned:chunk 4096"',
    )
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    vocab, dim = hidden_states.load(args.temperature, 1).weight.shape
    methods = ["allocator"] if args.device == "cuda" else ["counted", "resident"]
    where = environment(args.device) | {"versions": versions()}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "linear_memory.csv"
    print(f"beyond inputs and gradients, {args.dtype}, D {dim}, V {vocab}; logits are fp32's")
    print(
        f"{'rows':>6} {'mode':8} {'logits MiB':>10}  {'provider':32}",
        *(f"{m:>15}" for m in methods),
    )
    for rows in args.rows:
        for mode in args.modes:
            for named in args.providers:
                provider, _, setting = named.partition(":")
                job = {"temperature": args.temperature, "rows": rows, "device": args.device}
                job |= {"dtype": args.dtype, "mode": mode}
                line = f"{rows:6} {mode:8} {4 * rows * vocab / 2**20:10.0f}  {named:32}"
                if not fits(provider, rows, vocab, args.device):
                    print(line, "does not fit", flush=True)
                    continue
                cells = []
                for method in methods:
                    if method == "counted" and not provider.startswith(("topr", "torch")):
                        cells.append(f"{'-':>15}")
                        continue
                    with context.Pool(1) as child:
                        found = child.apply(run, (method, provider, setting or None, job))
                    share = found / (4 * rows * vocab)
                    cells.append(f"{found / 2**20:6.0f} MiB {share:4.0%}")
                    row = {"provider": named, "metric": f"{method}_bytes", "value": found}
                    row |= job | {"dim": dim, "vocab": vocab, "share_of_fp32_logits": share} | where
                    new = not path.exists()
                    with path.open("a", newline="", encoding="utf-8") as f:
                        writer = csv.DictWriter(f, fieldnames=list(row))
                        if new:
                            writer.writeheader()
                        writer.writerow(row)
                print(line, *(f"{c:>15}" for c in cells), flush=True)


if __name__ == "__main__":
    main()
