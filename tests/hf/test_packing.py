"""Packed batches: sequences in one row, and the proof that they do not see each other."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_heads import SIZE
from test_trainer import PeftLike, rows
from transformers import AttentionInterface, DataCollatorWithFlattening, masking_utils

from topr_kernels import linear_topr_loss, log_prob, topr_loss
from topr_kernels.hf import causal_lm_log_prob, causal_lm_topr_loss
from topr_kernels.hf import packing as packing_module
from topr_kernels.hf.collator import CompletionCollator
from topr_kernels.hf.forward import completion_hidden, completion_logits, model_inputs
from topr_kernels.hf.heads import find_head
from topr_kernels.hf.packing import check_packing, pack, packing_problem
from topr_kernels.hf.signature import VARLEN
from topr_kernels.testing import assert_within_budget

Row = dict[str, Any]

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "embd_pdrop": 0.0}
GPT2 |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0}
HYBRID = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
LLAMA4 = {"attention_chunk_size": 4, "num_local_experts": 2, "intermediate_size_mlp": 64}
LLAMA4 |= {"layer_types": ["chunked_attention", "full_attention"]}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}
#: Name -> configuration class, model class, its settings.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "Gemma2": ("Gemma2Config", "Gemma2ForCausalLM", HYBRID),
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", HYBRID),
    "Mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4}),
    "GPT2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "Phi": ("PhiConfig", "PhiForCausalLM", {}),
    "Llama4": ("Llama4TextConfig", "Llama4ForCausalLM", LLAMA4),
    # The masks of these know nothing of packing in some versions of transformers, and nothing says so.
    "OPT": ("OPTConfig", "OPTForCausalLM", OPT),
    "Falcon": ("FalconConfig", "FalconForCausalLM", {"head_dim": None}),
    "GptOss": ("GptOssConfig", "GptOssForCausalLM", {**HYBRID, "num_local_experts": 4}),
}
#: Older versions of transformers count the chunks of Llama 4 from the start of the row.
CHUNKS = hasattr(masking_utils, "remap_positions_for_packed_sequence")
#: Model and attention; Gemma 2 caps its attention scores, which sdpa cannot.
EXACT = [
    (kind, attention)
    for kind in ("Llama", "Qwen3", "Gemma2", "Gemma3", "Mixtral", "GPT2", "Phi", "Llama4")
    for attention in ("sdpa", "eager")
    if (kind, attention) != ("Gemma2", "sdpa") and (kind != "Llama4" or CHUNKS)
]
#: In some version of transformers packed sequences see each other; which, the tests find by running.
DOUBTFUL = ["OPT", "Falcon", "GptOss"]


def build(kind: str, attention: str = "sdpa", seed: int = 0) -> Any:
    """A model in which every token that is seen, and every position, changes the log-probs."""
    torch.manual_seed(seed)
    config_class, model_class, changes = KINDS[kind]
    sizes = {k: v for k, v in {**SIZE, **changes}.items() if v is not None}
    config = getattr(transformers, config_class)(**sizes)
    config._attn_implementation = attention
    # Grouped products of experts know no fp64.
    config._experts_implementation = "eager"
    model = getattr(transformers, model_class)(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    return model


def ragged() -> list[Row]:
    """Lengths beyond the windows, an empty completion, a prompt of one token, samples of one prompt."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(6, 5), (1, 3), (4, 0), (9, 1), (1, 1), (3, 9)]
    data = []
    for i, (p, c) in enumerate(shapes):
        tokens = torch.randint(2, 90, (p + c,), generator=generator).tolist()
        data.append(
            {
                "prompt_token_ids": tokens[:p],
                "completion_token_ids": tokens[p:],
                "behavior_log_prob": [-4.0] * c,
                "reward": (1.0, -1.0, 1.0, -0.5, 2.0, -1.0)[i],
            }
        )
    return [*data, {**data[0], "reward": -1.0}]


def on_policy(model: Any, data: list[Row]) -> list[Row]:
    """With log mu near log pi, so that the negatives have weights between 0 and 1."""
    result = []
    for record in data:
        values = alone(model, record) + 0.02
        result.append({**record, "behavior_log_prob": values.tolist()})
    return result


def alone(model: Any, record: Row) -> torch.Tensor:
    """Log-probs of a completion, from the model's own forward over its sequence and nothing else."""
    ids = torch.tensor([record["prompt_token_ids"] + record["completion_token_ids"]])
    labels = ids.clone()
    labels[:, : len(record["prompt_token_ids"])] = -100
    with torch.no_grad():
        values = log_prob(model(ids, use_cache=False).logits, labels).log_prob[0]
    return values[len(record["prompt_token_ids"]) :]


def completions(values: torch.Tensor, data: list[Row]) -> list[torch.Tensor]:
    """Splits log-probs [1, N] of a packed batch into those of each completion."""
    lengths = [len(r["prompt_token_ids"]) + len(r["completion_token_ids"]) for r in data]
    parts = values[0].split(lengths)
    return [x[len(r["prompt_token_ids"]) :] for x, r in zip(parts, data, strict=True)]


def packed_log_probs(model: Any, data: list[Row]) -> list[torch.Tensor]:
    batch = CompletionCollator(0, packing=True)(data)
    with torch.no_grad():
        logits = completion_logits(model, batch)
        values = log_prob(logits, batch["labels"], cu_seqlens=batch["cu_seq_lens_q"]).log_prob
    return completions(values, data)


def loss_and_gradients(
    model: Any, batch: dict[str, Any], *, fused: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    _, keep = model_inputs(model, batch)
    labels, behavior = batch["labels"][:, -keep:], batch["behavior_log_prob"][:, -keep:]
    options = {"cu_seqlens": batch.get("cu_seq_lens_q")}
    if fused:
        head = find_head(model)
        hidden = completion_hidden(model, batch, check=head)
        out = linear_topr_loss(
            hidden,
            head.weight,
            labels,
            behavior,
            batch["reward"],
            bias=head.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            workspace_bytes=64 * 4 * SIZE["vocab_size"],
            **options,
        )
    else:
        logits = completion_logits(model, batch)
        out = topr_loss(logits, labels, behavior, batch["reward"], **options)
    out.loss.backward()
    return out.loss.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def reference(model: Any, data: list[Row]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients in fp64, one sequence after another, each alone."""
    model = model.double()
    total = torch.zeros((), dtype=torch.float64)
    model.zero_grad()
    counted = sum(bool(r["completion_token_ids"]) for r in data)
    for record in data:
        if not record["completion_token_ids"]:
            continue
        ids = torch.tensor([record["prompt_token_ids"] + record["completion_token_ids"]])
        labels, behavior = ids.clone(), torch.zeros(ids.shape, dtype=torch.float64)
        labels[:, : len(record["prompt_token_ids"])] = -100
        behavior[:, len(record["prompt_token_ids"]) :] = torch.tensor(record["behavior_log_prob"])
        reward = torch.tensor([record["reward"]], dtype=torch.float64)
        logits = model(ids, use_cache=False).logits.double()
        loss = topr_loss(logits, labels, behavior, reward, normalizer=counted).loss
        loss.backward()
        total += loss.detach()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.float()
    return total, gradients


# --- the batch -------------------------------------------------------------------------------


def test_the_layout_is_that_of_transformers_own_collator():
    data = ragged()
    batch = CompletionCollator(0, packing=True)(data)
    flat = [r["prompt_token_ids"] + r["completion_token_ids"] for r in data]
    theirs = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)(
        [{"input_ids": row} for row in flat]
    )
    for name in ("input_ids", "position_ids", *VARLEN):
        ours, expected = batch[name], theirs[name]
        if isinstance(ours, int):
            assert ours == int(expected), name
        else:
            assert torch.equal(ours, expected), name
            assert ours.dtype == expected.dtype, name
    assert set(batch) == {
        "input_ids",
        "position_ids",
        *VARLEN,
        "labels",
        "behavior_log_prob",
        "reward",
    }
    labels = batch["labels"][0].split([len(row) for row in flat])
    behavior = batch["behavior_log_prob"][0].split([len(row) for row in flat])
    for r, y, mu in zip(data, labels, behavior, strict=True):
        p = len(r["prompt_token_ids"])
        assert y.tolist() == [-100] * p + r["completion_token_ids"]
        assert mu.tolist() == [0.0] * p + r["behavior_log_prob"]
    assert batch["behavior_log_prob"].dtype == torch.float32
    assert batch["reward"].tolist() == [r["reward"] for r in data]


@pytest.mark.parametrize("packing", [False, True])
def test_groups_stay_and_never_reach_the_model(packing: bool):
    model, data, collate = build("GPT2"), rows(4), CompletionCollator(0, packing=packing)
    assert "group" not in collate(data)
    assert "group" not in collate([{**r, "group": None} for r in data])
    numbered = collate([{**r, "group": 7 + i // 2} for i, r in enumerate(data)])
    assert numbered["group"].tolist() == [7, 7, 8, 8]
    assert numbered["group"].dtype == torch.int64
    named = collate([{**r, "group": f"q{i // 2}"} for i, r in enumerate(data)])
    assert named["group"] == ["q0", "q0", "q1", "q1"]
    for batch in (numbered, named):
        assert "group" not in model_inputs(model, batch)[0]
    with pytest.raises(ValueError, match=r"record 1 .* no 'group'.*all records or to none"):
        collate([{**data[0], "group": 1}, data[1]])
    for bad in (1.5, True, "a"):
        with pytest.raises(TypeError, match=r"record 1 of the batch: group is .* expected an int"):
            collate([{**data[0], "group": 1}, {**data[1], "group": bad}])


@pytest.mark.parametrize("packing", [False, True])
def test_truncated_completions_are_not_counted(packing: bool):
    """By finish_reason, or else by the EOS they do not end with; their rows cost nothing either."""
    model, data = build("Llama"), rows(4, lengths=[2, 6, 3, 1])
    whole = on_policy(model, data)
    reasons = ["stop", "length", "stop", "length"]
    stated = [{**r, "finish_reason": x} for r, x in zip(whole, reasons, strict=True)]
    batch = CompletionCollator(0, packing=packing, mask_truncated=True)(stated)
    if not packing:
        assert batch["labels"].ne(-100).sum(1).tolist() == [2, 0, 3, 0]
        assert batch["logits_to_keep"] == 4
    assert batch["labels"].ne(-100).sum() == 5
    assert batch["behavior_log_prob"][batch["labels"].eq(-100)].eq(0).all()
    found, _ = loss_and_gradients(model, batch, fused=False)
    kept = CompletionCollator(0, packing=packing)([whole[0], whole[2]])
    expected, _ = loss_and_gradients(model, kept, fused=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    off = CompletionCollator(0, packing=packing)(stated)
    assert off["labels"].ne(-100).sum() == 12

    ended = [dict(r) for r in whole]
    for i in (0, 2):
        ended[i]["completion_token_ids"] = [*ended[i]["completion_token_ids"][:-1], 1 + i // 2]
    by_eos = CompletionCollator(0, packing=packing, mask_truncated=True, eos_token_id=[1, 2])
    assert by_eos(ended)["labels"].ne(-100).sum() == 5
    first = CompletionCollator(0, packing=packing, mask_truncated=True, eos_token_id=1)
    assert first(ended)["labels"].ne(-100).sum() == 2
    # What the records say goes before what they look like.
    assert first(stated)["labels"].ne(-100).sum() == 5
    # Nothing is left: an empty batch, whose loss is 0.
    cut = [{**r, "finish_reason": "length"} for r in whole]
    nothing = CompletionCollator(0, packing=packing, mask_truncated=True)(cut)
    assert nothing["labels"].eq(-100).all()
    assert loss_and_gradients(model, nothing, fused=False)[0] == 0


def test_what_was_truncated_must_be_known():
    data = rows(2)
    collate = CompletionCollator(0, mask_truncated=True)
    with pytest.raises(ValueError, match=r"no finish_reason and eos_token_id is None.*give"):
        collate(data)
    with pytest.raises(ValueError, match=r"record 0 .* no 'finish_reason', but others have"):
        collate([data[0], {**data[1], "finish_reason": "stop"}])


# --- packed equals alone ---------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "attention"), EXACT)
def test_packed_equals_padded_equals_alone(kind: str, attention: str):
    """Log-probs, loss and every gradient, fused and from logits, to the error of padded batches."""
    model = build(kind, attention)
    data = on_policy(model, ragged())
    loss, gradients = reference(build(kind, attention), data)
    wide = build(kind, attention).double()
    padded = CompletionCollator(0)(data)
    with torch.no_grad():
        logits = completion_logits(model, padded)
        values = log_prob(logits, padded["labels"][:, -logits.shape[1] :]).log_prob
    for i, (record, found) in enumerate(zip(data, packed_log_probs(model, data), strict=True)):
        n = len(record["completion_token_ids"])
        assert found.shape == (n,)
        if n:
            exact = alone(wide, record)
            assert exact.abs().max() > 1
            assert_within_budget(f"log_prob {i}", found, values[i, -n:], exact, operand=16.0)
    for fused in (False, True):
        plain_loss, plain = loss_and_gradients(model, padded, fused=fused)
        packed = CompletionCollator(0, packing=True)(data)
        found_loss, found = loss_and_gradients(model, packed, fused=fused)
        assert_within_budget("loss", found_loss, plain_loss, loss, operand=16.0)
        assert found.keys() == plain.keys()
        largest = max(x.abs().max().item() for x in gradients.values())
        assert largest > 0.1
        for name, x in found.items():
            assert_within_budget(name, x, plain[name], gradients[name], operand=16 * largest)


@pytest.mark.parametrize(("kind", "attention"), EXACT)
def test_the_check_passes_where_packing_is_exact(kind: str, attention: str):
    model, batch = build(kind, attention), CompletionCollator(0, packing=True)(ragged())
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
        assert check_packing(model.to(dtype), batch) < limit


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(7)), kind=st.sampled_from(["Llama", "Gemma3", "GPT2"]))
def test_order_of_the_sequences_does_not_matter(order: list[int], kind: str):
    """Each sequence's log-probs, to the error of the sequence on its own in fp32."""
    data = ragged()
    model, wide = build(kind), build(kind).double()
    for i, found in zip(order, packed_log_probs(model, [data[i] for i in order]), strict=True):
        if len(found):
            plain, exact = alone(model, data[i]), alone(wide, data[i])
            assert_within_budget(f"log_prob {i}", found, plain, exact, operand=16.0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_attention_mask_lets_samples_leak_and_is_refused(attention: str):
    """PITFALLS 30: transformers ignores the packing then, and so it does with a cache."""
    model, data = build("Llama", attention), ragged()
    batch = CompletionCollator(0, packing=True)(data)
    inputs, keep = model_inputs(model, batch)
    assert keep == batch["input_ids"].shape[1]
    assert inputs["use_cache"] is False
    mask = torch.ones_like(batch["input_ids"])
    first = len(data[0]["prompt_token_ids"]) + len(data[0]["completion_token_ids"])
    with torch.no_grad():
        right = model(**inputs).logits[0]
        for mistake in ({"attention_mask": mask}, {"use_cache": True}):
            leaked = model(**{**inputs, **mistake}).logits[0]
            torch.testing.assert_close(leaked[:first], right[:first], rtol=1e-4, atol=1e-4)
            assert (leaked[first:] - right[first:]).norm() > 0.3 * right[first:].norm()
    for mask_of in (mask, mask.bool(), mask[:, None, None]):
        with pytest.raises(
            ValueError, match=r"has an attention_mask.*data collator.*packing=False"
        ):
            model_inputs(model, {**batch, "attention_mask": mask_of})
        with pytest.raises(ValueError, match="has an attention_mask"):
            check_packing(model, {**batch, "attention_mask": mask_of})


@pytest.mark.parametrize("name", ["position_ids", *VARLEN[1:]])
def test_a_packed_batch_is_whole(name: str):
    batch = CompletionCollator(0, packing=True)(ragged())
    del batch[name]
    with pytest.raises(ValueError, match=rf"has no {name}; give all of"):
        completion_logits(build("Llama"), batch)


def test_further_inputs_go_with_a_packed_batch():
    model, data = build("GPT2"), ragged()
    batch = CompletionCollator(0, packing=True)(data)
    types = torch.full_like(batch["input_ids"], 7)
    inputs, _ = model_inputs(model, {**batch, "token_type_ids": types})
    assert inputs["token_type_ids"] is types
    with pytest.raises(ValueError, match="holds question"):
        model_inputs(model, {**batch, "question": ["?"]})


@pytest.mark.parametrize("by_signature_of", [False, True])
def test_a_peft_wrapper_passes_the_packing_on(by_signature_of: bool):
    base, data = build("Qwen3"), ragged()
    wrapper, batch = PeftLike(base).eval(), CompletionCollator(0, packing=True)(data)
    with torch.no_grad():
        found = completion_logits(wrapper, batch, signature_of=wrapper if by_signature_of else None)
        expected = completion_logits(base, batch)
    assert set(VARLEN) <= set(wrapper.received)
    assert torch.equal(found, expected)
    check_packing(wrapper, batch)
    check_packing(wrapper, batch, signature_of=wrapper)


# --- attention that takes the offsets --------------------------------------------------------


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What flash attention does: sequences from offsets alone, no mask, padded blocks of max_length."""
    assert attention_mask is None
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    t = query.shape[2]
    if cu_seq_lens_q is None:
        cu_seq_lens_q = cu_seq_lens_k = torch.tensor([0, t], dtype=torch.int32)
        max_length_q = max_length_k = t
    else:
        varlen_attention.calls += 1
    assert cu_seq_lens_q.dtype == cu_seq_lens_k.dtype == torch.int32
    assert type(max_length_q) is int
    assert query.shape[0] == 1
    out = torch.full_like(query, torch.nan)
    offsets = zip(cu_seq_lens_q.tolist(), cu_seq_lens_k.tolist(), strict=True)
    edges = list(offsets)
    for (q0, k0), (q1, k1) in pairwise(edges):
        # A kernel's grid covers max_length rows: those beyond it are never written.
        q1, k1 = min(q1, q0 + max_length_q), min(k1, k0 + max_length_k)
        scores = query[:, :, q0:q1] @ key[:, :, k0:k1].transpose(-1, -2) * scaling
        back = torch.arange(q1 - q0)[:, None] - torch.arange(k1 - k0)
        hidden = back < 0
        if sliding_window is not None:
            hidden = hidden | (back >= sliding_window)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[:, :, q0:q1] = weights @ value[:, :, k0:k1]
    return out.transpose(1, 2), None


varlen_attention.calls = 0  # type: ignore[attr-defined]


def deaf_attention(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """One that does not read the offsets."""
    for name in VARLEN:
        kwargs.pop(name, None)
    return varlen_attention(*args, **kwargs)


AttentionInterface.register("varlen_in_torch", varlen_attention)
AttentionInterface.register("deaf_in_torch", deaf_attention)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma3", "Mixtral", "GPT2", "Phi", "GptOss"])
def test_offsets_arrive_at_the_attention(kind: str):
    """As flash_attention_2 has it: offsets and lengths alone, in every layer."""
    if kind == "GptOss":
        # Its attention has sinks, which the function above does not know; alone they are missing too.
        model = expected_from = build(kind, "varlen_in_torch")
    else:
        model, expected_from = build(kind, "varlen_in_torch"), build(kind, "sdpa")
    data = ragged()
    varlen_attention.calls = 0
    found = packed_log_probs(model, data)
    assert varlen_attention.calls == 2
    for record, values in zip(data, found, strict=True):
        if len(values):
            expected = alone(expected_from, record)
            torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)
    batch = CompletionCollator(0, packing=True)(data)
    assert check_packing(model, batch) < 1e-4
    model.set_attn_implementation("deaf_in_torch")
    with pytest.raises(ValueError, match=r"'deaf_in_torch' does not keep packed sequences apart"):
        check_packing(model, batch)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma3"])
def test_flash_attention_equals_sdpa(kind: str):
    """The real thing, in bf16 on a GPU: gradients no further from fp64 than those of a padded batch."""
    pytest.importorskip("flash_attn")
    data = ragged()

    def run(model: Any, packing: bool, fused: bool) -> torch.Tensor:
        batch = {
            name: x.cuda() if isinstance(x, torch.Tensor) else x
            for name, x in CompletionCollator(0, packing=packing)(data).items()
        }
        if packing:
            check_packing(model, batch)
        _, gradients = loss_and_gradients(model, batch, fused=fused)
        return torch.cat([x.flatten().double() for x in gradients.values()])

    truth = run(build(kind).cuda().double(), packing=False, fused=False)
    error = {}
    for attention, packing in (("sdpa", False), ("sdpa", True), ("flash_attention_2", True)):
        model = build(kind, attention).to("cuda", torch.bfloat16)
        found = run(model, packing, fused=True)
        error[attention, packing] = float((found - truth).norm() / truth.norm())
    assert error["sdpa", True] <= 2 * error["sdpa", False]
    assert error["flash_attention_2", True] <= 2 * error["sdpa", False]


# --- models that cannot ----------------------------------------------------------------------


def leaking() -> Any:
    """A model that leaks in every version: its mask is made from an attention_mask, not positions."""
    model = build("Llama", "eager")
    plain = model.forward

    def forward(input_ids=None, position_ids=None, **kwargs):
        ones = torch.ones_like(input_ids)
        return plain(input_ids, attention_mask=ones, position_ids=position_ids, **kwargs)

    model.forward = forward
    return model


def keeps_apart(kind: str) -> bool:
    """Whether packed sequences have the log-probs they have alone, in fp32, whatever the check says."""
    model, data = build(kind, "eager"), ragged()
    pairs = zip(packed_log_probs(model, data), data, strict=True)
    differences = [(x - alone(model, record)).abs().max() for x, record in pairs if len(x)]
    # Nothing in between: rounding, or another token's value.
    largest = float(torch.stack(differences).max())
    assert largest < 1e-4 or largest > 1e-2
    return largest < 1e-4


@pytest.mark.parametrize("kind", ["planted", *DOUBTFUL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_check_refuses_models_whose_samples_leak(kind: str, dtype: torch.dtype):
    model = (leaking() if kind == "planted" else build(kind, "eager")).to(dtype)
    assert packing_problem(model) is None
    batch = CompletionCollator(0, packing=True)(ragged())
    if kind != "planted" and keeps_apart(kind):
        assert check_packing(model, batch) < 0.05
        return
    with pytest.raises(ValueError, match=r"does not keep packed.*packing=False.*flash_attention_2"):
        check_packing(model, batch)
    # Samples of one prompt, and a batch of one sequence, leak too.
    same = CompletionCollator(0, packing=True)([ragged()[0], ragged()[-1]])
    one = CompletionCollator(0, packing=True)(ragged()[:1])
    # The average over two copies of what a token sees is what it sees.
    pair = {"prompt_token_ids": [5], "completion_token_ids": [9], "behavior_log_prob": [-4.0]}
    copies = CompletionCollator(0, packing=True)([{**pair, "reward": 1.0}] * 2)
    for other in (same, one, copies):
        with pytest.raises(ValueError, match="does not keep packed sequences apart"):
            check_packing(model, other)


def test_positions_that_count_all_columns_are_found():
    """No leak, but the second sequence is not where it would be alone."""
    model, batch = build("GPT2"), CompletionCollator(0, packing=True)(ragged())
    plain = model.forward

    def forward(input_ids=None, position_ids=None, **kwargs):
        wrong = torch.arange(input_ids.shape[1])[None] if position_ids is not None else None
        embedded = (
            model.transformer.wpe(wrong) - model.transformer.wpe(position_ids)
            if (position_ids is not None)
            else 0
        )
        embeds = model.transformer.wte(input_ids) + embedded
        return plain(inputs_embeds=embeds, position_ids=position_ids, **kwargs)

    model.forward = forward
    with pytest.raises(ValueError, match="does not keep packed sequences apart"):
        check_packing(model, batch)


def test_the_check_leaves_no_trace():
    model, batch = build("Llama"), CompletionCollator(0, packing=True)(ragged())
    model.config.attention_dropout = 0.5
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    graphs: list[bool] = []
    hook = model.register_forward_pre_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    assert check_packing(model, batch) < 1e-4
    hook.remove()
    assert graphs == [False, False]
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert not model.lm_head._forward_pre_hooks
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())
    # A failure leaves none either.
    model.lm_head.forward = None
    with pytest.raises(TypeError):
        check_packing(model, batch)
    assert [module.training for module in model.modules()] == modes
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_check_runs_the_model_equally_often_for_any_batch(count: int):
    """The processes of a sharded model must do the same, whatever their batches."""
    model = build("Llama")
    calls: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    data = rows(count, lengths=[90] * count)
    check_packing(model, CompletionCollator(0, packing=True)(data))
    assert calls == [128, 64]
    # What lies in front is as long as it can be, lest it leak little.
    short = rows(2, lengths=[90, 1])
    check_packing(model, CompletionCollator(0, packing=True)(short))
    assert calls[2:] == [128, 64]


def test_the_check_finds_offsets_that_are_not_those_of_the_positions():
    model, batch = build("Llama"), CompletionCollator(0, packing=True)(ragged())
    moved = batch["cu_seq_lens_q"].clone()
    moved[1] += 1
    with pytest.raises(ValueError, match=r"position_ids of the packed batch does not match"):
        check_packing(model, {**batch, "cu_seq_lens_q": moved, "cu_seq_lens_k": moved})
    with pytest.raises(ValueError, match=r"cu_seq_lens_k of the packed batch does not match"):
        check_packing(model, {**batch, "cu_seq_lens_k": moved})
    with pytest.raises(ValueError, match=r"max_length_q of the packed batch does not match"):
        check_packing(model, {**batch, "max_length_q": 3})


def test_a_model_of_nan_is_no_agreement():
    model, batch = build("Llama"), CompletionCollator(0, packing=True)(ragged())
    nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.raises(ValueError, match="differ by nan of their norm"):
        check_packing(model, batch)


STATEFUL = {
    "Mamba": ("MambaConfig", "MambaForCausalLM", {}, "names no position_ids"),
    "Bloom": ("BloomConfig", "BloomForCausalLM", {"n_head": 4}, "names no position_ids"),
    "RecurrentGemma": (
        "RecurrentGemmaConfig",
        "RecurrentGemmaForCausalLM",
        {},
        # Older versions of transformers do not name its layers.
        "(layers of type linear_attention|carries a state from one sequence into the next)",
    ),
    "Lfm2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {"layer_types": ["conv", "full_attention"]},
        "layers of type conv",
    ),
}


@pytest.mark.parametrize("kind", STATEFUL)
def test_models_that_carry_a_state_are_refused(kind: str):
    config_class, model_class, changes, problem = STATEFUL[kind]
    config = getattr(transformers, config_class)(**{**SIZE, **changes})
    model = getattr(transformers, model_class)(config).eval()
    batch = CompletionCollator(0, packing=True)(ragged())
    for asked in (model, PeftLike(model)):
        with pytest.raises(ValueError, match=rf"packing=True, but .*{problem}.*packing=False"):
            completion_logits(asked, batch)
        with pytest.raises(ValueError, match=problem):
            check_packing(asked, batch)


def test_a_wrapper_must_pass_the_positions_on():
    class Closed(nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base_model, self.config = base, base.config

        def get_base_model(self) -> Any:
            return self.base_model

        def forward(self, input_ids=None, use_cache=None):
            return self.base_model(input_ids=input_ids, use_cache=use_cache)

    batch = CompletionCollator(0, packing=True)(ragged())
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.forward names no position_ids"):
        completion_logits(Closed(build("Llama")), batch)


def test_the_check_allows_the_rounding_of_autocast_and_finds_leaks_in_it():
    batch = CompletionCollator(0, packing=True)(ragged())
    exact, leaking = build("Qwen3"), build("OPT")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # More than fp32 parameters would be allowed, where rows are rounded otherwise.
        assert check_packing(exact, batch) < 0.05
        with pytest.raises(ValueError, match=r"expected at most 9.4e-02"):
            check_packing(leaking, batch)
    with pytest.raises(ValueError, match=r"expected at most 1.0e-04"):
        check_packing(leaking, batch)


def test_chunks_must_be_counted_from_the_start_of_each_sequence(monkeypatch: pytest.MonkeyPatch):
    """transformers < 5.20 or so counts them from the start of the row; flash attention has none."""
    model, batch = build("Llama4"), CompletionCollator(0, packing=True)(ragged())
    assert (packing_problem(model) is None) == CHUNKS
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"flash_attention_2'.*chunks.*packing=False"):
        model_inputs(model, batch)
    model.config._attn_implementation = "sdpa"
    monkeypatch.delattr(masking_utils, "remap_positions_for_packed_sequence", raising=False)
    with pytest.raises(ValueError, match=r"chunked attention would be counted from the start"):
        model_inputs(model, batch)


def test_what_the_config_says_is_read():
    model = build("Llama")
    model.config._attn_implementation = "paged|sdpa"
    assert "is for generation" in str(packing_problem(model))
    model.config._attn_implementation = None
    assert packing_problem(model) is None
    type(model)._is_stateful, before = True, type(model)._is_stateful
    try:
        assert "carries a state" in str(packing_problem(model))
        model.config.layer_types = ["full_attention", "full_attention"]
        assert packing_problem(model) is None
    finally:
        type(model)._is_stateful = before


def test_pack_keeps_every_token():
    generator = random.Random(0)
    for _ in range(20):
        lengths = [generator.randint(1, 9) for _ in range(generator.randint(1, 6))]
        flat = [[generator.randint(0, 99) for _ in range(n)] for n in lengths]
        batch = pack(flat)
        edges = batch["cu_seq_lens_q"].tolist()
        parts = pairwise(edges)
        assert [batch["input_ids"][0, i:j].tolist() for i, j in parts] == flat
        assert batch["max_length_q"] == batch["max_length_k"] == max(lengths)


@pytest.mark.parametrize("fused_head", [False, True])
def test_ones_own_loop_checks_a_packed_model_once(
    fused_head: bool, monkeypatch: pytest.MonkeyPatch
):
    batch = CompletionCollator(0, packing=True)(ragged())
    options = {"fused_head": fused_head}
    for function in (causal_lm_topr_loss, causal_lm_log_prob):
        with pytest.raises(ValueError, match=r"does not keep packed sequences apart"):
            function(leaking(), batch, **options)
        assert function(leaking(), batch, check_packed=False, **options).log_prob.any()
    calls = []
    monkeypatch.setattr(packing_module, "check_packing", lambda *args, **kw: calls.append(args[0]))
    first, second = build("Llama", "eager"), build("Llama", "eager")
    for model in (first, first, second, first):
        causal_lm_log_prob(model, batch, **options)
    assert calls == [first, second]
    first.set_attn_implementation("sdpa")
    causal_lm_log_prob(first, batch, **options)
    # A padded batch has nothing to check.
    causal_lm_log_prob(build("Llama", "eager"), CompletionCollator(0)(ragged()), **options)
    assert calls == [first, second, first]


def test_a_sequence_of_zeros_passes_the_check():
    """A padding id, whose embedding is 0, gives hidden states of 0."""
    model = build("Llama", "eager")
    record = {"prompt_token_ids": [0], "completion_token_ids": [], "behavior_log_prob": []}
    batch = CompletionCollator(0, packing=True)([{**record, "reward": 1.0}, ragged()[0]])
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0
        assert not model.model(torch.tensor([[0]])).last_hidden_state.any()
    assert check_packing(model, batch) < 1e-4
