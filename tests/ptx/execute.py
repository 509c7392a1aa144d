"""Executes a PTX program on numpy: a lane per thread, many CTAs at a time.

Registers are arrays over the lanes of all CTAs that run. A step takes the lanes that stand at one block
and executes it for them; lanes that went another way wait their turn, the earlier block first, so that
they meet again. CTAs run in teams: a team keeps step, and whose turn it is changes by chance wherever
the program touches global memory, if it has atomics at all.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ptx import numeric
from ptx.arithmetic import TYPES, arithmetic
from ptx.memory import BASE, POISON, UNIT, Array, Bad, Fault, Global, Order, Shared
from ptx.parse import (
    Address,
    Immediate,
    Instruction,
    Operand,
    Program,
    Register,
    Symbol,
    Unknown,
    Vector,
)

#: All lanes that a step may execute: True for all there are, else bool [lanes].
Mask = Any
Step = Callable[[Mask], None]
WARP = 32


class Options(NamedTuple):
    """How a launch is executed.

    Attributes:
        seed: of everything that is left to chance.
        ulps: how far approximate instructions may be off.
        teams: the most teams CTAs form; 1 runs them in step.
        resident: CTAs that run at a time.
        late: what a racing or stale read meets: False refuses it, True gives what was there at launch.
        cached: whether a plain load may meet what another CTA wrote in this launch, if it acquired it.
            PTX allows that; the house asks for ``.cg``.
        poison: whether a load of what nobody has written is a fault, or gives NaN.
        steps: blocks until a launch counts as endless.
    """

    seed: int = 0
    ulps: int = 0
    teams: int = 4
    resident: int = 64
    late: bool = False
    cached: bool = False
    poison: bool = True
    steps: int = 1_000_000


class Machine:
    """One launch of a program."""

    def __init__(
        self,
        program: Program,
        arguments: list[Any],
        memory: Global,
        grid: int,
        shared_bytes: int,
        options: Options | None = None,
        launch: int = 0,
    ) -> None:
        """Decodes the program.

        Args:
            program: from :func:`ptx.parse.parse`.
            arguments: one per parameter: an address, an integer or a float.
            memory: what there is on the device.
            grid: CTAs, along x.
            shared_bytes: sized at launch.
            options: see :class:`Options`.
            launch: number of the launch; no two of them are left to the same chance.

        Raises:
            Unknown: if the program has an instruction that is not known here.
        """
        self.program, self.memory, self.grid = program, memory, grid
        self.options = options or Options()
        self.rng = np.random.default_rng([self.options.seed, launch])
        self.approximate = numeric.Approximate(self.options.ulps, self.options.seed)
        if program.threads % WARP:
            raise Unknown(f"{program.threads} threads are no whole warps")
        self.threads, self.warps = program.threads, program.threads // WARP
        self.resident = min(grid, self.options.resident)
        self.lanes = self.resident * self.threads
        self.order = Order(grid, self.warps)
        memory.begin(self.order)
        size = program.static_shared + shared_bytes
        self.shared = Shared(self.resident, size, self.order)
        self.parameters = self._lay_out(arguments)
        self.slot = np.arange(self.lanes) // self.threads
        thread = np.arange(self.lanes, dtype=np.uint32) % self.threads
        self.cta = np.zeros(self.lanes, np.uint32)
        zero, one = np.uint32(0), np.uint32(1)
        self.special = {
            "%tid.x": thread,
            "%tid.y": zero,
            "%tid.z": zero,
            "%ctaid.x": self.cta,
            "%ctaid.y": zero,
            "%ctaid.z": zero,
            "%ntid.x": np.uint32(self.threads),
            "%ntid.y": one,
            "%ntid.z": one,
            "%nctaid.x": np.uint32(grid),
            "%nctaid.y": one,
            "%nctaid.z": one,
            "%laneid": thread % WARP,
        }
        poison = {"b16": POISON, "b32": POISON * 0x10001, "b64": POISON * 0x1000100010001}
        self.registers = {
            name: np.zeros(self.lanes, bool)
            if kind == "pred"
            else np.full(self.lanes, poison[kind], TYPES[kind])
            for name, kind in program.registers.items()
        }
        self.pc = np.zeros(self.lanes, np.int32)
        self.done, self.waiting = np.zeros(self.lanes, bool), np.zeros(self.lanes, bool)
        self.functions: dict[str, Callable[..., Any] | None] = {}
        self.blocks = [[self.decode(i) for i in block] for block in program.blocks]
        self.instructions = 0

    # ---- running ---------------------------------------------------------------------------------

    def run(self) -> None:
        """All CTAs of the grid, in an order of chance.

        Raises:
            Fault: at the first access or barrier at fault.
        """
        self.budget = self.options.steps
        ctas = self.rng.permutation(self.grid)
        with np.errstate(all="ignore"):
            for start in range(0, self.grid, self.resident):
                self._wave(ctas[start : start + self.resident])

    def _wave(self, ctas: Array) -> None:
        alive = self.slot < len(ctas)
        self.cta[alive] = np.repeat(ctas, self.threads)
        self.warp = (self.cta * self.warps + self.special["%tid.x"] // WARP).astype(np.int32)
        self.pc[:] = 0
        self.done[:] = ~alive
        self.shared.bytes.view(np.uint16)[:] = POISON
        self.shared.shadow.writer[:] = self.shared.shadow.reader[:] = -1
        count = 1
        if self.program.communicates:
            count = int(self.rng.integers(1, max(self.options.teams, 1) + 1))
        self.team = self.rng.integers(0, count, self.resident)[self.slot]
        turn = 0
        while not self.done.all():
            ready = ~self.done & ~self.waiting
            if count > 1 and (self.rng.random() < 0.2 or not (ready & (self.team == turn)).any()):
                turn = int(self.rng.choice(np.unique(self.team[ready])))
            self._step(ready & (self.team == turn) if count > 1 else ready)

    def _step(self, ready: Array) -> None:
        self.budget -= 1
        if self.budget < 0:
            raise Fault("endless", f"{self.program.name}: no end after {self.options.steps} blocks")
        block = int(self.pc[ready].min())
        mask: Mask = ready & (self.pc == block)
        count = int(np.count_nonzero(mask))
        if count == self.lanes:
            mask = True
        self.pc[mask if mask is not True else slice(None)] = block + 1
        steps = self.blocks[block]
        self.instructions += len(steps) * count
        for step in steps:
            step(mask)
        # Whoever runs off the end has returned.
        if block + 1 >= len(self.blocks):
            self.done |= self.pc >= len(self.blocks)
        self._release_barriers()

    def _release_barriers(self) -> None:
        if not self.waiting.any():
            return
        waiting = self.waiting.reshape(self.resident, -1)
        done = self.done.reshape(self.resident, -1)
        for slot in np.nonzero(waiting.all(1))[0]:
            at = slice(slot * self.threads, (slot + 1) * self.threads)
            if len(np.unique(self.pc[at])) > 1:
                raise Fault("barrier", f"{self._cta(at.start)} waits at different barriers")
            self.waiting[at] = False
            self.order.barrier(int(self.cta[at.start]))
        stuck = np.nonzero((waiting | done).all(1) & waiting.any(1) & done.any(1))[0]
        if stuck.size:
            slot = int(stuck[0])
            counts = f"{waiting[slot].sum()} threads wait, {done[slot].sum()} have returned"
            at = int(slot * self.threads + np.nonzero(waiting[slot])[0][0])
            last = self.program.blocks[int(self.pc[at]) - 1][-1]
            raise Fault("barrier", f"{last}: {self._cta(at)}: {counts}")

    def _cta(self, lane: int) -> str:
        return f"CTA {int(self.cta[lane])}"

    def fault(self, kind: str, i: Instruction, lane: int, message: str) -> Fault:
        thread = int(self.special["%tid.x"][lane])
        return Fault(
            kind, f"{i}: {self._cta(lane)}, thread {thread} of {self.program.name}: {message}"
        )

    def _lay_out(self, arguments: list[Any]) -> Array:
        """Bytes of the parameter space."""
        if len(arguments) != len(self.program.parameters):
            raise ValueError(
                f"{self.program.name}: {len(self.program.parameters)} parameters, "
                f"{len(arguments)} arguments"
            )
        space = np.zeros(sum(8 for _ in arguments) + 8, np.uint8)
        for p, a in zip(self.program.parameters, arguments, strict=True):
            kind = TYPES[p.type]
            if kind.kind == "f":
                value = np.array(a, kind)
            else:
                value = np.array(int(a) % (1 << 8 * kind.itemsize), f"u{kind.itemsize}")
            space[p.offset : p.offset + kind.itemsize] = value.reshape(1).view(np.uint8)
        return space

    # ---- operands --------------------------------------------------------------------------------

    def source(self, operand: Operand, kind: str) -> Array:
        """A view of an operand as a type: [lanes], or a scalar of that dtype."""
        dtype = TYPES[kind]
        if isinstance(operand, Register):
            if operand.name in self.special:
                return self.special[operand.name].view(dtype)
            array = self._register(operand)
            if kind == "pred" or array.itemsize == dtype.itemsize:
                return array.view(dtype)
            if array.itemsize < dtype.itemsize:
                raise Unknown(f"{operand.name} read as .{kind}")
            return array.view(dtype)[:: array.itemsize // dtype.itemsize]
        if isinstance(operand, Immediate):
            if dtype.kind == "b":
                return np.bool_(operand.value != 0)
            if operand.is_float:
                width = 8 if kind == "f64" else 4
                return np.array(operand.value, f"u{width}").view(dtype)[()]
            if dtype.kind == "f":
                raise Unknown(f"integer {operand.value} as .{kind}")
            value = operand.value % (1 << 8 * dtype.itemsize)
            return np.array(value, f"u{dtype.itemsize}").view(dtype)[()]
        if isinstance(operand, Symbol):
            return np.array(self._symbol(operand.name), f"u{dtype.itemsize}").view(dtype)[()]
        raise Unknown(f"operand {operand} as .{kind}")

    def destination(self, operand: Operand, kind: str) -> Array:
        """The same, to be written; as wide as the type."""
        if not isinstance(operand, Register):
            raise Unknown(f"destination {operand}")
        array = self._register(operand)
        if (kind == "pred") != (array.dtype == bool) or array.itemsize != TYPES[kind].itemsize:
            raise Unknown(f"{operand.name} written as .{kind}")
        return array.view(TYPES[kind])

    def _register(self, operand: Register) -> Array:
        if operand.name not in self.registers:
            raise Unknown(f"register {operand.name}")
        return self.registers[operand.name]

    def _symbol(self, name: str) -> int:
        if name in self.program.shared:
            return self.program.shared[name]
        for p in self.program.parameters:
            if p.name == name:
                return p.offset
        raise Unknown(f"symbol {name}")

    # ---- decoding --------------------------------------------------------------------------------

    def decode(self, i: Instruction) -> Step:
        """A function that executes an instruction for the lanes of a mask.

        Raises:
            Unknown: by name.
        """
        parts = i.form.split(".")
        try:
            step = getattr(self, f"_{parts[0]}", self._plain)(i, parts[0], parts[1:])
        except (Unknown, ValueError) as error:
            raise Unknown(f"{i}: {error}") from None
        if i.predicate is None:
            return step
        predicate = self.source(Register(i.predicate[0]), "pred")
        if parts[0] == "bra":  # a branch takes all lanes, to send those elsewhere that do not jump
            return step
        if i.predicate[1]:
            return lambda mask: step(~predicate & mask)
        return lambda mask: step(predicate & mask)

    def _plain(self, i: Instruction, name: str, modifiers: list[str]) -> Step:
        """What computes each lane for itself."""
        kind = modifiers[-1] if modifiers else ""
        if i.form not in self.functions:
            self.functions[i.form] = arithmetic(name, tuple(modifiers), self.approximate)
        function = self.functions[i.form]
        if function is None:
            raise Unknown(f"instruction form {i.form!r}")
        to, args = i.operands[0], i.operands[1:]
        kinds = [kind] * len(args)
        result = kind
        if name == "setp":
            result = "pred"
        elif name == "selp":
            kinds[-1] = "pred"
        elif name == "cvt":
            result, kinds = modifiers[-2], [modifiers[-1]] * len(args)
            result = {"bf16x2": "b32", "f16x2": "b32"}.get(result, result)
        elif name in ("mul", "mad") and "wide" in modifiers:
            result = kind[0] + str(2 * int(kind[1:]))
            kinds[2:] = [result] * len(kinds[2:])
        elif name in ("shl", "shr", "bfe"):
            kinds[1:] = ["u32"] * len(kinds[1:])
        out = self.destination(to, result)
        sources = [self.source(a, k) for a, k in zip(args, kinds, strict=True)]
        if isinstance(function, np.ufunc):
            ufunc = function
            if len(sources) == 1:
                (only,) = sources
                return lambda mask: ufunc(only, out=out, where=mask)
            first, second = sources
            return lambda mask: ufunc(first, second, out=out, where=mask)
        general = function

        def step(mask: Mask) -> None:
            np.copyto(out, general(*sources), where=mask)

        return step

    def _mov(self, i: Instruction, name: str, modifiers: list[str]) -> Step:
        (kind,) = modifiers
        to, of = i.operands
        if isinstance(to, Vector):
            width = TYPES[kind].itemsize * 8 // len(to.items)
            whole = self.source(of, f"u{TYPES[kind].itemsize * 8}")
            outs = [
                (self.destination(r, f"b{width}"), n * width)
                for n, r in enumerate(to.items)
                if r is not None
            ]

            def unpack(mask: Mask) -> None:
                values = [(out, (whole >> shift).astype(out.dtype)) for out, shift in outs]
                for out, value in values:
                    np.copyto(out, value, where=mask)

            return unpack
        out = self.destination(to, kind)
        if isinstance(of, Vector):
            width = TYPES[kind].itemsize * 8 // len(of.items)
            pieces = [self.source(r, f"b{width}") for r in of.items if r is not None]

            def pack(mask: Mask) -> None:
                value = np.zeros(self.lanes, out.dtype)
                for n, piece in enumerate(pieces):
                    value |= piece.astype(out.dtype) << (n * width)
                np.copyto(out, value, where=mask)

            return pack
        value = self.source(of, kind)
        return lambda mask: np.copyto(out, value, where=mask)

    # ---- control ---------------------------------------------------------------------------------

    def _bra(self, i: Instruction, name: str, modifiers: list[str]) -> Step:
        _only(modifiers, "uni")
        (target,) = i.operands
        if not isinstance(target, Symbol):
            raise Unknown(f"branch to {target}")
        block = self.program.labels[target.name]
        predicate, negated = None, False
        if i.predicate:
            predicate = self.source(Register(i.predicate[0]), "pred")
            negated = i.predicate[1]

        def step(mask: Mask) -> None:
            taken = mask if predicate is None else mask & (predicate != negated)
            if taken is True:
                self.pc[:] = block
            else:
                self.pc[taken] = block

        return step

    def _ret(self, i: Instruction, name: str, modifiers: list[str]) -> Step:
        _only(modifiers)

        def step(mask: Mask) -> None:
            self.done |= mask

        return step

    _exit = _ret

    def _bar(self, i: Instruction, name: str, modifiers: list[str]) -> Step:
        if modifiers == ["warp", "sync"]:
            return lambda mask: self._whole_warps(i, mask)
        _only(modifiers, "sync")
        if len(i.operands) != 1:
            raise Unknown("a barrier of some threads")

        def step(mask: Mask) -> None:
            self.waiting |= mask

        return step

    def _trap(self, i: Instruction, name: str, modifiers: list[str]) -> Step:
        def step(mask: Mask) -> None:
            raise self.fault("trap", i, int(self._active(mask)[0]), "reached")

        return step

    def _fence(self, i: Instruction, name: str, modifiers: list[str]) -> Step:
        _only(modifiers, "acq_rel", "sc", "cta", "gpu", "sys", "gl")
        device = not {"cta"} & set(modifiers)

        def step(mask: Mask) -> None:
            if device:
                for warp in np.unique(self.warp[self._active(mask)]):
                    self.order.fence(int(warp))

        return step

    _membar = _fence

    # ---- warps -----------------------------------------------------------------------------------

    def _active(self, mask: Mask) -> Array:
        return np.arange(self.lanes) if mask is True else np.nonzero(mask)[0]

    def _whole_warps(self, i: Instruction, mask: Mask) -> Array:
        """-> [warps] those that take part; all lanes of a warp must."""
        if mask is True:
            return np.arange(self.lanes // WARP)
        by_warp = mask.reshape(-1, WARP)
        some = by_warp.any(1)
        if not by_warp[some].all():
            warp = int(np.nonzero(some & ~by_warp.all(1))[0][0])
            raise self.fault("lanes", i, warp * WARP, "not all lanes of the warp are here")
        return np.nonzero(some)[0]

    def _full(self, operand: Operand, i: Instruction) -> Callable[[Array], None]:
        """A check that a mask of members names all lanes."""
        members = self.source(operand, "b32")

        def check(mask: Mask) -> None:
            named = members[self._active(mask)] if np.ndim(members) else members
            if not np.all(named == 0xFFFFFFFF):
                raise Unknown(f"{i}: a mask of some lanes")

        return check

    def _shfl(self, i: Instruction, name: str, modifiers: list[str]) -> Step:
        sync, mode, kind = modifiers
        if sync != "sync" or mode not in ("bfly", "idx", "up", "down") or len(i.operands) != 5:
            raise Unknown(f"instruction form {i.form!r}")
        out, value = self.destination(i.operands[0], kind), self.source(i.operands[1], kind)
        by, clamp = (self.source(o, "u32") for o in i.operands[2:4])
        check = self._full(i.operands[4], i)
        lane = np.arange(self.lanes) % WARP
        base = np.arange(self.lanes) - lane

        def step(mask: Mask) -> None:
            self._whole_warps(i, mask)
            check(mask)
            segment = (clamp >> np.uint32(8)) & np.uint32(31)
            b, c = by & np.uint32(31), clamp & np.uint32(31)
            last = (lane & segment) | (c & ~segment)
            if mode == "bfly":
                of = lane ^ b
            elif mode == "idx":
                of = (lane & segment) | (b & ~segment)
            else:
                of = lane + b if mode == "down" else lane.astype(np.int64) - b
            inside = of >= last if mode == "up" else of <= last
            from_lane = base + np.where(inside, of, lane).astype(np.int64)
            np.copyto(out, value[from_lane], where=mask)

        return step

    def _redux(self, i: Instruction, name: str, modifiers: list[str]) -> Step:
        sync, how, kind = modifiers
        functions = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }
        if sync != "sync" or how not in functions:
            raise Unknown(f"instruction form {i.form!r}")
        out, value = self.destination(i.operands[0], kind), self.source(i.operands[1], kind)
        check = self._full(i.operands[2], i)

        def step(mask: Mask) -> None:
            self._whole_warps(i, mask)
            check(mask)
            total = functions[how].reduce(value.reshape(-1, WARP), axis=1, dtype=value.dtype)
            np.copyto(out, np.repeat(total, WARP), where=mask)

        return step

    # ---- memory ----------------------------------------------------------------------------------

    def _address(self, operand: Operand, kind: str) -> Callable[[Array], Array]:
        """-> a function from lanes [n] to their addresses, uint64 [n]."""
        if not isinstance(operand, Address):
            raise Unknown(f"address {operand}")
        base = self.source(operand.base, kind)
        offset = np.uint64(operand.offset % (1 << 64))
        if np.ndim(base) == 0:
            fixed = np.uint64(int(base)) + offset
            return lambda lanes: np.full(len(lanes), fixed)
        return lambda lanes: base[lanes].astype(np.uint64) + offset

    def _ld(self, i: Instruction, name: str, modifiers: list[str]) -> Step:
        space, size, kind, flags = _access(modifiers)
        to, at = i.operands
        items = to.items if isinstance(to, Vector) else (to,)
        if len(items) != size:
            raise Unknown(f"{len(items)} registers for {size} words")
        outs = [self._widened(r, kind) for r in items]
        if space == "param":
            return self._ld_param(at, kind, outs)
        width = TYPES[kind].itemsize
        if space == "shared":
            address, get = self._address(at, "u32"), self._shared_get
        else:
            address, get = self._address(at, "u64"), self._global_get
        if space == "global" and flags & STRONG:
            if size > 1:
                raise Unknown(f"instruction form {i.form!r}")
            return self._strong(i, address, outs, kind, flags, None)

        def step(mask: Mask) -> None:
            lanes = self._active(mask)
            if lanes.size:
                words = get(i, address(lanes), lanes, width, size, flags)
                for n, out in enumerate(outs):
                    if out is not None:
                        out[lanes] = words[:, n].view(TYPES[kind])

        return step

    def _widened(self, operand: Any, kind: str) -> Array | None:
        """The register that a load writes, in the kind's signedness and its own width."""
        if operand is None:
            return None
        array = self._register(operand)
        if array.itemsize < TYPES[kind].itemsize:
            raise Unknown(f"{operand.name} loaded as .{kind}")
        return array if array.itemsize > TYPES[kind].itemsize else array.view(TYPES[kind])

    def _ld_param(self, at: Operand, kind: str, outs: list[Array | None]) -> Step:
        (out,) = outs
        assert out is not None
        dtype = TYPES[kind]
        wide = isinstance(at, Address) and isinstance(at.base, Register)
        wide = wide and self.program.registers.get(at.base.name) == "b64"  # type: ignore[union-attr]
        address = self._address(at, "u64" if wide else "u32")

        def step(mask: Mask) -> None:
            lanes = self._active(mask)
            if lanes.size:
                where = address(lanes).astype(np.int64)
                raw = self.parameters[where[:, None] + np.arange(dtype.itemsize)]
                # By way of the signed type a 32-bit parameter is extended with its sign.
                out[lanes] = raw.view(dtype)[:, 0].astype(out.dtype)

        return step

    def _st(self, i: Instruction, name: str, modifiers: list[str]) -> Step:
        space, size, kind, flags = _access(modifiers)
        at, of = i.operands
        items = of.items if isinstance(of, Vector) else (of,)
        if len(items) != size:
            raise Unknown(f"{len(items)} registers for {size} words")
        width = TYPES[kind].itemsize
        values = [self.source(r, f"b{8 * width}") for r in items if r is not None]
        if space == "shared":
            address, put = self._address(at, "u32"), self._shared_put
        elif space == "global":
            address, put = self._address(at, "u64"), self._global_put
        else:
            raise Unknown(f"instruction form {i.form!r}")
        if space == "global" and flags & STRONG:
            if size > 1:
                raise Unknown(f"instruction form {i.form!r}")
            return self._strong(i, address, [None], kind, flags, lambda old, new: new, *values)

        def step(mask: Mask) -> None:
            lanes = self._active(mask)
            if lanes.size:
                words = np.empty((len(lanes), size), f"u{width}")
                for n, value in enumerate(values):
                    words[:, n] = value[lanes] if np.ndim(value) else value
                put(i, address(lanes), lanes, words)

        return step

    def _units(
        self, i: Instruction, address: Array, lanes: Array, size: int, shared: bool
    ) -> Array:
        try:
            if shared:
                return self.shared.units(address, size, self.slot[lanes])
            return self.memory.units(address, size)
        except Bad as bad:
            raise self.fault(bad.kind, i, int(lanes[bad.which]), str(bad)) from None

    def _races(
        self, i: Instruction, race: Array, units: Array, lanes: Array, memory: Any, what: str
    ) -> None:
        """Raises for the first unit of a race."""
        which = int(np.nonzero(race)[0][0])
        lane, unit = int(lanes[which]), int(units[which])
        writer = int(memory.shadow.writer[unit])
        other = (
            f"warp {writer % self.warps} of CTA {writer // self.warps}" if writer >= 0 else "none"
        )
        if memory is self.memory:
            place = self.memory.place(unit * UNIT + BASE)
        else:
            place = f"byte {unit * UNIT % self.shared.size} of shared memory"
        message = f"{what} at {place}: not ordered with another warp; last written by {other}"
        raise self.fault("race", i, lane, message)

    def _shared_get(
        self, i: Instruction, address: Array, lanes: Array, width: int, count: int, flags: set[str]
    ) -> Array:
        units = self._units(i, address, lanes, width * count, shared=True)
        flat, who = units.ravel(), np.repeat(lanes, units.shape[1])
        race = self.shared.shadow.read(flat, self.warp[who])
        if race.any():
            self._races(i, race, flat, who, self.shared, "read")
        # Told by the writer, not by value: a matrix load takes fp32 in halves of any pattern.
        fresh = self.shared.shadow.writer[flat] < 0
        if fresh.any() and self.options.poison:
            which = int(np.nonzero(fresh)[0][0])
            at = int(flat[which]) * UNIT % self.shared.size
            message = f"reads byte {at} of shared memory that nobody has written"
            raise self.fault("poison", i, int(who[which]), message)
        return self.shared.bytes.view(np.uint16)[units].view(f"u{width}")

    def _shared_put(self, i: Instruction, address: Array, lanes: Array, words: Array) -> None:
        units = self._units(i, address, lanes, words.itemsize * words.shape[1], shared=True)
        flat, who = units.ravel(), np.repeat(lanes, units.shape[1])
        race, together = self.shared.shadow.write(flat, self.warp[who])
        bytes_, new = self.shared.bytes.view(np.uint16), words.view(np.uint16).ravel()
        # Warps that hold copies of one value all write it: nothing comes of who is last.
        race &= bytes_[flat] != new
        bytes_[flat] = new
        race |= together & (bytes_[flat] != new)
        if race.any():
            self._races(i, race, flat, who, self.shared, "write")

    def _poison(self, i: Instruction, words: Array, lanes: Array, what: str) -> None:
        if not self.options.poison:
            return
        poison = (words.view(np.uint16) == POISON).reshape(len(lanes), -1, words.itemsize // UNIT)
        bad = poison.all(2).any(1)
        if bad.any():
            lane = int(lanes[np.nonzero(bad)[0][0]])
            raise self.fault("poison", i, lane, f"reads {words.itemsize} bytes {what}")

    def _global_get(
        self, i: Instruction, address: Array, lanes: Array, width: int, count: int, flags: set[str]
    ) -> Array:
        memory = self.memory
        units = self._units(i, address, lanes, width * count, shared=False)
        flat, who = units.ravel(), np.repeat(lanes, units.shape[1])
        warp = self.warp[who]
        late = memory.shadow.read(flat, warp) | memory.mixed(flat, warp)
        if late.any() and not self.options.late:
            self._races(i, late, flat, who, memory, "read")
        if not flags & {"cg"} and not self.options.cached:
            stale = memory.shadow.foreign(flat, warp)
            if stale.any() and not self.options.late:
                which = int(np.nonzero(stale)[0][0])
                place = memory.place(int(flat[which]) * UNIT + BASE)
                message = f"plain load of what another CTA wrote in this launch, at {place}"
                raise self.fault("stale", i, int(who[which]), message)
            late |= stale
        words = memory.bytes.view(np.uint16)[units]
        if late.any():
            old = memory.old.view(np.uint16)[units]
            words = np.where(late.reshape(units.shape), old, words)
            return words.view(f"u{width}")
        words = words.view(f"u{width}")
        first = memory.place(int(address[0]))
        self._poison(i, words, lanes, f"that nobody has written, near {first}")
        return words

    def _global_put(self, i: Instruction, address: Array, lanes: Array, words: Array) -> None:
        memory = self.memory
        units = self._units(i, address, lanes, words.itemsize * words.shape[1], shared=False)
        flat, who = units.ravel(), np.repeat(lanes, units.shape[1])
        warp = self.warp[who]
        race, together = memory.shadow.write(flat, warp)
        race |= together | memory.mixed(flat, warp)
        if race.any() and not self.options.late:
            self._races(i, race, flat, who, memory, "write")
        memory.bytes.view(np.uint16)[units] = words.view(np.uint16)

    def _strong(
        self,
        i: Instruction,
        address: Callable[[Array], Array],
        outs: list[Array | None],
        kind: str,
        flags: set[str],
        change: Callable[..., Any] | None,
        *values: Array,
    ) -> Step:
        """Atomics, and loads and stores that are ordered: one lane after the other, by chance."""
        device = not flags & {"cta"}
        acquire = device and bool(flags & {"acquire", "acq_rel"})
        release = device and bool(flags & {"release", "acq_rel"})
        dtype = TYPES[kind]
        memory = self.memory

        def step(mask: Mask) -> None:
            lanes = self.rng.permutation(self._active(mask))
            if not lanes.size:
                return
            where = address(lanes)
            units = self._units(i, where, lanes, dtype.itemsize, shared=False)
            for lane, at, unit in zip(lanes, where, units, strict=True):
                warp = np.full(len(unit), self.warp[lane])
                if memory.shadow.unordered(unit, warp).any() and not self.options.late:
                    race = np.ones(len(unit), bool)
                    self._races(i, race, unit, np.full(len(unit), lane), memory, "atomic access")
                memory.atomics[unit] = warp
                self.order.atomic(int(warp[0]), int(at), acquire, release)
                word = memory.words(dtype.itemsize).view(dtype)
                index = int(unit[0]) * UNIT // dtype.itemsize
                old = word[index]
                self._poison(i, np.array([[old]]), np.array([lane]), "that nobody has written")
                if change is not None:
                    word[index] = change(old, *(v[lane] if np.ndim(v) else v for v in values))
                if outs[0] is not None:
                    outs[0][lane] = old

        return step

    def _atom(self, i: Instruction, name: str, modifiers: list[str]) -> Step:
        *rest, kind = modifiers
        flags = set(rest)
        functions: dict[str, Callable[..., Any]] = {
            "add": operator.add,
            "exch": lambda old, new: new,
            "min": min,
            "max": max,
            "and": operator.and_,
            "or": operator.or_,
            "xor": operator.xor,
            "cas": lambda old, expected, new: new if old == expected else old,
        }
        how = flags & functions.keys()
        known = {"global", "gpu", "sys", "cta", "relaxed", "acquire", "release", "acq_rel"}
        if len(how) != 1 or "global" not in flags or flags - how - known:
            raise Unknown(f"instruction form {i.form!r}")
        operands = i.operands if name == "atom" else (None, *i.operands)
        outs = [None if operands[0] is None else self.destination(operands[0], kind)]
        values = [self.source(o, kind) for o in operands[2:] if o is not None]
        if operands[1] is None:
            raise Unknown(f"instruction form {i.form!r}")
        address = self._address(operands[1], "u64")
        return self._strong(i, address, outs, kind, flags, functions[how.pop()], *values)

    _red = _atom

    def _ldmatrix(self, i: Instruction, name: str, modifiers: list[str]) -> Step:
        count, transposed = _matrix(i, modifiers)
        to, at = i.operands
        outs = [self.destination(r, "b32") for r in to.items]  # type: ignore[union-attr]
        address = self._address(at, "u32")

        def step(mask: Mask) -> None:
            warps = self._whole_warps(i, mask)
            if not warps.size:
                return
            lanes = (warps[:, None] * WARP + np.arange(8 * count)).ravel()
            rows = self._shared_get(i, address(lanes), lanes, 2, 8, set())
            tiles = rows.reshape(len(warps), count, 8, 8)
            tiles = tiles.swapaxes(2, 3) if transposed else tiles
            pairs = np.ascontiguousarray(tiles).view(np.uint32).reshape(len(warps), count, WARP)
            every = warps[:, None] * WARP + np.arange(WARP)
            for n, out in enumerate(outs):
                out[every] = pairs[:, n]

        return step

    def _stmatrix(self, i: Instruction, name: str, modifiers: list[str]) -> Step:
        count, transposed = _matrix(i, modifiers)
        at, of = i.operands
        values = [self.source(r, "b32") for r in of.items]  # type: ignore[union-attr]
        address = self._address(at, "u32")

        def step(mask: Mask) -> None:
            warps = self._whole_warps(i, mask)
            if not warps.size:
                return
            every = warps[:, None] * WARP + np.arange(WARP)
            pairs = np.stack([v[every] for v in values], 1)
            tiles = pairs.view(np.uint16).reshape(len(warps), count, 8, 8)
            tiles = tiles.swapaxes(2, 3) if transposed else tiles
            lanes = (warps[:, None] * WARP + np.arange(8 * count)).ravel()
            words = np.ascontiguousarray(tiles).reshape(-1, 8)
            self._shared_put(i, address(lanes), lanes, words)

        return step


# ---- what an instruction's name says ---------------------------------------------------------------

#: Loads and stores that are part of the order between CTAs.
STRONG = {"volatile", "relaxed", "acquire", "release"}
HINTS = ("L1::", "L2::")


def _only(modifiers: list[str], *known: str) -> None:
    if unknown := set(modifiers) - set(known):
        raise Unknown(f"modifier .{unknown.pop()}")


def _access(modifiers: list[str]) -> tuple[str, int, str, set[str]]:
    """-> (space, words, type of a word, flags) of a load or store."""
    *rest, kind = modifiers
    if kind not in TYPES or TYPES[kind].itemsize < UNIT:
        raise Unknown(f"type .{kind}")
    flags = {m for m in rest if not m.startswith(HINTS)}
    spaces = {"shared::cta": "shared"} | {s: s for s in ("global", "shared", "param")}
    space = flags & spaces.keys()
    sizes = {"v2": 2, "v4": 4}
    size = flags & sizes.keys()
    known = STRONG | {"weak", "gpu", "sys", "cta", "ca", "cg", "cs", "wb", "wt", "lu"}
    if len(space) != 1 or len(size) > 1 or flags - space - size - known:
        raise Unknown(f"modifiers .{'.'.join(modifiers)}")
    return spaces[space.pop()], sizes[size.pop()] if size else 1, kind, flags & known


def _matrix(i: Instruction, modifiers: list[str]) -> tuple[int, bool]:
    """-> (matrices, transposed)."""
    _only(modifiers, "sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "b16")
    return next(int(m[1]) for m in modifiers if m in ("x1", "x2", "x4")), "trans" in modifiers
