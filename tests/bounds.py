"""Proves that a Triton kernel touches only what its arguments hold, in the interpreter.

Inside :func:`checked` every pointer argument carries its number in bits that no address uses. Arithmetic
keeps them, so each load, store and atomic is known by the argument that it came from, and its
active addresses are compared with the elements of that very tensor: running over into another
argument, or into the gaps of a strided view, is found too. Works on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import triton.runtime.interpreter as interpreter
from torch import Tensor

#: User addresses end below this; the number of the argument stands above.
ADDRESS_BITS = 48


class OutOfBounds(AssertionError):
    """A kernel read or wrote an address that its argument does not hold."""


class Extent:
    """The addresses of a tensor's elements."""

    def __init__(self, x: Tensor) -> None:
        self.size = x.element_size()
        self.start = x.data_ptr()
        self.dense = x.is_contiguous()
        self.count = x.numel()
        offsets = np.zeros(1, np.int64)
        if not self.dense:
            for n, stride in zip(x.shape, x.stride(), strict=True):
                offsets = (offsets[:, None] + np.arange(n) * stride).ravel()
        self.offsets = np.unique(offsets)

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        distance = addresses.astype(np.int64) - self.start
        offset, rest = np.divmod(distance, self.size)
        if self.dense:
            return (rest == 0) & (offset >= 0) & (offset < self.count)
        return (rest == 0) & np.isin(offset, self.offsets)


class Bounds:
    """The extents of a launch's pointer arguments, in their order, and how many accesses they held."""

    def __init__(self) -> None:
        self.kernel = ""
        self.extents: list[Extent] = []
        self.touched = 0

    def start(self, kernel: str) -> None:
        self.kernel = kernel
        self.extents.clear()

    def tag(self, x: Tensor) -> int:
        self.extents.append(Extent(x))
        assert x.data_ptr() < 1 << ADDRESS_BITS and len(self.extents) < 1 << 15
        return len(self.extents) << ADDRESS_BITS | x.data_ptr()

    def check(self, pointers: np.ndarray, mask: Any, what: str) -> np.ndarray:
        """Compares the active addresses; -> the pointers without their tags."""
        pointers = np.asarray(pointers, np.uint64)
        plain = pointers & np.uint64((1 << ADDRESS_BITS) - 1)
        active = np.broadcast_to(True if mask is None else mask, pointers.shape)
        numbers = (pointers >> np.uint64(ADDRESS_BITS)).astype(np.int64)
        for number in np.unique(numbers[active]):
            own = active & (numbers == number)
            inside = self.extents[number - 1].holds(plain[own]) if number else np.zeros(1, bool)
            if not inside.all():
                raise OutOfBounds(f"{what} outside of pointer argument {number} of {self.kernel}")
            self.touched += inside.size
        return plain


@contextmanager
def patched_once() -> Iterator[None]:
    """A launch inside patches the language once, not at every call of a function: half its time."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    known: dict[int, Any] = {}

    def patched(fn: Any) -> Any:
        # What a module calls the language is in its globals; an empty scope has nothing to restore.
        where = id(fn.__globals__)
        if where in known:
            return type(known[where])()
        known[where] = patch(fn)
        return known[where]

    def started(executor: Any, *args: Any, **kw: Any) -> Any:
        known.clear()
        try:
            return launch(executor, *args, **kw)
        finally:
            known.clear()

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(interpreter, "_patch_lang", patched)
        patches.setattr(interpreter.GridExecutor, "__call__", started)
        yield


@contextmanager
def checked() -> Iterator[Bounds]:
    """Launches inside raise for an access out of bounds (as Triton's InterpreterError)."""
    bounds = Bounds()
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    convert, launch = interpreter._implicit_cvt, interpreter.GridExecutor.__call__
    load, store = builder.create_masked_load, builder.create_masked_store
    atomic = builder.create_atomic_rmw

    def stripped(pointers: Any, mask: Any, what: str) -> Any:
        active = None if mask is None else mask.data
        return handle(bounds.check(pointers.data, active, what), pointers.dtype)

    def tagged(arg: Any) -> Any:
        out = convert(arg)
        if isinstance(arg, Tensor):
            out.handle.data[:] = bounds.tag(arg)
        return out

    def started(executor: Any, *args: Any, **kw: Any) -> Any:
        bounds.start(executor.fn.__name__)
        return launch(executor, *args, **kw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", started)
        patch.setattr(interpreter, "_implicit_cvt", tagged)
        patch.setattr(
            builder,
            "create_masked_load",
            lambda self, p, mask, *a: load(self, stripped(p, mask, "read"), mask, *a),
        )
        patch.setattr(
            builder,
            "create_masked_store",
            lambda self, p, value, mask, *a: store(
                self, stripped(p, mask, "write"), value, mask, *a
            ),
        )
        patch.setattr(
            builder,
            "create_atomic_rmw",
            lambda self, op, p, value, mask, *a: atomic(
                self, op, stripped(p, mask, "atomic"), value, mask, *a
            ),
        )
        yield bounds
