"""SkyRL itself: its registry, its scaling of advantages, the micro-step of its policy worker."""

# ruff: noqa: E402

from __future__ import annotations

import typing
from types import SimpleNamespace
from typing import Any

import plain
import pytest
import torch
import typing_extensions
from torch import Tensor

# pydantic refuses the standard library's before Python 3.12.
typing.TypedDict = typing_extensions.TypedDict

from skyrl.backends.skyrl_train.utils import ppo_utils
from skyrl.backends.skyrl_train.workers.worker import PolicyWorkerBase
from skyrl.train.config.config import AlgorithmConfig

from topr_kernels.integrations import skyrl

REDUCTIONS = {"sequence_mean": (plain.ROWS, True), "token_mean": (0, False)}


def experience(data: plain.Batch, advantages: Tensor, rows: slice) -> Any:
    return SimpleNamespace(
        to_device=lambda _: None,
        sequences=data.ids[rows],
        action_log_probs=torch.full_like(data.mu, -9.0)[rows],  # the trainer's: never mu
        base_action_log_probs=None,
        advantages=advantages[rows],
        num_actions=plain.ANSWER,
        attention_mask=data.attention[rows],
        loss_mask=data.mask[rows],
        action_mask=data.mask[rows],
        rollout_logprobs=data.mu[rows],
        pixel_values=None,
        image_grid_thw=None,
    )


def worker(policy: Any, ranks: int) -> Any:
    """What SkyRL's micro-step reads of a worker, a model on the CPU in the place of its own."""

    def forward(ids: Tensor, actions: int, attention_mask: Tensor, **_: Any) -> Any:
        zeros = torch.zeros(len(ids), actions)
        data = plain.Batch(ids, attention_mask, zeros, zeros, zeros[:, 0])
        return plain.log_prob(policy, data), {"entropy": torch.zeros(ids.shape)}

    forward.train = lambda: None  # type: ignore[attr-defined]
    algorithm = AlgorithmConfig(policy_loss_type="topr", use_kl_loss=False, temperature=1.0)
    return SimpleNamespace(
        model=forward,
        cfg=SimpleNamespace(algorithm=algorithm),
        policy_loss_fn=ppo_utils.PolicyLossRegistry.get("topr"),
        mesh_rank=SimpleNamespace(dp_size=ranks),
        strategy=SimpleNamespace(backward=lambda loss, *_: loss.backward()),
        scheduler=SimpleNamespace(get_last_lr=lambda: [0.0]),
        optimizer=None,
    )


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_and_gradient_are_those_of_the_plain_loop(
    monkeypatch: pytest.MonkeyPatch, reduction: str, ranks: int, parts: int
):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(torch, "autocast", lambda **_: torch.enable_grad())
    skyrl.register()
    policy = plain.model()
    data = plain.batch(1, policy)
    rewards = torch.where(torch.arange(plain.ANSWER) == 0, data.score[:, None], 0.0)
    groups = [i // 4 for i in range(plain.ROWS)]
    advantages, _ = ppo_utils.compute_grpo_outcome_advantage(rewards, data.mask, groups)
    scaled = ppo_utils.apply_loss_reduction_to_advantages_minibatch(
        advantages, data.mask, reduction, plain.ROWS // parts, plain.ANSWER
    )
    rows = plain.ROWS // ranks // parts
    total, keys = 0.0, set()
    for i in range(ranks * parts):
        micro = experience(data, scaled, slice(i * rows, (i + 1) * rows))
        status = PolicyWorkerBase._forward_backward_micro(worker(policy, ranks), micro, 1.0)
        total += status["policy_loss"]
        found = {k: v for k, v in status.items() if "topr/" in k}
        assert all(type(v) is float for v in found.values())
        keys.add(tuple(found))
    assert len(keys) == 1 and keys.pop()
    gradient = {n: p.grad / ranks for n, p in policy.named_parameters()}  # FSDP averages
    policy.zero_grad()
    count, by_length = REDUCTIONS[reduction]
    reward = torch.where(data.mask == 1, advantages, 0.0).abs().amax(1) * advantages.sum(1).sign()
    unit = (count or float(data.mask.sum()), by_length)
    expected = plain.loss(plain.log_prob(policy, data), data, reward, unit)
    assert total == pytest.approx(float(expected.detach()), rel=1e-6)
    expected.backward()
    for name, p in policy.named_parameters():
        assert (gradient[name] - p.grad).norm() <= 1e-5 * p.grad.norm(), name


def test_registering_twice_does_no_harm():
    skyrl.register()
    skyrl.register(ratio="geometric")
    assert ppo_utils.PolicyLossRegistry.get("topr").keywords["ratio"] == "geometric"
    with pytest.raises(ValueError, match="'gspo' is a policy loss of SkyRL's own"):
        skyrl.register("gspo")


def test_its_own_settings_are_refused():
    skyrl.register()
    loss = ppo_utils.PolicyLossRegistry.get("topr")
    data = plain.batch(1, plain.model())
    inputs = (data.mu, data.mu, data.score[:, None].expand_as(data.mu))
    for name, value in (("use_kl_in_reward", True), ("advantage_batch_normalize", True)):
        with pytest.raises(ValueError, match=name):
            loss(*inputs, AlgorithmConfig(**{name: value}), data.mask, data.mu)
    for name in skyrl.CORRECTIONS:
        config = AlgorithmConfig()
        assert hasattr(config.off_policy_correction, name)
        setattr(config.off_policy_correction, name, 2.0)
        with pytest.raises(ValueError, match=f"off_policy_correction: {name}"):
            loss(*inputs, config, data.mask, data.mu)
