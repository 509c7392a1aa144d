"""TOPRGRPOTrainer: TOPR in TRL's GRPOTrainer."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")

from datasets import Dataset
from peft import LoraConfig
from processes import launch
from tiny import tiny_config, tiny_model, tiny_tokenizer
from transformers import MixtralConfig, MixtralForCausalLM, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from topr_kernels import SFT, TOPR, Limits
from topr_kernels.hf import trl as module
from topr_kernels.hf.trl import TOPRGRPOTrainer

Inputs = dict[str, Any]

PROMPTS = [
    f"{i} + {j} = " for i, j in ((1, 2), (3, 4), (5, 0), (2, 2), (7, 1), (0, 6), (4, 4), (9, 0))
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def digits(completions: list[str], **_: Any) -> list[float]:
    """Rewards that differ between the completions of a group, whatever the model says."""
    return [sum(map(ord, text)) % 7 - 0.5 * len(text) for text in completions]


def config(folder: Path, **changes: Any) -> GRPOConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_grad_norm": 1e9,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
    }
    return GRPOConfig(**{**settings, **changes})


def trainer(
    folder: Path,
    *,
    kind: type[GRPOTrainer] = TOPRGRPOTrainer,
    reward: Any = digits,
    topr: dict[str, Any] | None = None,
    lora: bool = False,
    rollout: Any = None,
    model: Any = None,
    **changes: Any,
) -> Any:
    peft = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]) if lora else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*rollout_func")
        result = kind(
            tiny_model() if model is None else model,
            reward,
            config(folder, **changes),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:2]}),
            processing_class=tiny_tokenizer(),
            peft_config=peft,
            rollout_func=rollout,
            **(topr or {}),
        )
    result.remove_callback(PrinterCallback)
    return result


def parameters(run: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}


def micro_batch(
    seed: int = 0, size: int = 4, lengths: tuple[int, ...] = (5, 0, 3, 6), **changes: Any
) -> Inputs:
    """What TRL passes to `_compute_loss`; one completion is empty, one has a tool's tokens."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    completion_mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    tool_mask = torch.ones(size, width, dtype=torch.int64)
    tool_mask[3, 2:4] = 0
    prompt_mask = torch.ones(size, 7, dtype=torch.int64)
    prompt_mask[0, :2] = 0
    return {
        "prompt_ids": torch.randint(2, 90, (size, 7), generator=generator),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(2, 90, (size, width), generator=generator),
        "completion_mask": completion_mask,
        "tool_mask": tool_mask,
        "advantages": torch.tensor([1.5, -2.0, -0.7, -0.4]),
        # Near the log-probs of the model, or negatives would have weight 0.
        "old_per_token_logps": -9.5 - 0.5 * torch.rand(size, width, generator=generator),
        "num_items_in_batch": completion_mask.sum(),
        **changes,
    }


def prepared(run: Any, batches: list[Inputs], steps: int = 1) -> Any:
    """The trainer in the state in which TRL calls `_compute_loss`."""
    run.model.train()
    run.args.steps_per_generation = len(batches)
    run._buffered_inputs = batches
    run.current_gradient_accumulation_steps = steps
    return run


def formula(
    model: Any, inputs: Inputs, mu: torch.Tensor | None, limits: Limits, temperature: float
) -> torch.Tensor:
    """The paper's loss with the sequence ratio, in fp64, sequence by sequence, without trl or us."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=mask).logits.double()[:, 6:-1] / temperature
    log_prob = logits.log_softmax(-1).gather(2, inputs["completion_ids"][..., None])[..., 0]
    total, count = 0, 0
    for i, reward in enumerate(inputs["advantages"].tolist()):
        scored = (inputs["completion_mask"][i] * inputs["tool_mask"][i]).bool()
        if not scored.any():
            continue
        count += 1
        row = log_prob[i][scored]
        x = (row - (row.detach() if mu is None else mu[i][scored].double())).sum()
        low, high = (
            (limits.pos_min, limits.pos_max) if reward >= 0 else (limits.neg_min, limits.neg_max)
        )
        c = x.clamp(math.log(low) if low else -math.inf, math.log(high)).detach()
        objective = c.exp() * (1 + x - c) if not (low < x.exp() < high) else x.exp()
        total = total - reward * objective / len(row)
    return total / count


def gradients(run: Any) -> dict[str, torch.Tensor]:
    found = {
        n: p.grad.clone()
        for n, p in run.model.named_parameters()
        if p.requires_grad and p.grad is not None
    }
    run.model.zero_grad()
    return found


def logged(run: Any) -> dict[str, float]:
    """What the trainer logs of the micro-batches since the last log."""
    figures = {"loss" if run.model.training else "eval_loss": 0.0}
    run.log(figures)
    return figures


def norm(grads: dict[str, torch.Tensor]) -> float:
    return torch.stack([g.norm() for g in grads.values()]).norm().item()


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys() and norm(expected) > 1e-3
    for name, g in expected.items():
        torch.testing.assert_close(actual[name], g, rtol=1e-4, atol=1e-6 * norm(expected), msg=name)


# --- one call -------------------------------------------------------------------------------


def test_nothing_of_trl_but_the_loss_is_overridden():
    """A new version of TRL has to be read for what we replace and no more."""
    own = {n for n in vars(TOPRGRPOTrainer) if not n.startswith("__")}
    assert {n for n in own if hasattr(GRPOTrainer, n)} == {"_compute_loss", "log"}
    assert own == {"_compute_loss", "log", "_topr_normalizer", "_topr_log", "_topr_gather"}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("mu", ["sampling_per_token_logps", "old_per_token_logps", "current"])
def test_loss_and_gradient_are_those_of_the_formula(tmp_path: Path, mu: str, lora: bool):
    limits, temperature = Limits(0.5, 2.0, 0.0, 0.8), 1.3
    # Under mu the signs of the log-ratios differ: both tails and the middle of the taper are hit.
    inputs = micro_batch()
    run = trainer(tmp_path, topr={"limits": limits}, temperature=temperature, lora=lora)
    with torch.no_grad():
        for module_ in run.model.modules():
            if hasattr(module_, "lora_B"):
                torch.nn.init.normal_(module_.lora_B["default"].weight, std=0.2)
    near = run._get_per_token_logps_and_entropies(
        run.model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        6,
    )[0].detach()
    # Log-ratios of +1 (above the limit), -2 (inside), +0.1 (inside of nothing: above 0.8).
    shift = torch.tensor([1.0, 9.0, -2.0, 0.1]) / torch.tensor([5, 1, 3, 4])
    inputs["old_per_token_logps"] = near - shift[:, None]
    if mu == "sampling_per_token_logps":
        # The sampler's are taken where both are there.
        inputs["sampling_per_token_logps"] = inputs["old_per_token_logps"]
        inputs["old_per_token_logps"] = near - 5
    elif mu == "current":
        del inputs["old_per_token_logps"]
    # PITFALLS 18: what is not scored is never read.
    unscored = inputs["completion_mask"] * inputs["tool_mask"] == 0
    for name in ("old_per_token_logps", "sampling_per_token_logps"):
        if name in inputs:
            inputs[name] = inputs[name].masked_fill(unscored, math.nan)
    expected = formula(run.model, inputs, inputs.get(mu), limits, temperature)
    expected.backward()
    expected_gradients = gradients(run)
    assert expected.abs() > 1e-3
    loss = prepared(run, [inputs])._compute_loss(run.model, inputs)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert_same(gradients(run), expected_gradients)


def test_a_log_prob_that_the_sampler_could_not_give_moves_nothing(tmp_path: Path):
    inputs = micro_batch(sampling_per_token_logps=torch.full((4, 6), -9.7))
    # The second is a tool's, and no news.
    inputs["sampling_per_token_logps"][[0, 3], [1, 2]] = math.nan
    run = trainer(tmp_path)
    loss = prepared(run, [inputs])._compute_loss(run.model, inputs)
    known = run._get_per_token_logps_and_entropies(
        run.model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        6,
    )[0].detach()
    inputs["sampling_per_token_logps"][0, 1] = known[0, 1]
    assert loss.isfinite() and loss.item() != 0
    figures = logged(run)
    assert loss.item() == run._compute_loss(run.model, inputs).item()
    # Of 5 + 3 + 4 scored tokens.
    assert figures["topr/unknown_mu_share"] == pytest.approx(1 / 12)
    assert logged(run)["topr/unknown_mu_share"] == 0


def test_a_log_of_one_process_gathers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A callback logs on the first process alone: the others would be waited for without end."""
    run, inputs = trainer(tmp_path), micro_batch()
    prepared(run, [inputs])._compute_loss(run.model, inputs)
    with monkeypatch.context() as patch:
        patch.setattr(run, "_topr_gather", None)
        run.log({"bleu": 1.0, "train_loss": 2.0})
        run.model.eval()
        run.log({"bleu": 1.0})
    run.model.train()
    assert "topr/objective" in logged(run), "they wait for the next log of all"


def test_metrics_are_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    inputs = micro_batch()
    run = prepared(trainer(tmp_path), [inputs])
    run._compute_loss(run.model, inputs)
    alone = logged(run)
    assert not any(name.startswith("topr/") for name in logged(run)), "what was logged is gone"
    run._compute_loss(run.model, inputs)
    # Another process with the same completions: means stay, an effective number doubles.
    monkeypatch.setattr(run.accelerator, "gather", lambda x: torch.cat([x, x]))
    both = logged(run)
    for name in ("objective", "log_ratio_negative_min", "log_ratio_negative_std", "kl_k3"):
        assert both[f"topr/{name}"] == pytest.approx(alone[f"topr/{name}"])
    assert both["topr/ess_negative"] == pytest.approx(2 * alone["topr/ess_negative"])


def test_metrics_do_not_depend_on_the_micro_batches(tmp_path: Path):
    """PITFALLS 52: standard deviations and effective sample sizes are no means of the batches'."""
    run = trainer(tmp_path)
    batches = [ragged(i) for i in range(4)]
    found = []
    for parts in ([joined(batches)], [joined(batches[:1]), joined(batches[1:])], batches):
        prepared(run, parts, len(parts))
        for inputs in parts:
            run._compute_loss(run.model, inputs)
        found.append({n: x for n, x in logged(run).items() if n.startswith("topr/")})
    assert found[0]["topr/log_ratio_negative_std"] > 0.1 and found[0]["topr/ess_negative"] > 1
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


def test_settings_reach_the_loss(tmp_path: Path):
    inputs = micro_batch()
    losses = {}
    for name, topr in {
        "default": {},
        "limits": {"limits": SFT},
        "ratio": {"ratio": "token"},
        "baseline": {"baseline": -0.5},
        "reduction": {"reduction": "token_mean"},
    }.items():
        run = trainer(tmp_path, topr=topr)
        losses[name] = prepared(run, [inputs])._compute_loss(run.model, inputs).item()
    assert len({round(x, 6) for x in losses.values()}) == len(losses), losses


def test_advantages_per_token_are_refused(tmp_path: Path):
    inputs = micro_batch(advantages=torch.ones(4, 6))
    run = trainer(tmp_path)
    with pytest.raises(ValueError, match=r"advantages: expected one per completion.*\(4, 6\)"):
        prepared(run, [inputs])._compute_loss(run.model, inputs)


def test_evaluation_normalises_a_batch_by_itself(tmp_path: Path):
    inputs = micro_batch()
    run = trainer(tmp_path)
    loss = prepared(run, [inputs])._compute_loss(run.model, inputs).item()
    objective = logged(run)["topr/objective"]
    prepared(run, [micro_batch(1)] * 2, 2).model.eval()
    with torch.no_grad():
        assert run._compute_loss(run.model, inputs).item() == pytest.approx(loss, rel=1e-6)
    assert logged(run)["eval_topr/objective"] == objective


def test_an_all_empty_batch_gives_zero(tmp_path: Path):
    """PITFALLS 29."""
    inputs = micro_batch()
    inputs["completion_mask"] = torch.zeros(4, 6, dtype=torch.int64)
    run = trainer(tmp_path)
    loss = prepared(run, [inputs])._compute_loss(run.model, inputs)
    loss.backward()
    assert loss.item() == 0
    assert norm(gradients(run)) == 0


# --- normalisation --------------------------------------------------------------------------


def ragged(seed: int) -> Inputs:
    """Micro-batches that differ in tokens and in non-empty completions."""
    lengths = [(5, 0, 3, 6), (1, 2, 0, 6), (0, 0, 6, 5), (4, 6, 1, 3)][seed % 4]
    return micro_batch(seed, lengths=lengths)


def accumulated(
    run: Any, buffered: list[Inputs], steps: int, first: int = 0
) -> dict[str, torch.Tensor]:
    """Gradients of one accumulated batch, made as transformers and TRL make them."""
    prepared(run, buffered, steps)
    assert run.loss_is_scaled_for_ga
    for run._step in range(first, first + steps):
        inputs = buffered[run._step % len(buffered)]
        run._compute_loss(run.model, inputs).backward()
    return gradients(run)


def joined(batches: list[Inputs]) -> Inputs:
    return {
        k: torch.stack([b[k] for b in batches]).sum()
        if v.dim() == 0
        else torch.cat([b[k] for b in batches])
        for k, v in batches[0].items()
    }


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_gradients_do_not_depend_on_accumulation(tmp_path: Path, reduction: str):
    """PITFALLS 28: the mean over a batch, not a mean of means, nor a multiple of either."""
    run = trainer(tmp_path, topr={"reduction": reduction})
    batches = [ragged(i) for i in range(4)]
    whole = accumulated(run, [joined(batches)], 1)
    halves = [joined(batches[:2]), joined(batches[2:])]
    assert_same(accumulated(run, halves, 2), whole)
    assert_same(accumulated(run, batches, 4), whole)
    # Several optimizer steps per generation: each takes its own part of the buffer.
    second = accumulated(run, [joined(batches[2:])], 1)
    assert_same(accumulated(run, batches, 2, first=2), second)
    assert_same(accumulated(run, batches, 2, first=6), second)
    # A buffer used several times within an accumulated batch (num_iterations).
    assert_same(accumulated(run, batches, 8), whole)


def test_an_accumulated_batch_over_several_generations(tmp_path: Path):
    """Exact where no completion is empty, although later batches are unknown at the first."""
    run = trainer(tmp_path)
    batches = [micro_batch(i, lengths=(5, 2, 6, 6 - i)) for i in range(3)]
    whole = accumulated(run, [joined(batches)], 1)
    run.model.zero_grad()
    for run._step, inputs in enumerate(batches):
        prepared(run, [inputs], 3)._compute_loss(run.model, inputs).backward()
    assert_same(gradients(run), whole)


# --- training -------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_training_moves_the_model_and_logs(tmp_path: Path, lora: bool):
    run = trainer(tmp_path, lora=lora, max_steps=3, num_iterations=2)
    before = parameters(run)
    run.train()
    after = parameters(run)
    assert before and all(p.isfinite().all() for p in after.values())
    assert any(not torch.equal(after[n], p) for n, p in before.items())
    entries = [e for e in run.state.log_history if "loss" in e]
    assert len(entries) == 3
    assert entries[0]["reward_std"] > 0
    for entry in entries:
        assert entry["grad_norm"] > 0 and entry["entropy"] > 0
        assert entry["topr/objective"] == pytest.approx(-entry["loss"], abs=2e-4)
        assert 0 < entry["topr/positive_share"] < 1
        assert "topr/kl_k3" in entry and "topr/entropy" not in entry
        assert None not in entry.values()
    # The first pass through a generation is on-policy, the second is not.
    assert entries[0]["topr/weight_negative_mean"] == pytest.approx(1, abs=1e-5)
    assert abs(entries[1]["topr/kl_k1"]) > 1e-6


def test_evaluation_logs_the_same_metrics(tmp_path: Path):
    run = trainer(tmp_path)
    run.evaluate()
    (entry,) = (e for e in run.state.log_history if "eval_loss" in e)
    assert entry["eval_topr/objective"] == pytest.approx(-entry["eval_loss"], abs=1e-5)
    assert entry["eval_entropy"] > 0 and entry["eval_topr/weight_negative_mean"] == 1


def test_the_entropy_is_that_of_trl(tmp_path: Path):
    inputs, logged = micro_batch(), []
    del inputs["tool_mask"]
    for kind in (TOPRGRPOTrainer, GRPOTrainer):
        run = prepared(trainer(tmp_path, kind=kind), [inputs])
        run._compute_loss(run.model, inputs)
        logged += run._metrics["train"]["entropy"]
    assert logged[0] > 0.01 and logged[0] == pytest.approx(logged[1], rel=1e-5)


def mixture_of_experts() -> Any:
    torch.manual_seed(0)
    size = {k: v for k, v in tiny_config().to_dict().items() if k != "model_type"}
    return MixtralForCausalLM(MixtralConfig(**size, num_local_experts=4, num_experts_per_tok=2))


def test_the_router_keeps_its_loss(tmp_path: Path):
    """Added as TRL adds it: its mean over the micro-batches of an optimizer step."""
    for steps in (1, 2):
        found = []
        for coefficient in (0.0, 0.5):
            run = trainer(tmp_path, model=mixture_of_experts(), router_aux_loss_coef=coefficient)
            batches = [ragged(i) for i in range(steps)]
            loss = prepared(run, batches, steps)._compute_loss(run.model, batches[0])
            loss.backward()
            found.append((loss.item(), gradients(run)))
        (aux_loss,) = run._metrics["train"]["aux_loss"]
        (without, plain), (with_it, moved) = found
        assert aux_loss > 0.5
        assert with_it - without == pytest.approx(0.5 * aux_loss / steps, rel=1e-4)
        routers = [n for n in plain if n.endswith("gate.weight")]
        assert routers and not any(torch.allclose(moved[n], plain[n]) for n in routers)


def reward_by_id(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 11) for ids in completion_ids]


def fixed_rollout(prompts: list[str], run: Any) -> dict[str, Any]:
    """The same completions for the same prompts, however batches are split."""
    rows = []
    for i, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(sum(map(ord, prompt)) + 97 * (i % 4))
        rows.append(torch.randint(2, 90, (2 + i % 4,), generator=generator).tolist())
    ids = run.processing_class(prompts)["input_ids"]
    return {"prompt_ids": ids, "completion_ids": rows, "logprobs": [[-3.0] * len(r) for r in rows]}


def step_of_train(folder: Path, masked: bool, **changes: Any) -> dict[str, float]:
    """One optimizer step over 16 completions; masked: truncated ones, which are then empty."""
    run = trainer(
        folder,
        reward=reward_by_id,
        rollout=fixed_rollout,
        shuffle_dataset=False,
        mask_truncated_completions=masked,
        **changes,
    )
    if masked:
        # None of these completions ends in EOS: let those that end in an even token be complete.
        run.eos_token_ids = list(range(0, 90, 2))
    before = parameters(run)
    run.train()
    (entry,) = (e for e in run.state.log_history if "loss" in e)
    after = parameters(run)
    moved = {n: float((after[n] - p).double().norm()) for n, p in before.items()}
    return {"loss": entry["loss"], "grad_norm": entry["grad_norm"], **moved}


@pytest.mark.parametrize("masked", [False, True])
def test_a_step_of_train_does_not_depend_on_accumulation(tmp_path: Path, masked: bool):
    """The whole of transformers and TRL around the loss."""
    one, *others = (
        step_of_train(
            tmp_path,
            masked,
            per_device_train_batch_size=16 // steps,
            gradient_accumulation_steps=steps,
        )
        for steps in (1, 2, 4)
    )
    assert abs(one["loss"]) > 1e-2 and one["grad_norm"] > 1e-2
    for other in others:
        assert other == pytest.approx(one, rel=1e-3)


def worker(path: str) -> None:
    """One process of the next test, started as a program: writes what its training came to."""
    torch.set_num_threads(1)
    folder = Path(path)
    moved = step_of_train(
        folder,
        True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        ddp_backend="gloo",
    )
    figures = {"processes": torch.distributed.get_world_size(), "moved": moved}
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(figures))


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
def test_two_processes_take_the_step_of_one(tmp_path: Path):
    """DDP averages gradients, the denominator is global, and processes differ in empty completions."""
    launch(2, "test_trl.worker", str(tmp_path), timeout=200)
    figures = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in "01"]
    assert [f["processes"] for f in figures] == [2, 2]
    one = step_of_train(tmp_path, True, per_device_train_batch_size=16)
    assert abs(one["loss"]) > 1e-2 and one["grad_norm"] > 1e-2
    moved = figures[0]["moved"]
    # DDP wraps the model, so its parameters go by other names.
    assert {n.removeprefix("module."): x for n, x in moved.items()} == pytest.approx(one, rel=1e-3)


def test_the_samplers_log_probs_are_mu(tmp_path: Path):
    run = trainer(tmp_path, reward=reward_by_id, rollout=fixed_rollout)
    run.train()
    (entry,) = (e for e in run.state.log_history if "loss" in e)
    assert entry["topr/unknown_mu_share"] == 0
    assert abs(entry["topr/kl_k1"]) > 0.1


# --- refusals -------------------------------------------------------------------------------

REFUSED = {
    "beta": 0.1,
    "entropy_coef": 0.01,
    "use_adaptive_entropy": True,
    "top_entropy_quantile": 0.5,
    "off_policy_mask_threshold": 0.5,
    "delta": 2.0,
    "epsilon": 0.1,
    "epsilon_high": 0.28,
    "importance_sampling_level": "sequence",
    "loss_type": "grpo",
    "use_bias_correction_kl": False,
    "sapo_temperature_neg": 2.0,
    "sapo_temperature_pos": 2.0,
    "vespo_k_pos": 1.0,
    "vespo_lambda_pos": 1.0,
    "vespo_k_neg": 1.0,
    "vespo_lambda_neg": 1.0,
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_of_other_losses_are_refused(tmp_path: Path, name: str):
    args = config(tmp_path, **{name: REFUSED[name]})
    with pytest.raises(ValueError, match=rf"^{name}: expected its default .*got {REFUSED[name]!r}"):
        TOPRGRPOTrainer("never-loaded", digits, args)


def test_every_option_of_the_loss_is_accounted_for():
    """Fails when TRL adds an option, until somebody has decided what TOPR does with it."""
    assert set(module._REFUSED) == set(REFUSED)
    names = {f.name for f in dataclasses.fields(GRPOConfig)}
    words = (
        "coef",
        "epsilon",
        "delta",
        "loss",
        "importance",
        "kl",
        "sapo",
        "vespo",
        "mask",
        "beta",
    )
    honoured = {"router_aux_loss_coef", "mask_truncated_completions", "adam_beta1", "adam_beta2"}
    honoured |= {"adam_epsilon", "loss_type", "prediction_loss_only"}
    # Without effect on their own: TRL documents that.
    honoured |= {"entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"}
    found = {n for n in names if any(word in n.split("_") or word in n for word in words)}
    left = {n for n in found - honoured - set(REFUSED) if not n.startswith("vllm_importance")}
    assert left == set()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vllm_importance_sampling_correction": True}, "vllm_importance_sampling_correction: got"),
        ({"top_p": 0.9}, r"top_p: got 0.9 with use_vllm.*pass top_p=1.0"),
        ({"top_k": 50}, "top_k: got 50"),
        ({"min_p": 0.1}, "min_p: got 0.1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty: got 1.1"),
        ({"generation_kwargs": {"top_p": 0.5}}, "top_p: got 0.5"),
        ({"vllm_structured_outputs_regex": "a*"}, "vllm_structured_outputs_regex: got one"),
    ],
)
def test_vllm_must_report_log_probs_that_are_a_mu(
    tmp_path: Path, changes: dict[str, Any], message: str
):
    settings = {"use_vllm": True, "vllm_importance_sampling_correction": False}
    module._check_config(config(tmp_path, **settings))
    with pytest.raises(ValueError, match=message):
        TOPRGRPOTrainer("never-loaded", digits, config(tmp_path, **settings | changes))
    # Without vLLM mu is scored with the full softmax.
    module._check_config(config(tmp_path, **changes))


@pytest.mark.parametrize(
    ("topr", "error", "message"),
    [
        ({"limits": "topr"}, TypeError, "limits: expected a topr_kernels.Limits"),
        ({"ratio": "words"}, ValueError, "ratio: expected one of"),
        ({"reduction": "sum"}, ValueError, "reduction: expected one of"),
        ({"baseline": math.nan}, ValueError, "baseline: expected a finite number"),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(
    topr: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        TOPRGRPOTrainer("never-loaded", digits, **topr)


def test_warns_of_rounded_logits(tmp_path: Path):
    with pytest.warns(UserWarning, match="cast_lm_head_to_fp32: got False"):
        trainer(tmp_path, bf16=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="cast_lm_head_to_fp32")
        trainer(tmp_path, bf16=True, cast_lm_head_to_fp32=True)
        trainer(tmp_path, topr={"limits": TOPR})


@pytest.mark.parametrize("found", ["1.14.2", "1.17.0", "2.0.0.dev0", "0.29.1", "none"])
def test_other_versions_of_trl_are_refused(found: str, monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> str:
        assert name == "trl"
        if found == "none":
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    message = rf'found trl {found}, expected trl >= 1.15, < 1.17.*pip install "trl>=1.15,<1.17"'
    with pytest.raises(ImportError, match=message):
        importlib.reload(module)


@pytest.mark.parametrize("found", ["1.15.0", "1.16.0", "1.16.3", "1.16.0.dev1"])
def test_checked_versions_of_trl_are_accepted(found: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metadata, "version", lambda name: found)
    module._check_trl()
