"""The logits path in plain torch, any device: row blocks, no copy of the logits.

Per scored row and logit: read once forward, read once and written once backward, plus temporaries of
one block that stay in cache. Allocates nothing of size [N, V] but the gradient (not even that in
place). Rows that are not scored are not read; rows with coefficient 0 are zero-filled unread.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from topr_kernels.layout import IGNORE_INDEX, scored_labels, sequence_offsets, to_labels, to_rows
from topr_kernels.ops import accumulate_dtype
from topr_kernels.ops import logits as ops
from topr_kernels.ops.options import Objective, Tokens, Transforms
from topr_kernels.rows import onehot_minus_softmax_, softcap_slope, softmax_rows_, transform_
from topr_kernels.sequence import sequence_stage

# Elements of a row block. Its few fp32 temporaries (2 MiB each) fit a desktop's last-level cache; a
# row longer than this is a block of its own.
BLOCK = 1 << 19


def _row_blocks(chosen: Tensor, vocab: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Splits the chosen rows, [O, T] bool, into blocks of (o, t) indices."""
    o, t = chosen.shape
    if chosen.device.type == "cpu":
        index = chosen.reshape(-1).nonzero().squeeze(-1)
    else:
        # Listing the chosen rows would copy their number to the host; take all of them instead.
        index = torch.arange(o * t, device=chosen.device)
    for block in torch.split(index, max(1, BLOCK // vocab)):
        if block.numel():
            yield block // t, block % t


def _read(logits: Tensor, block: tuple[Tensor, Tensor]) -> Tensor:
    # Advanced indexing copies one block out of any strides, so the transform may work in place.
    return logits.detach()[block].to(accumulate_dtype(logits.dtype))


def log_prob_fwd(
    logits: Tensor, tokens: Tokens, transforms: Transforms, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labels, cu_seqlens, shift = tokens
    vocab = logits.shape[-1]
    # Results take the layout of what they are computed from; the contract says contiguous.
    labels = labels.contiguous()
    target = to_rows(scored_labels(labels, cu_seqlens, shift), shift, IGNORE_INDEX)
    scored = target != IGNORE_INDEX
    dtype = accumulate_dtype(logits.dtype)
    row_log_prob = logits.new_zeros(labels.shape, dtype=dtype)
    row_lse, row_low, row_entropy = (torch.zeros_like(row_log_prob) for _ in range(3))
    for block in _row_blocks(scored, vocab):
        z = transform_(_read(logits, block), transforms)
        softmax = softmax_rows_(z, target[block], entropy)
        row_log_prob[block] = softmax.log_prob
        row_lse[block] = softmax.lse
        row_low[block] = softmax.lse_low
        row_entropy[block] = softmax.entropy
    out = tuple(
        to_labels(torch.where(scored, x, 0.0), shift)
        for x in (row_log_prob, row_lse, row_low, row_entropy)
    )
    log_prob, lse, low, ent = out
    return log_prob, lse, low, ent if entropy else torch.full_like(ent, torch.nan)


def topr_fwd(
    logits: Tensor, tokens: Tokens, objective: Objective, transforms: Transforms, entropy: bool
) -> tuple[Tensor, ...]:
    log_prob, lse, low, ent = log_prob_fwd(logits, tokens, transforms, entropy)
    labels = tokens.labels.contiguous()
    offsets, sound = sequence_offsets(labels, tokens.cu_seqlens)
    scored = scored_labels(labels, tokens.cu_seqlens, tokens.shift) != IGNORE_INDEX
    stage = sequence_stage(log_prob, scored, offsets, sound, objective)
    return (*stage[:2], log_prob, lse, low, ent, *stage[2:])


def _write_gradient(
    out: Tensor, logits: Tensor, tokens: Tokens, saved: ops.Saved, transforms: Transforms
) -> None:
    """Writes d_log_prob * (onehot - softmax), chained through temperature and softcap, to ``out``."""
    lse, lse_low, log_prob, d_log_prob, d_loss, denominator = saved
    vocab, shift = logits.shape[-1], tokens.shift
    target = to_rows(scored_labels(*tokens), shift, IGNORE_INDEX)
    if d_loss is not None and denominator is not None:
        # A coefficient of exactly 0 stays 0 by selection, also under an infinite loss scale; a NaN
        # scale (unsound offsets) reaches every row.
        scale = d_loss / denominator
        d_log_prob = torch.where((d_log_prob == 0) & ~scale.isnan(), 0.0, d_log_prob * scale)
    coefficient = to_rows(d_log_prob, shift, 0.0).masked_fill(target == IGNORE_INDEX, 0.0)
    row_lse, row_low, row_log_prob = (to_rows(x, shift, 0.0) for x in (lse, lse_low, log_prob))
    active = coefficient != 0
    for block in _row_blocks(~active, vocab):
        if out.device.type == "cpu":
            out[block] = 0
    for block in _row_blocks(active, vocab):
        z = transform_(_read(logits, block), transforms)
        slope = softcap_slope(z, transforms)
        row = row_lse[block], row_low[block]
        d = onehot_minus_softmax_(z, row, row_log_prob[block], target[block].clamp(0, vocab - 1))
        d.mul_(coefficient[block].unsqueeze(-1) / transforms.temperature)
        if slope is not None:
            d.mul_(slope)
        if out.device.type != "cpu":
            d = torch.where(active[block].unsqueeze(-1), d, 0.0)
        out[block] = d.to(out.dtype)


def logits_bwd(logits: Tensor, *args: Any) -> Tensor:
    out = logits.new_empty(logits.shape)
    _write_gradient(out, logits, *args)
    return out


def logits_bwd_(logits: Tensor, *args: Any) -> None:
    _write_gradient(logits, logits, *args)


ops.register("torch", ops.Kernels(log_prob_fwd, topr_fwd, logits_bwd, logits_bwd_))
