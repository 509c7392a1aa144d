"""Time, errors and peak memory of the TOPR loss from hidden states, forward and backward, beside peers.

    python benchmarks/linear_throughput.py --device cpu --out OUT         # real hidden states, fp32
    python benchmarks/linear_throughput.py --device cuda --out OUT        # BAR.md's shapes, bf16

Two modes: "trained" takes gradients of hidden states and head, "frozen" of hidden states alone.
On the CPU the data are real (hidden_states.py); on CUDA they are real hidden states and a real head
raised to the stated shape, at a stated entropy and tail mass (hidden_states.synthesise). Providers
are described in linear_peers.py; one that cannot be imported or fails is printed as such.

Order: (1) fp64 reference of loss and both gradients from the same inputs, in tiles; (2) a provider
with several settings is timed at each and keeps the fastest, all printed; (3) its loss and gradients
are compared with the reference, and the errors recorded; a provider that is red (gradients wrong by
more than 5 % for fp32, 10 % else) is not timed; (4) all are timed interleaved, together with
one matmul hidden @ weight.T with an output in the inputs' dtype, the unit of the ratios. Medians and
deciles over the repetitions are appended to OUT/linear_throughput.csv, after every mode of a case.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hidden_states
import torch
import torch.nn.functional as F
from linear_peers import Case, Loss, Provider, providers, versions
from logits_throughput import Clock, environment
from torch import Tensor

SHAPES = ["8192x4096x128256", "16384x2048x151936", "4096x896x151936"]
SHAPES += ["1024x4096x128256", "2048x4096x128256"]
TAIL_MASS = 0.01
TILE = 256


class Reference(NamedTuple):
    """fp64 loss, gradients of hidden [N, D] and head [V, D]."""

    loss: Tensor
    d_hidden: Tensor
    d_weight: Tensor


def reference(case: Case, kinds: set[str]) -> dict[str, Reference]:
    """fp64 truth from the same inputs: coefficients by autograd of the TOPR stage, the rest by tiles."""
    d, w = case.data, case.data.weight.double()
    tiles = list(zip(d.hidden.split(TILE), d.labels.split(TILE), strict=True))

    def log_softmax(h: Tensor) -> Tensor:
        return (h.double() @ w.T).log_softmax(-1)

    log_pi = torch.cat([log_softmax(h).gather(1, y[:, None])[:, 0] for h, y in tiles])
    log_pi.requires_grad_()
    found = {}
    for kind in kinds:
        loss = case.topr(log_pi) if kind == "topr" else -log_pi.mean()
        (c,) = torch.autograd.grad(loss, log_pi)
        d_hidden, d_weight = [], torch.zeros_like(w)
        for (h, y), c_tile in zip(tiles, c.split(TILE), strict=True):
            g = log_softmax(h).exp_().neg_()
            g[torch.arange(len(y), device=y.device), y] += 1
            g *= c_tile[:, None]
            d_hidden.append(g @ w)
            d_weight.addmm_(g.T, h.double())
        found[kind] = Reference(loss.detach(), torch.cat(d_hidden), d_weight)
    return found


def quantiles(x: Tensor) -> tuple[float, float, float, float]:
    """10 %, 50 %, 90 % quantile and maximum."""
    x = x.sort().values
    return tuple(x[round(q * (len(x) - 1))].item() for q in (0.1, 0.5, 0.9, 1.0))  # type: ignore[return-value]


def errors(case: Case, loss: Loss, want: Reference, trained: bool) -> dict[str, tuple[float, ...]]:
    """Metric to (q10, median, q90) or to a single value, against fp64."""
    h = case.data.hidden.detach().requires_grad_()
    w = case.data.weight.detach().requires_grad_(trained)
    value = loss(case, h, w)
    value.backward()
    found: dict[str, tuple[float, ...]] = {"loss_error": (abs(value.item() - want.loss.item()),)}
    pairs = {"d_hidden": (h.grad, want.d_hidden)}
    if trained:
        pairs["d_weight"] = (w.grad, want.d_weight)
    for name, (got, exact) in pairs.items():
        if got is None:
            raise RuntimeError(f"no gradient {name}")
        wrong = got.double() - exact
        found[f"{name}_error"] = ((wrong.norm() / exact.norm()).item(),)
        rows = exact.norm(dim=1)
        # A row whose true gradient underflows (a tapered-out sequence) has no relative error.
        relative = (wrong.norm(dim=1) / rows)[rows > 1e-30]
        *three, largest = quantiles(relative)
        found[f"{name}_row_error"], found[f"{name}_row_error_max"] = tuple(three), (largest,)
        found[f"{name}_sign_agreement"] = ((got.sign() == exact.sign()).double().mean().item(),)
    found |= {k: (float(v),) for k, v in case.aside.items()}
    case.aside = {}
    return found


def measure(case: Case, loss: Loss, clock: Clock, trained: bool) -> dict[str, float]:
    """One repetition: milliseconds, and bytes of peak memory beyond inputs and gradients."""
    h = case.data.hidden.detach().requires_grad_()
    w = case.data.weight.detach().requires_grad_(trained)
    if clock.cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    result: list[Tensor] = []
    forward = clock(lambda: result.append(loss(case, h, w)))
    backward = clock(lambda: result[0].backward())
    found = {"forward_ms": forward, "backward_ms": backward, "total_ms": forward + backward}
    if clock.cuda:
        gradients = h.nbytes + (w.nbytes if trained else 0)
        found["peak_bytes"] = float(torch.cuda.max_memory_allocated() - held - gradients)
    return found


def matmul(case: Case, clock: Clock) -> float:
    """Milliseconds of the forward matmul alone, output in the dtype of the inputs."""
    with torch.no_grad():
        return clock(lambda: F.linear(case.data.hidden, case.data.weight))


def fastest(
    name: str, provider: Provider, case: Case, clock: Clock, trained: bool
) -> tuple[str, Loss]:
    """Warms every setting up and returns the one whose better of two runs is the fastest.

    A setting whose first run takes five times as long as the best so far is not run again.
    """
    times = {}
    for setting, loss in provider.settings.items():
        try:
            first = measure(case, loss, clock, trained)["total_ms"]
            if len(provider.settings) > 1:
                hopeless = first > 5 * min(times.values(), default=first)
                runs = [
                    measure(case, loss, clock, trained)["total_ms"] for _ in range(2 - 2 * hopeless)
                ]
                times[setting] = min(runs, default=first)
        except Exception as error:  # one setting may be illegal at this shape
            if len(provider.settings) == 1:
                raise
            print(f"  {name}, {setting}: {type(error).__name__}: {str(error).splitlines()[0][:70]}")
    if len(provider.settings) == 1:
        return next(iter(provider.settings.items()))
    print(f"  {name}: " + ", ".join(f"{k} {v:.0f} ms" for k, v in times.items()), flush=True)
    best = min(times, key=times.__getitem__)
    return best, provider.settings[best]


def measure_mode(
    case: Case,
    facts: dict[str, Any],
    wants: dict[str, Reference],
    found: dict[str, Provider],
    clock: Clock,
    repetitions: int,
) -> tuple[list[dict[str, Any]], bool]:
    """CSV rows of one case and mode, and whether Ctrl-C cut the repetitions short."""
    trained = facts["mode"] == "trained"
    limit = 0.05 if facts["dtype"] == "float32" else 0.10
    rows: list[dict[str, Any]] = []

    def add(name: str, setting: str, metric: str, q10: float, median: float, q90: float) -> None:
        values = {"metric": metric, "median": median, "q10": q10, "q90": q90}
        rows.append({"provider": name, "setting": setting} | values | facts)

    chosen: dict[str, tuple[str, Loss]] = {}
    wrong: dict[str, dict[str, tuple[float, ...]]] = {}
    for name, provider in found.items():
        if provider.missing:
            print(f"  {name}: missing: {provider.missing}")
            continue
        try:
            setting, loss = fastest(name, provider, case, clock, trained)
            against = errors(case, loss, wants[provider.kind], trained)
        except Exception as error:  # a peer that cannot do this shape says so and is left out
            print(f"  {name}: failed: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
            continue
        worst = max(v[0] for k, v in against.items() if k in ("d_hidden_error", "d_weight_error"))
        if not worst < limit:
            print(f"  {name}: RED, not timed: {against}")
            continue
        chosen[name], wrong[name] = (setting, loss), against
        for metric, value in against.items():
            add(name, setting, metric, *(value if len(value) == 3 else value * 3))
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    unit, interrupted = [], False
    try:
        for _ in range(repetitions):
            unit.append(matmul(case, clock))
            for name, (_, loss) in chosen.items():
                samples[name].append(measure(case, loss, clock, trained))
    except KeyboardInterrupt:  # keeps the whole repetitions; the next mode is not begun
        interrupted = True
        unit = unit[: min(map(len, samples.values()))]
        if not unit:
            raise
    one = statistics.median(unit)
    add("matmul", "", "total_ms", *deciles(unit))
    n, v, dim = len(case.data.labels), *case.data.weight.shape
    print(f"  one matmul {one:.2f} ms, {2e-9 * n * v * dim / one:.3g} TFLOP/s")
    print(f"  {'':30} {'ms':>9} {'matmuls':>8} {'dH error':>9} {'dW error':>9} {'|A|/V':>7}")
    for name, runs in samples.items():
        runs = runs[: len(unit)]
        for metric in runs[0]:
            add(name, chosen[name][0], metric, *deciles([r[metric] for r in runs]))
        ratios = [r["total_ms"] / m for r, m in zip(runs, unit, strict=True)]
        add(name, chosen[name][0], "total_per_matmul", *deciles(ratios))
        total = statistics.median(r["total_ms"] for r in runs)
        e = {k: f"{x[0]:.1e}" for k, x in wrong[name].items() if len(x) == 1}
        share = wrong[name].get("active_share", (float("nan"),))[0]
        print(
            f"  {name:30} {total:9.2f} {total / one:8.2f} {e['d_hidden_error']:>9}"
            f" {e.get('d_weight_error', ''):>9} {share:7.1%}   {chosen[name][0]}",
            flush=True,
        )
    return rows, interrupted


def deciles(xs: list[float]) -> tuple[float, float, float]:
    """10 % quantile, median and 90 % quantile within the range of what was seen."""
    q = statistics.quantiles(xs if len(xs) > 1 else xs * 2, n=10, method="inclusive")
    return q[0], statistics.median(xs), q[-1]


def cases(args: argparse.Namespace) -> Iterator[tuple[str, hidden_states.Hidden]]:
    """The data to measure: real on the CPU, raised to the shapes of BAR.md on CUDA."""
    if args.device == "cuda" and not args.real:
        for shape in args.shapes:
            n, dim, vocab = map(int, shape.split("x"))
            for entropy in args.entropies:
                data = hidden_states.at_entropy(entropy, n, device=args.device)
                yield (
                    f"raised, tail {TAIL_MASS}",
                    hidden_states.synthesise(data, dim, vocab, TAIL_MASS, seed=0),
                )
        return
    for temperature in args.temperatures:
        yield f"SmolLM2 at {temperature}", hidden_states.load(temperature, args.rows)


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Appends rows to the CSV, with a header when it is new."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Measures and appends to the CSV."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=2048, help="of real data")
    temperatures = list(hidden_states.TEMPERATURES)
    parser.add_argument("--temperatures", type=float, nargs="+", default=temperatures)
    parser.add_argument("--real", action="store_true", help="real shape and data on CUDA too")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows x dim x vocab, on CUDA")
    parser.add_argument("--entropies", type=float, nargs="+", default=[0.5, 1.2, 2.6])
    parser.add_argument("--modes", nargs="+", default=["trained", "frozen"])
    parser.add_argument("--log2-tau", type=int, nargs="+", default=[-10, -16])
    parser.add_argument("--only", nargs="+", help="providers whose name contains one of these")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="256 real rows, two repetitions")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    if args.quick:
        args.rows, args.repetitions, args.real = 256, 2, True
        args.temperatures = args.temperatures[:1]
    found = providers(args.device, args.log2_tau)
    if args.only:
        found = {k: p for k, p in found.items() if any(part in k for part in args.only)}
    clock = Clock(args.device)
    where = environment(args.device) | {"versions": versions(), "threads": torch.get_num_threads()}
    args.out.mkdir(parents=True, exist_ok=True)
    for label, data in cases(args):
        case = Case(data, args.device, dtype)
        about = hidden_states.describe(case.data)
        facts = {"data": label, "rows": len(data.labels), "dim": data.weight.shape[1]}
        facts |= {"vocab": data.weight.shape[0], "dtype": str(dtype).removeprefix("torch.")}
        facts |= {k: f"{about[k]:.4g}" for k in ("entropy", "positive_share", "tapered_share")}
        wants = reference(case, {p.kind for p in found.values()})
        for mode in args.modes:
            torch._dynamo.reset()
            print(f"\n{facts | {'mode': mode}}", flush=True)
            rows, interrupted = measure_mode(
                case, facts | {"mode": mode}, wants, found, clock, args.repetitions
            )
            append(args.out / "linear_throughput.csv", [row | where for row in rows])
            if interrupted:
                raise SystemExit("interrupted: kept what was measured")


if __name__ == "__main__":
    main()
