"""A device that is not there: launches of Triton kernels, compiled to PTX for sm_90 and executed here.

``run`` is one launch over CPU tensors. ``device`` stands in for a GPU under the whole package: within it
``kernel[grid](...)`` comes here, ``impl="triton"`` serves CPU tensors, and fresh tensors are poisoned.
Needs a process in which Triton is not its interpreter (TRITON_INTERPRET unset or 0).
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from ptx.execute import Machine, Options
from ptx.memory import ALIGNMENT, POISON, Global
from ptx.parse import Program, parse
from topr_kernels import kernels

TARGET = GPUTarget("cuda", 90, 32)
#: From the text of a kernel's PTX to another.
Mutation = Callable[[str], str]


class Compiled(NamedTuple):
    """What came of a kernel: its PTX, the shared memory of a launch, and the names of its parameters."""

    ptx: str
    shared: int
    names: tuple[str, ...]


class Launch(NamedTuple):
    """What an executed launch was."""

    name: str
    grid: int
    instructions: int
    seconds: float


class Device:
    """Executes launches one after the other and remembers what they were."""

    def __init__(self, options: Options | None = None, mutate: Mutation | None = None) -> None:
        self.options, self.mutate = options or Options(), mutate
        self.launches: list[Launch] = []
        #: How often instruction forms stand in the programs that ran.
        self.forms: Counter[str] = Counter()

    def launch(self, kernel: Any, grid: Any, args: tuple[Any, ...], kw: dict[str, Any]) -> None:
        compiled, values = bind(kernel, args, kw)
        ptx = compiled.ptx if self.mutate is None else self.mutate(compiled.ptx)
        program = parsed(ptx)
        if callable(grid):
            grid = grid(values)
        if len(grid) > 1 and any(n != 1 for n in grid[1:]):
            raise NotImplementedError(f"grid {grid}: only one dimension is executed")
        if grid[0] == 0:  # Triton's launcher does nothing then
            return
        start = time.perf_counter()
        memory, arguments, storages = upload([(n, values[n]) for n in compiled.names])
        scratch = [0] * (len(program.parameters) - len(arguments))
        machine = Machine(
            program,
            arguments + scratch,
            memory,
            grid[0],
            compiled.shared,
            self.options,
            len(self.launches),
        )
        machine.run()
        for address, data in storages:
            data[:] = memory.take(address)
        seconds = time.perf_counter() - start
        self.launches.append(Launch(program.name, grid[0], machine.instructions, seconds))
        self.forms.update(i.form for block in program.blocks for i in block)


def run(kernel: Any, grid: int, *args: Any, options: Options | None = None, **kw: Any) -> Launch:
    """One launch of a ``triton.jit`` function over CPU tensors, written in place."""
    device = Device(options)
    device.launch(kernel, (grid,), args, kw)
    return device.launches[0]


@contextlib.contextmanager
def device(options: Options | None = None, mutate: Mutation | None = None) -> Iterator[Device]:
    """A fake CUDA device for everything that launches Triton kernels on CPU tensors within."""
    fake = Device(options, mutate)

    def launched(self: Any, *args: Any, grid: Any, warmup: bool, **kw: Any) -> None:
        fake.launch(self, grid, args, kw)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", launched))
        stack.enter_context(mock.patch.object(kernels, "_interpreted", lambda: True))
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch.Tensor, "new_empty"),
        ):
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield fake


def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An allocator whose memory shows when it is read before it is written."""

    @functools.wraps(allocate)
    def fresh(*args: Any, **kw: Any) -> Tensor:
        x = allocate(*args, **kw)
        if type(x) is Tensor and x.device.type == "cpu":
            data = content(x)
            data.view(np.uint16)[:] = POISON if len(data) % 2 == 0 else 0
        return x

    return fresh


def content(x: Tensor) -> Any:
    """The bytes of a tensor's storage, uint8 [n]."""
    flat = torch.tensor([], dtype=torch.uint8).set_(x.untyped_storage())
    return flat.numpy()


def upload(
    arguments: list[tuple[str, Any]],
) -> tuple[Global, list[Any], list[tuple[int, Any]]]:
    """Lays the tensors of a launch out on the device.

    Only elements of these tensors may be accessed: not what a view leaves out, nor what lies around.

    Returns:
        memory, arguments with addresses for tensors, and (address, bytes) of the storages.
    """
    memory = Global()
    groups: dict[int, list[tuple[str, Tensor]]] = {}
    for name, value in arguments:
        if isinstance(value, Tensor):
            groups.setdefault(value.untyped_storage().data_ptr(), []).append((name, value))
    addresses, storages = {}, []
    for pointer, views in groups.items():
        data = content(views[0][1])
        valid = np.zeros(len(data), bool)
        for _, x in views:
            valid |= belongs(x, len(data))
        names = ", ".join(f"{n} {str(x.dtype)[6:]} {list(x.shape)}" for n, x in views)
        address = memory.allocate(names, data, valid, pointer % ALIGNMENT)
        addresses[pointer] = address
        storages.append((address, data))

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        offset = value.storage_offset() * value.element_size()
        return addresses[value.untyped_storage().data_ptr()] + offset

    return memory, [place(value) for _, value in arguments], storages


def belongs(x: Tensor, size: int) -> Any:
    """Bool [size], the bytes of its storage that are elements of a tensor."""
    mask = torch.zeros(size // x.element_size(), dtype=torch.bool)
    if x.numel():
        shape = [1 if stride == 0 else n for n, stride in zip(x.shape, x.stride(), strict=True)]
        mask.as_strided(shape, x.stride(), x.storage_offset()).fill_(True)
    whole = np.zeros(size, bool)
    whole[: mask.numel() * x.element_size()] = mask.repeat_interleave(x.element_size()).numpy()
    return whole


# ---- compilation -----------------------------------------------------------------------------------


def bind(kernel: Any, args: tuple[Any, ...], kw: dict[str, Any]) -> tuple[Compiled, dict[str, Any]]:
    """Compiles as ``JITFunction.run`` would on a GPU. -> (what came of it, the bound arguments)."""
    kw = {"debug": kernel.debug or False, **kw}
    bound, specialization, options = binder(kernel)(*args, **kw)
    key = (kernel, repr(specialization), repr(sorted(options.items())))
    if key not in COMPILED:
        backend = make_backend(TARGET)
        parsed_options, signature, constants, attributes = kernel._pack_args(
            backend, kw, bound, specialization, options
        )
        source = ASTSource(kernel, signature, constants, attributes)
        done = triton.compile(source, target=TARGET, options=parsed_options.__dict__)
        names = tuple(n for n, kind in signature.items() if kind != "constexpr")
        COMPILED[key] = Compiled(done.asm["ptx"], done.metadata.shared, names)
    return COMPILED[key], bound


COMPILED: dict[Any, Compiled] = {}


@functools.cache
def binder(kernel: Any) -> Any:
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(TARGET))


@functools.cache
def parsed(ptx: str) -> Program:
    return parse(ptx)
