"""verl itself: its configuration files, its actor worker, its advantages, on a CPU over gloo."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import plain
import pytest
import torch
import verl_worker
from processes import case, launch
from tiny import tiny_tokenizer
from torch import Tensor
from verl import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import apply_bypass_mode

FP32 = "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32"
LOSS = "actor_rollout_ref.actor.policy_loss.loss_mode=topr"
AGG = "actor_rollout_ref.actor.loss_agg_mode="


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    plain.model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def grpo(data: plain.Batch) -> Tensor:
    """[B, T], verl's own."""
    rewards = torch.zeros(data.mask.shape)
    rewards[:, 0] = data.score
    groups = [i // 4 for i in range(plain.ROWS)]
    return core_algos.compute_grpo_outcome_advantage(rewards, data.mask, groups)[0]


def rows(data: plain.Batch, advantages: Tensor, part: slice = slice(None)) -> dict[str, Tensor]:
    names = {
        "input_ids": data.ids,
        "attention_mask": data.attention,
        "position_ids": data.positions,
        "prompts": data.ids[:, : plain.PROMPT],
        "responses": data.ids[:, plain.PROMPT :],
        "response_mask": data.mask,
        "old_log_probs": data.mu,
        "advantages": advantages,
    }
    return {name: value[part].contiguous() for name, value in names.items()}


def share() -> slice:
    each = plain.ROWS // torch.distributed.get_world_size()
    return slice(torch.distributed.get_rank() * each, (torch.distributed.get_rank() + 1) * each)


def reward(advantages: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask == 1, advantages, 0.0).abs().amax(1) * advantages.sum(1).sign()


def against_plain(actor: Any, config: Any, mode: str) -> tuple[float, dict[str, Any]]:
    """Two updates of an actor beside the plain loop: how far apart they end, and the last metrics."""
    policy = plain.model()
    start = {name: p.detach().clone() for name, p in policy.named_parameters()}
    batches = [plain.batch(seed, policy) for seed in (1, 2)]
    steps, metrics = [], {}
    for data in batches:
        advantages = grpo(data)
        metrics = verl_worker.update(actor, config, rows(data, advantages, share()))
        by_rows = (plain.ROWS, True)
        unit = by_rows if mode == "seq-mean-token-mean" else (float(data.mask.sum()), False)
        steps.append((data, reward(advantages, data.mask), unit))
    expected = plain.train(policy, steps)
    distance = plain.distance(verl_worker.weights(actor), expected, start)
    print("distance", distance)
    return distance, metrics


def two_steps(folder: str, micro: int, mode: str) -> None:
    """A rank: two updates of the actor against the plain loop."""
    config = verl_worker.actor_config(folder, micro, FP32, LOSS, AGG + mode)
    distance, metrics = against_plain(verl_worker.worker(config), config, mode)
    print("metrics", json.dumps({k: repr(v) for k, v in metrics.items()}))
    with case(mode):
        assert distance < 1e-5
        assert {"actor/topr_negative_share", "actor/topr_positive_share"} <= metrics.keys()
        assert "actor/pg_clipfrac" not in metrics


@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "token-mean"])
@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4)])
def test_two_steps_are_those_of_the_plain_loop(folder: Path, ranks: int, parts: int, mode: str):
    micro = plain.ROWS // ranks // parts
    print(*launch(ranks, "test_verl_real.two_steps", str(folder), micro, mode), sep="\n")


def test_the_driver_s_switch_of_bypass_mode_reaches_no_worker(folder: Path):
    """So loss_mode=topr stays, and mu is the sampler's: what workers hold was copied before."""
    bypass = "algorithm.rollout_correction.bypass_mode=true"
    driver = verl_worker.actor_config(str(folder), 8, FP32, LOSS, bypass)
    worker = copy.deepcopy(driver)
    data = plain.batch(1, plain.model())
    batch = DataProto.from_single_dict({"rollout_log_probs": data.mu})
    policy_loss = driver.actor_rollout_ref.actor.policy_loss
    apply_bypass_mode(batch, driver.algorithm.rollout_correction, policy_loss)
    assert policy_loss.loss_mode == "bypass_mode"
    assert worker.actor_rollout_ref.actor.policy_loss.loss_mode == "topr"
    assert torch.equal(batch.batch["old_log_probs"], data.mu)


def default_precision(folder: str) -> None:
    """A rank: verl's default, bf16 without flash-attn, is refused by verl's own settings."""
    config = verl_worker.actor_config(folder, 8, LOSS)
    actor = verl_worker.worker(config)
    data = plain.batch(1, plain.model())
    with pytest.raises(TypeError, match=r"fsdp_config\.mixed_precision\.param_dtype=fp32"):
        verl_worker.update(actor, config, rows(data, grpo(data)))


def test_the_default_precision_is_refused(folder: Path):
    launch(1, "test_verl_real.default_precision", str(folder))


@pytest.mark.parametrize("policy", ["auto", "none"])
def test_verl_loads_the_entry_point(policy: str):
    script = "import verl; from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as r"
    script += "; print('FOUND', 'topr' in r)"
    # Not as verl_worker has it: the platform of the tests is a module that only they can import.
    env = {name: x for name, x in os.environ.items() if not name.startswith("VERL_")}
    env["VERL_USE_EXTERNAL_PLUGINS"] = policy
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert f"FOUND {policy == 'auto'}" in done.stdout, done.stderr
