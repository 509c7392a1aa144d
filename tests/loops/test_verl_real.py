"""verl itself: its configuration files, its actor worker, its advantages, on a CPU over gloo."""

from __future__ import annotations

import json
from pathlib import Path

import plain
import pytest
import torch
import verl_worker
from processes import case, launch
from tiny import tiny_tokenizer
from torch import Tensor
from verl.trainer.ppo import core_algos

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


def two_steps(folder: str, micro: int, mode: str) -> None:
    """A rank: two updates of the actor against the plain loop."""
    config = verl_worker.actor_config(folder, micro, FP32, LOSS, AGG + mode)
    actor = verl_worker.worker(config)
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
    found = verl_worker.weights(actor)
    print("distance", plain.distance(found, expected, start))
    print("metrics", json.dumps({k: repr(v) for k, v in metrics.items()}))
    with case(mode):
        assert plain.distance(found, expected, start) < 1e-5
        assert {"actor/topr_negative_share", "actor/topr_positive_share"} <= metrics.keys()
        assert "actor/pg_clipfrac" not in metrics


@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "token-mean"])
@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4)])
def test_two_steps_are_those_of_the_plain_loop(folder: Path, ranks: int, parts: int, mode: str):
    micro = plain.ROWS // ranks // parts
    print(*launch(ranks, "test_verl_real.two_steps", str(folder), micro, mode), sep="\n")
