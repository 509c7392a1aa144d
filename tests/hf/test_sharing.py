"""One forward pass per prompt: equal to separate sequences, and the proof of it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import transformers
from test_packing import KINDS, Row, alone, build, on_policy, reference
from test_trainer import PeftLike, config, trainer
from tiny import tiny_tokenizer

from topr_kernels import TOPR
from topr_kernels.hf import (
    CompletionCollator,
    TOPRTrainer,
    causal_lm_log_prob,
    causal_lm_topr_loss,
    completion_hidden,
    completion_logits,
    score_behavior,
)
from topr_kernels.hf import sharing as sharing_module
from topr_kernels.hf import tree as tree_module
from topr_kernels.hf.forward import model_inputs
from topr_kernels.hf.packing import in_rows, packing_problem
from topr_kernels.hf.sharing import (
    is_tree,
    longest_sequence,
    prove_sharing,
    shares_prefix,
    sharing_problem,
    tree_masks,
    unshared,
)
from topr_kernels.hf.signature import VARLEN

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
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    loss, expected = reference(model, data)
    found, grads = gradients(model.double(), shared(data))
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=1e-13)
    assert_equal(grads, expected, 1e-12)


# --- what a model trains with ------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool):
    model = build("Gemma3")
    batch = shared(on_policy(model, siblings()))
    loss, expected = gradients(model, batch)
    model.train()
    # What is recomputed from inputs without gradient has none.
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    found, grads = gradients(model, batch)
    assert len(calls) == 2
    torch.testing.assert_close(found, loss, rtol=0, atol=0)
    assert_equal(grads, expected, 1e-6)


def test_adapters_get_the_gradients_of_separate_sequences():
    peft = pytest.importorskip("peft")
    base = build("Llama")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"])
    model = peft.get_peft_model(base, settings)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    batch = shared(siblings())
    assert prove_sharing(model, longest_sequence(batch)) is None
    loss, expected = gradients(model, unshared(batch))
    found, grads = gradients(model, batch)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    assert len(grads) == 10
    assert_equal(grads, expected, 1e-5)


def test_the_first_update_has_ratios_of_exactly_one_where_mu_was_scored_by_the_same_tree():
    model = build("Llama")
    collate = CompletionCollator(0, share_prefix=True)
    data = siblings()
    scored = score_behavior(model, data, collate, batch_size=len(data), progress=False)
    data = [{**r, "behavior_log_prob": x} for r, x in zip(data, scored, strict=True)]
    for r in data:
        if r["completion_token_ids"]:
            assert torch.tensor(r["behavior_log_prob"]).sub(alone(model, r)).abs().max() < 1e-5
    out = causal_lm_topr_loss(model, shared(data))
    assert out.log_ratio.eq(0).all()
    assert out.length.tolist() == [len(r["completion_token_ids"]) for r in data]
    # Another batch's tree rounds otherwise, and the records come in another order.
    other = causal_lm_topr_loss(model, shared(data[::-1][:5])).log_ratio.abs().max()
    print(f"max |log_ratio| with the tree of another batch: {other:.1e}")
    assert other < 1e-5


def test_labels_that_are_not_scored_run_and_count_nothing():
    """Tokens inside a completion that the policy did not write."""
    model = build("Llama")
    batch = shared(on_policy(model, siblings()))
    plain = unshared(batch)
    hole = batch["labels"][0, 2].item()
    batch["labels"][0, 2] = -100
    width = plain["labels"].shape[1]
    place = width - len(siblings()[0]["completion_token_ids"]) + 2
    assert plain["labels"][0, place] == hole
    plain["labels"][0, place] = -100
    loss, expected = gradients(model, plain)
    found, grads = gradients(model, batch)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
    assert_equal(grads, expected, 1e-5)


def test_weights_masks_segments_and_missing_mu_are_those_of_their_records():
    model, data = build("Llama"), on_policy(build("Llama"), siblings())
    for i, r in enumerate(data):
        tokens = range(len(r["completion_token_ids"]))
        r |= {"sample_weight": 1.0 + i, "completion_mask": [int(j % 3 != 1) for j in tokens]}
        r["segments"] = [(j + i) // 2 for j in tokens]
    data[0]["behavior_log_prob"] = None
    batch = shared(data, limits=TOPR)
    assert not batch["behavior_known"].all()
    for packing in (False, True):
        plain = unshared(shared(data, limits=TOPR, packing=packing))
        loss, expected = gradients(model, plain, ratio="segment")
        found, grads = gradients(model, batch, ratio="segment")
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
        assert_equal(grads, expected, 1e-5)


def test_a_batch_with_next_to_nothing_in_common_is_padded_as_ever():
    data = [siblings()[3], siblings(seed=1)[0]]
    for packing in (False, True):
        found = CompletionCollator(0, share_prefix=True, packing=packing)(data)
        expected = CompletionCollator(0, packing=packing)(data)
        assert found.keys() == expected.keys()
        assert torch.equal(found["input_ids"], expected["input_ids"])
    cut = [{**r, "finish_reason": "length"} for r in siblings()]
    nothing = CompletionCollator(0, share_prefix=True, mask_truncated=True)(cut)
    assert causal_lm_topr_loss(build("Llama"), nothing).loss == 0


def test_rows_of_logits_and_hidden_states_are_those_of_the_labels():
    """Also of a model that takes no logits_to_keep and computes them all."""
    model, batch = build("Llama"), shared(siblings())
    plain = model.forward
    with torch.no_grad():
        logits, hidden = completion_logits(model, batch), completion_hidden(model, batch)
        model.forward = lambda input_ids, attention_mask, position_ids, use_cache: plain(
            input_ids, attention_mask, position_ids, use_cache=use_cache
        )
        torch.testing.assert_close(completion_logits(model, batch), logits, rtol=0, atol=1e-5)
    assert logits.shape[:2] == hidden.shape[:2] == batch["labels"].shape
    start = 0
    for r in siblings():
        row = torch.tensor([r["prompt_token_ids"] + r["completion_token_ids"]])
        n = len(r["completion_token_ids"])
        with torch.no_grad():
            expected = plain(row).logits[0, -n - 1 : -1]
        torch.testing.assert_close(logits[0, start : start + n], expected, rtol=0, atol=1e-5)
        start += n


# --- the proof ---------------------------------------------------------------------------------

TOKENS = torch.tensor([7, 3, 9, 9, 4, 8, 2, 6, 5, 3, 8, 7])


def leaking(attention: str = "sdpa") -> Any:
    """A model that makes its own mask, by columns, whatever it is given."""
    model = build("Llama", attention)
    plain = model.forward

    def forward(input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return plain(input_ids=input_ids, position_ids=position_ids, **kwargs)

    model.forward = forward
    return model


def columns_as_positions() -> Any:
    model = build("Llama")
    plain = model.forward

    def forward(input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return plain(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    model.forward = forward
    return model


def wide_window() -> Any:
    """Gemma 3 whose layers see less than their config says: only the last tokens show it."""
    model = build("Gemma3")
    model.config.sliding_window = 9
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 9
    return model


def raising() -> Any:
    model = build("Llama")
    plain = model.forward

    def forward(input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        if attention_mask is not None and attention_mask.dim() != 2:
            raise RuntimeError("two dimensions")
        return plain(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    model.forward = forward
    return model


@pytest.mark.parametrize("kind", [leaking, columns_as_positions, raising])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_proof_finds_models_that_do_not_run_trees(kind: Any, dtype: torch.dtype):
    model = kind().to(dtype)
    problem = str(prove_sharing(model, TOKENS))
    expected = "raises RuntimeError: two dimensions" if kind is raising else "does not keep"
    assert expected in problem
    batch = shared(siblings())
    for function in (causal_lm_topr_loss, causal_lm_log_prob):
        with pytest.raises(ValueError, match=r"share_prefix=True, but Llama.*share_prefix=False"):
            function(model, batch)
    assert not shares_prefix(model, TOKENS)


def test_the_proof_sees_windows_that_only_the_last_tokens_reach(monkeypatch: pytest.MonkeyPatch):
    model = wide_window()
    assert prove_sharing(model, TOKENS) is None
    kinds = sharing_module._layer_kinds
    monkeypatch.setattr(sharing_module, "_layer_kinds", lambda config: ["full_attention"])
    assert "does not keep" in str(prove_sharing(model, TOKENS))
    # No token reaches beyond it.
    assert prove_sharing(model, TOKENS[:8]) is None
    monkeypatch.setattr(sharing_module, "_layer_kinds", kinds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_proof_allows_the_rounding_of_half_precision(dtype: torch.dtype):
    for kind in ("Qwen3", "Mixtral"):
        assert prove_sharing(build(kind).to(dtype), TOKENS) is None
    with torch.autocast("cpu", dtype=dtype):
        assert prove_sharing(build("Gemma3"), TOKENS) is None


def test_the_proof_is_remembered_for_a_model_and_its_attention(monkeypatch: pytest.MonkeyPatch):
    batch, calls = shared(siblings()), []
    measured = sharing_module._measured
    monkeypatch.setattr(
        sharing_module, "_measured", lambda *args: calls.append(args[0]) or measured(*args)
    )
    first, second = build("Llama"), build("Llama")
    for model in (first, first, second, first):
        causal_lm_log_prob(model, batch)
    first.set_attn_implementation("eager")
    causal_lm_log_prob(first, batch)
    assert calls == [first, second, first]
    causal_lm_log_prob(build("Llama"), batch, check_packed=False)
    assert len(calls) == 3


def test_the_proof_leaves_no_trace_and_runs_any_batch_alike():
    model = build("Llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    shapes: list[Any] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(
            (kwargs["input_ids"].shape[1], torch.is_grad_enabled(), model.training)
        ),
        with_kwargs=True,
    )
    assert prove_sharing(model, TOKENS[:1]) is None
    assert prove_sharing(model, TOKENS) is None
    hook.remove()
    assert shapes == [(n, False, False) for n in (2, 1, 18, 12)]
    assert [module.training for module in model.modules()] == modes
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    assert "differ by nan" in str(prove_sharing(model, TOKENS))


def test_what_is_known_against_a_model_is_said_without_running_it():
    model = build("Llama")
    model.config._attn_implementation = "flash_attention_2"
    remedy = r"'flash_attention_2'.*sdpa, eager and flex_attention.*share_prefix=False"
    with pytest.raises(ValueError, match=remedy):
        completion_logits(model, shared(siblings()))
    model = build("Llama")
    model.config.layer_types = ["linear_attention", "full_attention"]
    assert "layers of type linear_attention" in str(sharing_problem(model))
    model.config.layer_types = None
    model.config.attention_layers = ["global", "local"]
    assert "window of columns" in str(sharing_problem(model))
    routed = build("Mixtral")
    routed.config.output_router_logits = True
    assert "output_router_logits" in str(sharing_problem(routed))
    assert sharing_problem(PeftLike(build("GPT2"))) is None


def test_windows_of_a_model_of_images_are_those_of_its_text():
    """Its own config names none: a sequence longer than the first batch's would see beyond them."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    vision = {**small, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    text = {**small, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 8}
    text |= {"vocab_size": 99, "sliding_window": 4}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=98
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    short = torch.tensor(siblings()[3]["prompt_token_ids"] + [7])
    assert len(short) < 4 and prove_sharing(model, short) is None
    batch = shared(siblings())
    kinds = tree_masks(model, batch["tree_ends"], batch["position_ids"]).keys()
    assert kinds == {"sliding_attention", "full_attention"}
    found = causal_lm_log_prob(model, batch).log_prob[0]
    expected = torch.cat([alone(model, r) for r in siblings()])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    config.text_config.layer_types = ["linear_attention", "full_attention"]
    assert "linear_attention" in str(packing_problem(model))


def test_the_longest_sequence_is_that_of_any_layout():
    data = siblings()
    expected = max((r["prompt_token_ids"] + r["completion_token_ids"] for r in data), key=len)
    for options in ({}, {"packing": True}, {"share_prefix": True}):
        assert longest_sequence(CompletionCollator(0, **options)(data)).tolist() == expected
    assert longest_sequence({"input_ids": torch.tensor([[3, 4]])}).tolist() == [3, 4]


def test_block_masks_of_flex_attention_are_the_dense_ones():
    """Its compiler takes a minute on a CPU; what it is given is compared, for windows too."""
    batch = shared(siblings())
    ends, depths = batch["tree_ends"], batch["position_ids"]
    rows, width = ends.shape
    expected = sharing_module.tree_masks(build("Gemma3"), ends, depths)
    found = sharing_module.tree_masks(build("Gemma3", "flex_attention"), ends, depths)
    assert found.keys() == expected.keys() == {"full_attention", "sliding_attention"}
    b, q, k = torch.meshgrid(*map(torch.arange, (rows, width, width)), indexing="ij")
    for kind, mask in found.items():
        assert mask.shape == (rows, 1, width, width)
        assert mask.mask_mod(b, torch.tensor(0), q, k).equal(expected[kind][:, 0] == 0)
    assert not expected["full_attention"].equal(expected["sliding_attention"])


# --- packed rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Llama", "Gemma3", "GPT2"])
def test_packed_sequences_lie_in_rows_that_cost_no_more_than_padding(
    kind: str, monkeypatch: pytest.MonkeyPatch
):
    model, data = build(kind), on_policy(build(kind), siblings())
    # As if attention over these few tokens were dear.
    monkeypatch.setattr(tree_module, "_ATTENTION_EQUALS", 4)
    batch = CompletionCollator(0, packing=True)(data)
    lengths = batch["cu_seq_lens_q"].diff().tolist()
    placed = in_rows(model, batch)
    inputs, keep = model_inputs(model, placed)
    rows, width = inputs["input_ids"].shape
    assert rows > 1 and keep == sum(lengths)
    assert rows * width**2 < len(lengths) * max(lengths) ** 2
    assert rows * width <= len(lengths) * max(lengths)
    assert not set(inputs) & set(VARLEN)
    cells = placed["row_cells"]
    assert inputs["input_ids"].flatten()[cells].equal(batch["input_ids"][0])
    assert inputs["position_ids"].flatten()[cells].equal(batch["position_ids"][0])
    for i, part in enumerate(cells.split(lengths)):
        assert part.diff().eq(1).all() and part[0] // width == part[-1] // width, i
    loss, expected = gradients(model, CompletionCollator(0)(data))
    found, grads = gradients(model, batch)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
    assert_equal(grads, expected, 1e-5)
    # Kernels that take offsets get one row, whose pairs they do not compute.
    model.config._attn_implementation = "flash_attention_2"
    assert in_rows(model, batch) is batch
    assert model_inputs(model, batch)[0]["input_ids"].shape == (1, keep)


# --- the Trainer -------------------------------------------------------------------------------


def runs(
    folder: Path, data: list[Row], model: Any = None, **changes: Any
) -> tuple[TOPRTrainer, list[int]]:
    """A Trainer over all records in one step, and the tokens of each of its forward passes."""
    run = trainer(folder, data, model, per_device_train_batch_size=len(data), **changes)
    passes: list[int] = []
    run.model.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return run, passes


def test_training_shares_prompts_unless_it_is_told_not_to(tmp_path: Path):
    """The same update, from fewer tokens, and the log says how many."""
    data, weights, tokens = siblings(), [], []
    for choice in (None, True, False):
        run, passes = runs(tmp_path, data, share_prefix=choice, learning_rate=0.1)
        run.train()
        weights.append([p.detach().clone() for p in run.model.parameters()])
        tokens.append(passes[-1])
        entry = run.state.log_history[0]
        padded = CompletionCollator(0)(data)["input_ids"].numel()
        assert entry.get("tokens_saved", 0) == pytest.approx(1 - passes[-1] / padded)
    assert tokens[0] == tokens[1] < 0.6 * tokens[2]
    for first, second, third in zip(*weights, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, third, rtol=0, atol=1e-6)


def test_a_model_that_fails_the_proof_is_trained_unshared_and_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    sharing_module.warn_unshared.cache_clear()
    data = siblings()
    run, _ = runs(tmp_path, data, leaking(), max_steps=2)
    run.train()
    plain, _ = runs(tmp_path, data, leaking(), max_steps=2, share_prefix=False)
    plain.train()
    for p, q in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert "tokens_saved" not in run.state.log_history[0]
    assert run.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    said = [r.getMessage() for r in caplog.records if "runs its prompt anew" in r.getMessage()]
    assert len(said) == 1 and "does not keep the branches of a tree apart" in said[0]
    run, _ = runs(tmp_path, data, leaking(), share_prefix=True)
    with pytest.raises(ValueError, match=r"share_prefix=True, but Llama.*share_prefix=False"):
        run.train()
    flash = build("Llama")
    flash.config._attn_implementation = "flash_attention_2"
    unshared_run = trainer(tmp_path, data, flash)
    assert not unshared_run.data_collator.share_prefix
    assert "takes no mask" not in caplog.text
    unshared_run.get_train_dataloader()
    assert "'flash_attention_2' of LlamaForCausalLM takes no mask" in caplog.text
    with pytest.raises(ValueError, match=r"share_prefix=True, but .*sdpa, eager"):
        trainer(tmp_path, data, flash, share_prefix=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_mask_of_a_tree_has_the_dtype_that_attention_computes_in(
    tmp_path: Path, attention: str
):
    """Autocast begins in the model's forward; a mask of another dtype would be copied in every layer."""
    model, masks = build("Llama"), []
    model.config._attn_implementation = attention
    run, _ = runs(tmp_path, siblings(), model, bf16=True, max_steps=1)
    model.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    run.train()
    assert run.state.log_history[0]["tokens_saved"] > 0
    assert masks[-1].dtype == torch.bfloat16


def test_a_module_without_a_config_is_trained_unshared(tmp_path: Path):
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("Llama")

        def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
            return self.inner(input_ids, attention_mask, position_ids, use_cache=use_cache)

    run = trainer(tmp_path, siblings(), Plain(), fused_head=False, max_steps=1)
    run.train()
    assert "tokens_saved" not in run.state.log_history[0]
    with pytest.raises(ValueError, match=r"share_prefix=True, but Plain has no config"):
        trainer(tmp_path, siblings(), Plain(), fused_head=False, share_prefix=True)


def test_a_subclass_with_a_loss_of_its_own_gets_batches_as_ever_unless_it_wants_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    class Reading(TOPRTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            self.read = sorted(inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)

    for choice, name in ((None, "attention_mask"), (True, "tree_ends")):
        args = config(tmp_path, per_device_train_batch_size=8, max_steps=1, share_prefix=choice)
        data = {"train_dataset": siblings(), "processing_class": tiny_tokenizer()}
        run = Reading(build("Llama"), args, **data)
        run.train()
        assert name in run.read
    assert caplog.text.count("Reading has a compute_loss of its own") == 1


def test_mu_of_the_initial_model_is_scored_by_trees_too(tmp_path: Path):
    data = [{k: x for k, x in r.items() if k != "behavior_log_prob"} for r in siblings()]
    found = []
    for model in (build("Llama"), leaking()):
        run, _ = runs(tmp_path, data, model, behavior="initial")
        run.train()
        found.append(run.state.log_history[0])
        scored = [r["behavior_log_prob"] for r in run.train_dataset]
        for r, values in zip(siblings(), scored, strict=True):
            expected = alone(build("Llama"), r).tolist()
            assert values == pytest.approx(expected, abs=1e-5)
    assert found[0]["tokens_saved"] > 0.4 and "tokens_saved" not in found[1]


def test_every_epoch_sees_every_record_once_also_when_it_is_resumed(tmp_path: Path):
    """Batches of 3 cut groups of 4, 3 and 1; the run is broken off in the second epoch."""
    data = siblings()
    for i, r in enumerate(data):
        r["reward"] = 1.0 + i

    def train(folder: Path, steps: int, resume: bool = False) -> list[list[float]]:
        run = trainer(
            folder,
            data,
            build("Llama"),
            per_device_train_batch_size=3,
            max_steps=steps,
            save_strategy="steps",
            save_steps=4,
            learning_rate=1e-4,
        )
        seen: list[list[float]] = []
        whole = run.compute_loss

        def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            seen.append(inputs["reward"].tolist())
            return whole(model, inputs, *args, **kwargs)

        run.compute_loss = compute_loss
        run.train(resume_from_checkpoint=resume)
        return seen

    seen = train(tmp_path / "whole", 9)
    for epoch in range(3):
        rewards = [x for batch in seen[3 * epoch :][:3] for x in batch]
        assert sorted(rewards) == [1.0 + i for i in range(8)]
        prompts = [tuple(data[int(x) - 1]["prompt_token_ids"]) for x in rewards]
        assert sum(a != b for a, b in pairwise(prompts)) == 2
    assert seen[:3] != seen[3:6]
    train(tmp_path / "parted", 4)
    assert train(tmp_path / "parted", 9, resume=True) == seen[4:]
