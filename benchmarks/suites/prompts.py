"""A training step over K answers to each prompt: prompts run once, packed, and padded.

The model has the shape of SmolLM2-135M with random weights, in fp32 on a CPU and bf16 on CUDA, so that
nothing need be loaded. A step is ``causal_lm_topr_loss``, its backward and AdamW with a learning rate of
0. The losses of the layouts are compared before anything is timed. ``tokens`` counts those of a forward
pass with their padding. ``peak_bytes`` is what a step adds to the memory: on CUDA all of it, on a CPU
the growth of the peak resident set.

The floor of a step is that of its tokens: layers, head and optimizer over every distinct one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.engine import LOSS_LIMIT, Bench, Interrupted, Job, summary
from benchmarks.measure import deciles, interleave
from benchmarks.suites.memory import resident_bytes

#: SmolLM2-135M by its published configuration.
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
TINY = SHAPE | {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64}
TINY |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
#: Layout -> arguments of the collator.
LAYOUTS: dict[str, dict[str, bool]] = {
    "topr shared prompts": {"share_prefix": True},
    "topr packed": {"packing": True},
    "topr padded": {},
}
SEQUENCES = 32
#: Tokens of a prompt and of an answer, answers to a prompt.
CPU = ((256, 16, 16), (256, 64, 1))
FULL = tuple((p, c, k) for p in (64, 256, 1024) for c in (16, 64, 256) for k in (1, 4, 16))


def jobs(device: str, quick: bool, full: bool = False) -> list[Job]:
    """One for each shape; on CUDA also with ``flex_attention``."""
    shapes = ((8, 3, 4),) if quick else FULL if full or device == "cuda" else CPU
    attentions = ("sdpa",) if device == "cpu" else ("sdpa", "flex_attention")
    return [
        Job(
            f"end_to_end prompts {p}/{c}/K={k} {attention}",
            _job(p, c, k, attention),
            1.0 if device == "cuda" else 6.0,
        )
        for p, c, k in shapes
        for attention in attentions
    ]


def _job(prompt: int, answer: int, k: int, attention: str) -> Callable[[Bench], None]:
    def measure(bench: Bench) -> None:
        _measure(bench, prompt, answer, k, attention)

    return measure


def records(prompt: int, answer: int, k: int, sequences: int, vocab: int) -> list[dict[str, Any]]:
    """Random tokens: prompts of equal length, answers of half to one and a half times ``answer``."""
    g = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(0, vocab, (n,), generator=g).tolist()

    found = []
    for i in range(sequences):
        question = tokens(prompt) if i % k == 0 else found[-1]["prompt_token_ids"]
        length = int(torch.randint(answer - answer // 2, answer + answer // 2 + 1, (), generator=g))
        found.append(
            {
                "prompt_token_ids": question,
                "completion_token_ids": tokens(length),
                "behavior_log_prob": [-10.8] * length,
                "reward": 1.0 if i % 2 else -1.0,
            }
        )
    return found


def _measure(bench: Bench, prompt: int, answer: int, k: int, attention: str) -> None:
    import transformers

    from topr_kernels.hf import CompletionCollator, causal_lm_topr_loss

    shape = TINY if bench.quick else SHAPE
    dtype = torch.float32 if bench.device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape, attn_implementation=attention)
    model = transformers.LlamaForCausalLM(config).to(bench.device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    data = records(prompt, answer, k, 2 * k if bench.quick else SEQUENCES, shape["vocab_size"])
    layouts = {
        name: {
            n: x.to(bench.device) if isinstance(x, torch.Tensor) else x
            for n, x in CompletionCollator(0, **options)(data).items()
        }
        for name, options in LAYOUTS.items()
    }
    kind = (
        f"SmolLM2-135M-shaped, {len(data) // k} prompts of {prompt}, {k} answers of {answer} each"
    )
    facts: dict[str, Any] = {"path": "model", "data": f"{kind}, {attention}", "mode": "trained"}
    facts |= {"rows": sum(len(r["completion_token_ids"]) for r in data), "dtype": str(dtype)[6:]}
    facts |= {"dim": shape["hidden_size"], "vocab": shape["vocab_size"]}
    bench.say(str(facts["data"]))
    tokens: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )

    def step(batch: Mapping[str, Any]) -> dict[str, float]:
        held = resident_bytes(bench.device)
        loss: list[Any] = []
        found = {"forward_ms": bench.clock(lambda: loss.append(causal_lm_topr_loss(model, batch)))}
        found["backward_ms"] = bench.clock(lambda: loss[0].loss.backward())
        found["optimizer_ms"] = bench.clock(
            lambda: (optimizer.step(), optimizer.zero_grad())  # type: ignore[no-untyped-call]
        )
        found["total_ms"] = sum(found.values())
        found |= {"peak_bytes": held(), "tokens": float(tokens[-1])}
        return found | {"loss": loss[0].loss.item()}

    calls: dict[str, Callable[[], dict[str, float]]] = {}
    losses: dict[str, float] = {}
    for name in [n for n in layouts if not bench.wanted or any(w in n for w in bench.wanted)]:
        bench.tick(name)
        try:
            losses[name] = step(layouts[name])["loss"]
        except Exception as error:  # torch runs no backward of flex_attention on a CPU
            bench.drop(facts, name, "failed", summary(error), ours=True)
            continue
        first = next(iter(losses.values()))
        if not abs(losses[name] - first) <= LOSS_LIMIT * (1 + abs(first)):
            bench.drop(facts, name, "red", f"loss {losses[name]}, not {first}", ours=True)
            continue
        calls[name] = lambda batch=layouts[name]: step(batch)
    samples, interrupted = interleave(
        calls, bench.repetitions, bench.deadline, bench.tick, bench.now
    )
    for name, runs in samples.items():
        for metric in runs[0]:
            bench.add(
                facts, name, metric, deciles([r[metric] for r in runs]), repetitions=len(runs)
            )
        shown = {metric: deciles([r[metric] for r in runs])[1] for metric in runs[0]}
        bench.say(
            f"  {name:24} {shown['total_ms']:10.0f} ms  {shown['tokens']:8.0f} tokens  "
            f"{shown['peak_bytes'] / 2**20:8.0f} MiB"
        )
    bench.flush()
    if interrupted:
        raise Interrupted
