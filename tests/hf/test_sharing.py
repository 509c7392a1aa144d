"""One forward pass per prompt: equal to separate sequences, and the proof of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from test_packing import KINDS, Row, build, on_policy, reference

from topr_kernels.hf import CompletionCollator, causal_lm_topr_loss
from topr_kernels.hf.sharing import (
    is_tree,
    prove_sharing,
)

KINDS["Cohere"] = ("CohereConfig", "CohereForCausalLM", {"logit_scale": 0.25})
KINDS["Granite"] = ("GraniteConfig", "GraniteForCausalLM", {"logits_scaling": 4.0})
KINDS["Tied"] = ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True})
#: Families and attention; windows and chunks are of 4 tokens.
EXACT = [
    *((kind, "sdpa") for kind in ("Llama", "Tied", "Qwen3", "Gemma3", "GPT2", "Cohere", "Granite")),
    *((kind, "sdpa") for kind in ("Mixtral", "Phi", "Llama4")),
    *((kind, "eager") for kind in ("Llama", "Gemma2", "Gemma3", "GPT2", "GptOss", "Llama4")),
]


def siblings(seed: int = 0) -> list[Row]:
    """Two questions behind one system prompt, out of order, and one by itself; an empty completion."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(2, 90, (n,), generator=generator).tolist()

    system = tokens(5)
    one, two, other = system + tokens(3), system + tokens(4), tokens(2)
    shapes = [(one, 5), (two, 1), (one, 7), (other, 3), (two, 6), (one, 0), (two, 4), (one, 2)]
    return [
        {
            "prompt_token_ids": prompt,
            "completion_token_ids": tokens(length),
            "behavior_log_prob": [-4.0] * length,
            "reward": (1.0, -1.0, -0.5)[i % 3],
        }
        for i, (prompt, length) in enumerate(shapes)
    ]


def shared(data: list[Row], **options: Any) -> dict[str, Any]:
    batch = CompletionCollator(0, share_prefix=True, **options)(data)
    assert is_tree(batch)
    return batch


def gradients(
    model: Any, batch: dict[str, Any], **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = causal_lm_topr_loss(model, batch, **options)
    out.loss.backward()
    return out.loss.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], allowed: float) -> None:
    """Each gradient, but for a share of its norm."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        # Biases of keys have no gradient but rounding's.
        assert (found[name] - x).norm() <= allowed * x.norm() + 1e-3 * allowed, name


@pytest.mark.parametrize(("kind", "attention"), EXACT)
def test_a_tree_gives_the_loss_and_every_gradient_of_separate_sequences(kind: str, attention: str):
    model = build(kind, attention)
    assert prove_sharing(model, torch.tensor(siblings()[2]["prompt_token_ids"])) is None
    data = on_policy(model, siblings())
    batch = shared(data)
    assert batch["input_ids"].numel() < 0.7 * batch["unshared"]["attention_mask"].sum()
    loss, expected = reference(model, data)
    for fused_head in (True, False):
        found, grads = gradients(model, batch, fused_head=fused_head, check=True)
        torch.testing.assert_close(found.double(), loss, rtol=1e-5, atol=1e-6)
        assert_equal(grads, expected, 1e-5)


@pytest.mark.parametrize(("kind", "attention"), EXACT)
def test_in_fp64_they_are_equal_to_twelve_digits(
    kind: str, attention: str, monkeypatch: pytest.MonkeyPatch
):
    """Norms, rotations and softmax of most families compute in fp32 whatever they are given."""
    model = build(kind, attention)
    data = on_policy(model, siblings())
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    loss, expected = reference(model, data)
    found, grads = gradients(model.double(), shared(data))
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=1e-13)
    assert_equal(grads, expected, 1e-12)
