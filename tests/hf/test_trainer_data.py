"""What the Trainer is given: text, data sets, adapters, log mu; and what it says of stale data."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from processes import call, launch
from test_trainer import Row, config, plain_loss, rows, trainer
from tiny import random_model, tiny_config, tiny_tokenizer
from transformers import LlamaForCausalLM, TrainerCallback

from topr_kernels import log_prob
from topr_kernels.hf import (
    CompletionCollator,
    TOPRConfig,
    TOPRTrainer,
    completion_logits,
    find_head,
    initial,
    score_behavior,
)
from topr_kernels.hf import packing as packing_module
from topr_kernels.hf.watch import NegativeWatch, SequenceMetrics

TEXT = [
    {"prompt": "2+2=", "completion": "4", "reward": 1.0},
    {"prompt": "7-3=", "completion": "5", "reward": -1.0},
    {"prompt": "10+1=", "completion": "11", "reward": 1.0},
    {"prompt": "9-9=", "completion": "19 or so", "reward": -1.0},
]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat(record: Row) -> Row:
    return {
        "prompt": [{"role": "user", "content": record["prompt"]}],
        "completion": [{"role": "assistant", "content": record["completion"]}],
        "reward": record["reward"],
    }


@pytest.fixture
def chat_tokenizer(monkeypatch: pytest.MonkeyPatch) -> Any:
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    return tokenizer


# --- where log mu comes from -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "messages", "Dataset"])
@pytest.mark.parametrize("packing", [False, True])
def test_prompt_completion_reward_is_enough(
    tmp_path: Path, kind: str, packing: bool, chat_tokenizer: Any
):
    """A data set as TRL has them: log mu is the initial model's, so every ratio starts at 1."""
    data: Any = [chat(r) for r in TEXT] if kind == "messages" else TEXT
    if kind == "Dataset":
        data = pytest.importorskip("datasets").Dataset.from_list(TEXT)
    run = trainer(
        tmp_path,
        data,
        behavior="initial",
        packing=packing,
        temperature=0.8,
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=0.0,
    )
    record = run.train_dataset[0]
    completion = tiny_tokenizer().decode(record["completion_token_ids"])
    assert completion == "4<eos>" and len(record["behavior_log_prob"]) == 2
    # The same as the plain log-softmax of the model's own logits says.
    batch = CompletionCollator(0)([record])
    logits = completion_logits(random_model(), batch)
    labels = batch["labels"][:, -batch["logits_to_keep"] :]
    expected = log_prob(logits, labels, temperature=0.8).log_prob[0, 1:]
    torch.testing.assert_close(torch.tensor(record["behavior_log_prob"]), expected)
    run.train()
    for entry in run.state.log_history[:2]:
        assert abs(entry["log_ratio_positive_mean"]) < 1e-5
        assert entry["weight_negative_mean"] == pytest.approx(1, abs=1e-5)
    assert run.evaluate()["eval_kl_k3"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("fused_head", [False, True])
def test_mixed_precision_starts_at_ratio_1_as_well(tmp_path: Path, fused_head: bool):
    """mu of 40 tokens each, scored in fp32, would be off by what bf16 rounds in pi."""
    data = [
        {k: x for k, x in r.items() if k != "behavior_log_prob"} for r in rows(8, lengths=[40] * 8)
    ]
    model = random_model()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    run = trainer(
        tmp_path,
        data,
        model,
        behavior="initial",
        bf16=True,
        fused_head=fused_head,
        per_device_train_batch_size=8,
    )
    run.train()
    entry = run.state.log_history[0]
    ratios = [x for name, x in entry.items() if name.startswith("log_ratio_")]
    assert len(ratios) == 8 and set(ratios) == {0.0}


class Waiting(torch.nn.Linear):
    """Records where it was moved to."""

    def to(self, device: Any) -> Any:
        moves.append(str(device))
        return self


moves: list[str] = []


def test_a_model_that_waits_for_its_wrapper_is_scored_where_it_will_train(
    monkeypatch: pytest.MonkeyPatch,
):
    """FSDP and DeepSpeed leave the model on the CPU until training begins."""
    free = SimpleNamespace(mem_get_info=lambda _: (10_000, 20_000))
    monkeypatch.setattr(torch, "get_device_module", lambda _: free)
    device = torch.device("cuda", 0)

    def moved(model: Any, device: Any) -> list[str]:
        moves.clear()
        with initial._on(model, device):
            pass
        return list(moves)

    assert moved(Waiting(8, 8), device) == ["cuda:0", "cpu"]
    assert moved(Waiting(8, 8), torch.device("cpu")) == []
    with pytest.warns(UserWarning, match=r"do not fit.*on cuda:0.*on the CPU.*behavior='recorded'"):
        assert moved(Waiting(64, 64), device) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert moved(Waiting(64, 64, device="meta"), device) == []
        placed = Waiting(64, 64)
        placed.hf_device_map = {"": "cpu"}
        assert moved(placed, device) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: setattr(p, "ds_id", 0), r"ZeRO-3 partitioned .*as it was loaded"),
        (lambda p: setattr(p, "full_tensor", p.clone), r"is sharded over the processes"),
    ],
)
def test_a_model_that_is_not_whole_cannot_be_scored(tmp_path: Path, change: Any, message: str):
    model = random_model()
    model.lm_head.weight.data = torch.empty(0)
    change(model.lm_head.weight)
    with pytest.raises(ValueError, match=rf"'initial', but .*{message}.*behavior='recorded'"):
        trainer(tmp_path, TEXT, model, behavior="initial")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_token_ids": []}, r"record 3, field 'prompt': has no tokens"),
        ({"completion_token_ids": None}, r"record 3, field 'completion_token_ids': is missing"),
    ],
)
def test_a_record_that_cannot_be_scored_is_named(tmp_path: Path, change: Row, message: str):
    datasets = pytest.importorskip("datasets")
    data = [{k: x for k, x in r.items() if k != "behavior_log_prob"} for r in rows(6)]
    data[3] |= change
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, datasets.Dataset.from_list(data), behavior="initial")


def dropout_warnings(folder: Path, model: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(folder, rows(8), model, per_device_train_batch_size=4, max_steps=2).train()
    return [str(w.message) for w in caught if "drops out" in str(w.message)]


def test_warns_once_of_dropout(tmp_path: Path):
    model = LlamaForCausalLM(tiny_config(attention_dropout=0.5))
    (message,) = dropout_warnings(tmp_path, model)
    first = r"model\.layers\.0\.self_attn\.attention_dropout of the model is 0.5 and 1 more: .*"
    assert re.match(first + r"with attention_dropout=0.0 in its config", message)
    model = random_model()
    model.model.norm = torch.nn.Sequential(model.model.norm, torch.nn.Dropout(0.25))
    (message,) = dropout_warnings(tmp_path, model)
    assert message.startswith("model.norm.1 of the model is 0.25: ")
    assert "Load the model without it" in message
    assert dropout_warnings(tmp_path, random_model()) == []


def test_scoring_runs_in_eval_mode_and_leaves_the_mode_as_it_was(tmp_path: Path):
    found = []
    for training in (True, False):
        torch.manual_seed(0)
        model = LlamaForCausalLM(tiny_config(attention_dropout=0.5)).train(training)
        model.lm_head.train(not training)
        run = trainer(tmp_path, TEXT, model, behavior="initial")
        assert model.training == training == model.model.training != model.lm_head.training
        found.append([r["behavior_log_prob"] for r in run.train_dataset])
    assert found[0] == found[1]


def test_the_first_packed_batch_checks_that_sequences_stay_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = []
    monkeypatch.setattr(packing_module, "check_packing", lambda *args, **_: calls.append(args))
    for packing in (False, True):
        trainer(
            tmp_path,
            rows(8),
            packing=packing,
            share_prefix=False,
            per_device_train_batch_size=4,
            max_steps=2,
        ).train()
        assert len(calls) == packing


def test_recorded_log_probs_are_never_replaced_nor_missed(tmp_path: Path):
    # A positive needs none in TOPR, so the first negative is named.
    message = r"record 1 has no behavior_log_prob.*-1 with baseline=0 is a neg.*behavior='initial'"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, TEXT)
    with pytest.raises(ValueError, match=r"record 0 has no behavior_log_prob.*is a positive"):
        trainer(tmp_path, TEXT, limits="tis")
    with pytest.raises(ValueError, match=r"record 0 has a behavior_log_prob.*drop the column"):
        trainer(tmp_path, rows(4), behavior="initial")
    mixed = [*rows(2), {**rows(1)[0], "behavior_log_prob": None, "reward": -1.0}]
    with pytest.raises(ValueError, match=r"record 2 has no behavior_log_prob"):
        trainer(tmp_path, mixed)
    with pytest.raises(ValueError, match=r"behavior: expected one of"):
        config(tmp_path, behavior="current")


def ids_only(data: list[Row]) -> list[Row]:
    return [{k: v for k, v in r.items() if k != "behavior_log_prob"} for r in data]


class Tagged(CompletionCollator):
    """A subclass that changes what the model sees: the last token of every prompt."""

    def __call__(self, features: Any) -> dict[str, Any]:
        batch = super().__call__(features)
        first = batch["labels"].ne(-100).int().argmax(1)
        batch["input_ids"][torch.arange(len(first)), first - 1] = 7
        return batch


@pytest.mark.parametrize("kind", ["function", "subclass", "other order", "unscored"])
def test_the_collator_of_training_scores(kind: str, tmp_path: Path):
    """Every ratio is 1 at the first step, whatever collator makes the batches."""
    pad = CompletionCollator(0)
    seen: list[Any] = []

    def collate(features: list[Row]) -> dict[str, Any]:
        seen.append([f["tag"] for f in features])
        # Longest first, so in another order than the records'.
        size = (lambda f: -len(f["completion_token_ids"])) if kind == "other order" else None
        batch = pad(sorted(features, key=size) if size else features)
        if kind == "unscored":
            batch["labels"][batch["input_ids"] % 2 == 0] = -100
        return batch

    data = [{**r, "tag": i} for i, r in enumerate(ids_only(rows(6)))]
    own = Tagged(0) if kind == "subclass" else collate
    run = TOPRTrainer(
        random_model(),
        config(tmp_path, behavior="initial", per_device_train_batch_size=3),
        own,
        train_dataset=data,
    )
    run.train()
    figures = run.state.log_history[0]
    assert figures["log_ratio_negative_max"] == figures["log_ratio_positive_min"] == 0
    assert figures["kl_k3"] == 0 and figures["length_mean"] > 0


def test_a_collator_that_drops_log_mu_is_refused_before_training(tmp_path: Path):
    pad, calls = CompletionCollator(0), itertools.count()

    def summed(features: list[Row]) -> dict[str, Any]:
        batch = pad(features)
        return {**batch, "behavior_log_prob": batch["behavior_log_prob"].sum(1)}

    def replaced(features: list[Row]) -> dict[str, Any]:
        return pad(
            [{**f, "behavior_log_prob": [0.0] * len(f["completion_token_ids"])} for f in features]
        )

    def drawn(features: list[Row]) -> dict[str, Any]:
        batch = pad(features)
        batch["labels"][:, -1 - next(calls) % 2] = -100
        return batch

    for own, problem in (
        (summed, "it changes, sums or drops them"),
        (replaced, "it changes, sums or drops them"),
        (drawn, "scores other tokens of the same records at each call"),
    ):
        with pytest.raises(ValueError, match=rf"data_collator: .*{problem}.*behavior='recorded'"):
            settings = config(tmp_path, behavior="initial")
            TOPRTrainer(random_model(), settings, own, train_dataset=ids_only(rows(6)))


def test_an_offloaded_model_scores_log_mu():
    accelerate = pytest.importorskip("accelerate")
    options: dict[str, Any] = {"batch_size": 4, "fused_head": False, "progress": False}
    expected = score_behavior(random_model(), rows(6), CompletionCollator(0), **options)
    model = accelerate.cpu_offload(random_model(), execution_device="cpu")
    assert all(p.is_meta for p in model.parameters()) and initial._problem(model) is None
    assert score_behavior(model, rows(6), CompletionCollator(0), **options) == expected
    with pytest.raises(ValueError, match=r"weight is offloaded .*fused_head=False"):
        score_behavior(model, rows(6), CompletionCollator(0), **{**options, "fused_head": True})


def test_an_offloaded_model_is_not_trained(tmp_path: Path):
    """Before anything runs; where it lies on its device, hooks do not matter."""
    accelerate = pytest.importorskip("accelerate")
    for offload in (
        lambda model: accelerate.cpu_offload(model, execution_device="cpu"),
        lambda model: accelerate.dispatch_model(
            model, {"model": "cpu", "lm_head": "disk"}, offload_dir=tmp_path, force_hooks=True
        ),
    ):
        with pytest.raises(ValueError, match=r"model: its .* is offloaded .*FSDP .*cpu_offload"):
            trainer(tmp_path, rows(4), offload(random_model()), fused_head=False)
    placed = accelerate.dispatch_model(random_model(), {"": "cpu"}, force_hooks=True)
    run = trainer(tmp_path, rows(4), placed)
    run.train()
    assert run.state.log_history[0]["grad_norm"] > 0


@pytest.mark.parametrize("fused_head", [False, True])
def test_a_model_that_gives_nan_scores_no_log_mu(fused_head: bool):
    """Above all not 0, which would be a probability of 1."""
    model, data = random_model(), rows(6)
    with torch.no_grad():
        model.get_input_embeddings().weight[data[4]["prompt_token_ids"][-1]] = torch.nan
    held = [
        i for i, r in enumerate(data) if data[4]["prompt_token_ids"][-1] in r["prompt_token_ids"]
    ]
    options: dict[str, Any] = {"batch_size": 1, "fused_head": fused_head, "progress": False}
    first = next(i for i in held if data[i]["completion_token_ids"])
    with pytest.raises(ValueError, match=rf"record {first}: .*log-probability of NaN|differ"):
        score_behavior(model, data, CompletionCollator(0), **options)


def test_a_compiled_model_trains_as_the_model_in_it(tmp_path: Path):
    weights = []
    for changes in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        torch._dynamo.reset()
        torch.manual_seed(0)
        # Each layer is traced anew.
        model = LlamaForCausalLM(tiny_config(num_hidden_layers=1))
        changes |= {"max_steps": 2, "per_device_train_batch_size": 4}
        run = trainer(tmp_path, rows(8), model, **changes)
        run.train()
        weights.append([p.detach().clone() for p in run.model.parameters()])
    for p, q in zip(*weights, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_default_dtype_of_the_user_changes_no_score():
    model, data, collate = random_model(), rows(2), CompletionCollator(0)
    options = {"batch_size": 2, "progress": False}
    expected = score_behavior(model, data, collate, **options)
    torch.set_default_dtype(torch.float64)
    try:
        assert score_behavior(model, data, collate, **options) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_compiled_model_scores_as_the_model_in_it():
    torch._dynamo.reset()
    model, data, collate = random_model(), rows(2), CompletionCollator(0)
    options = {"batch_size": 2, "progress": False}
    compiled = torch.compile(model, backend="eager")
    found = score_behavior(compiled, data, collate, **options)
    for row, other in zip(found, score_behavior(model, data, collate, **options), strict=True):
        assert row == pytest.approx(other, abs=1e-5)


def test_a_data_set_of_the_constructor_is_known_again(tmp_path: Path):
    """Although the one in use is a prepared copy, and the model that scored it is gone."""
    data = ids_only(rows(6))
    run = trainer(tmp_path, data, behavior="initial", max_steps=1)
    run.train()
    assert run.evaluate(data).keys() >= {"eval_loss"}
    with pytest.raises(ValueError, match=r"after 1 steps with behavior='initial'"):
        run.evaluate(ids_only(rows(5)))


def test_a_head_of_another_kind_of_weight_is_refused():
    class Quantised(torch.Tensor):
        """What torchao puts into an nn.Linear."""

    model = random_model()
    weight = model.lm_head.weight.detach().as_subclass(Quantised)
    model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(
        ValueError, match=r"weight is a .*Quantised; expected a plain tensor.*fused"
    ):
        find_head(model)


def test_a_resumed_run_does_not_score_the_model_of_its_checkpoint(tmp_path: Path):
    settings = {"behavior": "initial", "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, TEXT, max_steps=2, **settings).train()
    checkpoint = tmp_path / "checkpoint-2"
    learnt = LlamaForCausalLM.from_pretrained(checkpoint)
    for where in (str(checkpoint), True):
        run = trainer(tmp_path, TEXT, learnt, max_steps=3, **settings)
        with pytest.raises(
            ValueError, match=r"'initial', but log mu of .*checkpoint-2 is not that of"
        ):
            run.train(resume_from_checkpoint=where)
    other = trainer(tmp_path, TEXT[:3], max_steps=3, **settings)
    with pytest.raises(ValueError, match="the records are others"):
        other.train(resume_from_checkpoint=True)
    nearly = random_model()
    with torch.no_grad():
        nearly.lm_head.weight.mul_(1 + 1e-3)
    with pytest.warns(UserWarning, match=r"behavior='initial': log mu of .*checkpoint-2 is not"):
        trainer(tmp_path, TEXT, nearly, max_steps=3, **settings).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("nats", "bf16", "warns"), [(5e-5, 0, 0), (5e-4, 0, 1), (5e-4, 1, 0)])
def test_what_another_batch_rounds_apart_is_no_news(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, nats: float, bf16: int, warns: int
):
    """Scored in batches of another size, log mu has other last digits: more of them in bf16."""
    run = trainer(tmp_path, TEXT[:2], behavior="initial", bf16=bool(bf16))
    scored = run._scored_by
    assert scored is not None
    other = [scored.first[0] + nats, *scored.first[1:]]
    (tmp_path / scored.NAME).write_text(json.dumps(other))
    recwarn.clear()
    scored.check(tmp_path)
    assert len(recwarn) == warns


def test_a_stream_cannot_be_scored_before_training(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_list(TEXT).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"IterableDataset that has no length"):
        trainer(tmp_path, stream, behavior="initial")
    # Recorded ones train as they come.
    stream = datasets.Dataset.from_list(rows(8)).to_iterable_dataset()
    run = trainer(tmp_path, stream, per_device_train_batch_size=4, max_steps=2)
    run.train()
    assert run.state.log_history[1]["grad_norm"] > 0


def initial_worker(folder: str) -> None:
    """Two processes score a share each and must end with the same records."""
    data = TEXT[:3]
    run = trainer(Path(folder), data, behavior="initial", ddp_backend="gloo")
    one = [r["behavior_log_prob"] for r in run.train_dataset]
    torch.save(one, Path(folder) / f"{run.args.process_index}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
def test_processes_share_the_scoring(tmp_path: Path):
    launch(2, "test_trainer_data.initial_worker", str(tmp_path))
    alone = trainer(tmp_path, TEXT[:3], behavior="initial").train_dataset
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert [len(x) for x in found] == [2, 2, 3]
        for a, b in zip(found, alone, strict=True):
            assert a == pytest.approx(b["behavior_log_prob"], abs=1e-5)


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.04}, r"beta: got 0.04.*linear_log_prob"),
        ({"entropy_coef": 0.01}, r"entropy_coef: got 0.01.*linear_log_prob"),
        ({"label_smoothing_factor": 0.5}, r"label_smoothing_factor: got 0.5.*leave it 0"),
        (
            {"parallelism_config": SimpleNamespace(cp_size=2, sp_size=1)},
            r"parallelism_config: got cp_size=2 and sp_size=1.*linear_topr_loss\(sequence_group=",
        ),
        (
            {"parallelism_config": SimpleNamespace(cp_size=1, sp_size=4)},
            r"parallelism_config: got cp_size=1 and sp_size=4.*linear_topr_loss\(sequence_group=",
        ),
        ({"impl": "nope"}, r"impl: expected one of 'auto', 'torch'.*got 'nope'"),
        ({"impl": "triton_staged"}, r"impl: expected one of 'auto', 'torch'.*got 'triton_staged'"),
        ({"workspace_bytes": -1}, r"workspace_bytes: expected at least"),
    ],
)
def test_config_refuses(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workspace_bytes": "x"}, r"workspace_bytes: expected an int, got str"),
        ({"workspace_bytes": True}, r"workspace_bytes: expected an int, got bool"),
        ({"entropy": "yes"}, r"entropy: expected True or False, got 'yes'"),
        ({"fused_head": 1}, r"fused_head: expected True or False, got 1"),
        ({"packing": "false"}, r"packing: expected True or False, got 'false'"),
    ],
)
def test_config_refuses_types(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(TypeError, match=message):
        config(tmp_path, **changes)


def test_config_takes_the_implementations_of_its_path(tmp_path: Path):
    assert config(tmp_path, impl="triton_staged", fused_head=False).impl == "triton_staged"
    assert config(tmp_path, impl="native", workspace_bytes=1 << 20).impl == "native"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("compute_loss_func", r"compute_loss_func: .*never calls it.*compute_loss"),
        ("compute_metrics", r"compute_metrics: .*never calls it.*metrics of TOPROutput"),
        ("preprocess_logits_for_metrics", r"preprocess_logits_for_metrics: .*never calls it"),
    ],
)
def test_functions_that_would_never_be_called_are_refused(tmp_path: Path, name: str, message: str):
    given = {"train_dataset": rows(), "processing_class": tiny_tokenizer()}
    with pytest.raises(ValueError, match=message):
        TOPRTrainer(random_model(), config(tmp_path), **given, **{name: lambda *_: None})
    TOPRTrainer(random_model(), config(tmp_path), **given, **{name: None})


@pytest.mark.parametrize("name", ["packing", "share_prefix", "mask_truncated"])
def test_settings_of_the_collator_do_not_go_with_another_one(tmp_path: Path, name: str):
    args = config(tmp_path, **{name: True})
    with pytest.raises(ValueError, match=rf"{name}: got True with a data_collator"):
        TOPRTrainer(random_model(), args, CompletionCollator(0), rows())


@pytest.mark.parametrize("packing", [False, True])
def test_batches_are_not_joined_and_cut_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
):
    """Those that the main process dispatches: of different width, or one row."""
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_list(rows(8)).to_iterable_dataset()
    args = config(tmp_path, packing=packing)

    def make(collator: Any = None, **data: Any) -> TOPRTrainer:
        return TOPRTrainer(
            random_model(), args, collator, processing_class=tiny_tokenizer(), **data
        )

    make(train_dataset=stream)
    monkeypatch.setattr(TOPRConfig, "world_size", 2)
    message = r"the main process.*accelerator_config=\{'dispatch_batches': False\}"
    for data in (
        {"train_dataset": stream},
        {"eval_dataset": stream},
        {"train_dataset": rows(), "eval_dataset": {"easy": rows(), "hard": stream}},
    ):
        with pytest.raises(ValueError, match=message):
            make(**data)
    args.accelerator_config.dispatch_batches = True
    with pytest.raises(ValueError, match=message):
        make(train_dataset=rows())
    args.accelerator_config.dispatch_batches = False
    make(train_dataset=stream)
    # Batches of another collator may well be equally wide.
    if not packing:
        args.accelerator_config.dispatch_batches = None
        make(lambda features: {}, train_dataset=stream)


def test_bad_records_are_refused_before_training(tmp_path: Path):
    with pytest.raises(ValueError, match=r"record 1.*reward"):
        trainer(tmp_path, [TEXT[0], {"prompt": "a", "completion": "b"}], behavior="initial")


def test_truncated_completions_are_not_counted(tmp_path: Path):
    data = rows(6)
    cut = [{**r, "finish_reason": "length" if i in (1, 4) else "stop"} for i, r in enumerate(data)]
    kept = [r for i, r in enumerate(data) if i not in (1, 4)]
    expected = plain_loss(random_model(), kept).item()
    run = trainer(tmp_path, cut, mask_truncated=True, per_device_train_batch_size=6)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


# --- time for a new iteration --------------------------------------------------------------------


def stale(*windows: list[float]) -> list[str]:
    """Warnings about negatives of those weights, a list per log; each log three times over."""
    from topr_kernels import topr_loss_from_log_prob

    watch = NegativeWatch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for weights in windows:
            log_pi = torch.tensor(weights).log()[:, None].clamp(min=-1e3)
            nothing, one = torch.zeros_like(log_pi), torch.ones_like(log_pi)
            out = topr_loss_from_log_prob(log_pi, one, nothing, -one[:, 0])
            metrics = SequenceMetrics()
            for _ in range(3):
                metrics.add(out)
            watch.warn(metrics.result())
    return [str(w.message) for w in caught]


def test_warns_once_when_negatives_stopped_teaching():
    (dead,) = stale([1e-9] * 6 + [1.0] * 4)
    assert "60% of the negatives have a weight below 1e-06" in dead and "new iteration" in dead
    (few,) = stale([0.5] + [1e-4] * 19)
    assert "60 negatives count for only 3.0" in few
    assert stale([1e-9] * 4 + [1.0] * 6) == []
    assert stale([0.3] * 5) == []
    assert len(stale([0.0] * 5)) == 1
    # Each log is judged by itself.
    assert len(stale([1e-9] * 3 + [1.0] * 7, [1e-9] * 6 + [1.0] * 4)) == 1
    assert len(stale([1e-9] * 6 + [1.0] * 4, [1e-9] * 6 + [1.0] * 4)) == 1


def test_the_trainer_warns(tmp_path: Path):
    # An untrained model gives a token a probability of about 1 in 100.
    data = rows(8, lengths=[5] * 8)
    for row in data:
        row["behavior_log_prob"] = [0.0] * len(row["behavior_log_prob"])
    with pytest.warns(UserWarning, match="of the negatives have a weight below"):
        trainer(tmp_path, data, per_device_train_batch_size=8).train()


# --- adapters, checkpoints, reports -----------------------------------------------------------


@pytest.mark.parametrize("on_head", [False, True])
def test_peft_trains_its_adapters_only_and_saves_them(tmp_path: Path, on_head: bool):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj"] + (["lm_head"] if on_head else [])
    model = peft.get_peft_model(random_model(), peft.LoraConfig(r=4, target_modules=targets))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = trainer(
        tmp_path, rows(8), model, per_device_train_batch_size=4, max_steps=3, learning_rate=0.05
    )
    run.train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in n for n in changed) == on_head
    run.save_model(str(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(random_model(), str(tmp_path / "adapter"))
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


def test_gradient_checkpointing_gives_the_same_step(tmp_path: Path):
    norms = []
    for checkpointing in (False, True):
        run = trainer(
            tmp_path,
            rows(8),
            random_model(),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            gradient_checkpointing=checkpointing,
        )
        run.train()
        norms.append(run.state.log_history[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-6) and norms[0] > 0.05


UNBROKEN = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "save_strategy": "steps",
    "save_steps": 2,
}


class Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            signal.raise_signal(signal.SIGKILL)


def killed_worker(folder: str) -> None:
    # It is of no group.
    del os.environ["RANK"], os.environ["LOCAL_RANK"]
    torch.set_num_threads(1)
    run = trainer(Path(folder), TEXT, behavior="initial", packing=True, **UNBROKEN)
    run.add_callback(Kill())
    run.train()


def test_a_killed_run_resumes_to_the_weights_of_an_unbroken_one(tmp_path: Path):
    """SIGKILL, not an exception: nothing gets to clean up."""
    job = {"world": 1, "function": "test_trainer_data.killed_worker", "timeout": 150, "env": {}}
    args, imports = [str(tmp_path / "killed")], ["topr_kernels.hf.trainer"]
    status = call("processes.run", args=args, imports=imports, folder=str(tmp_path), **job)
    assert status == [-signal.SIGKILL], (tmp_path / "0").read_text()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resumed = trainer(tmp_path / "killed", TEXT, behavior="initial", packing=True, **UNBROKEN)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 6
        whole = trainer(tmp_path / "whole", TEXT, behavior="initial", packing=True, **UNBROKEN)
        whole.train()
    finally:
        torch.set_num_threads(threads)
    start = random_model()
    for p, q, r in zip(
        whole.model.parameters(), resumed.model.parameters(), start.parameters(), strict=True
    ):
        assert torch.equal(p, q) and not torch.equal(p, r)


def test_metrics_reach_tensorboard(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trainer(
        tmp_path,
        rows(8),
        report_to="tensorboard",
        per_device_train_batch_size=4,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
    )
    run.train()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"train/objective", "train/ess_negative", "eval/objective"} <= names
