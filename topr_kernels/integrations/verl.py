"""TOPR as a policy loss of verl (``actor.policy_loss.loss_mode=topr``).

Follows ``PolicyLossFn`` and ``agg_loss`` of verl-project/verl, verl/trainer/ppo/core_algos.py, as
verl/workers/utils/losses.py: ppo_loss calls them. To use it put two lines into a module of your own,
``from topr_kernels.integrations.verl import register`` and ``register()``, and name that module in
``actor_rollout_ref.model.external_lib``: the workers import it where they build the model.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from topr_kernels import choices, validation
from topr_kernels.integrations.tokens import one_per_sequence
from topr_kernels.limits import TOPR, Limits, Taper
from topr_kernels.loss import topr_loss_from_log_prob
from topr_kernels.output import TOPROutput

#: verl's loss_agg_mode -> (our reduction, what verl calls the count of its units in the whole batch).
AGGREGATIONS = {
    "seq-mean-token-mean": ("sequence_mean", "global_batch_size"),
    "token-mean": ("token_mean", "batch_num_tokens"),
    "token-sum": ("sum", None),
}


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
    batch. mu is ``old_log_prob``: under verl's defaults the trainer's own log-probs at the start of the
    step, which is right if the rollout came from those weights. For stale rollouts turn on
    ``rollout_correction.bypass_mode``, which puts the sampler's log-probs there. It switches to the loss
    mode "bypass_mode": call ``register("bypass_mode")``. That replaces verl's own loss of this name,
    and its rejection of sequences.

    The advantage takes the place of the reward. Group means (GRPO, RLOO) keep the sign of the reward
    relative to its group: a right answer in a mixed group stays positive, and groups of equal rewards
    do not train. They are also a baseline, the one that gives positives half of the weight in every
    group (p~ = 50 %, Eq. 7; the paper recommends 10 to 20 %). Dividing by the group's standard
    deviation changes no sign. Whitening over the batch (GDPO, REINFORCE++, GAE) does: what is below the
    mean of the batch becomes negative.

    Args:
        old_log_prob: [B, T] log mu in nats, fp32 or fp64.
        log_prob: [B, T] log pi in nats, fp32 or fp64, differentiable.
        advantages: [B, T] floating, the same at every scored token of a sequence.
        response_mask: [B, T] bool, or 0 and 1.
        loss_agg_mode: "seq-mean-token-mean" (the paper's), "token-mean" (verl's default) or "token-sum":
            our "sequence_mean", "token_mean" and "sum".
        config: verl's ActorConfig, of which only ``global_batch_info`` is read (``dp_size``,
            ``global_batch_size``, ``batch_num_tokens``). If it is None, or lacks the counts on one rank,
            means are over this micro-batch alone, as in verl.
        rollout_is_weights: None; see Raises.
        limits: clip limits per sign of the reward, or a taper of one's own, as in :func:`topr_loss`.
        ratio: "sequence" (the paper), "geometric" (as GSPO and verl's PR 6986), "token", or per turn
            of the policy (``response_mask`` is 0 between them) "segment" or "segment_geometric".

    Returns:
        (loss, metrics). Loss 0-dim, times ``dp_size`` because the ranks are averaged. Metrics are
        floats, copied to the host together: means over the sequences of the micro-batch, and 0 where
        there are none, because verl averages them. ``actor/ppo_kl`` (log mu - log pi per token),
        ``actor/topr_objective`` (R * O / |y|), and as shares of all sequences
        ``actor/topr_negative_share``, ``actor/topr_negative_weight`` (divide by the share for the mean
        weight of a negative) and ``actor/topr_dead_share`` (negatives of weight < 1e-6).

    Raises:
        TypeError: half-precision log-probs, or a ``global_batch_info`` that is no mapping, as in verl.
        ValueError: advantages that differ within a sequence, an aggregation that TOPR has no reduction
            for, ``dp_size`` > 1 without the count of the whole batch, or ``rollout_is_weights``, which
            would weigh every token a second time, positives too.
    """
    if rollout_is_weights is not None:
        raise ValueError(
            "rollout_is_weights: expected None, TOPR has its own weight pi/mu per sequence; set "
            "algorithm.rollout_correction.rollout_is=null, and for mu = the sampler's log-probs "
            'rollout_correction.bypass_mode=true with register("bypass_mode")'
        )
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
        "use an outcome estimator (algorithm.adv_estimator=grpo, rloo, remax, or your own), not GAE, a "
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
        normalizer=None if count is None else float(count) / ranks,
    )
    loss = out.loss * ranks if reduction == "sum" else out.loss
    return loss, _metrics(out)


def register(
    name: str = "topr", *, limits: Limits | Taper = TOPR, ratio: str = "sequence"
) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """Registers :func:`topr_policy_loss` with verl in this process.

    Args:
        name: value of ``actor.policy_loss.loss_mode`` that selects it.
        limits: as in :func:`topr_policy_loss`.
        ratio: as in :func:`topr_policy_loss`.

    Returns:
        The function that verl will call, with the options bound.

    Raises:
        ImportError: verl cannot be imported.
        TypeError: limits that are neither ``Limits`` nor callable.
        ValueError: an unknown ratio.
    """
    validation.check_limits(limits)
    validation.check_choice("ratio", ratio, choices.RATIOS)
    try:
        # Imported only here: the loss itself is used and tested without verl.
        verl = importlib.import_module("verl.trainer.ppo.core_algos")
    except ImportError as error:
        raise ImportError(
            "register: verl.trainer.ppo.core_algos cannot be imported; install verl in the environment "
            "of the workers, or hand topr_policy_loss to your own registry"
        ) from error
    loss = functools.partial(topr_policy_loss, limits=limits, ratio=ratio)
    verl.register_policy_loss(name)(loss)
    return loss


def _metrics(out: TOPROutput) -> dict[str, float]:
    figures = out.metrics()
    counted = out.length > 0
    negative = counted & (out.reward < 0)
    share = negative.sum() / counted.sum().clamp(min=1)

    def where(present: Tensor, figure: Tensor) -> Tensor:
        # verl averages over micro-batches and ranks: one without negatives must not make it NaN.
        return torch.where(present.any(), figure, 0.0)

    values = {
        "actor/ppo_kl": where(counted, figures["kl_k1"]),
        "actor/topr_objective": where(counted, figures["objective"]),
        "actor/topr_negative_share": share,
        "actor/topr_negative_weight": where(negative, figures["weight_negative_mean"] * share),
        "actor/topr_dead_share": where(negative, figures["dead_share"] * share),
    }
    on_host = torch.stack([v.double() for v in values.values()]).tolist()
    return dict(zip(values, on_host, strict=True))
