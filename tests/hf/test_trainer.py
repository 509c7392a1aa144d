"""TOPRTrainer, TOPRConfig and the collator."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from processes import launch
from tiny import random_model, tiny_config, tiny_tokenizer
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    LlamaForCausalLM,
    PrinterCallback,
    TrainingArguments,
)

from topr_kernels import (
    PRESETS,
    SFT,
    TOPR,
    Limits,
    TOPROutput,
    layout,
    linear_topr_loss,
    log_prob,
    topr_loss,
)
from topr_kernels.hf import (
    CompletionCollator,
    TOPRConfig,
    TOPRTrainer,
    collator,
    completion_hidden,
    completion_logits,
)
from topr_kernels.hf import causal_lm as causal_lm_module
from topr_kernels.hf.prefix import common_prefix_length, prefix_sharing_problem
from topr_kernels.hf.watch import NegativeWatch, SequenceMetrics, warn_if_never_negative

Row = dict[str, Any]


def rows(count: int = 8, *, lengths: list[int] | None = None, seed: int = 0) -> list[Row]:
    """Records with prompts and completions of different lengths; alternating signs of reward."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(2, 90, (n,), generator=generator).tolist()

    header = tokens(5)
    result = []
    for i in range(count):
        length = lengths[i] if lengths else 1 + i % 4
        result.append(
            {
                "prompt_token_ids": header + tokens(2 + i % 3),
                "completion_token_ids": tokens(length),
                "behavior_log_prob": (-3 - torch.rand(length, generator=generator)).tolist(),
                "reward": 1.0 if i % 3 == 0 else -1.0,
            }
        )
    return result


def config(folder: Path, **changes: Any) -> TOPRConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_grad_norm": 1e9,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_steps": 1,
    }
    return TOPRConfig(**{**settings, **changes})


def trainer(folder: Path, data: list[Row], model: Any = None, **changes: Any) -> TOPRTrainer:
    result = TOPRTrainer(
        model=random_model() if model is None else model,
        args=config(folder, **changes),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny_tokenizer(),
    )
    result.remove_callback(PrinterCallback)
    return result


def plain_loss(model: Any, data: list[Row], **options: Any) -> torch.Tensor:
    """The loss from one full forward pass over right-padded rows."""
    width = max(len(r["prompt_token_ids"]) + len(r["completion_token_ids"]) for r in data)
    ids = torch.zeros(len(data), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    behavior = torch.zeros(len(data), width)
    for i, r in enumerate(data):
        p, row = len(r["prompt_token_ids"]), r["prompt_token_ids"] + r["completion_token_ids"]
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        labels[i, p : len(row)] = torch.tensor(r["completion_token_ids"], dtype=torch.int64)
        behavior[i, p : len(row)] = torch.tensor(r["behavior_log_prob"])
    logits = model(input_ids=ids, attention_mask=mask).logits
    reward = torch.tensor([r["reward"] for r in data])
    return topr_loss(logits, labels, behavior, reward, **options).loss


# --- collator --------------------------------------------------------------------------------


def test_labels_cover_the_completion_only_even_where_pad_is_eos():
    """PITFALLS 32: a mask made by comparing ids with the pad id would lose the EOS."""
    eos = tiny_tokenizer().eos_token_id
    data = rows(2, lengths=[3, 1])
    data[0]["completion_token_ids"][-1] = eos
    data[1]["completion_token_ids"] = [eos]
    data[1]["prompt_token_ids"] += [eos, eos]
    batch = CompletionCollator(pad_token_id=eos)(data)
    assert batch["labels"][0, -3:].tolist() == data[0]["completion_token_ids"]
    assert batch["labels"].ne(-100).sum(1).tolist() == [3, 1]
    lengths = [len(r["prompt_token_ids"]) + len(r["completion_token_ids"]) for r in data]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["labels"][1, -1] == eos


@pytest.mark.parametrize("share_prefix", [False, True])
def test_batch_is_right_aligned_with_positions_of_real_tokens(share_prefix: bool):
    data = rows(5)
    batch = CompletionCollator(0, share_prefix)(data)
    assert batch["prefix_length"] == (5 if share_prefix else 0)
    assert batch["logits_to_keep"] == 5
    assert batch["reward"].tolist() == [r["reward"] for r in data]
    for i, r in enumerate(data):
        row = r["prompt_token_ids"] + r["completion_token_ids"]
        real = batch["attention_mask"][i].bool()
        assert batch["input_ids"][i][real].tolist() == row
        assert batch["position_ids"][i][real].tolist() == list(range(len(row)))
        n = len(r["completion_token_ids"])
        torch.testing.assert_close(
            batch["behavior_log_prob"][i, -n:], torch.tensor(r["behavior_log_prob"])
        )
        assert batch["behavior_log_prob"][i, :-n].eq(0).all()


def test_common_prefix_leaves_each_prompt_a_token():
    assert common_prefix_length([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_prefix_length([[1, 2, 3], [1, 4]]) == 1
    assert common_prefix_length([[1], [1, 2]]) == 0
    assert common_prefix_length([[5, 1], [6, 1]]) == 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("reward", None, "record 1 .* no 'reward'"),
        ("prompt_token_ids", [], "record 1 .*prompt_token_ids is empty"),
        ("behavior_log_prob", [-1.0] * 9, "record 1 .*9 entries, but the completion has 2 tokens"),
    ],
)
def test_collator_names_a_bad_record(field: str, value: Any, message: str):
    data = rows(2)
    data[1][field] = value
    with pytest.raises(ValueError, match=message):
        CompletionCollator(0)(data)


@pytest.mark.parametrize("share_prefix", [False, True])
def test_kept_logits_equal_those_of_each_sequence_alone(share_prefix: bool):
    """Neither padding, nor logits_to_keep, nor a prefix that is run once changes a logit."""
    model, data = random_model(), rows(6)
    batch = CompletionCollator(0, share_prefix)(data)
    with torch.no_grad():
        kept = completion_logits(model, batch)
        for i, r in enumerate(data):
            row = torch.tensor([r["prompt_token_ids"] + r["completion_token_ids"]])
            n = len(r["completion_token_ids"])
            alone = model(row).logits[0, -n - 1 :]
            assert alone.abs().max() > 0.1
            torch.testing.assert_close(kept[i, -n - 1 :], alone, rtol=1e-5, atol=1e-6)
    assert kept.shape[1] == batch["logits_to_keep"] < batch["input_ids"].shape[1]


def test_log_probs_of_kept_logits_equal_those_of_all_logits():
    model, data = random_model(), rows(6)
    batch = CompletionCollator(0)(data)
    keep = batch["logits_to_keep"]
    with torch.no_grad():
        kept = log_prob(completion_logits(model, batch), batch["labels"][:, -keep:]).log_prob
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")}
        full = log_prob(model(**inputs).logits, batch["labels"]).log_prob
    assert kept.abs().max() > 1
    torch.testing.assert_close(kept, full[:, -keep:], rtol=0, atol=2e-6)
    assert full[:, :-keep].eq(0).all()


def test_a_model_without_logits_to_keep_gives_the_same():
    class Old(LlamaForCausalLM):
        def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
            return super().forward(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
            )

    model = random_model()
    old = Old(tiny_config()).eval()
    old.load_state_dict(model.state_dict())
    batch = CompletionCollator(0)(rows(4))
    with torch.no_grad():
        expected = completion_logits(model, batch)
        torch.testing.assert_close(completion_logits(old, batch), expected, rtol=0, atol=1e-6)
        hidden = completion_hidden(model, batch)
        assert hidden.shape == (4, batch["logits_to_keep"], 32)
        torch.testing.assert_close(completion_hidden(old, batch), hidden, rtol=0, atol=1e-6)
    assert "forward does not take" in str(prefix_sharing_problem(old))


class PeftLike(torch.nn.Module):
    """The signature and the methods of peft.PeftModelForCausalLM."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_model = base
        self.config = base.config
        self.received: dict[str, Any] = {}

    def get_base_model(self) -> Any:
        return self.base_model

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        task_ids=None,
        **kwargs,
    ):
        self.received = kwargs
        return self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def gpt2(kind: type[GPT2LMHeadModel] = GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Positions are learnt and the model counts the padding, unless it is given them."""
    torch.manual_seed(0)
    settings = GPT2Config(
        vocab_size=len(tiny_tokenizer()),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    )
    model = kind(settings).eval()
    torch.nn.init.normal_(model.transformer.wpe.weight, std=0.5)
    return model


def check_rows_alone(model: Any, kept: torch.Tensor, data: list[Row]) -> None:
    """Kept logits are those of each unpadded sequence on its own."""
    for i, r in enumerate(data):
        row = torch.tensor([r["prompt_token_ids"] + r["completion_token_ids"]])
        n = len(r["completion_token_ids"])
        with torch.no_grad():
            alone = model(row).logits[0, -n - 1 :]
        torch.testing.assert_close(kept[i, -n - 1 :], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_signature_of", [False, True])
def test_a_peft_wrapper_gets_positions_and_logits_to_keep(by_signature_of: bool):
    base = gpt2()
    wrapper, data = PeftLike(base).eval(), rows(6)
    batch = CompletionCollator(0)(data)
    with torch.no_grad():
        kept = completion_logits(wrapper, batch, signature_of=wrapper if by_signature_of else None)
    assert wrapper.received["logits_to_keep"] == batch["logits_to_keep"]
    assert torch.equal(wrapper.received["position_ids"], batch["position_ids"])
    check_rows_alone(base, kept, data)


def test_a_peft_wrapper_shares_the_prefix_of_its_base_model():
    base, data = random_model(), rows(6)
    wrapper = PeftLike(base).eval()
    assert prefix_sharing_problem(wrapper) is None
    with torch.no_grad():
        kept = completion_logits(wrapper, CompletionCollator(0, share_prefix=True)(data))
    check_rows_alone(base, kept, data)


def test_an_open_ended_forward_gets_positions():
    class Open(GPT2LMHeadModel):
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    model, data = gpt2(Open), rows(6)
    with torch.no_grad():
        kept = completion_logits(model, CompletionCollator(0)(data))
    check_rows_alone(model, kept, data)
    # What **kwargs takes may be ignored: not enough to share a prefix.
    assert "forward does not take" in str(prefix_sharing_problem(model))


@pytest.mark.parametrize("wrapped", [False, True])
def test_padding_without_positions_is_moved_or_refused(wrapped: bool):
    class NoPositions(GPT2LMHeadModel):
        def forward(self, input_ids=None, attention_mask=None, use_cache=None):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask)

    model = gpt2(NoPositions)
    asked = PeftLike(model).eval() if wrapped else model
    data = rows(4)
    with torch.no_grad():
        check_rows_alone(model, completion_logits(asked, CompletionCollator(0)(data)), data)
    with pytest.raises(ValueError, match=r"NoPositions.forward takes no position_ids.*one seq"):
        completion_logits(asked, CompletionCollator(0)(data), check_padded=False)
    # Without padding, or with padding after the tokens only, positions are the columns.
    same = [data[0], data[0]]
    with torch.no_grad():
        check_rows_alone(model, completion_logits(asked, CompletionCollator(0)(same)), same)
        ids = torch.tensor([data[0]["prompt_token_ids"] + [0, 0]])
        right = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        right["attention_mask"][:, -2:] = 0
        assert completion_logits(asked, right).shape[:2] == ids.shape


def test_missing_positions_are_counted_from_the_mask():
    model, data = gpt2(), rows(6)
    batch = CompletionCollator(0)(data)
    del batch["position_ids"]
    with torch.no_grad():
        check_rows_alone(model, completion_logits(model, batch), data)
    del batch["attention_mask"]
    with pytest.raises(ValueError, match=r"no position_ids and no attention_mask.*collator"):
        completion_logits(model, batch)


def test_further_model_inputs_are_passed_on_or_named():
    model, data = gpt2(), rows(6)
    batch = CompletionCollator(0)(data)
    # GPT-2 embeds token types with the token table.
    types = torch.full_like(batch["input_ids"], 7)
    keep = batch["logits_to_keep"]
    with torch.no_grad():
        plain = completion_logits(model, batch)
        typed = completion_logits(model, {**batch, "token_type_ids": types})
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")}
        expected = model(**inputs, token_type_ids=types).logits[:, -keep:]
        torch.testing.assert_close(typed, expected, rtol=0, atol=1e-6)
        assert (typed - plain).abs().max() > 0.01
        wrapped = completion_logits(PeftLike(model).eval(), {**batch, "token_type_ids": types})
        torch.testing.assert_close(wrapped, expected, rtol=0, atol=1e-6)
    # Llama's forward has **kwargs, in which a name it does not know would vanish.
    with pytest.raises(ValueError, match=r"holds question, token_type_ids, which Llama.*collator"):
        completion_logits(random_model(), {**batch, "token_type_ids": types, "question": ["?"]})
    shared = CompletionCollator(0, share_prefix=True)(data)
    with pytest.raises(ValueError, match=r"\(token_type_ids\).*share_prefix=False"):
        completion_logits(model, {**shared, "token_type_ids": types})


def test_one_value_marks_unscored_labels():
    assert collator.IGNORE_INDEX is layout.IGNORE_INDEX


def test_prefix_sharing_is_refused_where_it_would_not_be_exact():
    model = random_model()
    assert prefix_sharing_problem(model) is None
    model.config.layer_types = ["full_attention", "sliding_attention"]
    batch = CompletionCollator(0, share_prefix=True)(rows(4))
    with pytest.raises(ValueError, match=r"sliding_attention.*share_prefix=False"):
        completion_logits(model, batch)
    model.config.layer_types = None
    model.train()
    model.gradient_checkpointing_enable()
    assert "gradient checkpointing" in str(prefix_sharing_problem(model))


# --- configuration ---------------------------------------------------------------------------


def test_config_takes_a_preset_or_limits_and_writes_json(tmp_path: Path):
    assert config(tmp_path).limits == TOPR
    assert config(tmp_path, limits="sft").limits == SFT
    mine = Limits(0.5, 2.0, 0.0, 1.0)
    restored = json.loads(config(tmp_path, limits=mine).to_json_string())
    assert Limits(**restored["limits"]) == mine
    assert config(tmp_path).remove_unused_columns is False


def test_config_reads_a_command_line(tmp_path: Path):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--limits", "tis", "--ratio", "token"]
    flags += ["--baseline", "-0.25", "--entropy", "--temperature", "0.5"]
    flags += ["--workspace_bytes", "100000", "--grad_tolerance", "0.25"]
    (parsed,) = HfArgumentParser(TOPRConfig).parse_args_into_dataclasses(flags)
    assert parsed.limits == PRESETS["tis"] != TOPR
    assert (parsed.ratio, parsed.baseline, parsed.temperature) == ("token", -0.25, 0.5)
    assert parsed.entropy and not parsed.remove_unused_columns
    assert (parsed.workspace_bytes, parsed.grad_tolerance) == (100000, 0.25)
    assert parsed.fused_head
    (parsed,) = HfArgumentParser(TOPRConfig).parse_args_into_dataclasses(
        [*flags[:3], "--fused_head", "false"]
    )
    assert not parsed.fused_head
    (parsed,) = HfArgumentParser(TOPRConfig).parse_args_into_dataclasses(flags[:3])
    assert parsed.limits == TOPR
    (parsed,) = HfArgumentParser(TOPRConfig).parse_dict(parsed.to_dict(), allow_extra_keys=True)
    assert parsed.limits == TOPR


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limits": "ppo"}, r"limits: got 'ppo'.*'sft'"),
        ({"limits": 3}, r"limits: got 3"),
        ({"reduction": "mean"}, r"reduction: got 'mean'.*sequence_mean"),
        ({"ratio": "word"}, r"ratio: expected one of 'sequence'.*got 'word'"),
        ({"temperature": 0.0}, r"temperature: "),
        ({"baseline": float("nan")}, r"baseline: "),
        ({"remove_unused_columns": True}, r"remove_unused_columns: got True"),
        ({"grad_tolerance": 1.5}, r"grad_tolerance: expected .*got 1.5"),
        ({"fused_head": False, "grad_tolerance": 0.1}, r"grad_tolerance: got 0.1 with fused_head"),
        ({"fused_head": False, "workspace_bytes": 9}, r"workspace_bytes: got 9 with fused_head"),
    ],
)
def test_config_refuses(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize(("named", "expected"), [("cpu:0", "cpu"), ("cuda:1", "cuda:1")])
def test_a_cpu_among_several_processes_has_no_number(
    named: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """``torch.load(map_location="cpu:0")`` fails, and transformers 5.17 resumes with that."""
    settings = config(tmp_path)
    monkeypatch.setattr(TrainingArguments, "device", property(lambda _: torch.device(named)))
    assert str(settings.device) == expected


def test_trainer_without_a_pad_id_says_what_to_pass(tmp_path: Path):
    with pytest.raises(ValueError, match=r"processing_class.*data_collator=CompletionCollator"):
        TOPRTrainer(model=random_model(), args=config(tmp_path), train_dataset=rows())


# --- gradients -------------------------------------------------------------------------------

SPLITS = [(8, 1), (4, 2), (2, 4), (3, 3)]


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"share_prefix": True},
        {"packing": True},
        {"fused_head": False},
        {"fused_head": False, "packing": True},
    ],
    ids=str,
)
def test_gradients_do_not_depend_on_accumulation(
    tmp_path: Path, reduction: str, layout: dict[str, bool]
):
    """PITFALLS 28: accumulation 1, 2, 4 and the ragged 3 + 3 + 2, one sequence being empty."""
    data = rows(8, lengths=[3, 1, 4, 0, 2, 4, 1, 2])
    model = random_model()
    loss = plain_loss(model, data, baseline=-0.4, reduction=reduction)
    loss.backward()
    expected = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert expected > 0.05
    for size, steps in SPLITS:
        run = trainer(
            tmp_path,
            data,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            reduction=reduction,
            baseline=-0.4,
            **layout,
        )
        before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        run.train()
        entry = run.state.log_history[0]
        assert entry["grad_norm"] == pytest.approx(expected, rel=1e-5), (size, steps)
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-5), (size, steps)
        for (name, p), q in zip(run.model.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(
                p.detach(), before[name] - 0.1 * q.grad, rtol=1e-4, atol=1e-6
            )


def test_a_normaliser_per_micro_batch_would_be_noticed(tmp_path: Path):
    """The test above can fail: counting one micro-batch only multiplies the gradient."""

    class Wrong(TOPRTrainer):
        def _get_num_items_in_batch(self, batch_samples: list[Row], device: torch.device) -> Any:
            return super()._get_num_items_in_batch(batch_samples[:1], device)

    norms = []
    for size, steps in ((8, 1), (2, 4)):
        args = config(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        run = Wrong(random_model(), args, train_dataset=rows(), processing_class=tiny_tokenizer())
        run.train()
        norms.append(run.state.log_history[0]["grad_norm"])
    assert norms[1] > 2 * norms[0]


def test_an_all_empty_batch_trains_to_nothing(tmp_path: Path):
    """PITFALLS 29."""
    run = trainer(tmp_path, rows(4, lengths=[0] * 4), per_device_train_batch_size=4)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    run.train()
    assert run.state.log_history[0]["loss"] == 0
    assert run.state.log_history[0]["grad_norm"] == 0
    assert all(torch.equal(p, before[n]) for n, p in run.model.named_parameters())


def two_process_model(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(tie_word_embeddings=tied)).eval()


def worker(settings: dict[str, Any]) -> None:
    """One process of the next test, started as a program: trains a step and writes what came of it."""
    torch.set_num_threads(1)
    folder = Path(settings.pop("folder"))
    data = rows(8, lengths=[3, 1, 4, 0, 2, 4, 1, 2])
    run = trainer(folder, data, two_process_model(settings.pop("tied")), baseline=-0.4, **settings)
    run.train()
    if run.args.process_index == 0:
        entry = run.state.log_history[0]
        figures = {"processes": run.accelerator.num_processes, "grad_norm": entry["grad_norm"]}
        figures["extremes"] = [entry[f"log_ratio_negative_{side}"] for side in ("min", "max")]
        (folder / "figures.json").write_text(json.dumps(figures))
        torch.save(run.accelerator.unwrap_model(run.model).state_dict(), folder / "weights.pt")


#: A static graph and no_sync, which accumulates, do not go together in torch 2.13.
STATIC = {
    "ddp_static_graph": True,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
}


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
@pytest.mark.parametrize(
    ("reduction", "tied", "settings"),
    [
        ("sequence_mean", True, {}),
        ("token_mean", False, {}),
        ("sequence_mean", False, {"ddp_find_unused_parameters": False}),
        ("sequence_mean", True, STATIC),
        ("sequence_mean", False, {"fused_head": False}),
        ("sequence_mean", True, {"packing": True}),
    ],
)
def test_two_processes_take_the_step_of_one(
    tmp_path: Path, reduction: str, tied: bool, settings: dict[str, Any]
):
    """DDP averages gradients; the normaliser is global. Shares differ in tokens and sequences."""
    settings = {
        "folder": str(tmp_path),
        "reduction": reduction,
        "tied": tied,
        "ddp_backend": "gloo",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        **settings,
    }
    launch(2, "test_trainer.worker", settings)
    data = rows(8, lengths=[3, 1, 4, 0, 2, 4, 1, 2])
    model = two_process_model(tied)
    plain_loss(model, data, baseline=-0.4, reduction=reduction).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    whole = CompletionCollator(0)(data)
    ratios = causal_lm_module.causal_lm_topr_loss(model, whole, baseline=-0.4)
    negative = ratios.log_ratio[(ratios.reward < 0) & (ratios.length > 0)]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["processes"] == 2
    assert figures["grad_norm"] == pytest.approx(norm, rel=1e-5)
    # The metrics, too, are of both processes.
    extremes = [negative.min().item(), negative.max().item()]
    assert figures["extremes"] == pytest.approx(extremes, rel=1e-4)
    weights = torch.load(tmp_path / "weights.pt")
    for name, p in model.named_parameters():
        torch.testing.assert_close(weights[name], p.detach() - 0.1 * p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fused_head", [False, True])
@pytest.mark.parametrize("ratio", ["sequence", "geometric", "token"])
def test_options_reach_the_loss(tmp_path: Path, ratio: str, fused_head: bool):
    data = rows(4)
    options = {"ratio": ratio, "temperature": 0.7, "baseline": 0.2, "limits": Limits(0.5, 2, 0, 1)}
    expected = plain_loss(random_model(), data, **options).item()
    run = trainer(
        tmp_path,
        data,
        per_device_train_batch_size=4,
        entropy=True,
        fused_head=fused_head,
        **options,
    )
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert 0 < run.state.log_history[0]["entropy"] < 10


class Loud(GPT2LMHeadModel):
    """Multiplies its logits, and no config says so."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 3
        return out


def test_settings_of_the_fused_head_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return linear_topr_loss(*args, **kwargs)

    monkeypatch.setattr(causal_lm_module, "linear_topr_loss", spy)
    settings = {"workspace_bytes": 16 * 4 * 200, "grad_tolerance": 0.25, "impl": "torch"}
    run = trainer(tmp_path, rows(4), per_device_train_batch_size=4, **settings)
    run.train()
    (call,) = calls
    assert {name: call[name] for name in settings} == settings
    with pytest.raises(ValueError, match=r"workspace_bytes: expected at least"):
        trainer(tmp_path, rows(4), workspace_bytes=1000)


@pytest.mark.parametrize("fused_head", [False, True])
def test_the_models_own_logits_are_trained_on(tmp_path: Path, fused_head: bool):
    """PITFALLS 27: Gemma's softcap and Cohere's scale in the Trainer, both ways."""
    for kind, transform in (("Gemma2", {"final_logit_softcapping": 0.5}), ("Cohere", {})):
        torch.manual_seed(0)
        size = {k: v for k, v in tiny_config().to_dict().items() if k != "model_type"}
        settings = getattr(transformers, f"{kind}Config")(**{**size, **transform, "head_dim": 8})
        model = getattr(transformers, f"{kind}ForCausalLM")(settings).eval()
        torch.nn.init.normal_(model.lm_head.weight, std=0.5)
        loss = plain_loss(model, rows(4))
        loss.backward()
        expected = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
        model.zero_grad()
        run = trainer(
            tmp_path, rows(4), model, per_device_train_batch_size=4, fused_head=fused_head
        )
        run.train()
        entry = run.state.log_history[0]
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert entry["grad_norm"] == pytest.approx(expected, rel=1e-4)


def test_a_head_that_cannot_be_fused_is_refused_before_training(tmp_path: Path):
    """PITFALLS 26: when the trainer is made, and what no config tells, at the first batch."""

    class Adapter(torch.nn.Module):
        def __init__(self, base_layer: torch.nn.Linear) -> None:
            super().__init__()
            self.base_layer = base_layer

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.base_layer(hidden) + 1

    model = random_model()
    model.lm_head = Adapter(model.lm_head)
    with pytest.raises(ValueError, match=r"Adapter.*fused_head=False"):
        trainer(tmp_path, rows(4), model)
    trainer(tmp_path, rows(4), model, fused_head=False).train()

    loud = gpt2(Loud)
    before = {name: p.detach().clone() for name, p in loud.named_parameters()}
    with pytest.raises(ValueError, match=r"does something to them.*fused_head=False"):
        trainer(tmp_path, rows(4), loud).train()
    assert all(torch.equal(p, before[name]) for name, p in loud.named_parameters())
    run = trainer(tmp_path, rows(4), loud, per_device_train_batch_size=4, fused_head=False)
    run.train()
    expected = plain_loss(gpt2(Loud), rows(4)).item()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_only_the_first_batch_makes_logits_of_a_few_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    samples = []
    inside = causal_lm_module.loss_in_head

    def spy(model: Any, compute: Any, *, sample: bool) -> Any:
        samples.append(sample)
        return inside(model, compute, sample=sample)

    monkeypatch.setattr(causal_lm_module, "loss_in_head", spy)
    run = trainer(tmp_path, rows(8), per_device_train_batch_size=4, max_steps=2)
    run.train()
    run.evaluate()
    # The first batch runs in train and in eval mode, whose log-probs are compared, and to learn.
    assert samples == [True, True, False, False, False]


def test_mixed_precision_runs_the_head_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Accelerate's autocast is that of the model's forward, and the head's product is in it."""
    seen = []

    def spy(hidden: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return linear_topr_loss(hidden, weight, *args, **kwargs)

    monkeypatch.setattr(causal_lm_module, "linear_topr_loss", spy)
    figures = {}
    for name, settings in {
        "exact": {},
        "fused": {"bf16": True},
        "logits": {"bf16": True, "fused_head": False},
    }.items():
        model = random_model()
        torch.nn.init.normal_(model.lm_head.weight, std=0.5)
        run = trainer(tmp_path, rows(8), model, per_device_train_batch_size=8, **settings)
        run.train()
        figures[name] = run.state.log_history[0]
        assert all(p.dtype == torch.float32 for p in run.model.parameters())
    assert [enabled for enabled, _ in seen] == [False, True]
    assert seen[1][1] == torch.bfloat16
    for name in ("loss", "grad_norm"):
        for found in ("fused", "logits"):
            assert figures[found][name] == pytest.approx(figures["exact"][name], rel=2e-2)
            assert figures[found][name] != figures["exact"][name]


def test_resuming_from_a_checkpoint_gives_the_same_weights(tmp_path: Path):
    changes = {"max_steps": 4, "per_device_train_batch_size": 2, "optim": "adamw_torch"}
    changes |= {"learning_rate": 1e-3}
    whole = trainer(tmp_path / "a", rows(), **changes)
    whole.train()
    half = trainer(tmp_path / "b", rows(), save_strategy="steps", save_steps=2, **changes)
    half.train()
    resumed = trainer(tmp_path / "b", rows(), model=random_model(seed=1), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


# --- metrics ---------------------------------------------------------------------------------


def test_metrics_are_logged_for_training_and_evaluation(tmp_path: Path):
    run = trainer(
        tmp_path, rows(8), per_device_train_batch_size=4, num_train_epochs=1, max_steps=-1
    )
    run.train()
    entries = [e for e in run.state.log_history if "loss" in e]
    assert len(entries) == 2
    for name in ("objective", "weight_negative_mean", "ess_negative", "positive_share", "kl_k3"):
        assert all(name in e for e in entries), name
    assert "entropy" not in entries[0]
    figures = run.evaluate()
    assert figures["eval_positive_share"] == pytest.approx(3 / 8)
    expected = plain_loss(run.model, rows(8)).item()
    assert figures["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert figures["eval_objective"] == pytest.approx(-expected, rel=1e-5)
    json.dumps(run.state.log_history, allow_nan=False)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_ragged_evaluation_is_exact(tmp_path: Path, packing: bool, reduction: str):
    """Batches of 3, 3 and 2, one of whose sequences is empty."""
    data = rows(8, lengths=[3, 1, 4, 0, 2, 4, 1, 2])
    run = trainer(
        tmp_path, data, per_device_eval_batch_size=3, packing=packing, reduction=reduction
    )
    figures = run.evaluate()
    expected = plain_loss(run.model, data, reduction=reduction).item()
    assert figures["eval_loss"] == pytest.approx(expected, rel=1e-5)
    # The objective is the mean over sequences, whatever the reduction.
    mean = plain_loss(run.model, data).item()
    assert figures["eval_objective"] == pytest.approx(-mean, rel=1e-5)


def test_metrics_average_over_the_steps_between_logs(tmp_path: Path):
    fine = trainer(tmp_path, rows(8), per_device_train_batch_size=2, max_steps=4)
    coarse = trainer(tmp_path, rows(8), per_device_train_batch_size=2, max_steps=4, logging_steps=4)
    fine.train()
    coarse.train()
    each = [e for e in fine.state.log_history if "loss" in e]
    (mean,) = [e for e in coarse.state.log_history if "loss" in e]
    for name, reduce in (
        ("objective", lambda x: sum(x) / len(x)),
        ("log_ratio_negative_min", min),
        ("log_ratio_positive_max", max),
    ):
        values = [e[name] for e in each if name in e]
        assert mean[name] == pytest.approx(reduce(values), rel=1e-5), name


def result(
    reward: list[float], log_ratio: list[list[float]], dtype: torch.dtype = torch.float32
) -> TOPROutput:
    """Two-token sequences of a policy that is uniform over four tokens, with given log-ratios."""
    mu = math.log(1 / 4) - torch.tensor(log_ratio, dtype=dtype)
    labels = torch.ones(mu.shape, dtype=torch.int64)
    logits = torch.zeros(*mu.shape, 4, dtype=dtype)
    return topr_loss(logits, labels, mu, torch.tensor(reward, dtype=dtype), shift=False)


def test_metrics_of_batches_are_those_of_all_their_sequences():
    reward = [1.0, -1.0, -1.0, -1.0, 1.0]
    ratios = [[0.3, 0.1], [-2.0, -1.0], [-0.5, 0.1], [0.2, 0.2], [-1.0, 0.4]]
    whole = {k: float(v) for k, v in result(reward, ratios, torch.float64).metrics().items()}
    for cut in (1, 2, 3):
        metrics = SequenceMetrics()
        for part in (slice(cut), slice(cut, None)):
            output = result(reward[part], ratios[part], torch.float64)
            metrics.add(output, (output.length > 0).sum())
        joined = metrics.result()
        loss = float(result(reward, ratios, torch.float64).loss)
        assert joined.pop("loss") == pytest.approx(loss, rel=1e-12)
        assert joined == {k: pytest.approx(v, rel=1e-12) for k, v in whole.items() if v == v}
        assert "entropy" not in joined, "undefined where it was not asked for"
    assert SequenceMetrics().result() == {}


def test_metrics_of_processes_are_joined_however_many_sequences_each_has():
    parts = [result([1.0], [[0.3, 0.1]]), result([-1.0, -1.0], [[-2.0, -1.0], [0.5, 0.1]])]
    rows_of: list[Tensor] = []

    def gather(x: Tensor) -> Tensor:
        """Of the second process, after the first has called as often."""
        rows_of.append(x)
        return torch.cat([firsts[len(rows_of) - 1], x])

    firsts: list[Tensor] = []
    one, other = SequenceMetrics(), SequenceMetrics()
    one.add(parts[0])
    other.add(parts[1])
    # What the first sends: its sums, its number of sequences, and these filled up to the most.
    sequences = torch.nn.functional.pad(one._sequences[0], (0, 1)).reshape(1, -1)
    firsts += [one._sums[0][None], torch.ones(1, 1, dtype=torch.float64), sequences]
    joined, whole = other.result(gather), SequenceMetrics()
    for part in parts:
        whole.add(part)
    assert joined == whole.result() and joined["positive_share"] == pytest.approx(1 / 3)


def test_a_process_without_a_batch_does_not_keep_the_others_waiting():
    """It joins every collective, with nothing to add."""
    one, other = SequenceMetrics(), SequenceMetrics()
    one.add(result([1.0, -1.0], [[0.3, 0.1], [-1.0, 0.2]]))
    sent: list[Tensor] = []

    def record(x: Tensor) -> Tensor:
        sent.append(x)
        return x

    alone = one.result(record)
    joined = iter(sent)
    assert other.result(lambda x: torch.cat([next(joined), x])) == alone
    assert next(joined, None) is None and other.result() == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NegativeWatch().warn(other.result())


def test_metrics_are_joined_on_the_way(monkeypatch: pytest.MonkeyPatch):
    """However many batches there are between two logs."""
    monkeypatch.setattr(SequenceMetrics, "MOST_PARTS", 2)
    metrics, whole = SequenceMetrics(), SequenceMetrics()
    ratios = [[0.3, 0.1], [-1.0, 0.2], [0.5, 0.0], [0.1, 0.1], [-0.3, 0.2]]
    for ratio, reward in zip(ratios, [1.0, -1.0, -1.0, 1.0, -1.0], strict=True):
        metrics.add(result([reward], [ratio]))
    whole.add(result([1.0, -1.0, -1.0, 1.0, -1.0], ratios))
    assert len(metrics._sums) <= 2
    assert metrics.result() == pytest.approx(whole.result(), rel=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_evaluation_does_not_depend_on_the_size_of_its_batches(packing: bool, tmp_path: Path):
    results = []
    for size in (3, 4, 8):
        made = trainer(
            tmp_path,
            rows(8),
            packing=packing,
            per_device_eval_batch_size=size,
            dataloader_drop_last=True,
        )
        found = made.evaluate(rows(10, seed=1))
        results.append({k: v for k, v in found.items() if not k.endswith(("time", "second"))})
        assert made.args.dataloader_drop_last
    assert "eval_ess_negative" in results[0] and "eval_log_ratio_negative_std" in results[0]
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("passed_on", [True, False])
def test_a_term_of_a_subclass_is_averaged_over_the_micro_batches(passed_on: bool, tmp_path: Path):
    class WithTerm(TOPRTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            items = num_items_in_batch if passed_on else None
            loss = super().compute_loss(model, inputs, num_items_in_batch=items)
            return loss + model.get_input_embeddings().weight.square().sum()

    steps = {}
    for micro_batches in (1, 3):
        model = random_model()
        before = model.get_input_embeddings().weight.detach().clone()
        # Of a learning rate this small nothing is left of the loss's own gradient.
        data = [{**r, "reward": r["reward"] * 1e-9} for r in rows(6)]
        settings = config(
            tmp_path,
            per_device_train_batch_size=6 // micro_batches,
            gradient_accumulation_steps=micro_batches,
        )
        WithTerm(model, settings, CompletionCollator(0), train_dataset=data).train()
        steps[micro_batches] = before - model.get_input_embeddings().weight.detach()
        torch.testing.assert_close(steps[micro_batches], 0.1 * 2 * before, rtol=1e-5, atol=1e-6)


def test_noise_that_only_training_has_is_warned_of(tmp_path: Path):
    data = rows(4)
    with pytest.warns(UserWarning, match=r"neftune_noise_alpha=9 adds noise"):
        trainer(tmp_path, data, neftune_noise_alpha=9.0).train()
    made = trainer(tmp_path, data)

    def noise(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        return output + torch.randn_like(output) if module.training else None

    made.model.get_input_embeddings().register_forward_hook(noise)
    with pytest.warns(UserWarning, match="what acts in train mode alone: a hook"):
        made.train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*train mode")
        trainer(tmp_path, data).train()


def test_looking_for_noise_draws_no_random_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Training with dropout in the adapter would else go another way."""
    states = []
    original = TOPRTrainer._topr

    def spied(self: TOPRTrainer, *args: Any) -> Any:
        states.append(torch.get_rng_state())
        return original(self, *args)

    monkeypatch.setattr(TOPRTrainer, "_topr", spied)
    trainer(tmp_path, rows(4), neftune_noise_alpha=9.0).train()
    monkeypatch.setattr(TOPRTrainer, "_warn_of_noise", lambda *args: None)
    trainer(tmp_path, rows(4), neftune_noise_alpha=9.0).train()
    assert torch.equal(*states)


# --- warning ---------------------------------------------------------------------------------


def test_warns_once_where_no_reward_is_negative(tmp_path: Path):
    data = [{**r, "reward": max(r["reward"], 0.0)} for r in rows(4)]
    with pytest.warns(UserWarning, match="positives only") as caught:
        trainer(tmp_path, data, per_device_train_batch_size=2, max_steps=2).train()
    assert sum("positives only" in str(w.message) for w in caught) == 1


def test_does_not_warn_without_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not warn_if_never_negative([1.0, -1.0], 0.0, TOPR)
        assert not warn_if_never_negative([1.0, 0.0], 0.5, TOPR)
        assert not warn_if_never_negative([1.0, 1.0], 0.0, SFT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not warn_if_never_negative([], 0.0, TOPR)


def test_a_collator_may_compute_the_rewards(tmp_path: Path):
    """Records without rewards, and a batch without position_ids: both are the collator's affair."""
    data = rows(4)
    raw = [{k: v for k, v in r.items() if k != "reward"} for r in data]
    pad = CompletionCollator(0)

    def collate(features: list[Row]) -> dict[str, Any]:
        assert "reward" not in features[0]
        by_prompt = {tuple(r["prompt_token_ids"]): r["reward"] for r in data}
        batch = pad([{**f, "reward": by_prompt[tuple(f["prompt_token_ids"])]} for f in features])
        del batch["position_ids"]
        return batch

    args = config(tmp_path, per_device_train_batch_size=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="No reward of this data set")
        run = TOPRTrainer(random_model(), args, data_collator=collate, train_dataset=raw)
    run.train()
    expected = plain_loss(random_model(), data).item()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
