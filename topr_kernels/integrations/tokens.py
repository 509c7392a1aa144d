"""From the per-token numbers of other frameworks to TOPR's one number per sequence."""

from __future__ import annotations

import torch
from torch import Tensor


def one_per_sequence(name: str, values: Tensor, mask: Tensor, remedy: str) -> Tensor:
    """Reads a number per sequence off a tensor that repeats it at every scored token.

    TOPR weighs a whole sequence by one signed reward (Eq. 3), and the sign of that reward chooses the
    limits: a sequence whose tokens disagree has no such reward. Copies one flag to the host.

    Args:
        name: what the values are called in the message.
        values: [B, T] floating; not read where the mask is 0.
        mask: [B, T], nonzero where a token is scored.
        remedy: what the message says to do about values that differ within a sequence.

    Returns:
        [B] in the dtype of ``values``; 0 for a sequence without a scored token.

    Raises:
        ValueError: shapes that disagree, or values that differ within a sequence.
    """
    if values.shape != mask.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(mask.shape)} like the mask, got {tuple(values.shape)}"
        )
    scored = mask != 0
    low = torch.where(scored, values, torch.inf).amin(-1)
    high = torch.where(scored, values, -torch.inf).amax(-1)
    # NaN compares false and reaches the loss, which raises or turns NaN.
    varies = scored.any(-1) & (high > low)
    if varies.any():
        i = int(varies.nonzero()[0])
        raise ValueError(
            f"{name}: expected one value per sequence, repeated over its scored tokens, got "
            f"{float(low[i])} to {float(high[i])} in sequence {i}; {remedy}"
        )
    return torch.where(scored.any(-1), high, 0.0)
