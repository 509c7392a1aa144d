"""TOPR as a custom loss of prime-rl.

    [trainer.loss]
    type = "custom"
    import_path = "topr_kernels.integrations.prime_rl.topr_loss"
    kwargs = { limits = "topr", ratio = "sequence" }

Follows PrimeIntellect-ai/prime-rl, src/prime_rl/trainer/rl/loss.py: compute_loss calls the function
once per sequence, adds up what it returns and divides by ``rl_scale``, the sum of the rl weights over
all scored tokens of the step; the trainer undoes FSDP's average over the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

from topr_kernels.integrations.tokens import one_per_sequence, read_limits
from topr_kernels.limits import Limits
from topr_kernels.loss import topr_loss_from_log_prob


class LossInputs(Protocol):
    """The attributes of prime-rl's LossInputs that are read; T tokens of one sequence, prompt included.

    ``loss_weights``, [T] or None, is read too; older versions do not have it.
    """

    @property
    def trainer_logprobs(self) -> Tensor:
        """[T] log pi, fp32 or fp64, differentiable."""

    @property
    def inference_logprobs(self) -> Tensor:
        """[T] log mu."""

    @property
    def advantages(self) -> Tensor:
        """[T], the same at every scored token."""

    @property
    def loss_mask(self) -> Tensor:
        """[T] bool, which tokens are scored."""


class LossOutputs(NamedTuple):
    """What prime-rl reads of a result; it need not be of its own class."""

    loss: Tensor
    metrics: dict[str, Tensor]


def topr_loss(
    inputs: LossInputs,
    *,
    limits: str | Limits | Mapping[str, float] = "topr",
    ratio: str = "sequence",
) -> LossOutputs:
    """Computes the TOPR loss of one sequence, ``-w R O`` with w its loss weight.

    Added up over the sequences and divided by prime-rl's scale, the sum of w over all scored tokens:

    - without weights (w = 1) this is :func:`topr_kernels.topr_loss` with reduction "token_mean";
    - with w = 1 / |y| of the sequence it is "sequence_mean", the paper's. A custom algorithm has to
      provide those weights. ``loss_aggregation = "prompt"`` provides 1 / (tokens of the group), the mean
      over groups of their token means, which is "sequence_mean" for groups of one.

    Both are over the sequences that prime-rl keeps: those of advantage 0, whose loss is 0, it drops from
    the scale too. mu is ``inference_logprobs``. A rollout that prime-rl splits into several samples
    has a ratio per sample. Advantages are the reward minus the mean of its group: a baseline that gives
    positives half of the weight (p~ = 50 %, Eq. 7; the paper recommends 10 to 20 %). Copies one flag to
    the host per call, two with weights, as prime-rl's own losses do by indexing with the mask.

    Args:
        inputs: prime-rl's LossInputs.
        limits: name of a preset ("topr", "tis", "is", "reinforce", "sft"), the four limits by name, or
            a ``Limits``.
        ratio: "sequence" (the paper), "geometric", "token", or per turn of the policy "segment" or
            "segment_geometric".

    Returns:
        LossOutputs: loss 0-dim; 0-dim metrics that prime-rl averages over the sequences:
        ``topr/log_ratio`` (of the whole sequence, nats), ``topr/objective`` (R * O), ``topr/negative``
        (1 where R < 0) and ``topr/negative_weight`` (0 where it is not; divide by the mean of
        ``topr/negative`` for the mean weight of a negative).

    Raises:
        TypeError: half-precision log-probs, or limits of another type.
        ValueError: unknown names, or advantages or weights that differ within the sequence.
    """
    mask = inputs.loss_mask.unsqueeze(0)
    reward = one_per_sequence(
        "advantages",
        inputs.advantages.unsqueeze(0),
        mask,
        "choose an algorithm with one advantage per rollout (algo.type = grpo, max_rl or rae)",
    )
    out = topr_loss_from_log_prob(
        inputs.trainer_logprobs.unsqueeze(0),
        mask,
        inputs.inference_logprobs.unsqueeze(0),
        reward,
        limits=read_limits(limits),
        ratio=ratio,
        reduction="sum",
    )
    loss = out.loss
    weights = getattr(inputs, "loss_weights", None)
    if weights is not None:
        remedy = "weigh whole sequences: a weight per token has no place in a ratio of sequences"
        loss = loss * one_per_sequence("loss_weights", weights.unsqueeze(0), mask, remedy)[0]
    negative = (out.reward < 0).to(out.weight.dtype)
    metrics = {
        "topr/log_ratio": out.log_ratio[0],
        "topr/objective": -out.loss.detach(),
        "topr/negative": negative[0],
        "topr/negative_weight": (negative * out.weight)[0],
    }
    return LossOutputs(loss, metrics)
