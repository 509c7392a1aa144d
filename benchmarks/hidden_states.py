"""Real hidden states for the fused-linear benchmarks: SmolLM2-135M-Instruct, sampled off policy.

    python benchmarks/hidden_states.py             # builds the cache if missing, describes it
    python benchmarks/hidden_states.py --check     # does the generator keep the sparsity? minutes

Random hidden states have a softmax nobody meets, and flatter whatever skips small gradients. Here a
real model answers 32 requests of different kinds at several temperatures, until EOS or 384 tokens.
The behavior policy mu that samples is the model with noise on the hidden state (``DRIFT`` of its
norm, a new draw per token); the policy pi is the model itself, so the log-ratios have the sign and
the spread of a policy that has moved away from its data. Kept are the inputs of the head that
predict a scored token, the tokens, log mu, and the head. Rewards alternate between +1 and -1.

For shapes a 135M model does not have, ``at_entropy`` rescales real rows (sequences of the temperature
whose entropy is nearest) to an entropy and samples their tokens anew, from mu made as above; and
``synthesise`` raises D and V: a matrix with orthonormal rows leaves every logit as it is, and perturbed
copies of real head rows, lowered by a constant through one more direction, hold a stated mass of the
softmax. ``--check`` compares the size of the active vocabulary of such data with the real curve, over
tiles of 64 to 1024 rows, and with that of temperatures sampled for the check alone.

The cache is one file (about 58 MB): the head as the int8 blocks it is dequantised from, exactly;
hidden states in fp16, which defines them: everything downstream starts from the rounded values.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

MODEL = "smollm2"
CACHE = Path(__file__).parent / ".cache" / "hidden_states.pt"
TEMPERATURES = (1.0, 0.6, 0.75)
TOKENS = 8192  # per temperature
# For --check alone; not part of the cache, which travels to where the benchmarks run.
HELD_OUT = CACHE.with_name("held_out.pt")
OTHER_TEXTS = (0.95, 0.55, 0.78, 0.75)
LONGEST = 384
DRIFT = 0.03
TILE = 256
PERTURBATION = 0.5
PROMPTS = [
    "Explain why the sky is blue to a curious ten-year-old.",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "A train leaves at 9:40 and travels 210 km at 84 km/h. When does it arrive? Show your steps.",
    "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "List ten ideas for a birthday party on a small budget.",
    "Compare renewable and fossil energy in three paragraphs.",
    "Write a polite e-mail that asks a landlord to repair a leaking tap.",
    "Describe the life cycle of a butterfly.",
    "What are the main causes of inflation?",
    "Give me a recipe for vegetable soup with quantities and steps.",
    "Continue this sentence in an unexpected way: When the last library closed, the books",
    "Solve for x and explain every step: 3(x - 4) + 5 = 2x + 9.",
    "Write a poem about winter in a big city.",
    "Summarise the plot of Romeo and Juliet.",
    "How does a refrigerator work?",
    "Write a SQL query that finds the three customers with the largest total orders, and explain it.",
    "Give advice to somebody who is nervous before a job interview.",
    "Describe a market square in a medieval town, with smells and sounds.",
    "What is the difference between a virus and a bacterium?",
    "Write a dialogue between a teacher and a student about the value of mistakes.",
    "Plan a three-day trip to Rome for a family with two children.",
    "Explain what a hash table is and when to use it.",
    "Tom has 3 boxes of 24 pencils and gives away 17. How many are left? Explain.",
    "Write a product description for a wooden desk lamp.",
    "What happened during the French Revolution?",
    "Translate into French and explain the grammar: The children were playing when it began to rain.",
    "Write a bash script that counts the lines of every text file in a folder.",
    "Argue for and against school uniforms.",
    "Tell a joke about a physicist, and then explain why it is funny.",
    "Explain compound interest with an example.",
    "Write the opening paragraph of a detective novel set in Lisbon.",
    "What should one know before adopting a dog?",
]


class Hidden(NamedTuple):
    """Packed scored rows of one policy; row t predicts label t (``shift=False``).

    Attributes:
        hidden: [N, D] fp32, already divided by the temperature: logits are ``hidden @ weight.T``.
        weight: [V, D] fp32.
        labels: [N] int64.
        behavior_log_prob: [N] fp32, log mu of each label.
        reward: [B], +1 and -1 in turn.
        cu_seqlens: [B + 1] int32.
        temperature: at which the labels were drawn.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    behavior_log_prob: Tensor
    reward: Tensor
    cu_seqlens: Tensor
    temperature: float


def _draw(
    h: Tensor, weight: Tensor, g: torch.Generator, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """[N] tokens drawn from mu and [N] log mu: the head over hidden states with noise."""
    noise = torch.randn(h.shape, generator=g, device=h.device) * h.norm(dim=1, keepdim=True)
    mu = (h + DRIFT * noise / h.shape[1] ** 0.5) @ weight.T / temperature
    mu = mu.log_softmax(-1)
    ids = torch.multinomial(mu.exp(), 1, generator=g)
    return ids[:, 0], mu.gather(1, ids)[:, 0]


@torch.no_grad()
def sample(loaded: Any, temperature: float, tokens: int, seed: int) -> dict[str, Tensor]:
    """Samples completions of PROMPTS from mu until ``tokens`` are there; the last one is cut."""
    from topr_kernels.hf.signature import cache_argument, cache_of

    model, tokenizer = loaded.model, loaded.tokenizer
    cache = cache_argument(model.model)
    g = torch.Generator().manual_seed(seed)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True
        )
        for p in PROMPTS
    ]
    tokenizer.padding_side = "left"
    prompt = tokenizer(texts, return_tensors="pt", padding=True)
    weight = model.lm_head.weight.float().cpu()
    done: list[tuple[Tensor, Tensor, Tensor]] = []
    while sum(len(labels) for _, labels, _ in done) < tokens:
        ids, mask, past = prompt.input_ids, prompt.attention_mask, {}
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        length = torch.full((len(PROMPTS),), LONGEST)
        for i in range(LONGEST):
            out = model.model(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                position_ids=(mask.cumsum(-1) - 1)
                .clamp(min=0)[:, -ids.shape[1] :]
                .to(model.device),
                use_cache=True,
                **past,
            )
            past, h = {cache: cache_of(out)}, out.last_hidden_state[:, -1].float().cpu()
            labels, log_mu = _draw(h, weight, g, temperature)
            ids = labels[:, None]
            steps.append((h, labels, log_mu))
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            ended = (ids[:, 0] == tokenizer.eos_token_id) & (length == LONGEST)
            length = torch.where(ended, i + 1, length)
            if int(length.max()) <= i:
                break
        h, labels, log_mu = (torch.stack(x, 1) for x in zip(*steps, strict=True))
        done += [(h[s, :n], labels[s, :n], log_mu[s, :n]) for s, n in enumerate(length.tolist())]
    sizes = torch.tensor([0] + [len(labels) for _, labels, _ in done]).cumsum(0)
    sizes = torch.cat([sizes[sizes < tokens], torch.tensor([tokens])])
    hidden, labels, log_mu = (torch.cat(x)[:tokens].clone() for x in zip(*done, strict=True))
    return {"hidden": hidden.half(), "labels": labels, "log_mu": log_mu, "sizes": sizes}


def _to_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[V, D] fp32 -> int8 [V, D / 32, 32] and fp16 scales, if exact; else bf16 and no scales."""
    blocks = weight.view(weight.shape[0], -1, 32)
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).half()
    q = (blocks / scale.float()).nan_to_num().round().to(torch.int8)
    if torch.equal(q.float() * scale.float(), blocks):
        return q, scale
    return weight.bfloat16(), torch.empty(0)


def _sampled(loaded: Any, temperature: float, seed: int) -> dict[str, Any]:
    """What ``sample`` gives and the policy's mean entropy; a minute or two on two cores."""
    start = time.perf_counter()
    data: dict[str, Any] = sample(loaded, temperature, TOKENS, seed)
    seconds = time.perf_counter() - start
    whole = _unpacked(data, loaded.model.lm_head.weight.detach().float().cpu(), temperature)
    data["entropy"] = log_prob_and_entropy(whole)[1].mean().item()
    print(f"sampled {TOKENS} tokens at {temperature} in {seconds:.0f} s", flush=True)
    return data


def _write(found: dict[str, Any], path: Path) -> dict[str, Any]:
    from topr_kernels.recipe.files import atomic_path

    with atomic_path(path) as temporary:
        torch.save(found, temporary)
    return found


def build() -> dict[str, Any]:
    """Samples every temperature and writes the cache; minutes on two cores."""
    from topr_kernels.recipe.models import load_model

    loaded = load_model(MODEL)
    found: dict[str, Any] = {"head": _to_blocks(loaded.model.lm_head.weight.detach().cpu())}
    for seed, temperature in enumerate(TEMPERATURES):
        found[str(temperature)] = _sampled(loaded, temperature, seed)
    return _write(found, CACHE)


def _stored() -> dict[str, Any]:
    found: dict[str, Any] = torch.load(CACHE) if CACHE.exists() else {}
    return found if {str(t) for t in TEMPERATURES} <= set(found) else build()


def _held_out() -> dict[str, Any]:
    """Real rows of texts that the generator has not seen."""
    found: dict[str, Any] = torch.load(HELD_OUT) if HELD_OUT.exists() else {}
    missing = {t: s for s, t in enumerate(OTHER_TEXTS, len(TEMPERATURES)) if str(t) not in found}
    if missing:
        from topr_kernels.recipe.models import load_model

        loaded = load_model(MODEL)
        for temperature, seed in missing.items():
            found[str(temperature)] = _sampled(loaded, temperature, seed)
            _write(found, HELD_OUT)
    return found


def _unpacked(data: dict[str, Any], weight: Tensor, temperature: float) -> Hidden:
    return Hidden(
        data["hidden"].float() / temperature,
        weight,
        data["labels"],
        data["log_mu"],
        torch.empty(0),
        _offsets(data["sizes"].diff()),
        temperature,
    )


def _offsets(sizes: Tensor) -> Tensor:
    """[B + 1] int32 of the lengths of B sequences."""
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)


def _head(stored: dict[str, Any]) -> Tensor:
    q, scale = stored["head"]
    return (q.float() * scale.float()).flatten(1) if scale.numel() else q.float()


def load(temperature: float, rows: int = 2048) -> Hidden:
    """Real data of one temperature, from the cache or sampled now.

    Args:
        temperature: one of TEMPERATURES.
        rows: N. Sequences are taken in order and the last is cut; beyond what was sampled the whole
            is repeated, which is good for measuring memory and nothing else.
    """
    stored = _stored()
    return repeated(_unpacked(stored[str(temperature)], _head(stored), temperature), rows)


def repeated(data: Hidden, rows: int) -> Hidden:
    """The same sequences again and again until there are so many rows: for time and memory."""
    times = -(-rows // len(data.labels))

    def again(x: Tensor) -> Tensor:
        return torch.cat([x] * times)

    whole = data._replace(
        hidden=again(data.hidden),
        labels=again(data.labels),
        behavior_log_prob=again(data.behavior_log_prob),
        cu_seqlens=_offsets(again(data.cu_seqlens.diff())),
    )
    return first(whole, rows)


def first(data: Hidden, rows: int) -> Hidden:
    """The first rows, the last sequence cut, rewards in turn."""
    inner = data.cu_seqlens[data.cu_seqlens < rows]
    reward = torch.ones(len(inner), device=data.hidden.device)
    reward[1::2] = -1
    return data._replace(
        hidden=data.hidden[:rows],
        labels=data.labels[:rows],
        behavior_log_prob=data.behavior_log_prob[:rows],
        reward=reward,
        cu_seqlens=torch.cat([inner, inner.new_tensor([rows])]),
    )


def to(data: Hidden, device: str) -> Hidden:
    """The same on a device."""
    return Hidden(*(x.to(device) if isinstance(x, Tensor) else x for x in data))


def log_prob_and_entropy(data: Hidden) -> tuple[Tensor, Tensor]:
    """[N] log pi of the labels and [N] entropy in nats, tile by tile in fp32."""
    found = []
    for h, y in zip(data.hidden.split(TILE), data.labels.split(TILE), strict=True):
        logp = (h @ data.weight.T.to(h.dtype)).float().log_softmax(-1)
        entropy = -(logp.exp() * logp).nan_to_num().sum(-1)
        found.append((logp.gather(1, y[:, None])[:, 0], entropy))
    log_prob, entropy = (torch.cat(x) for x in zip(*found, strict=True))
    return log_prob, entropy


def describe(data: Hidden) -> dict[str, float]:
    """Counts, entropy, shares of positive and of tapered tokens, spread of the log-ratios."""
    log_prob, entropy = log_prob_and_entropy(data)
    sizes = data.cu_seqlens.diff().long()
    of = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    log_ratio = torch.zeros(len(sizes), device=sizes.device, dtype=torch.float64)
    log_ratio.index_add_(0, of, (log_prob - data.behavior_log_prob).double())
    tapered = (data.reward < 0) & (log_ratio < 0)
    return {
        "tokens": len(data.labels),
        "sequences": len(sizes),
        "longest": float(sizes.max()),
        "entropy": entropy.mean().item(),
        "entropy_median": entropy.median().item(),
        "positive_share": (data.reward > 0)[of].float().mean().item(),
        "tapered_share": tapered[of].float().mean().item(),
        "log_ratio_min": log_ratio.min().item(),
        "log_ratio_median": log_ratio.median().item(),
        "log_ratio_max": log_ratio.max().item(),
    }


def _shuffled(data: Hidden, seed: int) -> Hidden:
    """The same sequences in another order."""
    parts = torch.arange(len(data.labels)).split(data.cu_seqlens.diff().tolist())
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed))
    rows = torch.cat([parts[i] for i in order])
    return data._replace(
        hidden=data.hidden[rows],
        labels=data.labels[rows],
        behavior_log_prob=data.behavior_log_prob[rows],
        cu_seqlens=_offsets(data.cu_seqlens.diff()[order]),
    )


def _factor(data: Hidden, target: float) -> float:
    """What the hidden states are to be multiplied by for a mean entropy of target nats."""
    factor = 1.0
    for _ in range(20):
        entropy, variance = torch.zeros(2, dtype=torch.float64)
        for h in data.hidden.split(TILE):
            logp = (factor * h @ data.weight.T).log_softmax(-1)
            p = logp.exp()
            each = -(p * logp).sum(-1)
            entropy += each.double().sum().cpu()
            variance += ((p * logp.square()).sum(-1) - each.square()).double().sum().cpu()
        mean = entropy.item() / len(data.labels)
        if abs(mean / target - 1) < 1e-3:
            return factor
        # Newton on the logarithms: d entropy / d ln factor = -Var of the logits times factor.
        step = math.log(mean / target) * mean * len(data.labels) / variance.item()
        factor *= math.exp(min(max(step, -0.5), 0.5))
    raise ValueError(f"target={target}: no factor found, got to {mean:.3g} nats")


def at_entropy(target: float, rows: int, seed: int = 0, device: str = "cpu") -> Hidden:
    """Real rows, rescaled to a mean entropy; tokens sampled from them as the real ones were.

    Args:
        target: nats; sequences of the temperature whose entropy is nearest are scaled to it.
        rows: N, at most TOKENS.
        seed: of the order of the sequences, the noise of mu and the tokens; the last two are others on
            another kind of device.
        device: where to compute, and of the result.
    """
    if rows > TOKENS:
        raise ValueError(f"rows={rows}: at most {TOKENS}")
    stored = _stored()
    nearest = min(TEMPERATURES, key=lambda t: abs(math.log(stored[str(t)]["entropy"] / target)))
    whole = _unpacked(stored[str(nearest)], _head(stored), nearest)
    data = to(first(_shuffled(whole, seed), rows), device)
    factor = _factor(data, target)
    data = data._replace(hidden=factor * data.hidden, temperature=nearest / factor)
    g = torch.Generator(device).manual_seed(seed)
    labels, log_mu = [], []
    for h in data.hidden.split(TILE):
        y, log_prob = _draw(h, data.weight, g)
        labels.append(y)
        log_mu.append(log_prob)
    return data._replace(labels=torch.cat(labels), behavior_log_prob=torch.cat(log_mu))


def synthesise(data: Hidden, dim: int, vocab: int, tail_mass: float, seed: int) -> Hidden:
    """Raises D to ``dim`` and V to ``vocab``; added columns hold ``tail_mass`` of the mean softmax.

    Args:
        data: on any device; at least one dimension less than ``dim``.
        dim: the new D. Rows of hidden states and head are multiplied by a matrix with orthonormal
            rows, so the logits stay; one further direction carries the same number in every hidden
            state, and the minus a bias of the added columns.
        vocab: the new V. Added rows are copies of real ones drawn at random, with noise of
            ``PERTURBATION`` of their norm; log mu follows log pi, so the log-ratios stay.
        tail_mass: mean share of the softmax the added columns hold together.
        seed: of every draw.
    """
    g = torch.Generator().manual_seed(seed)
    (v, d), device = data.weight.shape, data.hidden.device
    if dim <= d or vocab < v:
        raise ValueError(f"dim={dim}, vocab={vocab}: must exceed {d} and reach {v}")
    q = torch.linalg.qr(torch.randn(dim, d + 1, generator=g)).Q.T.to(device)
    constant = data.hidden.norm(dim=1).mean() / d**0.5
    hidden, weight = data.hidden @ q[:d] + constant * q[d], data.weight @ q[:d]
    mu = data.behavior_log_prob
    if vocab > v:
        copies = data.weight[torch.randint(0, v, (vocab - v,), generator=g).to(device)]
        noise = torch.randn(copies.shape, generator=g).to(device) / d**0.5
        copies = copies + PERTURBATION * copies.norm(dim=1, keepdim=True) * noise
        odds = torch.cat(
            [
                ((h @ copies.T).logsumexp(-1) - (h @ data.weight.T).logsumexp(-1)).double()
                for h in data.hidden.split(TILE)
            ]
        )
        low, high = -100.0, 100.0
        for _ in range(60):
            shift = (low + high) / 2
            low, high = (
                (shift, high) if (odds - shift).sigmoid().mean() > tail_mass else (low, shift)
            )
        weight = torch.cat([weight, copies @ q[:d] - shift / constant * q[d]])
        mu = mu + torch.nn.functional.logsigmoid(shift - odds).to(mu.dtype)
    return data._replace(hidden=hidden, weight=weight, behavior_log_prob=mu)


def active_sizes(data: Hidden, sizes: list[int], log2_tau: int = -10) -> list[Tensor]:
    """|A| of each tile of each size: the fewest columns, labels among them, that leave out tau^2.

    Coefficients are 1: the energy of a column is the sum over the tile of (softmax - onehot)^2.
    """
    energy: dict[int, list[Tensor]] = {size: [] for size in sizes}
    label_sets: dict[int, list[Tensor]] = {size: [] for size in sizes}
    smallest = min(sizes)
    whole = len(data.labels) // max(sizes) * max(sizes)
    for start in range(0, whole, smallest):
        h, y = data.hidden[start : start + smallest], data.labels[start : start + smallest]
        p = (h @ data.weight.T).softmax(-1)
        p[torch.arange(len(y)), y] -= 1
        e, there = p.square().sum(0), torch.zeros(p.shape[1], dtype=torch.bool).to(p.device)
        there[y] = True
        for size in sizes:
            if start % size == 0:
                energy[size].append(e.clone())
                label_sets[size].append(there.clone())
            else:
                energy[size][-1] += e
                label_sets[size][-1] |= there
    found = []
    for size in sizes:
        counts = []
        for e, there in zip(energy[size], label_sets[size], strict=True):
            others = e[~there].double().sort().values.cumsum(0)
            left_out = int((others <= 4.0**log2_tau * e.double().sum()).sum())
            counts.append(len(e) - left_out)
        found.append(torch.tensor(counts, dtype=torch.float64))
    return found


def _relative_error(counts: Tensor) -> float:
    """Standard error of the mean over tiles, as a share of the mean."""
    return (counts.std() / counts.mean()).item() / len(counts) ** 0.5


def judge(ratio: float, error: float) -> str:
    """What the check says of a ratio with its standard error: "", "beyond 10 %" or "OFF"."""
    beyond = abs(ratio - 1) - 0.1
    return "" if beyond <= 0 else "OFF" if beyond > 2 * error else "beyond 10 %"


def check(dim: int = 640, draws: int = 3) -> bool:
    """Prints |A| of generated over real data per tile size; False if any is off.

    "again" makes the entropy of a stored temperature from its own sequences, in another order with
    other tokens: the ratio is the generator's alone, and off beyond 10 %. "another text" makes that of
    sequences that were sampled for this check alone from stored ones, as every benchmark at a given
    entropy does. Two texts differ by themselves: the standard error of the ratio stands beside it, from
    tiles of 512 rows, which are longer than any sequence; what is beyond 10 % is not settled, and off
    is what lies beyond by more than two of them. The last text is of a stored temperature, so that its
    ratio is of the texts alone.
    """
    sizes, good = [64, 128, 256, 512, 1024], True
    stored = _stored()
    head = _head(stored)
    for name, real in (("again", stored), ("another text", _held_out())):
        for temperature in TEMPERATURES if name == "again" else OTHER_TEXTS:
            data, entropy = real[str(temperature)], real[str(temperature)]["entropy"]
            there = active_sizes(_unpacked(data, head, temperature), sizes)
            worst, error = [1.0] * len(sizes), 0.0
            for seed in range(draws):
                made = synthesise(at_entropy(entropy, TOKENS, seed), dim, len(head), 0.0, seed)
                here = active_sizes(made, sizes)
                ratios = [(a.mean() / b.mean()).item() for a, b in zip(here, there, strict=True)]
                worst = [
                    max(w, r, key=lambda x: abs(x - 1)) for w, r in zip(worst, ratios, strict=True)
                ]
                if name != "again":
                    pair = (_relative_error(x[sizes.index(512)]) for x in (here, there))
                    error = max(error, math.hypot(*pair))
            words = {judge(w, error) for w in worst}
            good &= "OFF" not in words
            print(f"{name}, T = {temperature}, {entropy:.2f} nats, tiles of {sizes} rows:")
            print("  real |A|    ", *(f"{a.mean():8.0f}" for a in there))
            print("  worst ratio ", *(f"{w:8.3f}" for w in worst), *sorted(words - {""}))
            if error:
                print(f"  standard error of the ratio {error:.3f}")
            sys.stdout.flush()
    return good


def main(arguments: list[str] | None = None) -> int:
    """Describes the data, or checks the generator; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, TOKENS])
    parser.add_argument("--check", action="store_true", help="generated against real sparsity")
    args = parser.parse_args(arguments)
    if args.check:
        return int(not check())
    for temperature in TEMPERATURES:
        for rows in args.rows:
            facts = describe(load(temperature, rows))
            print(f"T = {temperature}: " + ", ".join(f"{k} {v:.4g}" for k, v in facts.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
