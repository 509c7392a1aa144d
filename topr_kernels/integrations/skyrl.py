"""TOPR as a policy loss of SkyRL (``trainer.algorithm.policy_loss_type=topr``).

In the process that starts the training (SkyRL's registry hands the loss on to its workers):

    from topr_kernels.integrations.skyrl import register
    register()

- **mu** is ``rollout_logprobs``, the sampler's (``generator.sampling_params.logprobs=1`` asks for them).
  SkyRL's ``old_log_probs`` are the trainer's at the start of the step: another number.
- **The reward** is the advantage: ``advantage_estimator`` grpo, rloo or maxrl, relative to the group.
  reinforce++ whitens over the batch, which moves signs: compare ``topr/positive_share`` with the share
  of right answers.
- **The reduction** is SkyRL's ``loss_reduction``, already in the advantages: here is only the sum.
  "sequence_mean" is the paper's, "token_mean" SkyRL's default.
- **Refused**: ``off_policy_correction`` (weights and masks on top of the ratio), ``use_kl_in_reward``
  and ``advantage_batch_normalize`` (they turn right answers negative), advantages that differ within an
  answer (gae), missing ``rollout_logprobs``, half-precision log-probs.
- SkyRL adds a KL penalty by default and logs it: ``use_kl_loss=false`` for TOPR alone.

Follows ``PolicyLossRegistry`` of skyrl/backends/skyrl_train/utils/ppo_utils.py, as
skyrl/backends/skyrl_train/workers/worker.py: _forward_backward_micro calls it.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor

from topr_kernels.integrations.tokens import (
    check_free,
    check_precision,
    check_ratio,
    check_signs,
    figures,
    one_per_sequence,
    read_limits,
)
from topr_kernels.limits import TOPR, Limits
from topr_kernels.loss import topr_loss_from_log_prob

#: Fields of off_policy_correction that weigh or mask once they are set.
CORRECTIONS = (
    "tis_ratio_type",
    "sequence_mask_metric",
    *(
        f"{m}_is_threshold_{end}"
        for m in ("outlier_token", "token_mask")
        for end in ("low", "high")
    ),
)


def topr_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    *,
    limits: Limits = TOPR,
    ratio: str = "sequence",
) -> tuple[Tensor, dict[str, float]]:
    """Computes the TOPR loss of a micro-batch of SkyRL: the sum of -A O over its sequences.

    Args:
        log_probs: [B, T] log pi in nats, fp32 or fp64, differentiable.
        old_log_probs: [B, T], not read.
        advantages: [B, T], scaled by SkyRL so that the sum over the mini-batch is its reduction.
        config: SkyRL's AlgorithmConfig; ``off_policy_correction``, ``use_kl_in_reward`` and
            ``advantage_batch_normalize`` are read.
        loss_mask: [B, T], 0 and 1.
        rollout_logprobs: [B, T] log mu in nats.
        limits: clip limits per sign of the advantage.
        ratio: "sequence" (the paper), "geometric" or "token".

    Returns:
        (loss 0-dim, metrics): figures of :mod:`topr_kernels.integrations.tokens` under ``topr/``.
        ``topr/objective`` is of the scaled advantages.

    Raises:
        TypeError: half-precision log-probs.
        ValueError: no log mu or mask, a setting that would make it another loss, or advantages that
            differ within an answer.
    """
    if rollout_logprobs is None or loss_mask is None:
        raise ValueError(
            "rollout_logprobs and loss_mask: expected tensors, got None; log mu is the sampler's: set "
            "generator.sampling_params.logprobs=1"
        )
    _refuse_settings(config)
    check_precision(
        "log_probs",
        log_probs,
        "set policy.fsdp_config.mixed_precision.param_dtype=fp32, or install flash-attn >= 2.4.3",
    )
    reward = one_per_sequence(
        "advantages",
        advantages,
        loss_mask,
        "use trainer.algorithm.advantage_estimator=grpo, rloo or maxrl, not gae, with "
        "use_kl_in_reward=false",
    )
    out = topr_loss_from_log_prob(
        log_probs,
        loss_mask,
        rollout_logprobs,
        reward,
        limits=limits,
        ratio=ratio,
        reduction="sum",
    )
    return out.loss, {f"topr/{name}": figure for name, figure in figures(out).items()}


def _refuse_settings(config: Any) -> None:
    correction = getattr(config, "off_policy_correction", None)
    set_here = [name for name in CORRECTIONS if getattr(correction, name, None) is not None]
    if set_here:
        raise ValueError(
            f"off_policy_correction: {', '.join(set_here)} would weigh or mask on top of the ratio "
            "pi/mu that TOPR takes per sequence; set them to null, and use_tis=false"
        )
    check_signs("trainer.algorithm", config, ("use_kl_in_reward", "advantage_batch_normalize"))


def register(name: str = "topr", *, limits: str | Limits = TOPR, ratio: str = "sequence") -> None:
    """Registers :func:`topr_policy_loss` with SkyRL as ``name``; calling it again is harmless.

    Raises:
        ImportError: SkyRL cannot be imported.
        TypeError: limits that are not ``Limits``.
        ValueError: unknown names, or ``name`` is a loss of SkyRL's own.
    """
    check_ratio(ratio)
    loss = functools.partial(topr_policy_loss, limits=read_limits(limits), ratio=ratio)
    # Imported only here: the loss itself is used and tested without SkyRL.
    skyrl = importlib.import_module("skyrl.backends.skyrl_train.utils.ppo_utils")
    registry: Any = skyrl.PolicyLossRegistry
    if name in registry.list_available():
        check_free("SkyRL", name, registry.get(name), topr_policy_loss, "choose another name")
        registry.unregister(name)
    registry.register(name, loss)
