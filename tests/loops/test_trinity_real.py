"""Trinity-RFT itself: its registry, its loss inside verl's actor worker, its own TOPR beside ours."""

from __future__ import annotations

from pathlib import Path

import plain
import pytest
import torch
import verl_worker
from processes import case, launch
from test_verl_real import FP32, against_plain, folder
from trinity.algorithm import ADVANTAGE_FN, ENTROPY_LOSS_FN, POLICY_LOSS_FN
from trinity.common.config import AlgorithmConfig
from trinity.trainer.verl.losses import build_trinity_loss

__all__ = ["folder"]  # a fixture
OURS = "topr_kernels.integrations.trinity.TOPRPolicyLossFn"


def algorithm(policy: str, mode: str) -> AlgorithmConfig:
    args = {**POLICY_LOSS_FN.get(policy).default_args(), "loss_agg_mode": mode}
    return AlgorithmConfig(
        policy_loss_fn=policy,
        policy_loss_fn_args=args,
        kl_loss_fn="none",
        kl_loss_fn_args={},
        entropy_loss_fn="none",
        entropy_loss_fn_args=ENTROPY_LOSS_FN.get("none").default_args(),
        loss_agg_mode=mode,
    )


def two_steps(folder: str, micro: int, mode: str) -> None:
    """A rank: two updates by verl's worker with the loss that Trinity gives it."""
    config = verl_worker.actor_config(folder, micro, FP32)
    actor = verl_worker.worker(config)
    actor.set_loss_fn(build_trinity_loss(algorithm(OURS, mode)))
    distance, metrics = against_plain(actor, config, mode)
    with case(mode):
        assert distance < 1e-5
        assert "actor/topr_negative_share" in metrics


@pytest.mark.parametrize(
    ("ranks", "parts", "mode"),
    [
        (1, 1, "seq-mean-token-mean"),
        (1, 2, "token-mean"),
        (1, 4, "seq-mean-token-mean"),
        (2, 2, "seq-mean-token-mean"),
        (2, 4, "token-mean"),
    ],
)
def test_two_steps_are_those_of_the_plain_loop(folder: Path, ranks: int, parts: int, mode: str):
    micro = plain.ROWS // ranks // parts
    print(*launch(ranks, "test_trinity_real.two_steps", str(folder), micro, mode), sep="\n")


def gradient(policy: str, parts: int) -> torch.Tensor:
    """By each log-prob, after the parts of a batch; a mean per part where the loss takes one."""
    model = plain.model()
    data = plain.batch(1, model)
    loss_fn = POLICY_LOSS_FN.get(policy)(backend="verl", loss_agg_mode="token-mean")
    pi = plain.log_prob(model, data).detach().requires_grad_()
    size = plain.ROWS // parts
    for i in range(parts):
        part = slice(i * size, (i + 1) * size)
        inputs = {
            "old_log_probs": data.mu[part],
            "response_mask": data.mask[part],
            "advantages": data.score[part, None].expand(-1, plain.ANSWER),
            "dp_size": 1,
            "batch_num_tokens": int(data.mask.sum()),
            "global_batch_size": plain.ROWS,
        }
        assert {"old_log_probs", "response_mask", "advantages"} <= set(loss_fn.select_keys)
        loss_fn(logprob=pi[part], **inputs)[0].backward()
    assert pi.grad is not None
    return pi.grad


def test_its_own_topr_depends_on_the_micro_batch_and_ours_does_not():
    """README's table: its mean per micro-batch is added up by the engine."""
    theirs = [float(gradient("topr", parts).norm()) for parts in (1, 4)]
    print("gradient of Trinity's own TOPR, whole and in four parts:", theirs)
    assert theirs[1] > 3 * theirs[0]
    torch.testing.assert_close(gradient(OURS, 4), gradient(OURS, 1))


def test_one_answer_without_its_batch():
    """As its Tinker trainer calls it: 1-D, under Trinity's own names."""
    model = plain.model()
    data = plain.batch(1, model)
    pi = plain.log_prob(model, data).detach()
    loss_fn = POLICY_LOSS_FN.get(OURS)(backend="tinker")
    advantages = data.score[1].expand(plain.ANSWER)
    inputs = {"old_logprob": data.mu[1], "action_mask": data.mask[1], "advantages": advantages}
    found, _ = loss_fn(logprob=pi[1], ref_logprob=None, **inputs)
    expected = -plain.objective(pi, data.mu, data.mask, data.score)[1] / data.mask[1].sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_its_reinforce_advantage_is_the_reward():
    assert ADVANTAGE_FN.get("reinforce") is not None
    with pytest.raises(TypeError, match="advantage_threshold"):
        POLICY_LOSS_FN.get(OURS)(advantage_threshold=0.5)
