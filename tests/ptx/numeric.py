"""Arithmetic of PTX on numpy arrays: what rounds, saturates or treats NaN in a way of its own.

Not modelled: the payload of a NaN (PTX makes 0x7fffffff of most).
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
LEAST_NORMAL = np.float32(2.0**-126)


def flush(x: Array) -> Array:
    """.ftz: a subnormal fp32 becomes a zero of its sign."""
    return np.where(np.abs(x) < LEAST_NORMAL, np.copysign(np.float32(0), x), x)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a b + c in fp32, rounded once.

    The product is exact in fp64; the sum is rounded there to odd, which makes the second rounding right.
    """
    product = a.astype(np.float64) * b
    c = c.astype(np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    bits += inexact * np.where((error > 0) == (total > 0), 1, -1)
    return total.astype(np.float32)


def maximum(a: Array, b: Array) -> Array:
    """max.f32: the other operand where one is NaN; +0 above -0."""
    both = (a.view(np.uint32) & b.view(np.uint32)).view(np.float32)
    return np.where((a == 0) & (b == 0), both, np.fmax(a, b))


def minimum(a: Array, b: Array) -> Array:
    """min.f32: the other operand where one is NaN; -0 below +0."""
    either = (a.view(np.uint32) | b.view(np.uint32)).view(np.float32)
    return np.where((a == 0) & (b == 0), either, np.fmin(a, b))


def divide(a: Array, b: Array) -> Array:
    """Integers, towards zero. A divisor of 0 must have been refused."""
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


def shift_left(a: Array, by: Array) -> Array:
    """Shl: everything is gone from the width on."""
    width = a.itemsize * 8
    return np.where(by < width, a << (by % width).astype(a.dtype), 0).astype(a.dtype)


def shift_right(a: Array, by: Array) -> Array:
    """Shr: of a signed type with copies of its sign."""
    width = a.itemsize * 8
    by = np.minimum(by, width - 1) if a.dtype.kind == "i" else by
    shifted = a >> (by % width).astype(a.dtype)
    return np.where(by < width, shifted, 0).astype(a.dtype)


def from_bf16(x: Array) -> Array:
    return (x.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x: Array) -> Array:
    """To the nearest, ties to even. -> uint16."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def to_fp16(x: Array) -> Array:
    """To the nearest, ties to even. -> uint16."""
    return np.where(np.isnan(x), 0x7FFF, x.astype(np.float16).view(np.uint16)).astype(np.uint16)


class Approximate:
    """Results of approximate instructions, up to ``ulps`` away from the rounded ones.

    A seed is a device: on one of them the same operands give the same bits, in every lane and launch.
    """

    def __init__(self, ulps: int, seed: int) -> None:
        self.ulps, self.seed = ulps, seed

    def of(self, exact: Array, promised: Array | bool = False) -> Array:
        """fp64 values -> fp32 off by a few ulp, but where the instruction set promises the result."""
        rounded = exact.astype(np.float32)
        if not self.ulps:
            return rounded
        mixed = exact.view(np.uint64) + np.uint64(self.seed)
        for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):  # splitmix64
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(factor)
        off = (mixed >> np.uint64(33)) % np.uint64(2 * self.ulps + 1)
        off = off.astype(np.int32) - np.int32(self.ulps)
        moved = (rounded.view(np.int32) + off).view(np.float32)
        # Zeros and infinities stay what they are, and nothing becomes one.
        infinite = ~np.isfinite(rounded) | ~np.isfinite(moved)
        stays = promised | ~(np.abs(rounded) > 2 * LEAST_NORMAL) | infinite
        return np.where(stays, rounded, moved)

    def ex2(self, x: Array) -> Array:
        return self.of(np.exp2(x.astype(np.float64)), x == 0)

    def lg2(self, x: Array) -> Array:
        return self.of(np.log2(x.astype(np.float64)), x == 1)

    def rcp(self, x: Array) -> Array:
        return self.of(1.0 / x.astype(np.float64))

    def sqrt(self, x: Array) -> Array:
        return self.of(np.sqrt(x.astype(np.float64)))

    def rsqrt(self, x: Array) -> Array:
        return self.of(1.0 / np.sqrt(x.astype(np.float64)))

    def div(self, a: Array, b: Array) -> Array:
        return self.of(a.astype(np.float64) / b)
