"""The public contract, checked once on the host before any work and without a device sync.

Metadata (types, shapes, dtypes, devices, names) always raises. Values (label range, content of
``cu_seqlens``, finite rewards) raise where reading them is free, that is on eager CPU tensors, and
anywhere with ``debug=True``; elsewhere the kernels poison the loss with NaN and never read out of
bounds.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from topr_kernels.layout import IGNORE_INDEX
from topr_kernels.limits import PRESETS, Limits

RATIOS = ("sequence", "geometric", "token")
REDUCTIONS = ("sequence_mean", "token_mean", "sum")
LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(
    name: str, x: object, dtypes: tuple[torch.dtype, ...], device: torch.device, remedy: str = ""
) -> Tensor:
    """Checks that an argument is a tensor of one of the dtypes on the device; returns it."""
    hint = f"; {remedy}" if remedy else ""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}{hint}")
    if x.dtype not in dtypes:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected dtype {expected}, got {got}{hint}")
    if x.device != device:
        raise ValueError(
            f"{name}: on {x.device}, expected {device} like the logits; move it there first"
        )
    return x


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Checks that a named option is one of its choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(name: str, value: object, *, positive: bool = False) -> float:
    """Checks that an option is a finite Python number (and > 0 if asked); returns it as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name}: expected a Python number, got {type(value).__name__}; use float(...) or .item()"
        )
    # Comparisons rather than math.isfinite, which a compiled graph with symbolic floats cannot trace.
    if not -math.inf < value < math.inf or (positive and value <= 0):
        kind = "a finite number > 0" if positive else "a finite number"
        raise ValueError(f"{name}: expected {kind}, got {value}")
    return float(value)


def check_transforms(temperature: float, softcap: float | None) -> tuple[float, float | None]:
    """Checks temperature and softcap; returns them as floats."""
    temperature = check_number("temperature", temperature, positive=True)
    if softcap is not None:
        softcap = check_number("softcap", softcap, positive=True)
    return temperature, softcap


def check_limits(limits: object) -> Limits:
    """Checks that ``limits`` is a Limits object."""
    if not isinstance(limits, Limits):
        names = ", ".join(PRESETS)
        raise TypeError(
            f"limits: expected a topr_kernels.Limits, got {type(limits).__name__} ({limits!r}); use a "
            f"preset (topr_kernels.TOPR, ...; PRESETS has them by name: {names}) or Limits(...)"
        )
    return limits


def check_rows(
    logits: object, labels: object, cu_seqlens: object, shift: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checks logits, labels and ``cu_seqlens`` and brings them to [O, T, V], [O, T], [B + 1].

    Returns:
        (logits [O, T, V], labels [O, T], cu_seqlens or None): views, nothing is copied.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a torch.Tensor, got {type(logits).__name__}")
    logits = check_tensor("logits", logits, LOGITS_DTYPES, logits.device)
    if logits.dim() not in (2, 3) or logits.shape[-1] == 0:
        raise ValueError(
            "logits: expected [B, T, V] (padded) or [N, V] / [1, N, V] with cu_seqlens (packed), "
            f"V >= 1, got shape {tuple(logits.shape)}"
        )
    labels = check_tensor(
        "labels", labels, (torch.int64,), logits.device, "cast token ids with .long()"
    )
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels: expected shape {tuple(logits.shape[:-1])} to match logits "
            f"{tuple(logits.shape)}, got {tuple(labels.shape)}; pass labels and logits of the same "
            "length, unshifted, the shift is done inside (or shift=False if they are aligned)"
        )
    if cu_seqlens is None:
        if logits.dim() == 2:
            raise ValueError(
                f"cu_seqlens: missing for packed logits of shape {tuple(logits.shape)}; pass the "
                "[B + 1] offsets of the sequences, or [B, T, V] logits for padded input"
            )
        return logits, labels, None
    cu_seqlens = check_tensor("cu_seqlens", cu_seqlens, (torch.int32, torch.int64), logits.device)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected shape [B + 1], got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.shape[0] == 1 and labels.numel() > 0:
        raise ValueError(
            f"cu_seqlens: a single entry holds no sequence, but there are {labels.numel()} tokens; "
            "pass [B + 1] offsets from 0 to N"
        )
    if logits.dim() == 3 and logits.shape[0] != 1:
        raise ValueError(
            f"logits: with cu_seqlens expected [N, V] or [1, N, V], got {tuple(logits.shape)}; "
            "flatten the batch, or drop cu_seqlens for padded input"
        )
    if logits.dim() == 2:
        logits, labels = logits.unsqueeze(0), labels.unsqueeze(0)
    return logits, labels, cu_seqlens


def check_frozen(name: str, x: Tensor) -> None:
    """Refuses a tensor that requires grad where the method holds it constant."""
    if x.requires_grad:
        raise ValueError(
            f"{name}: requires grad, but it is a constant of the objective and would silently get "
            f"none; pass {name}.detach()"
        )


def check_sequences(
    labels: Tensor,
    cu_seqlens: Tensor | None,
    behavior_log_prob: object,
    reward: object,
    normalizer: object,
    ratio: str,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checks what belongs to sequences.

    Args:
        labels: [O, T], already checked.
        cu_seqlens: [B + 1] or None, already checked.
        behavior_log_prob: [O, T] (packed: [N] or [1, N]) per token, or [B] per sequence.
        reward: [B].
        normalizer: number > 0, 0-dim tensor or None.
        ratio: ratio level.
        reduction: reduction.

    Returns:
        (behavior_log_prob [O, T] or [B], reward [B], normalizer 0-dim tensor or None).
    """
    check_choice("ratio", ratio, RATIOS)
    check_choice("reduction", reduction, REDUCTIONS)
    device = labels.device
    sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    reward = check_tensor(
        "reward",
        reward,
        (torch.float32, torch.float64, torch.bfloat16, torch.float16),
        device,
        "cast it with .float()",
    )
    if reward.shape != (sequences,):
        raise ValueError(
            f"reward: expected one per sequence, shape ({sequences},), got {tuple(reward.shape)}"
        )
    check_frozen("reward", reward)
    behavior = check_tensor(
        "behavior_log_prob",
        behavior_log_prob,
        (torch.float32, torch.float64),
        device,
        "store log mu in fp32: half precision loses whole nats on a sequence",
    )
    check_frozen("behavior_log_prob", behavior)
    per_token = [labels.shape] if cu_seqlens is None else [labels.shape, labels.shape[1:]]
    if behavior.shape in per_token:
        behavior = behavior.reshape(labels.shape)
    elif behavior.shape != (sequences,):
        raise ValueError(
            f"behavior_log_prob: expected shape {tuple(per_token[-1])} (per token, aligned with "
            f"labels) or ({sequences},) (summed per sequence), got {tuple(behavior.shape)}"
        )
    elif ratio == "token":
        raise ValueError(
            f"behavior_log_prob: ratio='token' needs it per token, shape {tuple(per_token[-1])}, got "
            f"one sum per sequence {tuple(behavior.shape)}; pass token log-probs or another ratio"
        )
    return behavior, reward, _normalizer(normalizer, reduction, device)


def _normalizer(normalizer: object, reduction: str, device: torch.device) -> Tensor | None:
    if normalizer is None:
        return None
    if reduction == "sum":
        raise ValueError(
            "normalizer: reduction='sum' has no denominator; drop it, or choose 'sequence_mean' "
            "(non-empty sequences) or 'token_mean' (scored tokens)"
        )
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0 or normalizer.device != device or normalizer.dtype.is_complex:
            raise ValueError(
                f"normalizer: expected a number or a 0-dim real tensor on {device}, got shape "
                f"{tuple(normalizer.shape)} of {normalizer.dtype} on {normalizer.device}"
            )
        check_frozen("normalizer", normalizer)
        return normalizer
    number = check_number("normalizer", normalizer, positive=True)
    return torch.full((), number, dtype=torch.float64, device=device)


def check_normalizer_value(normalizer: Tensor, anything_scored: bool) -> None:
    """Raises when a denominator on the device is NaN, negative, or 0 with something to divide."""
    value = normalizer.item()
    if not (0 < value < math.inf or (value == 0 and not anything_scored)):
        raise ValueError(
            f"normalizer: expected a finite number > 0, got {value}; pass the count of non-empty "
            "sequences (or of scored tokens, for 'token_mean') over all parts of the batch"
        )


def values_readable(x: Tensor, debug: bool) -> bool:
    """Whether value checks may read tensors here: eager CPU, or anywhere eager with ``debug``."""
    if torch.compiler.is_compiling():
        if debug:
            raise ValueError(
                "debug=True reads values on the host, which a compiled graph cannot; debug in eager mode"
            )
        return False
    return debug or x.device.type == "cpu"


def check_label_values(labels: Tensor, vocab: int) -> None:
    """Raises when a label is neither IGNORE_INDEX nor a token id."""
    bad = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocab))
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"labels: expected token ids in [0, {vocab}) or {IGNORE_INDEX} (not scored), got "
            f"{int(labels[where])} at {where}"
        )


def check_cu_seqlens_values(cu_seqlens: Tensor, n: int) -> None:
    """Raises when offsets do not start at 0, decrease, or do not end at the number of tokens."""
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"cu_seqlens: expected to start at 0, got {offsets[0]}")
    for i, (a, b) in enumerate(pairwise(offsets)):
        if b < a:
            raise ValueError(
                f"cu_seqlens: not increasing: entry {i + 1} is {b} after {a}; pass cumulative "
                "offsets, not lengths"
            )
    if offsets[-1] != n:
        raise ValueError(
            f"cu_seqlens: expected to end at the number of tokens N = {n}, got {offsets[-1]}"
        )


def check_reward_values(reward: Tensor) -> None:
    """Raises when a reward is NaN or infinite."""
    bad = ~reward.isfinite()
    if bad.any():
        i = int(bad.nonzero()[0])
        raise ValueError(
            f"reward: expected finite numbers, got {float(reward[i])} for sequence {i}; drop the "
            "sequence or give it a reward"
        )
