"""The taper of TOPR in log space: the one torch definition of Eq. 3's weight and Eq. 6's value."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Bound = float | Tensor
Function = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def clip_log_ratio(log_ratio: Tensor, log_min: Bound, log_max: Bound) -> Tensor:
    """Clips a log-ratio to ``[log_min, log_max]``; NaN stays NaN.

    Args:
        log_ratio: log(pi/mu), any shape, floating.
        log_min: log a, number or tensor that broadcasts; -inf for a = 0.
        log_max: log b, number or tensor that broadcasts; +inf for b = inf.

    Returns:
        c = clip(log_ratio, log_min, log_max), shape and dtype of ``log_ratio``.
    """
    # Compare-and-select: PTX min/max drop NaN, and all kernels follow this line.
    c = torch.where(log_ratio < log_min, log_min, log_ratio)
    return torch.where(c > log_max, log_max, c)


def taper(log_ratio: Tensor, log_min: Bound, log_max: Bound) -> tuple[Tensor, Tensor]:
    """Computes rho(x, a, b) of Eq. 6 and the weight [x]_a^b of Eq. 3 from log x.

    Both come from c = clip(log x, log a, log b): the weight is ``exp(c)``, the value
    ``exp(c) * (1 + log x - c)``. They satisfy ``x * d rho/dx = weight`` and ``rho <= x``. A zero
    weight has value 0 by selection, which covers a = 0 at x = 0 and b = 0.

    Args:
        log_ratio: log x = log(pi/mu), any shape, floating.
        log_min: log a, number or tensor that broadcasts.
        log_max: log b, number or tensor that broadcasts.

    Returns:
        (value, weight), shape and dtype of ``log_ratio``. NaN in gives NaN out in both.
    """
    c = clip_log_ratio(log_ratio, log_min, log_max)
    weight = c.exp()
    # Inside the limits the excess is exactly 0, also at log x = +inf where inf - inf is NaN.
    excess = torch.where(log_ratio == c, 0.0, log_ratio - c)
    value = torch.where(weight == 0, 0.0, weight * (1 + excess))
    return value, weight


def taper_by(function: Function, log_ratio: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Value and weight by a custom taper, see ``limits.Taper``.

    Args:
        function: the taper.
        log_ratio: [n] floating.
        positive: [n] bool.

    Returns:
        (value, weight), shape and dtype of ``log_ratio``. NaN in gives NaN out in both.

    Raises:
        TypeError: if it returns anything but two floating tensors.
        ValueError: if their shape is another.
    """
    name = getattr(function, "__qualname__", type(function).__name__)
    results = function(log_ratio, positive)
    if not isinstance(results, (tuple, list)) or len(results) != 2:
        raise TypeError(
            f"limits: {name} returned {type(results).__name__}; expected two tensors, (objective, "
            "weight)"
        )
    for kind, x in zip(("objective", "weight"), results, strict=True):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"limits: the {kind} of {name} is {got}; expected a floating tensor")
        if x.shape != log_ratio.shape:
            raise ValueError(
                f"limits: the {kind} of {name} has shape {tuple(x.shape)}; expected that of the "
                f"log-ratios, {tuple(log_ratio.shape)}, entry by entry"
            )
    # A NaN ratio never becomes a finite weight.
    unknown = log_ratio.isnan()
    value, weight = (torch.where(unknown, log_ratio, x.to(log_ratio.dtype)) for x in results)
    return value, weight
