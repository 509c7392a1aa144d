"""One call from model and batch to the loss: every family, adapters, routers, and sharded wrappers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from processes import launch
from test_heads import SIZE, build
from test_trainer import PeftLike, rows
from tiny import random_model, tiny_config
from transformers import LlamaForCausalLM

from topr_kernels import Limits, topr_loss
from topr_kernels.hf import (
    CompletionCollator,
    causal_lm,
    causal_lm_log_prob,
    causal_lm_topr_loss,
    completion_logits,
)
from topr_kernels.hf.capture import loss_in_head
from topr_kernels.hf.signature import counts_positions, takes

MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
#: Architectures and settings, tied and untied heads among them.
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {"tie_word_embeddings": False}),
    ("Llama", {"tie_word_embeddings": True}),
    ("Qwen3", {}),
    ("Gemma2", {"final_logit_softcapping": 3.0}),
    ("Gemma3", {}),
    ("Cohere", {"logit_scale": 0.25}),
    ("Granite", {"logits_scaling": 4.0}),
    ("Phi", {}),
    ("GPT2LMHead", {}),
    ("Mixtral", MOE),
]
NAMES = [f"{kind}-{next(iter(changes.values()), 'plain')}" for kind, changes in FAMILIES]
LORA_TARGETS = {"GPT2LMHead": ["c_attn"], "Phi": ["q_proj", "fc1"]}


def family(kind: str, **changes: Any) -> Any:
    """A tiny random model; GPT-2 has other names for its sizes."""
    if kind != "GPT2LMHead":
        return build(kind, **changes)
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ids = {k: v for k, v in SIZE.items() if k.endswith("_id") or k == "vocab_size"}
    return GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=4, **ids)).eval()


def eager_loss(model: Any, batch: dict[str, Any], **options: Any) -> torch.Tensor:
    """The loss of the model's own logits, with the model's own router loss beside it."""
    seen: list[Any] = []
    handle = model.register_forward_hook(lambda _, __, out: seen.append(out))
    logits = completion_logits(model, batch)
    handle.remove()
    keep = batch["logits_to_keep"]
    loss = topr_loss(
        logits,
        batch["labels"][:, -keep:],
        batch["behavior_log_prob"][:, -keep:],
        batch["reward"],
        impl="torch",
        **options,
    ).loss
    balancing = getattr(seen[-1], "aux_loss", None)
    if balancing is not None:
        loss = loss + model.config.router_aux_loss_coef * balancing
    return loss


def check_gradients(model: Any, batch: dict[str, Any], *, rtol: float = 1e-4, **options: Any):
    """The fused loss and the gradient of every parameter equal those of the logits."""
    model.zero_grad()
    expected = eager_loss(model, batch, **options)
    expected.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert expected != 0
    present = [g.abs().max() for g in gradients.values() if g is not None]
    assert present and max(present) > 1e-3
    model.zero_grad()
    found = causal_lm_topr_loss(model, batch, check=True, workspace_bytes=SMALL, **options)
    found.loss.backward()
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-6)
    for name, p in model.named_parameters():
        if name not in gradients:
            assert p.grad is None, name
        elif gradients[name] is None:
            assert p.grad is None or not p.grad.any(), name
        else:
            torch.testing.assert_close(
                p.grad, gradients[name], rtol=rtol, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    return found


#: Random models are far off policy; with these limits both signs still teach.
BOTH = Limits(0.5, 2.0, 0.5, 2.0)
SMALL = 64 * 4 * SIZE["vocab_size"]


@pytest.mark.parametrize(("kind", "changes"), FAMILIES, ids=NAMES)
def test_every_family_gets_the_gradients_of_its_own_logits(kind: str, changes: dict[str, Any]):
    model, batch = family(kind, **changes), CompletionCollator(0)(rows(6))
    check_gradients(model, batch, limits=BOTH, temperature=0.7)
    with torch.no_grad():
        scored = causal_lm_log_prob(model, batch, workspace_bytes=SMALL, check=True).log_prob
        found = causal_lm_topr_loss(model, batch, workspace_bytes=SMALL)
    assert torch.equal(scored, found.log_prob) and scored.min() < -3


@pytest.mark.parametrize("fused", [True, False])
def test_options_of_a_batch_reach_the_loss(fused: bool):
    """Segments, weights and which log mu is known, of the columns that are kept."""
    model, batch = family("Llama"), CompletionCollator(0)(rows(6))
    keep, count = batch["logits_to_keep"], len(batch["reward"])
    batch["sequence_weight"] = torch.linspace(0.0, 2.0, count)
    batch["segments"] = torch.arange(batch["labels"].shape[1]).expand(count, -1) // 2
    batch["behavior_known"] = batch["reward"] < 0
    out = causal_lm_topr_loss(model, batch, fused_head=fused, ratio="segment_geometric")
    expected = topr_loss(
        completion_logits(model, batch),
        *(batch[n][:, -keep:] for n in ("labels", "behavior_log_prob")),
        batch["reward"],
        ratio="segment_geometric",
        segments=batch["segments"][:, -keep:],
        sequence_weight=batch["sequence_weight"],
        behavior_known=batch["behavior_known"],
    )
    assert (out.length > 2).any() and out.log_ratio.isnan().any()
    for name in ("loss", "weight", "log_ratio", "sequence_weight"):
        a, b = getattr(out, name), getattr(expected, name)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("kind", "changes"), FAMILIES, ids=NAMES)
@pytest.mark.parametrize("on", ["backbone", "head", "modules_to_save"])
def test_lora_gets_the_gradients_of_the_models_own_logits(
    kind: str, changes: dict[str, Any], on: str
):
    """PITFALLS 26: LoRA on the head is part of the logits, and of the gradients."""
    peft = pytest.importorskip("peft")
    model = family(kind, **changes)
    targets = LORA_TARGETS.get(kind, ["q_proj", "v_proj"])
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=[*targets, head] if on == "head" else targets,
        modules_to_save=[head] if on == "modules_to_save" else None,
        fan_in_fan_out=False,
    )
    model = peft.get_peft_model(model, settings).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        # B begins at 0, where the gradient of A is 0 too.
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
            elif "modules_to_save" in name:
                p.add_(0.1 * torch.randn_like(p))
    batch = CompletionCollator(0)(rows(6))
    check_gradients(model, batch, limits=BOTH)
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    if on != "backbone":
        assert any(head in n for n in trained)
    with torch.no_grad(), model.disable_adapter():
        plain = causal_lm_topr_loss(model, batch, check=True).log_ratio
    with torch.no_grad():
        adapted = causal_lm_topr_loss(model, batch, check=True).log_ratio
    assert not torch.allclose(plain, adapted, atol=1e-3)


def test_lora_on_the_head_merged_stacked_biased_and_half_precision():
    peft = pytest.importorskip("peft")
    batch = CompletionCollator(0)(rows(6))
    settings = peft.LoraConfig(r=4, target_modules=["lm_head"], lora_bias=True)
    model = peft.get_peft_model(build("Llama", tie_word_embeddings=False), settings).eval()
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "second"])
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    found = check_gradients(model, batch, limits=BOTH)
    with pytest.raises(RuntimeError):
        model.merge_adapter()  # PEFT's own refusal, for the bias
    for adapter in ("default", "second"):
        model.base_model.model.lm_head.lora_bias[adapter] = False
        model.base_model.model.lm_head.lora_B[adapter].bias = None
    found = causal_lm_topr_loss(model, batch, limits=BOTH, check=True)
    model.merge_adapter()
    merged = causal_lm_topr_loss(model, batch, limits=BOTH, check=True)
    torch.testing.assert_close(merged.log_ratio, found.log_ratio, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    # PEFT keeps adapters in fp32 beside a half-precision base.
    half = model.to(torch.bfloat16)
    for name, p in half.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    rounded = causal_lm_topr_loss(half, batch, limits=BOTH, check=True)
    torch.testing.assert_close(rounded.log_ratio, found.log_ratio, rtol=0.1, atol=0.3)


def test_adapters_that_compute_something_else_are_refused():
    peft = pytest.importorskip("peft")
    for settings in (
        peft.LoraConfig(r=4, target_modules=["lm_head"], use_dora=True),
        peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
    ):
        model = peft.get_peft_model(build("Llama", tie_word_embeddings=False), settings)
        with pytest.raises(ValueError, match=r"head.*fused_head=False"):
            causal_lm_topr_loss(model, CompletionCollator(0)(rows(2)))


def test_lora_dropout_on_the_head_is_applied():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["lm_head"], lora_dropout=0.5)
    model = peft.get_peft_model(build("Llama", tie_word_embeddings=False), settings).train()
    with torch.no_grad():
        model.base_model.model.lm_head.lora_B["default"].weight.normal_(std=0.3)
    batch, values = CompletionCollator(0)(rows(6)), []
    for call in (causal_lm_topr_loss, causal_lm_topr_loss, eager_loss):
        torch.manual_seed(3)
        out = call(model, batch)
        values.append(float(out if isinstance(out, torch.Tensor) else out.loss))
    other = float(causal_lm_topr_loss(model, batch).loss)
    assert values[0] == values[1] != other


def test_router_losses_are_kept_and_split_by_share(monkeypatch: pytest.MonkeyPatch):
    """A mixture of experts keeps its balance; over micro-batches its loss is a weighted mean."""
    model, data = build("Mixtral", **MOE, router_aux_loss_coef=0.5), rows(6, lengths=[3] * 6)
    collate = CompletionCollator(0)
    whole = causal_lm_topr_loss(model, collate(data))
    model.config.output_router_logits = False
    without = causal_lm_topr_loss(model, collate(data))
    assert (whole.loss - without.loss) > 0.5
    model.config.output_router_logits = True
    parts = [collate(data[:2]), collate(data[2:])]
    losses = [causal_lm_topr_loss(model, part, normalizer=6.0).loss for part in parts]
    alone = [causal_lm_topr_loss(model, part).loss for part in parts]
    expected = alone[0] * 2 / 6 + alone[1] * 4 / 6
    torch.testing.assert_close(sum(losses), expected)
    monkeypatch.setattr(causal_lm, "_ROUTER_WEIGHTS", ("its_name_elsewhere",))
    with pytest.raises(ValueError, match="has a weight for it"):
        causal_lm_topr_loss(model, parts[0])


def test_the_logits_of_the_outputs_carry_the_loss():
    """Whatever a model does to its logits, the loss and its gradient pass unchanged; twice as well."""
    model = build("Gemma2", final_logit_softcapping=3.0)
    batch = CompletionCollator(0)(rows(4))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")}

    def compute(hidden: torch.Tensor, head: Any) -> torch.Tensor:
        return (hidden * 2).sum() + head.weight.sum()

    with loss_in_head(model, compute) as inside:
        logits = model(**inputs).logits
    assert logits.shape[-1] == 1
    loss = inside.arrive(logits)
    (5 * loss).backward(retain_graph=True)
    first = model.lm_head.weight.grad.clone()
    # The head is tied: 5 from its own product, the rest from the embedding.
    loss.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, first * 1.2)
    with loss_in_head(model, compute), pytest.raises(RuntimeError, match="captured already"):
        loss_in_head(model, compute).__enter__()
    with loss_in_head(model, compute) as inside:
        pass
    with pytest.raises(ValueError, match="called its head 0 times"):
        inside.arrive(logits)


def test_a_wrapper_is_called_and_fused_head_is_optional():
    model, batch = random_model(), CompletionCollator(0)(rows(6))
    a = causal_lm_topr_loss(model, batch)
    b = causal_lm_topr_loss(PeftLike(model), batch)
    c = causal_lm_topr_loss(model, batch, fused_head=False)
    assert torch.equal(a.loss, b.loss)
    torch.testing.assert_close(a.loss, c.loss, rtol=1e-5, atol=1e-6)
    d = causal_lm_log_prob(model, batch, fused_head=False).log_prob
    torch.testing.assert_close(d, a.log_prob, rtol=1e-5, atol=1e-5)


def sharded_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(tie_word_embeddings=False)).eval()


def sharded_worker(own_head: bool, trained: bool) -> None:
    """Two FSDP2 ranks with half of the batch each; rank 0 compares with one process."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    data, collate = rows(6, lengths=[3, 1, 4, 0, 2, 4]), CompletionCollator(0)
    plain, model = sharded_model(), sharded_model()
    for m in (plain, model):
        m.lm_head.requires_grad_(trained)
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=True)
    if own_head:
        fully_shard(model.lm_head, reshard_after_forward=True)
    fully_shard(model, reshard_after_forward=True)
    part = collate(data[:2] if rank == 0 else data[2:])
    # Ranks average gradients; the normaliser is of both.
    out = causal_lm_topr_loss(model, part, normalizer=5.0, check=True)
    (out.loss * world).backward()
    with torch.no_grad():
        causal_lm_topr_loss(model, part, normalizer=5.0)
    causal_lm_topr_loss(plain, collate(data)).loss.backward()
    expected = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert p.grad is None
            continue
        whole = p.grad.full_tensor()
        assert whole.abs().max() > 0, name
        torch.testing.assert_close(whole, expected[name].grad, rtol=1e-4, atol=1e-6)
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
@pytest.mark.parametrize(("own_head", "trained"), [(False, True), (True, True), (True, False)])
def test_fsdp2_shards_take_the_gradients_of_one_process(own_head: bool, trained: bool):
    """PITFALLS 26: inside the wrapped forward the head is whole, and its hooks reduce its gradient."""
    launch(2, "test_causal_lm.sharded_worker", own_head, trained)


@pytest.mark.parametrize("fused_head", [False, True])
def test_labels_before_what_is_kept_are_not_left_out_in_silence(
    fused_head: bool, monkeypatch: pytest.MonkeyPatch
):
    """A custom collator that counts K where K + 1 columns hold what K labels need."""
    model, good = random_model().eval(), CompletionCollator(0)(rows(4))
    keep, width = good["logits_to_keep"], good["labels"].shape[1]
    short = {**good, "logits_to_keep": keep - 1}
    message = (
        rf"got {keep - 1}, with which 1 scored labels, .* column {width - keep + 1} of {width}"
    )
    for call in (causal_lm_topr_loss, causal_lm_log_prob):
        with pytest.raises(ValueError, match=rf"logits_to_keep: {message}.*at least {keep}:"):
            call(model, short, fused_head=fused_head)
        # Where reading is not free it is done when asked for.
        with monkeypatch.context() as patch:
            patch.setattr(causal_lm, "values_readable", lambda *_: False)
            call(model, short, fused_head=fused_head)
            with pytest.raises(ValueError, match=message):
                call(model, short, fused_head=fused_head, check=True)
    expected = causal_lm_topr_loss(model, good, fused_head=fused_head).loss
    for more in (0, keep, keep + 1, width):
        found = causal_lm_topr_loss(model, {**good, "logits_to_keep": more}, fused_head=fused_head)
        torch.testing.assert_close(found.loss, expected)
    # The first label of a row has nothing before it and never counts.
    whole = {**good, "labels": good["input_ids"].clone()}
    causal_lm_topr_loss(model, {**whole, "logits_to_keep": width}, fused_head=fused_head)


def test_a_head_sharded_outside_the_forward_says_what_to_call():
    model = random_model()
    model.lm_head.weight = nn.Parameter(torch.empty(0))
    from topr_kernels.hf import find_head

    with pytest.raises(ValueError, match="let causal_lm_topr_loss or TOPRTrainer call"):
        find_head(model)


# --- positions ---------------------------------------------------------------------------------

IMAGE, BEGIN, END = 60, 61, 62


def vision_model() -> Any:
    """A tiny Qwen2-VL: tokens of an image have positions in three dimensions."""
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 100.0}
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    patches = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    config = transformers.Qwen2VLConfig(
        text_config={**text, **heads, **ids, "rope_parameters": rope},
        vision_config={**sizes, **patches, "in_chans": 3},
        **{"image_token_id": IMAGE, "video_token_id": 63},
        **{"vision_start_token_id": BEGIN, "vision_end_token_id": END},
    )
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model


def vision_batch(padding: int) -> dict[str, Any]:
    """A question with an image of 16 tokens, and an answer of four; padding in front."""
    row = [0] * padding + [5, BEGIN, *[IMAGE] * 16, END, 7, 8, 9, 10, 11]
    ids = torch.tensor([row])
    labels = torch.full_like(ids, -100)
    labels[:, -4:] = ids[:, -4:]
    pixels = torch.randn(64, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(len(row)) >= padding).long()[None],
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "labels": labels,
        "behavior_log_prob": torch.zeros(1, len(row)),
        "reward": torch.tensor([-1.0]),
    }


@pytest.mark.parametrize("padding", [0, 3])
def test_a_model_with_positions_of_its_own_counts_them(padding: int):
    model, batch = vision_model(), vision_batch(padding)
    assert counts_positions(model), "transformers calls the method otherwise: see hf/signature.py"
    ours = ("labels", "behavior_log_prob", "reward")
    batch = {n: x for n, x in batch.items() if n in ours or takes(model, n)}
    with torch.no_grad():
        logits = model(**{n: x for n, x in batch.items() if n not in ours}).logits
    expected = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    for fused_head in (False, True):
        found = causal_lm_log_prob(model, batch, fused_head=fused_head).log_prob
        torch.testing.assert_close(found[:, -4:], expected[:, -4:], rtol=1e-5, atol=1e-5)
        # Numbers of tokens are other positions, and so is another log-prob.
        flat = {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}
        other = causal_lm_log_prob(model, flat, fused_head=fused_head).log_prob
        assert (other[:, -4:] - expected[:, -4:]).abs().max() > 0.1


def test_positions_are_not_guessed_beside_other_inputs():
    class Sees(LlamaForCausalLM):
        def forward(self, input_ids=None, position_ids=None, pixel_values=None, **kwargs):
            seen.append(position_ids)
            return super().forward(input_ids, position_ids=position_ids, **kwargs)

    seen: list[Any] = []
    model = build("Llama")
    model.__class__ = Sees
    only_text = ("image_grid_thw", "mm_token_type_ids")
    batch = {n: x for n, x in vision_batch(0).items() if n not in only_text}
    causal_lm_log_prob(model, batch)
    # Once for each row of causal_problem, then for the batch.
    assert seen == [None] * 3, "the model counts"
    padded = {n: x for n, x in vision_batch(2).items() if n in batch}
    with pytest.raises(
        ValueError, match=r"padded before its tokens and holds pixel_values.*position"
    ):
        causal_lm_log_prob(model, padded)
    given = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    causal_lm_log_prob(model, {**padded, "position_ids": given})
    assert seen[3] is given or torch.equal(seen[3], given)
