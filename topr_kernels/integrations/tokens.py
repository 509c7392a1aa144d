"""What the adapters share: numbers per token to one per sequence, options by name, figures to log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from topr_kernels import choices, validation
from topr_kernels.limits import PRESETS, Limits
from topr_kernels.output import TOPROutput


def one_per_sequence(
    name: str, values: Tensor, mask: Tensor, remedy: str, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Reads a number per sequence off a tensor that repeats it at every scored token.

    TOPR weighs a whole sequence by one signed reward (Eq. 3), and the sign of that reward chooses the
    limits: a sequence whose tokens disagree has no such reward. Copies one flag to the host.

    Args:
        name: what the values are called in the message.
        values: [B, T], or packed [N], floating; not read where the mask is 0.
        mask: in the shape of ``values``, nonzero where a token is scored.
        remedy: what the message says to do about values that differ within a sequence.
        cu_seqlens: [B + 1] offsets of packed sequences, from 0 to N.

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
    low = _extreme(torch.where(scored, values, torch.inf), cu_seqlens, "amin")
    high = _extreme(torch.where(scored, values, -torch.inf), cu_seqlens, "amax")
    # Without a scored token low is +inf. NaN compares false and reaches the loss, which raises or
    # turns NaN.
    varies = high > low
    if varies.any():
        i = int(varies.nonzero()[0])
        raise ValueError(
            f"{name}: expected one value per sequence, repeated over its scored tokens, got "
            f"{float(low[i])} to {float(high[i])} in sequence {i}; {remedy}"
        )
    return torch.where(low == torch.inf, 0.0, high)


def _extreme(values: Tensor, cu_seqlens: Tensor | None, which: str) -> Tensor:
    if cu_seqlens is None:
        return values.amin(-1) if which == "amin" else values.amax(-1)
    lengths = cu_seqlens.diff()
    owner = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths)
    start = values.new_full((len(lengths),), torch.inf if which == "amin" else -torch.inf)
    return start.scatter_reduce(0, owner, values, which)


def check_precision(name: str, log_prob: Tensor, remedy: str) -> None:
    """Refuses half-precision log-probs with the framework's own remedy.

    bf16 keeps 8 bits of each log-prob: 0.007 nats rms per token over a vocabulary of 49152, so 0.2 nats
    over an answer of 1000 tokens and 0.6 over 8000, where the weight is off by a factor of 1.9. The
    bits are gone: no cast brings them back.

    Raises:
        TypeError: ``log_prob`` in half precision.
    """
    if log_prob.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"{name}: expected float32 or float64, got {log_prob.dtype}, whose rounding adds up over "
            f"the answer, to some 0.2 nats in 1000 tokens; {remedy}"
        )


def read_limits(limits: str | Limits | Mapping[str, float]) -> Limits:
    """Limits from what a configuration file can hold: a preset's name, or the four by name.

    Raises:
        TypeError: limits of another type.
        ValueError: an unknown name.
    """
    if isinstance(limits, str):
        if limits not in PRESETS:
            raise ValueError(
                f"limits: expected one of {', '.join(map(repr, PRESETS))}, the four limits by name or "
                f"a Limits, got {limits!r}"
            )
        return PRESETS[limits]
    read = Limits(**limits) if isinstance(limits, Mapping) else limits
    validation.check_limits(read)
    return read


def check_ratio(ratio: str) -> None:
    """Refuses an unknown ratio before anything is trained.

    Raises:
        ValueError: a ratio that is not in ``choices.RATIOS``.
    """
    validation.check_choice("ratio", ratio, choices.RATIOS)


def check_signs(where: str, config: object, names: Sequence[str], remedy: str = "") -> None:
    """Refuses settings that turn right answers negative, and so choose the limits of wrong ones.

    Raises:
        ValueError: one of the names is true in ``config``, which ``where`` calls by its path.
    """
    for name in names:
        if getattr(config, name, False):
            raise ValueError(
                f"{where}.{name}: expected false, it turns right answers negative, which chooses the "
                f"limits of wrong ones; set it to false{remedy}"
            )


def check_free(framework: str, name: str, taken: object, ours: object, remedy: str) -> None:
    """Refuses to register under the name of a loss that a framework has itself.

    Args:
        framework: its name.
        name: to register.
        taken: what has that name, or None.
        ours: the loss, of which ``taken`` may be a partial.
        remedy: what the message says to do.

    Raises:
        ValueError: ``taken`` is another's.
    """
    if taken is not None and getattr(taken, "func", None) is not ours:
        raise ValueError(f"register: {name!r} is a policy loss of {framework}'s own; {remedy}")


def figures(out: TOPROutput) -> dict[str, float]:
    """What to log of a micro-batch, copied to the host together.

    Means over its non-empty sequences, and 0 where there are none: frameworks average over micro-batches
    and ranks, so a part without negatives must neither leave a key out nor make the mean NaN. Shares
    are of all sequences: divide a ``negative_`` figure by ``negative_share``.

    Returns:
        ``kl`` (log mu - log pi per token), ``objective`` (R * O / |y|), ``positive_share``,
        ``negative_share``, ``negative_weight`` and ``dead_share`` (negatives of weight < 1e-6).
    """
    metrics = out.metrics()
    counted = out.length > 0
    negative = counted & (out.reward < 0)
    share = negative.sum() / counted.sum().clamp(min=1)

    def where(present: Tensor, figure: Tensor) -> Tensor:
        return torch.where(present.any(), figure, 0.0)

    values = {
        "kl": where(counted, metrics["kl_k1"]),
        "objective": where(counted, metrics["objective"]),
        "positive_share": where(counted, metrics["positive_share"]),
        "negative_share": share,
        "negative_weight": where(negative, metrics["weight_negative_mean"] * share),
        "dead_share": where(negative, metrics["dead_share"] * share),
    }
    on_host = torch.stack([v.double() for v in values.values()]).tolist()
    return dict(zip(values, on_host, strict=True))
