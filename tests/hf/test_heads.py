"""The head of Hugging Face models: what it is, and hidden states captured instead of logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from test_trainer import PeftLike, rows
from tiny import random_model, tiny_config, tiny_tokenizer
from transformers import LlamaForCausalLM

from topr_kernels import linear_log_prob, log_prob
from topr_kernels.hf import CompletionCollator, completion_hidden, completion_logits, find_head
from topr_kernels.hf.capture import capture_hidden

SIZE = {
    "vocab_size": len(tiny_tokenizer()),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def build(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A model of that architecture whose logits are as large as those of trained models."""
    torch.manual_seed(seed)
    text = f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config"
    config = getattr(transformers, text)(**{**SIZE, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    head = model.get_output_embeddings()
    nn.init.normal_(head.weight, std=0.5)
    if head.bias is not None:
        nn.init.normal_(head.bias)
    return model


MINICPM3 = {"dim_model_base": 8, "q_lora_rank": 8, "kv_lora_rank": 8, "num_key_value_heads": 4}
#: Architecture, its settings, and the logit_scale, softcap and bias to be found.
KINDS = [
    ("Llama", {"tie_word_embeddings": True}, 1.0, None, False),
    ("Llama", {"tie_word_embeddings": False}, 1.0, None, False),
    ("Gemma2", {"final_logit_softcapping": 3.0}, 1.0, 3.0, False),
    ("Gemma2", {"final_logit_softcapping": None}, 1.0, None, False),
    ("Cohere", {"logit_scale": 0.25}, 0.25, None, False),
    ("Granite", {"logits_scaling": 4.0}, 0.25, None, False),
    ("HyperCLOVAX", {"logits_scaling": 0.5}, 0.5, None, False),
    ("MiniCPM3", MINICPM3, 1.0, None, False),
    ("RecurrentGemma", {"logits_soft_cap": 3.0}, 1.0, 3.0, False),
    ("Phi", {}, 1.0, None, True),
]
NAMES = [f"{kind}-{next(iter(changes.values()), 'plain')}" for kind, changes, *_ in KINDS]


def fused_log_prob(model: Any, batch: dict[str, Any], called: Any = None) -> torch.Tensor:
    head = find_head(model)
    hidden = completion_hidden(
        model if called is None else called, batch, signature_of=model, check=head
    )
    return linear_log_prob(
        hidden,
        head.weight,
        batch["labels"][:, -batch["logits_to_keep"] :],
        **head.options,
        workspace_bytes=64 * 4 * SIZE["vocab_size"],
    ).log_prob


def logits_log_prob(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    labels = batch["labels"][:, -batch["logits_to_keep"] :]
    return log_prob(completion_logits(model, batch), labels).log_prob


@pytest.mark.parametrize(("kind", "changes", "scale", "softcap", "bias"), KINDS, ids=NAMES)
def test_the_head_makes_the_models_own_logits(
    kind: str, changes: dict[str, Any], scale: float, softcap: float | None, bias: bool
):
    """PITFALLS 27: softcap, scale and bias of every family, values and gradients."""
    model = build(kind, **changes)
    head = find_head(model)
    assert (head.logit_scale, head.softcap) == (scale, softcap)
    assert head.weight is model.get_output_embeddings().weight
    assert (head.bias is not None) == bias
    batch = CompletionCollator(0)(rows(6))
    expected = logits_log_prob(model, batch)
    torch.manual_seed(0)
    upstream = torch.randn_like(expected)
    (expected * upstream).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    found = fused_log_prob(model, batch)
    (found * upstream).sum().backward()
    assert expected.abs().max() > 3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-4, msg=name)


def test_a_tied_head_gets_both_gradients():
    """PITFALLS 25: one parameter, once from the embedding and once from the head."""
    model, batch = build("Llama", tie_word_embeddings=True), CompletionCollator(0)(rows(6))
    logits_log_prob(model, batch).sum().backward()
    expected = model.lm_head.weight.grad
    model.zero_grad()
    fused_log_prob(model, batch).sum().backward()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    torch.testing.assert_close(model.lm_head.weight.grad, expected, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient():
    """PITFALLS 25."""
    model, batch = build("Llama", tie_word_embeddings=False), CompletionCollator(0)(rows(6))
    model.lm_head.requires_grad_(False)
    fused_log_prob(model, batch).sum().backward()
    assert model.lm_head.weight.grad is None
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


class Widened(LlamaForCausalLM):
    """Does to its logits what no config says."""

    factor = 0.5

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = self.change(out.logits)
        return out

    def change(self, logits: torch.Tensor) -> torch.Tensor:
        return logits * self.factor


class Capped(Widened):
    def change(self, logits: torch.Tensor) -> torch.Tensor:
        return 30 * torch.tanh(logits / 30)


class Cut(Widened):
    def change(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[..., :-3]


class Banned(Widened):
    def change(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor(5), -torch.inf)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Widened, "logits differ by 5.0e-01 of their norm"),
        (Capped, "logits differ by"),
        (Cut, "logits have shape"),
        (Banned, "logits differ by inf"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unknown_transform_is_refused(kind: Any, message: str, dtype: torch.dtype):
    """PITFALLS 27: rather than training on other logits than the model's."""
    model, batch = kind(tiny_config()).eval(), CompletionCollator(0)(rows(4))
    nn.init.normal_(model.lm_head.weight, std=1.0)
    model = model.to(dtype)
    with pytest.raises(ValueError, match=rf"{message}.*fused_head=False"):
        completion_hidden(model, batch, check=find_head(model))
    # Without it the check passes, in half precision too.
    kind.change, change = (lambda self, logits: logits), kind.change
    try:
        completion_hidden(model, batch, check=find_head(model))
    finally:
        kind.change = change


def test_rounding_of_known_transforms_is_allowed():
    batch = CompletionCollator(0)(rows(4))
    for kind, changes in (
        ("Gemma2", {"final_logit_softcapping": 3.0}),
        ("Granite", {"logits_scaling": 3.0}),
    ):
        for dtype in (torch.bfloat16, torch.float16):
            model = build(kind, **changes).to(dtype)
            completion_hidden(model, batch, check=find_head(model))


class LoraLike(nn.Module):
    """What PEFT makes of a linear layer: LoRA, or modules_to_save."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)
        self.weight = base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class QuantisedLike(nn.Linear):
    pass


def test_a_head_that_is_no_plain_linear_is_refused():
    """PITFALLS 26: LoRA on the head would be dropped without a word."""
    model = random_model()
    for head in (LoraLike(model.lm_head), QuantisedLike(32, SIZE["vocab_size"])):
        model.set_output_embeddings(head)
        for wrapped in (model, PeftLike(model)):
            with pytest.raises(ValueError, match=rf"{type(head).__name__}.*LoRA.*fused_head=False"):
                find_head(wrapped)
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        find_head(model.model)


@pytest.mark.parametrize("how", ["DTensor", "ZeRO-3", "flat shard"])
def test_a_sharded_head_is_refused(how: str):
    """PITFALLS 26."""
    model = random_model()
    weight = model.lm_head.weight
    if how == "DTensor":
        weight.full_tensor = lambda: weight
    elif how == "ZeRO-3":
        model.lm_head.weight = nn.Parameter(torch.empty(0))
        model.lm_head.weight.ds_id = 0
    else:
        model.lm_head.weight = nn.Parameter(weight.detach().flatten()[:7])
    with pytest.raises(ValueError, match=r"sharded over processes.*fused_head=False"):
        find_head(model)


def test_capturing_makes_no_logits_and_leaves_no_trace():
    model = random_model()
    with torch.no_grad(), capture_hidden(model) as capture:
        logits = model(torch.tensor([[3, 4, 5]])).logits
    assert logits.shape == (1, 3, 1)
    assert capture.hidden.shape == (1, 3, 32)
    assert "forward" not in vars(model.lm_head)
    full = model(torch.tensor([[3, 4, 5]])).logits
    assert full.shape == (1, 3, SIZE["vocab_size"])
    torch.testing.assert_close(model.lm_head(capture.hidden), full, rtol=0, atol=0)


def test_capturing_ends_with_an_exception_and_keeps_a_patched_forward():
    model = random_model()
    plain = model.lm_head.forward
    calls = []

    def patched(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return plain(hidden)

    for forward in (None, patched):
        if forward is not None:
            model.lm_head.forward = forward
        with pytest.raises(KeyError), capture_hidden(model):
            raise KeyError
        assert vars(model.lm_head).get("forward") is forward
        assert model(torch.tensor([[3]])).logits.shape[-1] == SIZE["vocab_size"]
    assert calls == [1]


def test_capturing_twice_at_once_is_refused():
    model = random_model()
    with capture_hidden(model):
        with pytest.raises(RuntimeError, match="captured already"), capture_hidden(model):
            pass
        # The refusal must not end the outer one.
        assert model(torch.tensor([[3, 4]])).logits.shape[-1] == 1
    assert model(torch.tensor([[3, 4]])).logits.shape[-1] == SIZE["vocab_size"]


def test_a_head_that_runs_never_or_twice_is_refused():
    model = random_model()
    with capture_hidden(model) as capture:
        pass
    with pytest.raises(ValueError, match=r"called its head 0 times.*fused_head=False"):
        _ = capture.hidden
    with capture_hidden(model) as capture:
        model(torch.tensor([[3]]))
        model(torch.tensor([[3]]))
    with pytest.raises(ValueError, match=r"called its head 2 times"):
        _ = capture.hidden


def test_a_peft_wrapper_captures_the_same():
    base, data = random_model(), rows(6)
    nn.init.normal_(base.lm_head.weight, std=0.5)
    batch = CompletionCollator(0)(data)
    with torch.no_grad():
        expected = logits_log_prob(base, batch)
        found = fused_log_prob(PeftLike(base).eval(), batch)
        also = fused_log_prob(base, batch, called=PeftLike(base).eval())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, also)


def test_autocast_rounds_the_heads_operands():
    """The model's head would run in bf16: so must the product that stands in for it."""
    model, batch = build("Llama"), CompletionCollator(0)(rows(6))
    with torch.no_grad():
        exact = fused_log_prob(model, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected, found = logits_log_prob(model, batch), fused_log_prob(model, batch)
    noise = (expected - exact).abs().max()
    assert noise > 1e-3
    assert (found - expected).abs().max() < noise
