"""TOPR as a policy loss of verl (``actor.policy_loss.loss_mode=topr``).

Tried inside verl 0.9.1: its actor worker, FSDP2 on a CPU, one and two ranks. verl finds the loss by
itself, through the entry point ``verl.plugins`` of this package; where plugins are switched off
(``VERL_USE_EXTERNAL_PLUGINS=none``), name the module that registers it,
``actor_rollout_ref.model.external_lib=topr_kernels.integrations.verl_plugin``. Then

    actor_rollout_ref.actor.policy_loss.loss_mode=topr
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean
    algorithm.rollout_correction.bypass_mode=true    # for stale rollouts: mu is the sampler's
    algorithm.adv_estimator=topr                     # the score itself; or grpo, rloo, remax

- **mu** is ``old_log_probs``: the trainer's own log-probs at the start of the step, which is right if
  the rollout came from those weights; with ``rollout_correction.bypass_mode=true`` the sampler's. Leave
  ``loss_mode=topr`` then: verl's driver switches its own copy to "bypass_mode", and no worker sees it.
- **The reward** is the advantage. ``adv_estimator=topr`` is the score as it came, the paper's. Group
  means (grpo, rloo) are a baseline that gives positives half of the weight in every group (p~ = 50 %,
  Eq. 7; the paper recommends 10 to 20 %): a right answer in a mixed group stays positive, groups of
  equal scores do not train. ``use_kl_in_reward`` and whitening over the batch (reinforce_plus_plus,
  reinforce_plus_plus_baseline, gdpo, gae) turn right answers negative: compare
  ``actor/topr_positive_share`` with the share of right answers that verl logs.
- **Refused**: rollout_is (weights every token a second time), ``rollout_rs=token_*`` where the worker is
  told of it, loss_agg_mode without a reduction of ours, half-precision log-probs, advantages that differ
  within an answer. What only the driver knows cannot be refused here: ``rollout_rs=token_*`` cuts
  tokens out of the mask, and so out of the ratio of the sequence; use ``rollout_rs=seq_*``.

Follows ``PolicyLossFn`` and ``agg_loss`` of verl/trainer/ppo/core_algos.py, as
verl/workers/utils/losses.py: ppo_loss calls them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from topr_kernels import validation
from topr_kernels.integrations.tokens import (
    check_free,
    check_precision,
    check_ratio,
    check_signs,
    figures,
    one_per_sequence,
)
from topr_kernels.limits import TOPR, Limits, Taper
from topr_kernels.loss import topr_loss_from_log_prob

#: verl's loss_agg_mode -> (our reduction, what verl calls the count of its units in the whole batch).
AGGREGATIONS = {
    "seq-mean-token-mean": ("sequence_mean", "global_batch_size"),
    "token-mean": ("token_mean", "batch_num_tokens"),
    "token-sum": ("sum", None),
}

#: Where half-precision log-probs come from in verl, and what to set.
PRECISION = (
    "set +actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32, or keep bf16 and have "
    "the fp32 cross-entropy of flash-attn >= 2.4.3 (installed, VERL_DISABLE_FLASH_ATTN_CE unset, "
    "full_determinism=false)"
)


def topr_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    limits: Limits | Taper = TOPR,
    ratio: str = "sequence",
) -> tuple[Tensor, dict[str, float]]:
    """Computes the TOPR loss of a micro-batch of verl.

    The sum over micro-batches, averaged over the data-parallel ranks, is :func:`topr_loss` of the whole
    batch. Where verl gives ``global_batch_size``, "seq-mean-token-mean" divides by it: empty responses
    count, as in verl's own losses. A batch without a scored token has loss 0 and a gradient of 0.

    Args:
        old_log_prob: [B, T] log mu in nats, fp32 or fp64.
        log_prob: [B, T] log pi in nats, fp32 or fp64, differentiable.
        advantages: [B, T] floating, the same at every scored token of a sequence.
        response_mask: [B, T] bool, or 0 and 1.
        loss_agg_mode: "seq-mean-token-mean" (the paper's), "token-mean" (verl's default) or "token-sum":
            our "sequence_mean", "token_mean" and "sum".
        config: verl's ActorConfig, of which ``global_batch_info`` is read (``dp_size``,
            ``global_batch_size``, ``batch_num_tokens``) and
            ``policy_loss.rollout_correction.rollout_rs``. If it is None, or lacks the
            counts on one rank, means are over this micro-batch alone.
        rollout_is_weights: None; see Raises.
        limits: clip limits per sign of the reward, or a custom taper, as in :func:`topr_loss`.
        ratio: "sequence" (the paper), "geometric" (as GSPO and verl's PR 6986), "token", or per turn
            of the policy (``response_mask`` is 0 between them) "segment" or "segment_geometric".

    Returns:
        (loss, metrics). Loss 0-dim, times ``dp_size`` because the ranks are averaged. Metrics are those
        of :func:`topr_kernels.integrations.tokens.figures`, as ``actor/ppo_kl`` and ``actor/topr_...``.

    Raises:
        TypeError: half-precision log-probs, or a ``global_batch_info`` that is not a mapping.
        ValueError: advantages that differ within a sequence, an aggregation that TOPR has no reduction
            for, ``dp_size`` > 1 without the count of the whole batch, rejection of single tokens, or
            ``rollout_is_weights``, which would weigh every token a second time, positives too.
    """
    _refuse_correction(config, rollout_is_weights)
    check_precision("log_prob", log_prob, PRECISION)
    if loss_agg_mode not in AGGREGATIONS:
        raise ValueError(
            f"loss_agg_mode: expected one of {', '.join(map(repr, AGGREGATIONS))}, got "
            f"{loss_agg_mode!r}, which no reduction of TOPR matches; set "
            "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean, the paper's"
        )
    reduction, unit = AGGREGATIONS[loss_agg_mode]
    info = getattr(config, "global_batch_info", {})
    if not isinstance(info, Mapping):
        raise TypeError(
            "config.global_batch_info: expected a mapping with dp_size, global_batch_size and "
            f"batch_num_tokens, got {type(info).__name__}; verl fills it in before each loss, {{}} "
            "means this micro-batch alone"
        )
    ranks = info.get("dp_size", 1)
    count = info.get(unit)
    if count is None and unit is not None and ranks > 1:
        raise ValueError(
            f"config.global_batch_info: {unit!r} is missing with dp_size = {ranks}; a mean over this "
            "rank alone is not the mean of the batch, pass its count over all ranks"
        )
    reward = one_per_sequence(
        "advantages",
        advantages,
        response_mask,
        "use an outcome estimator (algorithm.adv_estimator=topr, grpo, rloo or remax), not GAE, a "
        "discount or a KL penalty inside the reward (algorithm.use_kl_in_reward=false)",
    )
    out = topr_loss_from_log_prob(
        log_prob,
        response_mask,
        old_log_prob,
        reward,
        limits=limits,
        ratio=ratio,
        reduction=reduction,
        # 0 tokens in the whole batch: any denominator gives the loss 0.
        normalizer=None if count is None else max(float(count), 1.0) / ranks,
    )
    loss = out.loss * ranks if reduction == "sum" else out.loss
    metrics = {f"actor/topr_{name}": figure for name, figure in figures(out).items()}
    metrics["actor/ppo_kl"] = metrics.pop("actor/topr_kl")
    return loss, metrics


def _refuse_correction(config: Any, weights: Tensor | None) -> None:
    if weights is not None:
        raise ValueError(
            "rollout_is_weights: expected None, TOPR has its own weight pi/mu per sequence; set "
            "algorithm.rollout_correction.rollout_is=null, and for mu = the sampler's log-probs "
            "rollout_correction.bypass_mode=true, with loss_mode=topr as it is"
        )
    correction = getattr(getattr(config, "policy_loss", None), "rollout_correction", None)
    rejection = getattr(correction, "rollout_rs", None)
    if rejection is not None and "token_" in str(rejection):
        raise ValueError(
            f"rollout_correction.rollout_rs: {rejection!r} takes single tokens out of the mask, and so "
            "out of the ratio of their sequence; set rollout_rs=null, or seq_sum_k1 and its like"
        )


def topr_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """The score of a response at each of its tokens: ``algorithm.adv_estimator=topr``.

    The paper's reward, signed as the reward function gave it: +1 and -1, not 1 and 0.

    Args:
        token_level_rewards: [B, T], its sum over a response is the score.
        response_mask: [B, T], 1 where a token is scored.
        config: verl's AlgoConfig, of which ``use_kl_in_reward`` is read.

    Returns:
        (advantages, returns), both [B, T] and equal.

    Raises:
        ValueError: ``use_kl_in_reward``, which makes right answers negative.
    """
    beside = "; a penalty goes beside the loss: actor.use_kl_loss=true"
    check_signs("algorithm", config, ("use_kl_in_reward",), beside)
    score = (token_level_rewards * response_mask).sum(-1, keepdim=True) * response_mask
    return score, score


def register(
    name: str = "topr", *, limits: Limits | Taper = TOPR, ratio: str = "sequence"
) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """Registers :func:`topr_policy_loss` with verl in this process.

    :func:`topr_advantage` is registered beside it, as the advantage estimator "topr". Again
    with other options it replaces what it registered.

    Args:
        name: value of ``actor.policy_loss.loss_mode`` that selects it.
        limits: as in :func:`topr_policy_loss`.
        ratio: as in :func:`topr_policy_loss`.

    Returns:
        The function that verl will call, with the options bound.

    Raises:
        ImportError: verl cannot be imported.
        TypeError: limits that are neither ``Limits`` nor callable.
        ValueError: an unknown ratio, or the name of a loss of verl's own.
    """
    validation.check_limits(limits)
    check_ratio(ratio)
    try:
        # Imported only here: the loss itself is used and tested without verl.
        verl = importlib.import_module("verl.trainer.ppo.core_algos")
    except ImportError as error:
        raise ImportError(
            "register: verl.trainer.ppo.core_algos cannot be imported; install verl in the environment "
            "of the workers, or hand topr_policy_loss to your own registry"
        ) from error
    check_free(
        "verl",
        name,
        verl.POLICY_LOSS_REGISTRY.get(name),
        topr_policy_loss,
        "register() and loss_mode=topr are right for every setting, "
        "rollout_correction.bypass_mode=true among them",
    )
    loss = functools.partial(topr_policy_loss, limits=limits, ratio=ratio)
    verl.register_policy_loss(name)(loss)
    verl.register_adv_est("topr")(topr_advantage)
    return loss
