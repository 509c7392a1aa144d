"""Accuracy of the sequence log-ratio from hidden states: the reduction alone, and the whole operator.

    python benchmarks/linear_accuracy.py --out OUT

bf16 hidden states and a bf16 head are the inputs; nothing else is rounded on purpose. Real rows of
one temperature (hidden_states.py) are cut into sequences of 512 to 32768 tokens; where rows must repeat,
the k-th repetition is scaled by 1 - k/50 before it is rounded, so that no row occurs twice and errors do
not add up in step.

- ``reduction``: log_ratio of the operator against the fp64 sum of its own fp32 log-probs less log mu.
- ``whole``: log_ratio against the fp64 sum over fp64 logits of the same bf16 inputs. Beside it: plain
  torch with fp32 logits (fp32 operands), and plain torch with logits rounded to bf16 and an fp32
  log-softmax; both sum in fp32.

Per length: mean and spread (standard deviation over sequences; one sequence has none) and the largest
error, in nats; under ``whole`` also log_prob per token, as length 1. ``--quick`` takes 4096 tokens.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hidden_states
import torch
from logits_throughput import environment
from torch import Tensor

from topr_kernels import linear_topr_loss

LENGTHS = (512, 2048, 8192, 32768)


def rows_of(temperature: float, tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """bf16 hidden states [N, D] and head [V, D], labels [N] and log mu [N]."""
    data = hidden_states.load(temperature, tokens)
    repetition = torch.arange(tokens) // hidden_states.TOKENS
    hidden = data.hidden * (1 - repetition / 50)[:, None]
    out = hidden.bfloat16(), data.weight.bfloat16(), data.labels, data.behavior_log_prob
    return tuple(x.to(device) for x in out)  # type: ignore[return-value]


def log_probs(h: Tensor, y: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
    """[N] log-probs of the labels, by tiles of rows."""
    tiles = zip(h.split(hidden_states.TILE), y.split(hidden_states.TILE), strict=True)
    return torch.cat([logits(t).log_softmax(-1).gather(1, i[:, None])[:, 0] for t, i in tiles])


@torch.no_grad()
def measure(temperature: float, tokens: int, device: str) -> list[dict[str, Any]]:
    """Rows of the table for one temperature."""
    h, w, y, mu = rows_of(temperature, tokens, device)
    w32, w64 = w.float(), w.double()
    exact = log_probs(h, y, lambda t: t.double() @ w64.T)
    plain = {
        "torch, fp32 logits": log_probs(h, y, lambda t: t.float() @ w32.T),
        # On the CPU the fp32 product, rounded: what a bf16 matmul with fp32 sums writes.
        "torch, bf16 logits": log_probs(
            h, y, lambda t: (t @ w.T if t.is_cuda else (t.float() @ w32.T).bfloat16()).float()
        ),
    }
    found: list[dict[str, Any]] = []

    def add(test: str, provider: str, length: int, error: Tensor) -> None:
        spread = error.std().item() if len(error) > 1 else float("nan")
        row = {"test": test, "provider": provider, "temperature": temperature, "length": length}
        row |= {"sequences": len(error), "mean": error.mean().item(), "spread": spread}
        found.append(row | {"max": error.abs().max().item()})

    for name, log_prob in plain.items():
        add("whole", name, 1, log_prob.double() - exact)
    for i, length in enumerate(n for n in LENGTHS if n <= tokens):
        b = tokens // length
        offsets = (torch.arange(b + 1) * length).to(torch.int32).to(device)
        out = linear_topr_loss(
            h, w, y, mu, torch.ones(b, device=device), cu_seqlens=offsets, shift=False
        )
        if i == 0:
            add("whole", "topr_kernels", 1, out.log_prob.double() - exact)
        true = (exact - mu.double()).view(b, length).sum(1)
        own = (out.log_prob.double() - mu.double()).view(b, length).sum(1)
        add("reduction", "topr_kernels", length, out.log_ratio.double() - own)
        add("whole", "topr_kernels", length, out.log_ratio.double() - true)
        for name, log_prob in plain.items():
            add("whole", name, length, (log_prob - mu).view(b, length).sum(1).double() - true)
    return found


def main() -> None:
    """Prints the tables and appends to the CSV."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, required=True)
    temperatures = list(hidden_states.TEMPERATURES)
    parser.add_argument("--temperatures", type=float, nargs="+", default=temperatures)
    parser.add_argument("--quick", action="store_true", help="4096 tokens of one temperature")
    args = parser.parse_args()
    tokens = 4096 if args.quick else max(LENGTHS)
    where = environment(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "linear_accuracy.csv"
    for temperature in args.temperatures[:1] if args.quick else args.temperatures:
        rows = measure(temperature, tokens, args.device)
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, fieldnames=[*rows[0], *where])
            if new:
                writer.writeheader()
            writer.writerows(row | where for row in rows)
        print(f"\nerror of the log-ratio in nats, bf16 inputs, temperature {temperature}")
        print(
            f"{'test':10} {'provider':20} {'length':>6} {'seqs':>6} {'mean':>10} {'spread':>9}",
            end="",
        )
        print(f" {'max':>9}")
        for r in sorted(rows, key=lambda r: (r["test"], r["provider"], r["length"])):
            numbers = f"{r['mean']:10.1e} {r['spread']:9.1e} {r['max']:9.1e}"
            print(f"{r['test']:10} {r['provider']:20} {r['length']:6} {r['sequences']:6} {numbers}")


if __name__ == "__main__":
    main()
