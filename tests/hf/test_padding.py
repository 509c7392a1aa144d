"""Padding in front of the tokens, and models that see it by their states or positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from test_heads import SIZE
from test_trainer import rows, trainer
from tiny import tiny_tokenizer

from topr_kernels import IS, REINFORCE, topr_loss
from topr_kernels.hf import (
    causal_lm_log_prob,
    causal_lm_topr_loss,
    completion_logits,
    score_behavior,
)
from topr_kernels.hf import padding as padding_module
from topr_kernels.hf.collator import CompletionCollator
from topr_kernels.hf.forward import completion_hidden
from topr_kernels.hf.padding import check_padding, moved_behind
from topr_kernels.hf.sharing import is_tree
from topr_kernels.hf.signature import positions
from topr_kernels.recipe.prompt_cache import cache_problem

Row = dict[str, Any]
# Ids of the padding, and of RoBERTa's own, which no record here has.
PAD, ROBERTA = 0, 1
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "decoder_ffn_dim": 32}
BART |= {"encoder_ffn_dim": 32, "decoder_attention_heads": 2, "encoder_attention_heads": 2}
GEMMA = {"num_attention_heads": 2, "num_hidden_layers": 3, "lru_width": 32}
RWKV = {"attention_hidden_size": 32, "num_hidden_layers": 2}
#: Name -> configuration class, model class, settings; whether padding in front of the tokens is exact.
KINDS: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", {}, True),
    "BART": ("BartConfig", "BartForCausalLM", {**BART, "dropout": 0.0}, False),
    "RoBERTa": (
        "RobertaConfig",
        "RobertaForCausalLM",
        {"is_decoder": True, "pad_token_id": ROBERTA},
        False,
    ),
    "RWKV": (
        "RwkvConfig",
        "RwkvForCausalLM",
        RWKV,
        False,
    ),
    "RecurrentGemma": ("RecurrentGemmaConfig", "RecurrentGemmaForCausalLM", GEMMA, False),
    "prompt tuning": ("LlamaConfig", "LlamaForCausalLM", {}, False),
}
SEEING = [name for name, kind in KINDS.items() if not kind[-1]]


def build(name: str) -> Any:
    """A model in which every token that is seen, and every position, changes the log-probs."""
    torch.manual_seed(0)
    config, kind, changes, _ = KINDS[name]
    settings = {**SIZE, "num_hidden_layers": 1, "hidden_dropout_prob": 0.0, **changes}
    settings |= {"attention_probs_dropout_prob": 0.0, "use_cache": False}
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings))
    if name == "prompt tuning":
        peft = pytest.importorskip("peft")
        tuning = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = peft.get_peft_model(model, tuning)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def alone(model: Any, record: Row) -> torch.Tensor:
    """Log-probs of a record's completion, by the model alone and without padding."""
    prompt, completion = record["prompt_token_ids"], record["completion_token_ids"]
    row = torch.tensor([prompt + completion])
    with torch.no_grad():
        logits = model(input_ids=row).logits[0, -row.shape[1] :]
    log_prob = logits[:-1].log_softmax(-1).gather(-1, row[0, 1:, None])[:, 0]
    return log_prob[len(prompt) - 1 :]


def ragged() -> list[Row]:
    """Prompts of 3 to 9 tokens, completions of 1 to 7; the shortest row is padded by 12."""
    data = rows(4, lengths=[4, 7, 2, 1])
    data[0]["prompt_token_ids"] = data[0]["prompt_token_ids"][:3]
    data[1]["prompt_token_ids"] += [7, 8]
    return data


@pytest.mark.parametrize("fused_head", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_every_token_has_the_log_prob_it_has_alone(name: str, fused_head: bool):
    """PITFALLS 49."""
    model, data = build(name), ragged()
    batch = CompletionCollator(PAD)(data)
    expected = [alone(model, record) for record in data]
    found = causal_lm_log_prob(model, batch, fused_head=fused_head, check=True)
    loss = causal_lm_topr_loss(model, batch, fused_head=fused_head, check=True)
    assert loss.log_prob.shape == found.log_prob.shape == (4, batch["logits_to_keep"])
    assert torch.equal(loss.log_prob, found.log_prob)
    for i, values in enumerate(expected):
        n = len(values)
        torch.testing.assert_close(found.log_prob[i, -n:], values, rtol=1e-5, atol=1e-5)
        assert not found.log_prob[i, :-n].any()
    scored = score_behavior(model, data, CompletionCollator(PAD), batch_size=4, progress=False)
    torch.testing.assert_close(torch.tensor(scored[1]), expected[1], rtol=1e-5, atol=1e-5)
    # Models that see padding, do: else nothing was shown.
    seen = causal_lm_log_prob(model, batch, fused_head=fused_head, check_padded=False).log_prob
    assert ((seen - found.log_prob).abs().max() > 0.1) == (name in SEEING)


@pytest.mark.parametrize("name", ["RoBERTa", "prompt tuning", "RWKV"])
def test_logits_hidden_states_and_gradients_are_in_the_batchs_columns(name: str):
    model, data = build(name), ragged()
    batch = CompletionCollator(PAD)(data)
    keep = batch["logits_to_keep"]
    labels = batch["labels"][:, -keep:]
    rest = (batch["behavior_log_prob"][:, -keep:], batch["reward"])
    logits = completion_logits(model, batch)
    hidden = completion_hidden(model, batch)
    torch.testing.assert_close(model.get_output_embeddings()(hidden), logits)
    parameters = [p for p in model.parameters() if p.requires_grad]
    of_logits = torch.autograd.grad(
        topr_loss(logits, labels, *rest, limits=REINFORCE).loss, parameters, allow_unused=True
    )
    out = causal_lm_topr_loss(model, batch, limits=REINFORCE)
    found = torch.autograd.grad(out.loss, parameters, allow_unused=True)
    assert max(g.abs().max() for g in found if g is not None) > 1e-3
    for a, b in zip(found, of_logits, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["RoBERTa", "RWKV"])
def test_segments_move_with_their_tokens(name: str):
    model, data = build(name), ragged()
    for record in data:
        tokens = len(record["completion_token_ids"])
        record |= {
            "behavior_log_prob": [-4.0] * tokens,
            "segments": [j // 2 for j in range(tokens)],
        }
    batch = CompletionCollator(PAD)(data)
    names = ("labels", "behavior_log_prob", "segments")
    labels, behavior, segments = (batch[n][:, -batch["logits_to_keep"] :] for n in names)
    options = {"limits": IS, "ratio": "segment"}
    rows_of = completion_logits(model, batch), labels, behavior, batch["reward"]
    expected = topr_loss(*rows_of, segments=segments, **options)
    found = causal_lm_topr_loss(model, batch, **options)
    torch.testing.assert_close(found.objective, expected.objective)
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.parametrize("name", SEEING)
def test_the_trainer_starts_at_ratios_of_the_rows_alone(name: str, tmp_path: Path):
    model, data = build(name), ragged()
    for record in data:
        record["behavior_log_prob"] = alone(model, record).clamp(max=0).tolist()
    run = trainer(tmp_path, data, model, per_device_eval_batch_size=4)
    figures = run.evaluate()
    for kind in ("positive", "negative"):
        assert abs(figures[f"eval_log_ratio_{kind}_mean"]) < 1e-4
        assert figures[f"eval_log_ratio_{kind}_std"] < 1e-4


def test_positions_that_a_model_counts_otherwise_are_not_given_without_padding():
    """RoBERTa counts from its padding id + 1; given 0, 1, ... it is wrong without any padding."""
    model = build("RoBERTa")
    data = ragged()[:1]
    batch = CompletionCollator(PAD)(data)
    expected = alone(model, data[0])
    found = causal_lm_log_prob(model, batch).log_prob[0, -len(expected) :]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # Those that a batch brings and that are no numbers of its tokens are its own affair, and move along.
    brought = {**CompletionCollator(PAD)(ragged())}
    own = torch.where(
        brought["attention_mask"] == 0, ROBERTA, brought["position_ids"] + ROBERTA + 1
    )
    found = causal_lm_log_prob(model, {**brought, "position_ids": own}).log_prob[0, -4:]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_sees_padding_on_both_sides_is_refused_by_name():
    class SeesAll(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            embedded = self.model.embed_tokens(input_ids)
            # By the number of columns; a mean over them would see later tokens.
            mixed = embedded + torch.tensor(float(embedded.shape[1])).sin()
            return super().forward(inputs_embeds=mixed, **kwargs)

    model, data = build("Llama"), ragged()
    model.__class__ = SeesAll
    batch = CompletionCollator(PAD)(data)
    for call in (causal_lm_log_prob, causal_lm_topr_loss, completion_logits):
        with pytest.raises(ValueError, match=r"SeesAll gives.*padding.*batch_size=1.*packing=True"):
            call(model, batch)
    # The remedy serves.
    for record in data[:2]:
        found = causal_lm_log_prob(model, CompletionCollator(PAD)([record])).log_prob
        values = alone(model, record)
        torch.testing.assert_close(found[0, -len(values) :], values, rtol=1e-5, atol=1e-5)


def test_the_check_runs_once_for_a_model_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch):
    model, batch = build("RWKV"), CompletionCollator(PAD)(ragged())
    ran: list[int] = []
    monkeypatch.setattr(
        padding_module,
        "check_padding",
        lambda *args, **kwargs: ran.append(1) or check_padding(*args, **kwargs),
    )
    model.train()
    model.rwkv.blocks[0].eval()
    before, state = [m.training for m in model.modules()], torch.get_rng_state()
    causal_lm_log_prob(model, batch, check_padded=False)
    assert not ran
    for _ in range(2):
        causal_lm_log_prob(model, batch)
    assert ran == [1]
    assert before == [m.training for m in model.modules()]
    assert torch.equal(state, torch.get_rng_state())


def test_padding_anywhere_is_moved_behind_and_back():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 1], [1, 1, 1, 1, 1]])
    ids = torch.arange(15).view(3, 5)
    moved = moved_behind(
        {"input_ids": ids, "attention_mask": mask, "logits_to_keep": 2, "reward": 1}
    )
    assert moved.batch["input_ids"].tolist() == [
        [2, 3, 4, 0, 1],
        [5, 6, 9, 7, 8],
        [10, 11, 12, 13, 14],
    ]
    assert moved.batch["attention_mask"].tolist() == [[1] * 3 + [0] * 2] * 2 + [[1] * 5]
    assert moved.batch["reward"] == 1
    # The last two columns came from columns 1 to 4.
    keep = moved.batch["logits_to_keep"]
    assert keep == 4
    assert torch.equal(moved.restored(moved.batch["input_ids"][:, -keep:]), ids[:, -2:])


def test_a_prefix_is_not_shared_where_padding_after_it_is_seen():
    batch = CompletionCollator(PAD, share_prefix=True)(rows(4))
    assert is_tree(batch)
    for name, reason in (("RoBERTa", "padding id"), ("prompt tuning", "virtual tokens")):
        assert reason in str(cache_problem(build(name)))
    for name in SEEING:
        with pytest.raises(ValueError, match=r"share_prefix=True, but .*use share_prefix=False"):
            causal_lm_log_prob(build(name), batch)


def test_positions_of_a_table_that_begins_behind_the_padding_id_are_fewer():
    """The last sequence that fits, fits; one token more is past the table."""
    model = build("RoBERTa")
    most = positions(model)
    assert most == SIZE["max_position_embeddings"] - ROBERTA - 1
    ids = torch.full((1, most), 5)
    model(ids)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.cat([ids, ids[:, :1]], dim=1))
    assert positions(build("prompt tuning")) == SIZE["max_position_embeddings"] - 3
    assert positions(build("Llama")) == SIZE["max_position_embeddings"]


def test_a_state_is_not_trusted_to_fade():
    """Where padding behind is exact, it is taken: in half precision a little of it would pass."""
    exact = padding_module.PaddingCheck(as_it_is=0.0, behind=0.0, allowed=0.1, state=None)
    assert exact.exact_as_it_is
    assert not exact._replace(state="a state").exact_as_it_is
    assert exact._replace(state="a state", behind=1.0).exact_as_it_is
    nan = exact._replace(as_it_is=float("nan"), behind=float("nan"))
    assert not (nan.exact_as_it_is or nan.exact_behind)


def test_prompts_that_padding_would_change_are_not_sampled_together():
    from topr_kernels.recipe.generate import read_prompts

    tokenizer = tiny_tokenizer()
    for name in ("Llama", "RWKV", "RoBERTa"):
        model = build(name)
        for prompts, sees in ((["2+2=", "2+3="], False), (["2+2=", "22+22="], True)):
            if name == "RoBERTa" or (sees and name == "RWKV"):
                with pytest.raises(ValueError, match=r"sees padding .*expected .*--backend vllm"):
                    read_prompts(model, tokenizer, prompts)
            else:
                read_prompts(model, tokenizer, prompts)
