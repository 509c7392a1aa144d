"""TOPR as a policy loss of Trinity-RFT, in its verl worker and its Tinker trainer.

    algorithm:
      algorithm_type: topr
      policy_loss_fn: topr_kernels.integrations.trinity.TOPRPolicyLossFn
      policy_loss_fn_args: {limits: topr, ratio: sequence, loss_agg_mode: seq-mean-token-mean}
      loss_agg_mode: seq-mean-token-mean    # overrides the one above; Trinity's default is token-mean
      kl_loss_fn: none                      # Trinity's default for topr is k2

- **mu** is ``old_logprob``: the sampler's log-probs with ``bypass_old_logprobs: true``, Trinity's
  default.
- **The reward** is the advantage: ``advantage_fn: reinforce`` is the reward itself, the paper's;
  grpo and rloo are relative to the group.
- **Micro-batches and ranks are exact**: the counts of the whole batch (``dp_size``,
  ``batch_num_tokens``, ``global_batch_size``) are read, so the parts add up to one batch. Trinity's own
  ``topr`` weighs each token by itself and takes a mean per micro-batch, which the engine then adds up.
- **Refused**: loss_agg_mode without a reduction of ours, ``advantage_threshold`` (the branch is the sign
  of the advantage), half-precision log-probs, advantages that differ within an answer (ppo, a KL
  penalty inside the reward, reinforceplusplus: whitening moves signs, see
  ``actor/topr_positive_share``).

Follows ``PolicyLossFn`` of trinity/algorithm/policy_loss_fn/policy_loss_fn.py, as
trinity/trainer/verl/losses.py and trinity/trainer/tinker/tinker_trainer.py call it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from trinity.algorithm.policy_loss_fn import PolicyLossFn

from topr_kernels.integrations.tokens import check_ratio, read_limits
from topr_kernels.integrations.verl import topr_policy_loss
from topr_kernels.limits import Limits


class TOPRPolicyLossFn(PolicyLossFn):  # type: ignore[misc]
    """The TOPR loss under Trinity's names; Trinity selects inputs by the names of the parameters.

    Args:
        backend: "verl" or "tinker".
        loss_agg_mode: as in :func:`topr_kernels.integrations.verl.topr_policy_loss`.
        limits: name of a preset, the four limits by name, or a ``Limits``.
        ratio: "sequence" (the paper), "geometric" or "token".

    Raises:
        TypeError: limits of another type, or an argument of Trinity's own TOPR
            (``advantage_threshold``).
        ValueError: an unknown name.
    """

    def __init__(
        self,
        backend: str = "verl",
        loss_agg_mode: str = "seq-mean-token-mean",
        limits: str | Limits | Mapping[str, float] = "topr",
        ratio: str = "sequence",
    ) -> None:
        super().__init__(backend=backend)
        check_ratio(ratio)
        self.loss_agg_mode, self.limits, self.ratio = loss_agg_mode, read_limits(limits), ratio

    def __call__(
        self,
        logprob: Tensor,
        old_logprob: Tensor,
        action_mask: Tensor,
        advantages: Tensor,
        dp_size: int | None = None,
        batch_num_tokens: int | None = None,
        global_batch_size: int | None = None,
        # Under this name alone: Trinity would look for another one in its batch.
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, float]]:
        """Computes the loss of a micro-batch.

        Args:
            logprob: [B, T], or [T] of one answer; log pi in nats, fp32 or fp64, differentiable.
            old_logprob: log mu, like ``logprob``.
            action_mask: like ``logprob``, nonzero where a token is scored.
            advantages: like ``logprob``, the same at every scored token of an answer.
            dp_size: ranks that are averaged over; None: 1.
            batch_num_tokens: scored tokens of the whole batch; None: of this call.
            global_batch_size: answers of the whole batch; None: of this call.
            **kwargs: not read.

        Returns:
            (loss 0-dim, metrics), as :func:`topr_kernels.integrations.verl.topr_policy_loss`.

        Raises:
            TypeError: half-precision log-probs.
            ValueError: what :func:`topr_kernels.integrations.verl.topr_policy_loss` refuses.
        """
        if logprob.dim() == 1:
            logprob, old_logprob, action_mask, advantages = (
                x.unsqueeze(0) for x in (logprob, old_logprob, action_mask, advantages)
            )
        info = {
            "dp_size": dp_size or 1,
            "batch_num_tokens": batch_num_tokens,
            "global_batch_size": global_batch_size,
        }
        loss, metrics = topr_policy_loss(
            old_logprob,
            logprob,
            advantages,
            action_mask,
            self.loss_agg_mode,
            SimpleNamespace(global_batch_info=info),
            limits=self.limits,
            ratio=self.ratio,
        )
        # Trinity adds the prefix again.
        return loss, {name.removeprefix("actor/"): figure for name, figure in metrics.items()}

    @classmethod
    def default_args(cls) -> dict[str, Any]:
        """What ``policy_loss_fn_args`` is where a configuration leaves it out."""
        return {"loss_agg_mode": "seq-mean-token-mean", "limits": "topr", "ratio": "sequence"}
