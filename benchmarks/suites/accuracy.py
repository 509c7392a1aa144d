"""Errors of every provider against fp64 of the same bf16 hidden states and bf16 head.

- ``log_prob``: per token; ``log_ratio``: of sequences of 512 to 32768 tokens; ``weight``: min(1, ratio).
  Mean, spread (standard deviation over sequences; one sequence has none) and largest, in nats.
  Providers of log-probs sum them in fp32; this package returns its own.
- ``the sum alone``: this package's log-ratio against the fp64 sum of its own fp32 log-probs.
- gradients of hidden states and head (GRADIENT_ROWS rows), and the share of right signs.

Beside the providers two forms of plain torch: fp32 logits of fp32 operands, and logits rounded to bf16
before an fp32 log-softmax. Where rows must repeat, the k-th repetition is scaled by 1 - k/50 before
rounding, so that no row occurs twice and errors do not add up in step.

One of ours is red where its log-probs or log-ratios are further off than ``allowed`` says, which goes by
what plain torch with fp32 logits has on the same rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import data, hidden_states, providers
from benchmarks.case import Case, LinearCase, LogProb, Provider
from benchmarks.engine import Bench, Job, errors, summary, why_red

#: On two cores fp64 of 32768 rows alone takes half a minute.
LENGTHS = {
    "cpu": (512, 2048, 8192),
    "cpu, full": (512, 2048, 8192, 32768),
    "cuda": (512, 2048, 8192, 32768),
}
#: Not on a CPU: it has the errors of eager torch, and compiling takes longer than all the rest.
LEFT_OUT = {"cpu": ("torch.compile",), "cuda": ()}
PLAIN = "torch, fp32 logits"
#: Times the largest error of PLAIN, and nats per token: several units in the last place of an fp32
#: log-sum-exp. A log-prob from bf16 logits is off by 0.2, three thousand times as much.
ALLOWED, PER_TOKEN = 3.0, 2e-5
GRADIENT_ROWS = 1024
BLOCK = 2048  # rows of a peer's forward: log-probs are those of rows, and logits of 32768 fill a machine
TEMPERATURES = {"cpu": (1.0,), "cuda": hidden_states.TEMPERATURES}


def jobs(device: str, quick: bool, full: bool = False) -> list[Job]:
    """Per temperature log-ratios, then gradients."""
    size = data.size_of(device, full)
    found = []
    for temperature in (1.0,) if quick else TEMPERATURES[device]:
        name = f"accuracy T {temperature}" + (f" to {LENGTHS[size][-1]} tokens" if full else "")
        found.append(Job(f"{name} log-ratio", _job(_log_ratio, temperature), 6.5))
        found.append(Job(f"{name} gradients", _job(_gradients, temperature), 4.5))
    return found


def _measured(bench: Bench) -> dict[str, Provider]:
    found = bench.select(providers.linear(bench.device))
    return {n: p for n, p in found.items() if n not in LEFT_OUT[bench.device]}


def _job(measure: Callable[[Bench, float], None], temperature: float) -> Callable[[Bench], None]:
    return lambda bench: measure(bench, temperature)


def long_case(temperature: float, tokens: int, device: str, quick: bool) -> LinearCase:
    """bf16 rows, none of them twice, all rewards +1."""
    if quick:
        found = data.tiny(tokens, data.TINY["dim"], data.TINY["vocab"])
    else:
        found = hidden_states.load(temperature, tokens)
        repetition = torch.arange(tokens) // hidden_states.TOKENS
        found = found._replace(hidden=found.hidden * (1 - repetition / 50)[:, None])
    label = "tiny, random" if quick else f"SmolLM2 at {temperature}"
    return LinearCase(label, found, device, torch.bfloat16)


def in_sequences(case: LinearCase, length: int) -> LinearCase:
    """The same rows cut into sequences of one length, in place."""
    tokens, device = len(case.data.labels), case.device
    b = tokens // length
    offsets = (torch.arange(b + 1) * length).to(torch.int32).to(device)
    case.data = case.data._replace(cu_seqlens=offsets, reward=torch.ones(b, device=device))
    case.reward = case.data.reward
    case.length = torch.full((b,), length, device=device)
    case.of = torch.arange(b, device=device).repeat_interleave(length)
    return case


def plain() -> dict[str, LogProb]:
    """Plain torch by tiles of rows, with logits in fp32 and in bf16."""

    def tiled(logits: Callable[[Tensor, Tensor], Tensor]) -> LogProb:
        def log_prob(c: Case, h: Tensor, w: Tensor) -> Tensor:
            pairs = zip(h.split(256), c.row_labels().split(256), strict=True)
            return torch.cat([logits(t, w).log_softmax(-1).gather(1, y[:, None]) for t, y in pairs])

        return lambda c, h, w: log_prob(c, h, w)[:, 0]

    def rounded(t: Tensor, w: Tensor) -> Tensor:
        # On the CPU the fp32 product, rounded: what a bf16 matmul with fp32 sums writes.
        return (t @ w.T if t.is_cuda else (t.float() @ w.float().T).bfloat16()).float()

    return {
        PLAIN: tiled(lambda t, w: t.float() @ w.float().T),
        "torch, bf16 logits": tiled(rounded),
    }


def in_blocks(log_prob: LogProb) -> LogProb:
    """The same a block of rows at a time."""

    def blocks(c: Case, h: Tensor, w: Tensor) -> Tensor:
        found = []
        for rows, labels in zip(h.split(BLOCK), c.row_labels().split(BLOCK), strict=True):
            part = copy.copy(c)
            part.row_labels = lambda labels=labels: labels  # type: ignore[method-assign]
            found.append(log_prob(part, rows, w))
        return torch.cat(found)

    return blocks


@torch.no_grad()
def _log_ratio(bench: Bench, temperature: float) -> None:
    size = data.size_of(bench.device, bench.full)
    lengths = (4, 8) if bench.quick else LENGTHS[size]
    tokens = max(lengths)
    case = long_case(temperature, tokens, bench.device, bench.quick)
    facts = {**case.facts(), "mode": ""}
    exact, mu = case.log_pi(), case.mu.double()
    bench.say(f"{facts['data']}, bf16, {tokens} tokens: error in nats, mean ± spread")
    candidates: dict[str, LogProb] = {}
    found = _measured(bench)
    for name, p in found.items():
        if p.missing:
            bench.drop(facts, name, "missing", p.missing)
        elif p.log_probs and not p.tolerance:  # a tolerance touches gradients alone
            log_prob = next(iter(p.log_probs.values()))
            candidates[name] = log_prob if p.ours else in_blocks(log_prob)
    torch_has: dict[Where, float] = {}
    for name, log_prob in (plain() | candidates).items():
        ours = name in found and found[name].ours
        bench.tick(name)
        try:
            against = _errors(case, log_prob, exact, mu, lengths)
            if name == PLAIN:
                torch_has = {where: error.abs().max().item() for where, error in against.items()}
            red = _why_red(against, torch_has) if ours else ""
        except Exception as error:
            bench.drop(facts, name, "failed", summary(error), ours)
            continue
        if red:
            bench.drop(facts, name, "red", red, ours)
            continue
        _add(bench, facts, name, against)
    bench.flush()


#: What is off, "log_prob", "log_ratio", "alone" or "weight", and the tokens of a sequence.
Where = tuple[str, int]


def allowed(length: int, torch_has: float) -> float:
    """Nats that a log-prob (length 1) or log-ratio of ours may be off, beside plain torch."""
    return ALLOWED * torch_has + PER_TOKEN * length


def _why_red(against: dict[Where, Tensor], torch_has: dict[Where, float]) -> str:
    if not torch_has:
        raise RuntimeError(f"{PLAIN!r} failed: there is nothing to judge by")
    for (what, length), error in against.items():
        if what not in ("log_prob", "log_ratio"):
            continue
        limit, largest = allowed(length, torch_has[what, length]), error.abs().max().item()
        if not largest <= limit:
            return f"{what} of {length} tokens {largest:.1e}, at most {limit:.1e} is right"
    return ""


def _add(bench: Bench, facts: dict[str, object], name: str, against: dict[Where, Tensor]) -> None:
    line = []
    for (what, length), error in against.items():
        spread = error.std().item() if len(error) > 1 else math.nan
        columns = {"length": length, "repetitions": len(error)}
        alone = what == "alone"
        for metric, value in (
            ("mean", error.mean().item()),
            ("spread", spread),
            ("max", error.abs().max().item()),
        ):
            shown = f"{'log_ratio' if alone else what}_error_{metric}"
            who = f"{name}, the sum alone" if alone else name
            bench.add(facts, who, shown, value, **columns)
        if what == "log_ratio":
            line.append(f"{length}: {error.mean().item():+.1e} ± {spread:.1e}")
    bench.say(f"  {name:32} " + "  ".join(line))


def _errors(
    case: LinearCase, log_prob: LogProb, exact: Tensor, mu: Tensor, lengths: tuple[int, ...]
) -> dict[Where, Tensor]:
    # One forward for all lengths where the log-probs are those of rows alone; ours returns sums too.
    found = log_prob(in_sequences(case, lengths[0]), case.data.hidden, case.data.weight)
    ours = not isinstance(found, Tensor)
    errors_of = {("log_prob", 1): (found.log_prob if ours else found).double() - exact}
    for i, length in enumerate(lengths):
        b = len(exact) // length
        in_sequences(case, length)
        if ours and i:
            found = log_prob(case, case.data.hidden, case.data.weight)
        if ours:
            ratio = found.log_ratio
            own = (found.log_prob.double() - mu).view(b, length).sum(1)
            errors_of["alone", length] = ratio.double() - own
        else:
            ratio = (found - case.mu).view(b, length).sum(1)
        true = (exact - mu).view(b, length).sum(1)
        errors_of["log_ratio", length] = ratio.double() - true
        weight = ratio.double().clamp(max=0).exp() - true.clamp(max=0).exp()
        errors_of["weight", length] = weight
    return errors_of


def _gradients(bench: Bench, temperature: float) -> None:
    rows = data.TINY["rows"] if bench.quick else GRADIENT_ROWS
    case = data.linear_case(bench.device, "bfloat16", bench.quick, rows, temperature=temperature)
    facts = {**case.facts(), "mode": "trained"}
    bench.say(f"{facts['data']}, bf16, {rows} rows: relative errors of the gradients")
    for name, provider in _measured(bench).items():
        if provider.missing:
            bench.drop(facts, name, "missing", provider.missing)
            continue
        setting, loss = next(iter(provider.settings.items()))
        bench.tick(name)
        try:
            against = errors(case, provider, loss, True)
        except Exception as error:
            bench.drop(facts, name, "failed", summary(error), provider.ours)
            continue
        red = why_red(provider, "bfloat16", against) if provider.ours else ""
        if red:
            bench.drop(facts, name, "red", red, ours=True)
            continue
        for metric, value in against.items():
            bench.add(facts, name, metric, value, setting=setting, kind=provider.kind)
        shown = (f"{k} {against[f'{k}_error'][0]:.1e}" for k in ("d_hidden", "d_weight"))
        bench.say(f"  {name:32} " + "  ".join(shown))
    bench.flush()
