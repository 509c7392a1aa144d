"""What to do with the columns that the active-vocabulary backward leaves out: treatments compared.

    python benchmarks/linear_tails.py [--temperatures 1.0 0.75 0.6] [--log2-tau -10 -14]

On real hidden states, in tiles of 256 rows, against the exact products in fp32 (errors are far above its
rounding). For d_hidden and d_weight the relative Frobenius error; for d_hidden the relative error of
single tokens; for d_weight that of single rows and the share of entries with the right sign, which is
what AdamW goes by. Treatments of the tail of a tile:

- ``zero``: dropped, as gradient filtering elsewhere does;
- ``one``, ``sign``: one rank-one term per tile, or one per sign of the coefficients;
- ``clusters k``: one per cluster of similar hidden states, ``linear.active.cluster_rows``;
- ``sampled``: d_weight unbiased from as many tail columns again, drawn with probability ~ sqrt(energy);
- ``bf16 J``: nothing left out, the softmax rounded to bf16, to compare with.
"""

from __future__ import annotations

import argparse

import hidden_states
import torch
from torch import Tensor

from topr_kernels import TOPR, linear_log_prob
from topr_kernels.linear.active import cluster_rows, select_columns
from topr_kernels.ops.options import Objective
from topr_kernels.sequence import sequence_stage

TILE = 256


def coefficients(data: hidden_states.Hidden) -> Tensor:
    """[N] gradient of the TOPR loss by each log-prob."""
    log_pi = linear_log_prob(
        data.hidden, data.weight, data.labels, cu_seqlens=data.cu_seqlens, shift=False
    ).log_prob
    stage = sequence_stage(
        log_pi[None],
        torch.ones_like(log_pi, dtype=torch.bool)[None],
        data.cu_seqlens.long(),
        torch.tensor(True),
        Objective(
            data.behavior_log_prob[None],
            data.reward,
            None,
            *TOPR.log(),
            "sequence",
            0.0,
            "sequence_mean",
        ),
    )
    return stage.d_log_prob[0]


def clustered(
    j: Tensor, c: Tensor, hidden: Tensor, weight: Tensor, kept: Tensor, member: Tensor
) -> tuple[Tensor, Tensor]:
    """Tail terms of d_hidden [n, D] (without c) and d_weight [V, D] for groups member [k, n]."""
    mass = j.masked_fill(kept, 0.0).sum(1)
    profile = ((member * c.abs()) @ j).masked_fill(kept, 0.0)
    total = profile.sum(1, keepdim=True)
    total = torch.where(total == 0, 1.0, total)
    direction = ((member * (c * mass)) @ hidden) / total
    return mass[:, None] * (member.T @ ((profile @ weight) / total)), profile.T @ direction


def treatments(
    j: Tensor, c: Tensor, hidden: Tensor, weight: Tensor, label: Tensor, tau: float, seed: int
) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
    """Active share, and per treatment d_hidden [n, D] and d_weight [V, D] of one tile."""
    vocab = len(weight)
    energy = ((c / c.abs().max())[:, None] * j).square().sum(0)
    columns = select_columns(energy, label, tau)[0]
    columns = torch.arange(vocab) if columns is None else columns
    kept = torch.zeros(vocab, dtype=torch.bool)
    kept[columns] = True
    part = j[:, columns]
    d_hidden = part @ weight[columns]
    d_weight = torch.zeros_like(weight).index_add_(0, columns, part.T @ (c[:, None] * hidden))
    found = {"zero": (d_hidden, d_weight)}
    groups = {
        "one": torch.ones(1, len(c)),
        "sign": torch.stack([c >= 0, c < 0]).float(),
        **{f"clusters {k}": cluster_rows(hidden, k)[1] for k in (4, 8, 16, 32)},
    }
    for name, member in groups.items():
        tail_hidden, tail_weight = clustered(j, c, hidden, weight, kept, member)
        found[name] = (d_hidden + tail_hidden, d_weight + tail_weight)
    chance = energy.sqrt().masked_fill(kept, 0.0)
    chance = (chance * len(columns) / chance.sum().clamp(min=1e-30)).clamp(max=1)
    drawn = torch.rand(vocab, generator=torch.Generator().manual_seed(seed)) < chance
    update = (j[:, drawn].T @ (c[:, None] * hidden)) / chance[drawn, None]
    found["sampled"] = (d_hidden, d_weight.index_add(0, drawn.nonzero()[:, 0], update))
    return len(columns) / vocab, {
        f"{name}": (c[:, None] * dh, dw) for name, (dh, dw) in found.items()
    }


def compare(temperature: float, taus: list[float]) -> None:
    """Prints the table of one temperature."""
    data = hidden_states.load(temperature)
    weight, c = data.weight, coefficients(data)
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    shares: dict[float, list[float]] = {tau: [] for tau in taus}

    def add(name: str, start: int, d_hidden: Tensor, d_weight: Tensor) -> None:
        if name not in sums:
            sums[name] = torch.zeros_like(data.hidden), torch.zeros_like(weight)
        sums[name][0][start : start + len(d_hidden)] = d_hidden
        sums[name][1].add_(d_weight)

    for start in range(0, len(c), TILE):
        part = slice(start, start + TILE)
        hidden, label, c_tile = data.hidden[part], data.labels[part], c[part]
        j = -(hidden @ weight.T).softmax(-1)
        j[torch.arange(len(label)), label] += 1
        for name, rounded in (("exact", j), ("bf16 J", j.bfloat16().float())):
            weighted = c_tile[:, None] * hidden
            add(name, start, c_tile[:, None] * (rounded @ weight), rounded.T @ weighted)
        for tau in taus:
            share, found = treatments(j, c_tile, hidden, weight, label, tau, start)
            shares[tau].append(share)
            for name, gradients in found.items():
                add(f"2^{torch.tensor(tau).log2():.0f} {name}", start, *gradients)
    exact_hidden, exact_weight = sums.pop("exact")
    entropy = hidden_states.describe(data)["entropy"]
    print(f"\nT = {temperature}, {entropy:.2f} nats; active share by tau:", end=" ")
    print({f"{tau:.2g}": f"{sum(s) / len(s):.1%}" for tau, s in shares.items()})
    print(f"{'':20} dH error  dW error  token median  row median  row 90 %  right sign")
    tokens, rows = exact_hidden.norm(dim=1), exact_weight.norm(dim=1)
    for name, (d_hidden, d_weight) in sums.items():
        wrong_hidden, wrong_weight = d_hidden - exact_hidden, d_weight - exact_weight
        token = wrong_hidden.norm(dim=1) / tokens.clamp(min=1e-30)
        row = wrong_weight.norm(dim=1) / rows.clamp(min=1e-30)
        sign = (d_weight.sign() == exact_weight.sign()).float().mean()
        print(
            f"{name:20} {wrong_hidden.norm() / exact_hidden.norm():8.1e}"
            f"  {wrong_weight.norm() / exact_weight.norm():8.1e}  {token.median():12.1e}"
            f"  {row.median():10.3f}  {row.quantile(0.9):8.3f}  {sign:10.1%}",
            flush=True,
        )


def main() -> None:
    """Prints all tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    temperatures = list(hidden_states.TEMPERATURES)
    parser.add_argument("--temperatures", type=float, nargs="+", default=temperatures)
    parser.add_argument("--log2-tau", type=int, nargs="+", default=[-10, -14])
    args = parser.parse_args()
    with torch.no_grad():
        for temperature in args.temperatures:
            compare(temperature, [2.0**k for k in args.log2_tau])


if __name__ == "__main__":
    main()
