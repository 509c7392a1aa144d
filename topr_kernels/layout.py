"""From padded or packed, shifted or aligned inputs to rows, targets and sequence offsets.

Every per-token tensor of the package is aligned with ``labels``; a row is a row of the logits. With
``shift`` the row at position t predicts the label at t + 1, so the first label of a sequence has no
row. The kernels see logits [O, T, V] and labels [O, T]; packed input has O = 1 and ``cu_seqlens``.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Label of a position that is not scored, as in Hugging Face and torch cross-entropy.
IGNORE_INDEX = -100


def scored_labels(labels: Tensor, cu_seqlens: Tensor | None, shift: bool) -> Tensor:
    """Labels with IGNORE_INDEX also where no row of the same sequence predicts them.

    Args:
        labels: [O, T] int64.
        cu_seqlens: [B + 1] for packed input (O = 1), or None.
        shift: whether the row at t predicts the label at t + 1.

    Returns:
        [O, T] int64, a new tensor when anything had to be masked.
    """
    if not shift or labels.numel() == 0:
        return labels
    labels = labels.clone()
    if cu_seqlens is None:
        labels[:, 0] = IGNORE_INDEX
        return labels
    position = torch.arange(labels.shape[1], device=labels.device)
    first = torch.isin(position, cu_seqlens.to(position.dtype)[:-1])
    return labels.masked_fill(first, IGNORE_INDEX)


def to_rows(x: Tensor, shift: bool, fill: float) -> Tensor:
    """Moves a label-aligned [O, T] tensor to the rows of the logits; rows without a label get fill."""
    if not shift:
        return x
    out = torch.full_like(x, fill)
    out[:, :-1] = x[:, 1:]
    return out


def to_labels(x: Tensor, shift: bool) -> Tensor:
    """Moves a row-aligned [O, T] tensor to the positions of the labels; the first position gets 0."""
    if not shift:
        return x
    out = torch.zeros_like(x)
    out[:, 1:] = x[:, :-1]
    return out


def sequence_offsets(labels: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Offsets of the sequences in the flattened label positions, and whether they are sound.

    Args:
        labels: [O, T].
        cu_seqlens: [B + 1] integer or None (then every one of the O rows is a sequence).

    Returns:
        (offsets [B + 1] int64, sound 0-dim bool), both on the device of ``labels``. Offsets that are
        not sound (not starting at 0, decreasing, not ending at T) are replaced by zeros, so that
        nothing is ever read out of bounds; the caller poisons the loss.
    """
    o, t = labels.shape
    if cu_seqlens is None:
        offsets = torch.arange(o + 1, device=labels.device) * t
        return offsets, torch.ones((), dtype=torch.bool, device=labels.device)
    offsets = cu_seqlens.to(torch.int64)
    sound = (offsets[0] == 0) & (offsets[-1] == t) & (offsets.diff() >= 0).all()
    return torch.where(sound, offsets, torch.zeros_like(offsets)), sound


def sequence_index(offsets: Tensor, positions: int) -> Tensor:
    """Sequence number of every flattened label position: [positions] int64, clamped to B - 1."""
    position = torch.arange(positions, device=offsets.device)
    index = torch.searchsorted(offsets[1:].contiguous(), position, right=True)
    return index.clamp_(max=max(offsets.numel() - 2, 0))
