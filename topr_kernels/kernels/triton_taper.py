"""The taper of ``topr_kernels.taper`` for Triton: same names, same golden table."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-incomplete-defs
# (kernel bodies are not Python; what launches them is typed)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def taper(log_ratio, log_min, log_max):
    """-> (value, weight): rho of Eq. 6 and [x]_a^b of Eq. 3, NaN kept."""
    # Compare-and-select: PTX min and max drop NaN; the interpreter does not show it.
    c = tl.where(log_ratio < log_min, log_min, log_ratio)
    c = tl.where(c > log_max, log_max, c)
    weight = tl.exp(c)
    # Inside the limits the excess is exactly 0, also at log_ratio = +inf where inf - inf is NaN.
    excess = tl.where(log_ratio == c, 0.0, log_ratio - c)
    value = tl.where(weight == 0.0, 0.0, weight * (1.0 + excess))
    return value, weight
