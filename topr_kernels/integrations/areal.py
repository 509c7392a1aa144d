"""TOPR in AReaL: its FSDP actor with another loss.

    from topr_kernels.integrations.areal import TOPRActor
    actor = TOPRActor(config.actor)    # where FSDPPPOActor stood: in your own script, or in an
                                       # override of PPOTrainer._create_train_engine

Advantages, mini-batches, micro-batches, optimizer and logs stay AReaL's; where the actor trains a batch,
the loss and its weight are ours. For other options make a subclass with other ``limits``, ``ratio`` or
``reduction``. The functions, :func:`topr_loss` and :func:`loss_weight`, belong together: AReaL weighs a
micro-batch by the latter, and its own count of tokens with a mean over sequences is another loss.

- **mu** is ``logprobs``, the sampler's.
- **The reward** is the advantage, which is AReaL's reward of the answer with ``discount=1``,
  ``gae_lambda=1``, no critic and ``kl_ctl=0``: the same at every scored token.
- **Refused**: ``kl_ctl`` other than 0 (AReaL's default is 0.1: a penalty inside the reward turns right
  answers negative), ``recompute_logprob`` without ``use_decoupled_loss`` (it overwrites mu),
  ``rejection_sampling``, ``m2_threshold`` and ``use_sapo_loss`` (they have no place in this loss),
  ``adv_norm`` or ``reward_norm`` by the mean of the batch (they move signs), ``enable_tree_training``,
  half-precision log-probs, advantages that differ within an answer.

Follows areal/trainer/ppo/actor.py: PPOActor._ppo_update, and FSDPEngine.train_batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from areal.engine.fsdp_engine import FSDPPPOActor
from areal.utils import stats_tracker
from torch import Tensor

from topr_kernels.integrations.tokens import check_precision, figures, one_per_sequence
from topr_kernels.limits import TOPR, Limits
from topr_kernels.loss import topr_loss_from_log_prob


def topr_loss(
    logprobs: Tensor,
    entropy: Tensor,
    input_data: Mapping[str, Any],
    *,
    limits: Limits = TOPR,
    ratio: str = "sequence",
    reduction: str = "sequence_mean",
    **_: Any,
) -> Tensor:
    """Computes the TOPR loss of a packed micro-batch, a mean over its units.

    Args:
        logprobs: [N] log pi in nats of the token after each position, fp32 or fp64, differentiable.
        entropy: not read.
        input_data: ``logprobs`` (log mu), ``advantages``, ``loss_mask``, each [N], and ``cu_seqlens``.
        limits: clip limits per sign of the advantage.
        ratio: "sequence" (the paper), "geometric" or "token".
        reduction: "sequence_mean" (the paper's) or "token_mean", that of :func:`loss_weight`.

    Returns:
        0-dim. Figures go to AReaL's stats_tracker under ``topr/``.

    Raises:
        TypeError: half-precision log-probs.
        ValueError: advantages that differ within an answer.
    """
    check_precision("logprobs", logprobs, "AReaL casts logits to fp32; leave its log-probs so")
    mask, offsets = input_data["loss_mask"].bool(), input_data["cu_seqlens"]
    reward = one_per_sequence(
        "advantages",
        input_data["advantages"],
        mask,
        "set actor.discount=1, actor.gae_lambda=1, actor.kl_ctl=0 and train no critic",
        offsets,
    )
    out = topr_loss_from_log_prob(
        logprobs,
        mask,
        input_data["logprobs"],
        reward,
        cu_seqlens=offsets,
        limits=limits,
        ratio=ratio,
        reduction=reduction,
    )
    stats_tracker.scalar(**{f"topr/{name}": figure for name, figure in figures(out).items()})
    return out.loss


def loss_weight(input_data: Mapping[str, Any], reduction: str = "sequence_mean") -> Tensor:
    """Counts the units of the reduction in a packed micro-batch, 0-dim: ``loss_weight_fn``."""
    scored: Tensor = input_data["loss_mask"].long()
    if reduction == "token_mean":
        return scored.sum()
    before = torch.nn.functional.pad(scored.cumsum(0), (1, 0))
    return torch.count_nonzero(before[input_data["cu_seqlens"].long()].diff())


class TOPRActor(FSDPPPOActor):  # type: ignore[misc]
    """AReaL's FSDP actor that trains with :func:`topr_loss`.

    Args:
        config: AReaL's PPOActorConfig.

    Raises:
        ValueError: a setting that would make it another loss, see the head of this module.
    """

    limits: Limits = TOPR
    ratio: str = "sequence"
    reduction: str = "sequence_mean"

    def __init__(self, config: Any) -> None:
        for name, wrong, remedy in refusals(config):
            if wrong:
                raise ValueError(f"actor.{name}: {getattr(config, name)!r} {remedy}")
        super().__init__(config)

    def train_batch(
        self, input_: Any, loss_fn: Callable[..., Any], loss_weight_fn: Callable[..., Any]
    ) -> dict[str, float]:
        """One optimizer step on a mini-batch; AReaL's two functions are replaced."""
        loss = functools.partial(
            topr_loss, limits=self.limits, ratio=self.ratio, reduction=self.reduction
        )
        weight = functools.partial(loss_weight, reduction=self.reduction)
        stats: dict[str, float] = super().train_batch(input_, loss, weight)
        return stats


def refusals(config: Any) -> list[tuple[str, bool, str]]:
    """Settings of PPOActorConfig: name, whether it is wrong, what is the matter and what to set."""

    def by_batch(norm: Any) -> bool:
        return getattr(norm, "mean_level", None) == "batch"

    moves = "moves the signs of the rewards by the mean of the batch; set its mean_level to group"
    nowhere = "has no place in TOPR's loss and would be ignored; leave it at its default"
    mu = "overwrites the sampler's log-probs, which are mu; set use_decoupled_loss=true or this to false"
    return [
        ("kl_ctl", config.kl_ctl != 0, "puts a penalty into the reward; set it to 0"),
        ("recompute_logprob", config.recompute_logprob and not config.use_decoupled_loss, mu),
        ("adv_norm", by_batch(config.adv_norm), moves),
        ("reward_norm", by_batch(config.reward_norm), moves),
        ("rejection_sampling", config.rejection_sampling is not None, nowhere),
        ("m2_threshold", config.m2_threshold is not None, nowhere),
        ("use_sapo_loss", config.use_sapo_loss, nowhere),
        ("enable_tree_training", config.enable_tree_training, nowhere),
    ]
