"""The public contract, checked once on the host before any work and without a device sync.

Metadata (types, shapes, dtypes, devices, names) always raises. Values (label range, content of
``cu_seqlens``, finite rewards) raise where reading them is free, that is on eager CPU tensors, and
anywhere with ``debug=True``; elsewhere the kernels poison the loss with NaN and never read out of
bounds.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from topr_kernels.choices import RATIOS, REDUCTIONS, SEGMENT_RATIOS, SUMMED_RATIOS
from topr_kernels.layout import IGNORE_INDEX
from topr_kernels.limits import IS, PRESETS, Limits, Taper
from topr_kernels.ops.options import HeadWeights, Objective, Tokens, Transforms, Wanted
from topr_kernels.sequence import needs_behavior, of_tokens

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(
    name: str, x: object, dtypes: tuple[torch.dtype, ...], device: torch.device, remedy: str = ""
) -> Tensor:
    """Checks that an argument is a tensor of one of the dtypes on the device; returns it."""
    hint = f"; {remedy}" if remedy else ""
    if not isinstance(x, Tensor):
        # The remedy is for a tensor of another dtype.
        hint = "" if x is None else "; make it one with torch.as_tensor(...)"
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}{hint}")
    if x.dtype not in dtypes:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected dtype {expected}, got {got}{hint}")
    if x.device != device:
        raise ValueError(
            f"{name}: on {x.device}, expected {device} like the logits or hidden states; move it"
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


#: How far a softcap may be from ``logit_scale``, as a factor.
SOFTCAP_RANGE = 1e5


def check_transforms(
    temperature: float, softcap: float | None, logit_scale: float = 1.0
) -> Transforms:
    """Checks the transforms of the logits; returns them as floats.

    Raises:
        TypeError, ValueError: if one is not a positive finite number, or the softcap out of range.
    """
    logit_scale = check_number("logit_scale", logit_scale, positive=True)
    temperature = check_number("temperature", temperature, positive=True)
    if softcap is not None:
        softcap = check_number("softcap", softcap, positive=True)
        # The Triton kernels have powers of the ratio in their coefficients.
        if not 1 / SOFTCAP_RANGE <= softcap / logit_scale <= SOFTCAP_RANGE:
            raise ValueError(
                f"softcap: got {softcap} beside logit_scale={logit_scale}; expected "
                f"{logit_scale / SOFTCAP_RANGE:g} to {logit_scale * SOFTCAP_RANGE:g} (models have 10 to "
                "100); None is no softcap"
            )
    return Transforms(logit_scale, softcap, temperature)


def check_limits(limits: object) -> Limits | Taper:
    """Checks that ``limits`` is a Limits object, or a callable that is not a class."""
    if isinstance(limits, Limits) or (callable(limits) and not isinstance(limits, type)):
        return limits
    names = ", ".join(PRESETS)
    raise TypeError(
        f"limits: expected a topr_kernels.Limits, got {type(limits).__name__} ({limits!r}); use a "
        f"preset (topr_kernels.TOPR, ...; PRESETS has them by name: {names}), Limits(...) or a callable "
        "(log_ratio, positive) -> (objective, weight)"
    )


def check_rows(
    x: object,
    labels: object,
    cu_seqlens: object,
    name: str = "logits",
    size: str = "V",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checks rows, labels and ``cu_seqlens`` and brings them to [O, T, V], [O, T], [B + 1].

    Args:
        x: logits, or hidden states with D for V.
        labels: labels.
        cu_seqlens: offsets or None.
        name: what the rows are called in messages.
        size: what their last dimension is called.

    Returns:
        (rows [O, T, V], labels [O, T], cu_seqlens or None): views, nothing is copied.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if hasattr(x, "full_tensor"):
        raise TypeError(
            f"{name}: a DTensor; pass what is here, {name}.to_local(), or the whole, "
            f"{name}.full_tensor(); logits in shards of the vocabulary with process_group="
        )
    x = check_tensor(name, x, LOGITS_DTYPES, x.device)
    if x.dim() not in (2, 3) or x.shape[-1] == 0:
        raise ValueError(
            f"{name}: expected [B, T, {size}] (padded) or [N, {size}] / [1, N, {size}] with cu_seqlens "
            f"(packed), {size} >= 1, got shape {tuple(x.shape)}"
        )
    labels = check_tensor("labels", labels, (torch.int64,), x.device, "cast token ids with .long()")
    if labels.shape != x.shape[:-1]:
        raise ValueError(
            f"labels: expected shape {tuple(x.shape[:-1])} to match {name} "
            f"{tuple(x.shape)}, got {tuple(labels.shape)}; pass labels and {name} of the same "
            "length, unshifted, the shift is done inside (or shift=False if they are aligned)"
        )
    if cu_seqlens is None:
        if x.dim() == 2:
            raise ValueError(
                f"cu_seqlens: missing for packed {name} of shape {tuple(x.shape)}; pass the "
                f"[B + 1] offsets of the sequences, or [B, T, {size}] {name} for padded input"
            )
        return x, labels, None
    cu_seqlens = _check_cu_seqlens(cu_seqlens, labels)
    if x.dim() == 3 and x.shape[0] != 1:
        raise ValueError(
            f"{name}: with cu_seqlens expected [N, {size}] or [1, N, {size}], got {tuple(x.shape)}; "
            "flatten the batch, or drop cu_seqlens for padded input"
        )
    if x.dim() == 2:
        x, labels = x.unsqueeze(0), labels.unsqueeze(0)
    return x, labels, cu_seqlens


class LogitsArguments(NamedTuple):
    """Arguments of ``topr_loss`` and ``log_prob`` but those of sequences, as they came or checked."""

    logits: Tensor
    tokens: Tokens
    transforms: Transforms
    entropy: bool
    impl: str
    debug: bool


def check_logits(given: LogitsArguments) -> LogitsArguments:
    """Checks all but values; logits become [O, T, V], labels [O, T]."""
    logits, tokens, transforms, entropy, impl, debug = given
    x, labels, cu_seqlens = check_rows(logits, tokens.labels, tokens.cu_seqlens)
    tokens = Tokens(labels, cu_seqlens, tokens.shift)
    transforms = check_transforms(transforms.temperature, transforms.softcap)
    return LogitsArguments(x, tokens, transforms, entropy, impl, debug)


class TokenArguments(NamedTuple):
    """Arguments of ``topr_loss_from_log_prob`` but those of sequences, as they came or checked."""

    log_prob: Tensor
    mask: Tensor
    cu_seqlens: Tensor | None
    debug: bool

    @property
    def tokens(self) -> Tokens:
        """The mask in the place of labels."""
        return Tokens(self.mask, self.cu_seqlens, False)


def check_token_log_prob(given: TokenArguments) -> TokenArguments:
    """Checks all but values; log-probs and mask become [O, T], the mask bool."""
    log_prob, mask, cu_seqlens, debug = given
    if not isinstance(log_prob, Tensor):
        raise TypeError(f"log_prob: expected a torch.Tensor, got {type(log_prob).__name__}")
    log_prob = check_tensor(
        "log_prob",
        log_prob,
        (torch.float32, torch.float64),
        log_prob.device,
        "half precision loses whole nats on a sequence, and a cast would come too late; "
        "topr_kernels.log_prob gives fp32 from half-precision logits",
    )
    integers = (torch.int64, torch.int32, torch.uint8)
    mask = check_tensor("mask", mask, (torch.bool, *integers, *LOGITS_DTYPES), log_prob.device)
    if mask.shape != log_prob.shape:
        raise ValueError(
            f"mask: expected shape {tuple(log_prob.shape)} like log_prob, got {tuple(mask.shape)}"
        )
    if mask.is_floating_point() and values_readable(mask, False) and mask.isnan().any():
        raise ValueError("mask: got NaN; expected 0 or 1 for each token")
    mask = mask != 0
    if cu_seqlens is None:
        if log_prob.dim() != 2:
            raise ValueError(
                "log_prob: expected [B, T], or [N] / [1, N] with cu_seqlens, got shape "
                f"{tuple(log_prob.shape)}"
            )
        return TokenArguments(log_prob, mask, None, debug)
    if log_prob.dim() not in (1, 2) or (log_prob.dim() == 2 and log_prob.shape[0] != 1):
        raise ValueError(
            f"log_prob: with cu_seqlens expected [N] or [1, N], got {tuple(log_prob.shape)}; flatten "
            "the batch, or drop cu_seqlens for padded input"
        )
    cu_seqlens = _check_cu_seqlens(cu_seqlens, mask)
    return TokenArguments(log_prob.view(1, -1), mask.view(1, -1), cu_seqlens, debug)


def _check_cu_seqlens(cu_seqlens: object, tokens: Tensor) -> Tensor:
    cu_seqlens = check_tensor("cu_seqlens", cu_seqlens, (torch.int32, torch.int64), tokens.device)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected shape [B + 1], got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.shape[0] == 1 and tokens.numel() > 0:
        raise ValueError(
            f"cu_seqlens: a single entry holds no sequence, but there are {tokens.numel()} tokens; "
            "pass [B + 1] offsets from 0 to N"
        )
    return cu_seqlens


def check_head(hidden: Tensor, weight: object, bias: object) -> HeadWeights:
    """Checks the head of a language model against its hidden states.

    Args:
        hidden: [O, T, D], already checked.
        weight: [V, D] in the dtype of ``hidden``; under autocast any floating dtype.
        bias: [V] or None.

    Returns:
        HeadWeights; its compute_dtype is that of autocast where it is on.
    """
    device = hidden.device
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"weight: expected a torch.Tensor [V, D], got {type(weight).__name__}; pass "
            "lm_head.weight, not the module"
        )
    # A DTensor, or a placeholder of ZeRO-3 that has not been gathered.
    if hasattr(weight, "full_tensor") or (hasattr(weight, "ds_id") and weight.numel() == 0):
        kind = type(weight).__name__
        raise TypeError(
            f"weight: a {kind} that is sharded over processes; pass the whole matrix (inside the "
            "wrapped forward, as topr_kernels.hf.causal_lm_topr_loss does; "
            # Without grad_placements every process would keep the gradient of its own data alone.
            "weight.full_tensor(grad_placements=[torch.distributed.tensor.Partial()]); or inside "
            "deepspeed.zero.GatheredParameters), or, for a vocabulary in shards, "
            "process_group=weight.device_mesh.get_group()"
        )
    weight = check_tensor("weight", weight, LOGITS_DTYPES, device)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight: expected [V, D] with D = {hidden.shape[-1]} like the hidden states, V >= 1, got "
            f"{tuple(weight.shape)}; it is lm_head.weight, not its transpose"
        )
    if bias is not None:
        bias = check_tensor("bias", bias, LOGITS_DTYPES, device)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"bias: expected shape ({weight.shape[0]},) like the rows of weight, got "
                f"{tuple(bias.shape)}"
            )
    if torch.is_autocast_enabled(device.type) and hidden.dtype != torch.float64:
        return HeadWeights(weight, bias, torch.get_autocast_dtype(device.type))
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(
                f"{name}: expected dtype {hidden.dtype} like the hidden states, got {x.dtype}; cast one "
                "of them, or run under torch.autocast"
            )
    return HeadWeights(weight, bias, hidden.dtype)


def check_tolerance(
    grad_tolerance: object, compute: torch.dtype, head_frozen: bool, default: float
) -> float:
    """Checks ``grad_tolerance``; None is 0, or ``default`` for a frozen head in half precision."""
    if grad_tolerance is None:
        half = compute in (torch.float16, torch.bfloat16)
        return default if head_frozen and half else 0.0
    tolerance = check_number("grad_tolerance", grad_tolerance)
    if not 0 <= tolerance < 1:
        raise ValueError(
            "grad_tolerance: expected 0 (exact) or the relative norm of the logits' gradient to leave "
            f"out, below 1, e.g. 2 ** -10, got {tolerance}"
        )
    return tolerance


class LinearArguments(NamedTuple):
    """Arguments of the fused-linear functions but those of sequences, as they came."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    tokens: Tokens
    transforms: Transforms
    entropy: bool
    grad_tolerance: float | None
    workspace_bytes: int | None
    impl: str
    debug: bool


class LinearInputs(NamedTuple):
    """The same, checked: hidden [O, T, D], labels [O, T]."""

    hidden: Tensor
    weights: HeadWeights
    tokens: Tokens
    transforms: Transforms
    wanted: Wanted


def check_linear(given: LinearArguments, frozen_tolerance: float) -> LinearInputs:
    """Checks all but values and the workspace.

    Args:
        given: the arguments.
        frozen_tolerance: ``grad_tolerance`` of a frozen head in half precision, where it is None.
    """
    tokens, transforms = given.tokens, given.transforms
    x, labels, cu_seqlens = check_rows(
        given.hidden, tokens.labels, tokens.cu_seqlens, "hidden", "D"
    )
    weights = check_head(x, given.weight, given.bias)
    grad = torch.is_grad_enabled()
    trained = [y is not None and y.requires_grad and grad for y in (x, *weights[:2])]
    tolerance = check_tolerance(
        given.grad_tolerance, weights.compute_dtype, not trained[1], frozen_tolerance
    )
    return LinearInputs(
        x,
        weights,
        Tokens(labels, cu_seqlens, tokens.shift),
        check_transforms(transforms.temperature, transforms.softcap, transforms.logit_scale),
        Wanted(tolerance, *trained),
    )


def check_workspace(workspace_bytes: object, hidden: Tensor, vocab: int) -> int:
    """Checks the budget for a tile of logits; returns it in bytes, None being the default."""
    if workspace_bytes is None:
        return (2 << 30) if hidden.is_cuda else (192 << 20)
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
        raise TypeError(f"workspace_bytes: expected an int, got {type(workspace_bytes).__name__}")
    least = 16 * vocab * (8 if hidden.dtype == torch.float64 else 4)
    if workspace_bytes < least:
        raise ValueError(
            f"workspace_bytes: expected at least {least}, 16 rows of {vocab} logits, got "
            f"{workspace_bytes}"
        )
    return workspace_bytes


def check_frozen(name: str, x: Tensor) -> None:
    """Refuses a tensor that requires grad where the method holds it constant."""
    if x.requires_grad:
        raise ValueError(
            f"{name}: requires grad, but it is a constant of the objective and would silently get "
            f"none; pass {name}.detach()"
        )


class SequenceArguments(NamedTuple):
    """The arguments that belong to sequences, as they came."""

    behavior_log_prob: Tensor
    reward: Tensor
    normalizer: float | Tensor | None
    limits: Limits | Taper
    ratio: str
    baseline: float
    reduction: str
    sequence_weight: Tensor | None = None
    behavior_known: Tensor | None = None
    segments: Tensor | None = None


def check_objective(tokens: Tokens, given: SequenceArguments) -> Objective:
    """Checks what belongs to sequences.

    Args:
        tokens: checked; labels [O, T], or a mask in their place.
        given: behavior_log_prob [O, T] (packed: [N] or [1, N]) per token, or [B] per sequence;
            reward, sequence_weight and behavior_known [B]; normalizer a number > 0, a 0-dim tensor or
            None.

    Returns:
        Objective; behavior_log_prob [O, T] or [B].
    """
    labels, cu_seqlens, _ = tokens
    behavior_log_prob, reward, normalizer, limits, ratio, baseline, reduction = given[:7]
    check_choice("ratio", ratio, RATIOS)
    check_choice("reduction", reduction, REDUCTIONS)
    device = labels.device
    sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    reward = _per_sequence("reward", reward, sequences, device)
    weight = given.sequence_weight
    if weight is not None:
        weight = _per_sequence("sequence_weight", weight, sequences, device)
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
    elif ratio not in SUMMED_RATIOS:
        raise ValueError(
            f"behavior_log_prob: ratio={ratio!r} needs it per token, shape {tuple(per_token[-1])}, got "
            f"one sum per sequence {tuple(behavior.shape)}; pass token log-probs or another ratio"
        )
    segments = _segments(tokens, given)
    normalizer = _normalizer(normalizer, reduction, device)
    limits = check_limits(limits)
    taper = None if isinstance(limits, Limits) else limits
    log_limits = (limits if isinstance(limits, Limits) else IS).log()
    baseline = check_number("baseline", baseline)
    options = SEGMENT_RATIOS.get(ratio, ratio), baseline, reduction
    objective = Objective(behavior, reward, normalizer, *log_limits, *options, weight)
    if segments is not None or taper is not None:
        objective = objective._replace(segments=segments, taper=taper)
    return objective if given.behavior_known is None else _filled(tokens, objective, given)


def _segments(tokens: Tokens, given: SequenceArguments) -> Tensor | None:
    """Values of the tokens by which segments are told apart, [O, T]; None for another ratio."""
    labels, segments, ratio = tokens.labels, given.segments, given.ratio
    if ratio not in SEGMENT_RATIOS:
        if segments is not None:
            raise ValueError(
                f"segments: got some with ratio={ratio!r}, which does not read them; pass ratio="
                f"{' or '.join(map(repr, SEGMENT_RATIOS))}, or drop them"
            )
        return None
    if segments is None:
        return torch.zeros_like(labels, dtype=torch.int64)
    remedy = "give whole numbers, equal ones in a row being a segment, and cast them with .long()"
    segments = check_tensor("segments", segments, INTEGERS, labels.device, remedy)
    shapes = [labels.shape] if tokens.cu_seqlens is None else [labels.shape, labels.shape[1:]]
    if segments.shape not in shapes:
        raise ValueError(
            f"segments: expected one per token, shape {tuple(shapes[-1])} like behavior_log_prob, got "
            f"{tuple(segments.shape)}"
        )
    return segments.reshape(labels.shape)


def _filled(tokens: Tokens, objective: Objective, given: SequenceArguments) -> Objective:
    """The objective with something in the place of a log mu that is not known."""
    labels, cu_seqlens, _ = tokens
    remedy = "give True for a sequence whose log mu is known, as with .bool()"
    known = check_tensor(
        "behavior_known", given.behavior_known, (torch.bool,), labels.device, remedy
    )
    if known.shape != objective.reward.shape:
        raise ValueError(
            f"behavior_known: expected one per sequence, shape {tuple(objective.reward.shape)}, got "
            f"{tuple(known.shape)}"
        )
    # Without it the objective is that of mu = 1, up to a constant; a weight that needs it is NaN.
    fill = torch.where(needs_behavior(objective), torch.nan, 0.0)
    behavior, kept = objective.behavior_log_prob, known
    if behavior.dim() == 2:
        fill, kept = (of_tokens(x, labels, cu_seqlens) for x in (fill, known))
    behavior = torch.where(kept, behavior, fill.to(behavior.dtype))
    return objective._replace(behavior_log_prob=behavior, behavior_known=known)


def _per_sequence(name: str, x: object, sequences: int, device: torch.device) -> Tensor:
    """Checks a floating constant of the objective, one number per sequence."""
    x = check_tensor(name, x, LOGITS_DTYPES, device, "cast it with .float()")
    if x.shape != (sequences,):
        raise ValueError(
            f"{name}: expected one per sequence, shape ({sequences},), got {tuple(x.shape)}"
        )
    check_frozen(name, x)
    return x


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


def check_values(
    tokens: Tokens, vocab: int, objective: Objective | None = None, normalizer: object = None
) -> None:
    """Raises on values that are not sound; reads them on the host."""
    check_label_values(tokens.labels, vocab)
    check_sequence_values(tokens, objective, normalizer)


def check_sequence_values(tokens: Tokens, objective: Objective | None, normalizer: object) -> None:
    """Raises on values of sequences that are not sound; reads them on the host.

    Args:
        tokens: labels [O, T], or a mask in their place.
        objective: checked, or None.
        normalizer: as it came.
    """
    labels, cu_seqlens, _ = tokens
    if objective is not None:
        check_reward_values(objective.reward)
        if objective.sequence_weight is not None:
            check_weight_values(objective.sequence_weight)
        if objective.behavior_known is not None:
            check_known_values(objective)
    if isinstance(normalizer, Tensor):
        scored = labels if labels.dtype == torch.bool else labels != IGNORE_INDEX
        check_normalizer_value(normalizer, bool(scored.any()))
    if cu_seqlens is not None:
        check_cu_seqlens_values(cu_seqlens, labels.shape[1])


def check_label_values(labels: Tensor, vocab: int) -> None:
    """Raises when a label is neither IGNORE_INDEX nor a token id."""
    ids = labels.masked_fill(labels == IGNORE_INDEX, 0)
    low, high = map(int, ids.aminmax()) if ids.numel() else (0, 0)
    if low < 0 or high >= vocab:
        where = tuple(((ids < 0) | (ids >= vocab)).nonzero()[0].tolist())
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
    # A sum is finite only if all of its parts are; one of finite rewards may overflow.
    if not math.isfinite(reward.sum()) and not reward.isfinite().all():
        i = int((~reward.isfinite()).nonzero()[0])
        raise ValueError(
            f"reward: expected finite numbers, got {float(reward[i])} for sequence {i}; drop the "
            "sequence or give it a reward"
        )


def check_weight_values(weight: Tensor) -> None:
    """Raises when a weight of a sequence is NaN, infinite or negative."""
    bad = ~(weight.isfinite() & (weight >= 0))
    if bad.any():
        i = int(bad.nonzero()[0])
        raise ValueError(
            f"sequence_weight: expected finite numbers >= 0, got {float(weight[i])} for sequence {i}; a "
            "sign belongs to the reward, 0 leaves a sequence out"
        )


def check_known_values(objective: Objective) -> None:
    """Raises when the log mu of a sequence is not known whose weight depends on it."""
    known = objective.behavior_known
    assert known is not None
    bad = ~known & needs_behavior(objective)
    if bad.any():
        i = int(bad.nonzero()[0])
        why = "whose weight depends on pi/mu; "
        other = "choose limits that are equal for its sign (TOPR's of positives are)"
        if objective.taper is not None:
            why = "but limits is a callable, which reads pi/mu of every sequence; "
            other = "pass Limits that are equal for its sign (TOPR's of positives are)"
        raise ValueError(
            f"behavior_known: got False for sequence {i} of reward {float(objective.reward[i])} "
            f"(baseline {objective.baseline}), {why}score its log mu, leave it out, or {other}"
        )
