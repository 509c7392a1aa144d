"""What an instruction that computes each lane for itself makes of arrays, found by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx import numeric
from ptx.numeric import Array

TYPES = {
    **{f"{k}{n}": np.dtype(f"u{n // 8}") for k in "bu" for n in (8, 16, 32, 64)},
    **{f"s{n}": np.dtype(f"i{n // 8}") for n in (8, 16, 32, 64)},
    "f16": np.dtype("u2"),
    "bf16": np.dtype("u2"),
    "f16x2": np.dtype("u4"),
    "bf16x2": np.dtype("u4"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "pred": np.dtype(bool),
}
INTEGERS = tuple(t for t in TYPES if t[0] in "us")
HALVES = {
    "f16": (lambda x: x.view(np.float16).astype(np.float32), numeric.to_fp16),
    "bf16": (numeric.from_bf16, numeric.to_bf16),
}

Function = Callable[..., Any]
COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def arithmetic(
    name: str, modifiers: tuple[str, ...], approximate: numeric.Approximate
) -> Function | None:
    """The function over arrays that an instruction applies, a ufunc where there is one; else None."""
    *flags, kind = modifiers or ("",)
    if name == "setp":
        return _setp(tuple(flags), kind)
    if name == "selp" and not flags and (kind in TYPES):
        return lambda a, b, p: np.where(p, a, b)
    if name == "cvt":
        return _cvt(modifiers)
    if kind == "f32":
        return _float(name, flags, approximate)
    if (name, kind) in (("neg", "f16x2"), ("neg", "bf16x2")) and not flags:
        return lambda a: a ^ np.uint32(0x80008000)
    if flags:
        return (
            {
                ("mul", "lo"): np.multiply,
                ("mul", "wide"): lambda a, b: _widen(a) * _widen(b),
                ("mad", "lo"): lambda a, b, c: a * b + c,
                ("mad", "wide"): lambda a, b, c: _widen(a) * _widen(b) + c,
            }.get((name, *flags))
            if kind in INTEGERS
            else None
        )
    if kind in INTEGERS:
        found = {
            "add": np.add,
            "sub": np.subtract,
            "min": np.minimum,
            "max": np.maximum,
            "neg": np.negative,
            "abs": np.absolute,
            "div": _guarded(numeric.divide),
            "rem": _guarded(np.fmod),
            "shr": numeric.shift_right,
            "bfe": _extract if kind == "u32" else None,
        }.get(name)
        return found
    logic = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    if kind == "pred" or kind[:1] == "b":
        if name in logic:
            return logic[name]
        if name == "not":
            return np.logical_not if kind == "pred" else np.invert
        if name == "prmt" and kind == "b32":
            return _permute
        if name == "shl" and kind != "pred":
            return numeric.shift_left
        if name == "shr" and kind != "pred":
            return numeric.shift_right
    return None


def _widen(x: Array) -> Array:
    return x.astype(np.dtype(f"{x.dtype.kind}{2 * x.dtype.itemsize}"))


def _extract(a: Array, position: Array, length: Array) -> Array:
    position, length = position & np.uint32(255), length & np.uint32(255)
    mask = (np.uint64(1) << np.minimum(length, np.uint32(32)).astype(np.uint64)) - np.uint64(1)
    return (numeric.shift_right(a, position) & mask).astype(np.uint32)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: each nibble of the selector picks a byte of b:a, or with its top bit copies of its sign."""
    pair = (b.astype(np.uint64) << np.uint64(32)) | a
    result = np.uint32(0)
    for n in range(4):
        pick = (selector >> np.uint32(4 * n)) & np.uint32(15)
        byte = (pair >> ((pick & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte >= 128, np.uint32(255), np.uint32(0))
        byte = np.where(pick >= 8, sign, byte.astype(np.uint32))
        result = result | (byte << np.uint32(8 * n))
    return result


def _guarded(function: Function) -> Function:
    """Integer division. The result for a divisor of 0 is unspecified; all ones here."""

    def divide(a: Array, b: Array) -> Array:
        nothing = b == 0
        quotient = function(a, np.where(nothing, np.ones_like(b), b))
        return np.where(nothing, np.array(-1).astype(a.dtype), quotient)

    return divide


def _float(name: str, flags: list[str], approximate: numeric.Approximate) -> Function | None:
    ftz = "ftz" in flags
    flags = [f for f in flags if f != "ftz"]
    nan = "NaN" in flags and name in ("min", "max")
    flags = [f for f in flags if not (nan and f == "NaN")]
    if flags == ["xorsign", "abs"] and name in ("min", "max"):
        of_sizes = _float(name, ["NaN"] if nan else [], approximate)
        return None if ftz or of_sizes is None else _xorsign(of_sizes)
    exact: dict[tuple[str, ...], Function] = {
        ("add",): np.add,
        ("add", "rn"): np.add,
        ("sub",): np.subtract,
        ("sub", "rn"): np.subtract,
        ("mul",): np.multiply,
        ("mul", "rn"): np.multiply,
        ("div", "rn"): np.divide,
        ("sqrt", "rn"): np.sqrt,
        ("rcp", "rn"): np.reciprocal,
        ("neg",): np.negative,
        ("abs",): np.absolute,
        ("fma", "rn"): numeric.fma,
        ("max",): np.maximum if nan else numeric.maximum,
        ("min",): np.minimum if nan else numeric.minimum,
        ("div", "full"): approximate.div,
        ("ex2", "approx"): approximate.ex2,
        ("lg2", "approx"): approximate.lg2,
        ("rcp", "approx"): approximate.rcp,
        ("sqrt", "approx"): approximate.sqrt,
        ("rsqrt", "approx"): approximate.rsqrt,
    }
    function = exact.get((name, *flags))
    if function is None or not ftz:
        return function
    return lambda *args: numeric.flush(function(*(numeric.flush(a) for a in args)))


def _xorsign(of_sizes: Function) -> Function:
    """min or max of the absolute values, negative where the operands' signs differ."""

    def signed(a: Array, b: Array) -> Array:
        sign = (a.view(np.uint32) ^ b.view(np.uint32)) & np.uint32(1 << 31)
        size = np.asarray(of_sizes(np.abs(a), np.abs(b)))
        return (size.view(np.uint32) | sign).view(np.float32)

    return signed


def _setp(flags: tuple[str, ...], kind: str) -> Function | None:
    ftz = "ftz" in flags
    how = tuple(f for f in flags if f != "ftz")
    if len(how) != 1 or kind not in TYPES:
        return None
    name = how[0]
    if kind not in ("f32", "f16", "bf16"):
        signless = kind[0] == "b" and name not in ("eq", "ne")
        return None if signless or kind == "f64" else COMPARISONS.get(name)
    get = HALVES[kind][0] if kind in HALVES else (lambda x: x)
    if ftz:
        plain = get
        get = lambda x: numeric.flush(plain(x))  # noqa: E731
    if name == "num":
        return lambda a, b: ~(np.isnan(get(a)) | np.isnan(get(b)))
    if name == "nan":
        return lambda a, b: np.isnan(get(a)) | np.isnan(get(b))
    ordered = COMPARISONS.get(name)
    if ordered is not None and name in ("eq", "ne", "lt", "le", "gt", "ge"):
        if name == "ne":  # numpy's is true of NaN
            return lambda a, b: (get(a) != get(b)) & ~np.isnan(get(a)) & ~np.isnan(get(b))
        return lambda a, b: ordered(get(a), get(b))
    unordered = COMPARISONS.get(name[:-1])
    if (
        unordered is not None
        and name[-1] == "u"
        and name[:-1] in ("eq", "ne", "lt", "le", "gt", "ge")
    ):
        return lambda a, b: unordered(get(a), get(b)) | np.isnan(get(a)) | np.isnan(get(b))
    return None


def _cvt(modifiers: tuple[str, ...]) -> Function | None:
    *flags, to, of = modifiers
    if to in INTEGERS and of in INTEGERS and not flags:
        return lambda x: x.astype(TYPES[to])
    if to == "f32" and of in INTEGERS and flags == ["rn"]:
        return lambda x: x.astype(np.float32)
    if to == "f32" and of in HALVES and not flags:
        return HALVES[of][0]
    if to in HALVES and of == "f32" and flags == ["rn"]:
        return HALVES[to][1]
    if to in ("bf16x2", "f16x2") and of == "f32" and flags == ["rn"]:
        narrow = HALVES[to[:-2]][1]
        # The first operand becomes the upper half.
        return lambda a, b: (narrow(a).astype(np.uint32) << 16) | narrow(b)
    return None
