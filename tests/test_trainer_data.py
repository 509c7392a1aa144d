"""What the Trainer is given: text, data sets, adapters, log mu; and what it says of stale data."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from processes import TESTS, launch
from test_trainer import Row, config, plain_loss, rows, trainer
from tiny import random_model, tiny_config, tiny_tokenizer
from transformers import LlamaForCausalLM, TrainerCallback

from topr_kernels import log_prob
from topr_kernels.hf import CompletionCollator, TOPRConfig, TOPRTrainer, completion_logits
from topr_kernels.hf import trainer as trainer_module
from topr_kernels.hf.trainer import NegativeWatch

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


def test_scoring_runs_in_eval_mode_and_leaves_the_mode_as_it_was(tmp_path: Path):
    found = []
    for training in (True, False):
        torch.manual_seed(0)
        model = LlamaForCausalLM(tiny_config(attention_dropout=0.5)).train(training)
        run = trainer(tmp_path, TEXT, model, behavior="initial")
        assert model.training == training
        found.append([r["behavior_log_prob"] for r in run.train_dataset])
    assert found[0] == found[1]


def test_the_first_packed_batch_checks_that_sequences_stay_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = []
    monkeypatch.setattr(trainer_module, "check_packing", lambda *args, **_: calls.append(args))
    for packing in (False, True):
        trainer(
            tmp_path, rows(8), packing=packing, per_device_train_batch_size=4, max_steps=2
        ).train()
        assert len(calls) == packing


def test_recorded_log_probs_are_never_replaced_nor_missed(tmp_path: Path):
    with pytest.raises(ValueError, match=r"record 0 has no behavior_log_prob.*behavior='initial'"):
        trainer(tmp_path, TEXT)
    with pytest.raises(ValueError, match=r"record 0 has a behavior_log_prob.*drop the column"):
        trainer(tmp_path, rows(4), behavior="initial")
    mixed = [*rows(2), {**rows(1)[0], "behavior_log_prob": None}]
    with pytest.raises(ValueError, match=r"record 2 has no behavior_log_prob"):
        trainer(tmp_path, mixed)
    with pytest.raises(ValueError, match=r"behavior: expected one of"):
        config(tmp_path, behavior="current")


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
    code = "import sys, test_trainer_data; test_trainer_data.initial_worker(sys.argv[1])"
    launch(2, code, str(tmp_path))
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
        ({"packing": True, "share_prefix": True}, r"packing: got True with share_prefix=True"),
    ],
)
def test_config_refuses(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


@pytest.mark.parametrize("name", ["packing", "share_prefix", "mask_truncated"])
def test_settings_of_the_collator_do_not_go_with_another_one(tmp_path: Path, name: str):
    args = config(tmp_path, **{name: True})
    with pytest.raises(ValueError, match=rf"{name}: got True with a data_collator"):
        TOPRTrainer(random_model(), args, CompletionCollator(0), rows())


def test_packed_batches_are_not_cut_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Batches that the main process dispatches are cut along their first dimension."""
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_list(rows(8)).to_iterable_dataset()
    args = config(tmp_path, packing=True)
    TOPRTrainer(random_model(), args, train_dataset=stream, processing_class=tiny_tokenizer())
    monkeypatch.setattr(TOPRConfig, "world_size", 2)
    with pytest.raises(ValueError, match=r"packing: the main process.*dispatch_batches"):
        TOPRTrainer(random_model(), args, train_dataset=stream, processing_class=tiny_tokenizer())
    args.accelerator_config.dispatch_batches = False
    TOPRTrainer(random_model(), args, train_dataset=stream, processing_class=tiny_tokenizer())


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
            for _ in range(3):
                watch.add(out)
            watch.warn(lambda x: x)
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
    data = rows(8)
    for row in data:
        row["behavior_log_prob"] = [30.0] * len(row["behavior_log_prob"])
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
    torch.set_num_threads(1)
    run = trainer(Path(folder), TEXT, behavior="initial", packing=True, **UNBROKEN)
    run.add_callback(Kill())
    run.train()


def test_a_killed_run_resumes_to_the_weights_of_an_unbroken_one(tmp_path: Path):
    """SIGKILL, not an exception: nothing gets to clean up."""
    code = "import sys, test_trainer_data; test_trainer_data.killed_worker(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "killed")],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
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
