"""TOPR as a custom loss of Tinker, computed here or on its server.

    from topr_kernels.integrations.tinker import topr_loss
    training_client.forward_backward_custom(data, topr_loss)    # functools.partial for options

    loss = service_client.create_custom_loss(traced_topr_loss, TRACED_RANKS)    # runs on the server
    training_client.forward_backward_custom(data, loss)

Both read ``loss_fn_inputs`` of each Datum, as Tinker's cookbook fills it; only ``target_tokens`` and
``weights`` are sent to the server by the first.

- **mu** is ``logprobs``, the sampler's. The traced form calls it ``behavior_logprobs``, since Tinker
  gives ``logprobs`` to the policy's.
- **The reward** is ``advantages``, the same at every scored token; signed, +1 right and -1 wrong, or
  relative to the group as the cookbook makes it.
- **Scored** is ``mask``. It is never guessed: an advantage of 0 is a reward of 0, not a prompt.
- **The denominator** is the number of answers of the call; ``normalizer`` for a batch in several calls.
  Tinker adds calls up.
- **Refused**: a missing field, advantages that differ within an answer (a KL penalty per token), shapes
  that differ.

Tinker's own "importance_sampling" and "ppo" take one ratio per token and sum.
Follows TrainingClient._compute_custom_loss and create_custom_loss of the tinker client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from topr_kernels.integrations.tokens import figures, one_per_sequence, read_limits
from topr_kernels.limits import TOPR, Limits
from topr_kernels.loss import topr_loss_from_log_prob
from topr_kernels.taper import taper

FIELDS = ("logprobs", "advantages", "mask")

#: ``input_ranks`` of ``create_custom_loss`` for :func:`traced_topr_loss`.
TRACED_RANKS = {"logprobs": 1, "behavior_logprobs": 1, "advantages": 1, "mask": 1, "share": 1}


def topr_loss(
    data: Sequence[Any],
    logprobs: Sequence[Tensor],
    *,
    limits: str | Limits | Mapping[str, float] = "topr",
    ratio: str = "sequence",
    reduction: str = "sequence_mean",
    normalizer: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Computes the TOPR loss of a call of ``forward_backward_custom``.

    Args:
        data: Tinker's Datum objects.
        logprobs: per Datum [T], log pi in nats of its target tokens, differentiable.
        limits: name of a preset, the four limits by name, or a ``Limits``.
        ratio: "sequence" (the paper), "geometric" or "token".
        reduction: "sequence_mean" (the paper's), "token_mean" or "sum".
        normalizer: as in :func:`topr_kernels.topr_loss`: answers (or tokens) of the whole batch.

    Returns:
        (loss 0-dim, metrics): figures of :mod:`topr_kernels.integrations.tokens` under ``topr/``.

    Raises:
        ValueError: a field that is missing or of another shape, or advantages that differ within an
            answer.
    """
    columns = [
        [_field(i, datum, name, logprobs[i]) for i, datum in enumerate(data)] for name in FIELDS
    ]
    mu, advantages, mask = (pad_sequence(column, batch_first=True) for column in columns)
    reward = one_per_sequence(
        "advantages",
        advantages,
        mask,
        "give every scored token of an answer its answer's advantage",
    )
    out = topr_loss_from_log_prob(
        pad_sequence(list(logprobs), batch_first=True),
        mask != 0,
        mu,
        reward,
        limits=read_limits(limits),
        ratio=ratio,
        reduction=reduction,
        normalizer=normalizer,
    )
    return out.loss, {f"topr/{name}": figure for name, figure in figures(out).items()}


def _field(i: int, datum: Any, name: str, like: Tensor) -> Tensor:
    if name not in datum.loss_fn_inputs:
        raise ValueError(
            f"data[{i}].loss_fn_inputs: {name!r} is missing; TOPR reads {', '.join(FIELDS)}, each with "
            "one number per target token"
        )
    value: Tensor = datum.loss_fn_inputs[name].to_torch().to(like.device)
    if value.shape != like.shape:
        raise ValueError(
            f"data[{i}].loss_fn_inputs[{name!r}]: expected shape {tuple(like.shape)} like the target "
            f"tokens, got {tuple(value.shape)}"
        )
    return value


def traced_topr_loss(
    logprobs: Tensor, behavior_logprobs: Tensor, advantages: Tensor, mask: Tensor, share: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one Datum, the paper's limits and ratio, for ``create_custom_loss``: torch alone.

    Nothing is checked where it runs: the advantage of an answer is the mean over its scored tokens.

    Args:
        logprobs: [T] log pi in nats.
        behavior_logprobs: [T] log mu in nats.
        advantages: [T], the same at every scored token.
        mask: [T], nonzero where a token is scored.
        share: [1], what the answer counts: 1 / (answers of the batch * its scored tokens).

    Returns:
        (loss 0-dim, metrics): ``custom/topr_objective:sum`` (share * R * O).
    """
    scored = mask != 0
    log_ratio = torch.where(scored, logprobs.double() - behavior_logprobs.double(), 0.0).sum()
    reward = torch.where(scored, advantages.double(), 0.0).sum() / scored.sum().clamp(min=1)
    pos_min, pos_max, neg_min, neg_max = TOPR.log()
    low = torch.where(reward < 0, neg_min, pos_min)
    high = torch.where(reward < 0, neg_max, pos_max)
    objective = (share.double() * reward * taper(log_ratio, low, high)[0]).sum()
    return -objective, {"custom/topr_objective:sum": objective.detach()}
