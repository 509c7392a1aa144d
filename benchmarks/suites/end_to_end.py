"""A training step of a real model, forward, backward and AdamW, with every provider as its head.

On a CPU SmolLM2-135M-Instruct in fp32 on answers it has sampled itself; on CUDA models of the shape of
Llama-3-8B and Qwen2.5-1.5B built from their configurations, in bf16, with random weights and tokens:
their softmax is nearly uniform, which the entropy column says and no real model has. The learning rate
is 0: all the work of a step, and the same model for every provider. What a provider computes is
compared with fp64 on the hidden states of the model first, as everywhere.

Where a model has fewer layers than the one it is named after, at their real width, the data column says
so: with them goes a part of the time of a step, and the share of the head in it grows. The settings of a
provider are searched on the head alone.

"topr in Hugging Face" is ``causal_lm_topr_loss``, which finds the head and the scored rows itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import hidden_states, providers
from benchmarks.case import LinearCase, Loss, Provider
from benchmarks.engine import LOSS_LIMIT, Bench, Job, measure_case
from benchmarks.hidden_states import Hidden
from benchmarks.measure import Clock
from benchmarks.suites import prompts

WHOLE = "topr in Hugging Face"
#: Shapes by their published configurations; batch x tokens of a step; "of" so many layers.
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "kind": "llama",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "batch": (3, 12),
    },
    "Llama-3-8B-shaped": {
        "kind": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        # With their gradients and AdamW's moments 8 billion weights are 64 GB to make and to walk.
        "num_hidden_layers": 8,
        "of": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "batch": (4, 1024),
    },
    "Qwen2.5-1.5B-shaped": {
        "kind": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "batch": (8, 1024),
    },
}
SMOLLM2, SMOLLM2_BATCH, TEMPERATURE = "SmolLM2-135M-Instruct", (2, 192), 1.0
PROMPT_SHARE = 4  # every n-th token of a sequence is prompt, as a share at its start
#: Providers of a step; compiling the head for each model would take longer than measuring it.
HEADS = (
    "topr exact",
    "topr tau 2^-10",
    WHOLE,
    "torch eager",
    "TRL fused head tuned",
)
PEERS = {"cpu": (), "cuda": ("cut cross-entropy", "Liger selective log-prob")}


class Step(LinearCase):
    """A model and a batch; the rows that predict a scored token are the hidden states of the case."""

    whole = True

    def __init__(self, name: str, device: str, dtype: torch.dtype) -> None:
        self.model, self.batch, self.scored, shown = _build(name, device, dtype)
        super().__init__(label(name), shown, device, dtype)
        self.share = 1 - len(shown.labels) / self.scored.numel()
        # Random weights in half precision need no fp32 master copy to be timed.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0)

    def facts(self) -> dict[str, Any]:
        """As of hidden states, with the share of the batch that is prompt or padding."""
        return {**super().facts(), "path": "model", "masked_share": f"{self.share:.4g}"}

    def search(self, provider: Provider, loss: Loss, clock: Clock, trained: bool) -> float:
        """Of the head alone: the rest of a step is the same for every setting."""
        return super().repetition(provider, loss, clock, trained)["total_ms"]

    def repetition(
        self, provider: Provider, loss: Loss, clock: Clock, trained: bool
    ) -> dict[str, float]:
        """One step: model and loss, backward, optimizer."""
        if clock.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        result: list[Tensor] = []

        def forward() -> None:
            if getattr(loss, "whole", False):
                result.append(loss(self))
            else:
                ids, mask = self.batch["input_ids"], self.batch["attention_mask"]
                h = hidden(self.model, ids, mask)
                head = self.model.get_output_embeddings().weight
                result.append(loss(self, h[self.scored], head))

        def update() -> None:
            self.optimizer.step()
            self.optimizer.zero_grad()

        parts = {"forward_ms": clock(forward), "backward_ms": clock(lambda: result[0].backward())}
        parts["optimizer_ms"] = clock(update)
        found = {**parts, "total_ms": sum(parts.values())}
        if clock.cuda:  # the whole of it: weights, gradients, moments, activations
            found["peak_bytes"] = float(torch.cuda.max_memory_allocated())
        return found


def label(name: str) -> str:
    """Name of a model, and how many of its layers there are."""
    model = MODELS.get(name, {})
    cut = f", {model['num_hidden_layers']} of {model['of']} layers" if "of" in model else ""
    return name + cut


def hidden(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """[B, T, D] final hidden states. No cache of keys and values, which training has no use for."""
    found = model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    states: Tensor = found.last_hidden_state
    return states


def whole_step(device: str) -> Provider:
    """``causal_lm_topr_loss`` on the model and batch of a step."""
    from topr_kernels.hf import causal_lm_topr_loss

    def loss(c: Any, *leaves: Tensor) -> Tensor:
        if leaves:  # the check: gradients from the hidden states, the loss from the model as well
            out = providers.ours.outputs(c, *leaves, tolerance=0.0)
            with torch.no_grad():
                inside = causal_lm_topr_loss(c.model, c.batch, grad_tolerance=0.0).loss.item()
            right = out.loss.item()
            if not abs(inside - right) <= LOSS_LIMIT * (1 + abs(right)):
                raise RuntimeError(f"the loss inside the model is {inside}, not {right}")
            return out.loss
        return causal_lm_topr_loss(c.model, c.batch, grad_tolerance=0.0).loss

    loss.whole = True  # type: ignore[attr-defined]
    return Provider({providers.ours.serving("auto", device): loss}, ours=True)


def jobs(device: str, quick: bool, full: bool = False) -> list[Job]:
    """One per model, and the layouts of a batch of prompts (``prompts``)."""
    names = ["tiny"] if quick else [SMOLLM2] if device == "cpu" else list(MODELS)[1:]
    found = [Job(f"end_to_end {name}", _job(name), 8.0) for name in names]
    return [*found, *prompts.jobs(device, quick, full)]


def _job(name: str) -> Callable[[Bench], None]:
    def measure(bench: Bench) -> None:
        dtype = torch.float32 if bench.device == "cpu" else torch.bfloat16
        case = Step(name, bench.device, dtype)
        found = providers.linear(bench.device)
        # Behind the exact form of hidden states, so that the tables have them in this order.
        found = {
            "topr exact": found.pop("topr exact"),
            WHOLE: whole_step(bench.device),
            **found,
        }
        wanted = (*HEADS, *PEERS[bench.device])
        found = {n: found[n] for n in wanted if n in found}
        measure_case(bench, case, found, case.facts())

    return measure


def _build(
    name: str, device: str, dtype: torch.dtype
) -> tuple[Any, dict[str, Tensor], Tensor, Hidden]:
    """Model, batch, [B, T] rows that predict a scored token, and what a case needs to know."""
    if name == SMOLLM2:
        from topr_kernels.recipe.models import load_model

        model = load_model("smollm2").model.to(device)
        b, t = SMOLLM2_BATCH
        stored = hidden_states.load(TEMPERATURE, hidden_states.TOKENS)
        sizes = stored.cu_seqlens.diff().tolist()
        starts = [int(o) for o, n in zip(stored.cu_seqlens.tolist(), sizes, strict=False) if n >= t]
        ids = torch.stack([stored.labels[o : o + t] for o in starts[:b]]).to(device)
        lengths = [t - t // 8 * (i % 2) for i in range(b)]
    else:
        model, (b, t) = _from_config(name, device, dtype)
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.config.vocab_size, (b, t), generator=g).to(device)
        lengths = [t - t // 8 * (i % 2) for i in range(b)]
    model.train()
    position = torch.arange(t, device=device)
    mask = (position < torch.tensor(lengths, device=device)[:, None]).long()
    answer = (mask == 1) & (position >= t // PROMPT_SHARE)
    labels = torch.where(answer, ids, -100)
    scored = torch.zeros_like(answer)
    scored[:, :-1] = answer[:, 1:]
    reward = torch.ones(b, device=device)
    reward[1::2] = -1
    with torch.no_grad():
        h = hidden(model, ids, mask)[scored]
    head = model.get_output_embeddings().weight.detach()
    sizes = scored.sum(1).cumsum(0)
    offsets = torch.cat([sizes.new_zeros(1), sizes]).to(torch.int32)
    kept = labels[:, 1:][scored[:, :-1]]
    shown = Hidden(h, head, kept, torch.zeros(len(kept), device=device), reward, offsets, 1.0)
    log_pi = hidden_states.log_prob_and_entropy(shown)[0]
    g = torch.Generator().manual_seed(1)
    mu = log_pi + 0.02 * torch.randn(len(log_pi), generator=g).to(device)
    behavior = torch.zeros(b, t, device=device)
    behavior[:, 1:][scored[:, :-1]] = mu
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    batch |= {"behavior_log_prob": behavior, "reward": reward}
    return model, batch, scored, shown._replace(behavior_log_prob=mu)


def _from_config(name: str, device: str, dtype: torch.dtype) -> tuple[Any, tuple[int, int]]:
    import transformers

    settings = dict(MODELS[name])
    kind, batch = settings.pop("kind"), settings.pop("batch")
    settings.pop("of", None)
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }[kind]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return model_class(config_class(**settings)), batch
    finally:
        torch.set_default_dtype(before)
