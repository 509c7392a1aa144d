"""Memory that tells what is wrong with an access: bounds, alignment, poison, order.

Order is that of vector clocks, as race detectors keep them: every warp knows up to which tick it has
seen each other warp. Barriers join the warps of a CTA; a release leaves what its warp knows at the
address of an atomic, an acquire takes it from there. An access that meets a write it does not know of is
a race, however the CTAs happened to be interleaved.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

#: A 16-bit word of fresh memory: NaN in every float type, far from any index in every integer type.
POISON = 0xFFFB
#: Bytes; a unit is what races and bounds are told apart by.
UNIT = 2
#: Nothing is allocated so many bytes before and behind an allocation.
RED_ZONE = 1024
#: What the driver aligns allocations to.
ALIGNMENT = 512
#: Above 32 bits, so that a truncated address shows.
BASE = 1 << 40

# States of a unit besides the number of a warp: nobody; several warps of CTA c (-2 - c); several CTAs.
NOBODY = -1
EVERYBODY = -(1 << 30)


class Fault(AssertionError):
    """What a GPU might not have forgiven.

    Attributes:
        kind: "bounds", "alignment", "poison", "race", "stale", "barrier", "lanes" or "endless".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Bad(Exception):
    """An access of some lanes that is at fault; the executor says where it stands."""

    def __init__(self, kind: str, which: int, message: str) -> None:
        super().__init__(message)
        self.kind, self.which = kind, which


class Order:
    """Who has seen what of whom."""

    def __init__(self, ctas: int, warps: int) -> None:
        self.warps = warps
        #: [ctas] the tick at which the accesses of a CTA are stamped.
        self.tick = np.ones(ctas, np.int32)
        #: [ctas * warps, warps] up to which tick a warp knows the warps of its own CTA.
        self.inner = np.zeros((ctas * warps, warps), np.int32)
        #: The same of all warps, for warps that have acquired something.
        self.outer: dict[int, Array] = {}
        #: What a fence has put up for the next relaxed atomics, and what the last ones have met.
        self.released: dict[int, Array] = {}
        self.met: dict[int, Array] = {}
        #: Left behind at an address.
        self.messages: dict[int, Array] = {}

    def barrier(self, cta: int) -> None:
        """All warps of a CTA know what each of them knew or did."""
        warps = range(cta * self.warps, (cta + 1) * self.warps)
        self.inner[warps.start : warps.stop] = self.tick[cta]
        self.tick[cta] += 1
        known = [self.outer[w] for w in warps if w in self.outer]
        if known:
            joined = np.maximum.reduce(known)
            self.outer.update((w, joined) for w in warps)

    def fence(self, warp: int) -> None:
        """What this warp knows goes with its next atomics; what its last atomics met it knows now."""
        if warp in self.met:
            self._learn(warp, self.met[warp])
        self.released[warp] = self._snapshot(warp)

    def atomic(self, warp: int, address: int, acquire: bool, release: bool) -> None:
        """A read-modify-write: takes what others left at the address, leaves what it or a fence has."""
        message = self.messages.get(address)
        if message is not None and acquire:
            self._learn(warp, message)
        elif message is not None:
            self.met[warp] = np.maximum(message, self.met.get(warp, message))
        mine = self._snapshot(warp) if release else self.released.get(warp)
        if mine is not None:
            self.messages[address] = mine if message is None else np.maximum(message, mine)

    def _learn(self, warp: int, message: Array) -> None:
        self.outer[warp] = np.maximum(message, self.outer.get(warp, message))

    def _snapshot(self, warp: int) -> Array:
        """[ctas * warps] what this warp knows; what the CTA does from now on is later than that."""
        cta = warp // self.warps
        known = self.outer.get(warp)
        known = np.zeros(len(self.inner), np.int32) if known is None else known.copy()
        known[cta * self.warps : (cta + 1) * self.warps] = self.inner[warp]
        known[warp] = self.tick[cta]
        self.tick[cta] += 1
        return known

    def knows(self, warp: Array, other: Array, tick: Array) -> Array:
        """Whether ``warp`` has seen what ``other`` did at ``tick``; all [n]."""
        own = warp // self.warps == other // self.warps
        seen = np.where(own, self.inner[warp, other % self.warps], -1)
        for w in np.unique(warp[~own]):
            if w in self.outer:
                at = ~own & (warp == w)
                seen[at] = self.outer[w][other[at]]
        return (tick <= seen) | (warp == other)

    def settled(self, warp: Array, state: Array, tick: Array) -> Array:
        """Whether ``warp`` has seen all that a unit's state and tick stand for; all [n]."""
        done = (state == NOBODY) | (state == warp)
        some = np.nonzero(~done & (state >= 0))[0]
        if some.size:
            done[some] = self.knows(warp[some], state[some], tick[some])
        many = np.nonzero(~done & (state < NOBODY) & (state != EVERYBODY))[0]
        if many.size:
            first = (-2 - state[many]) * self.warps
            each = [self.knows(warp[many], first + i, tick[many]) for i in range(self.warps)]
            done[many] = np.logical_and.reduce(each)
        return done


class Shadow:
    """Last writer and readers of every unit of a memory."""

    def __init__(self, units: int, order: Order) -> None:
        self.order = order
        self.writer, self.reader = (np.full(units, NOBODY, np.int32) for _ in range(2))
        self.written, self.read_at = (np.zeros(units, np.int32) for _ in range(2))

    def read(self, units: Array, warp: Array) -> Array:
        """Notes a read. -> [n] whether it may meet a write that it does not know of."""
        order = self.order
        writer = self.writer[units]
        race = np.zeros(len(units), bool)
        some = np.nonzero((writer != NOBODY) & (writer != warp))[0]
        if some.size:
            race[some] = ~order.knows(warp[some], writer[some], self.written[units[some]])
        before = self.reader[units]
        fresh = order.settled(warp, before, self.read_at[units])
        cta = warp // order.warps
        self.reader[units] = np.where(fresh, warp, self._together(before, cta))
        self.read_at[units] = order.tick[cta]
        # Units that several lanes read at once keep the last one so far.
        now = self.reader[units]
        others = np.nonzero(fresh & (now != warp))[0]
        if others.size:
            self.reader[units[others]] = self._together(now[others], cta[others])
            apart = others[self._cta(self.reader[units[others]]) != cta[others]]
            self.reader[units[apart]] = EVERYBODY
        return race

    def write(self, units: Array, warp: Array) -> tuple[Array, Array]:
        """Notes a write.

        Returns:
            [n] whether an earlier access may meet it in either order, and [n] whether another warp
            writes the same unit in the same step.
        """
        order = self.order
        race = self.unordered(units, warp)
        self.writer[units] = warp
        self.written[units] = order.tick[warp // order.warps]
        self.reader[units] = NOBODY
        return race, self.writer[units] != warp

    def foreign(self, units: Array, warp: Array) -> Array:
        """-> [n] whether another CTA was the last to write in this launch."""
        writer = self.writer[units]
        return (writer != NOBODY) & (writer // self.order.warps != warp // self.order.warps)

    def unordered(self, units: Array, warp: Array) -> Array:
        """-> [n] whether a plain access may meet one of ``warp`` now, in either order; notes nothing."""
        settled = self.order.settled
        race = ~settled(warp, self.writer[units], self.written[units])
        return race | ~settled(warp, self.reader[units], self.read_at[units])

    def _cta(self, state: Array) -> Array:
        return np.where(state >= 0, state // self.order.warps, -2 - state)

    def _together(self, state: Array, cta: Array) -> Array:
        return np.where(self._cta(state) == cta, -2 - cta, EVERYBODY)


class Allocation(NamedTuple):
    name: str
    start: int
    size: int


class Global:
    """Global memory of a launch: what was put there, with red zones between."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self.freed: set[int] = set()
        self.contents: list[tuple[Array, Array]] = []
        self.end = RED_ZONE  # a multiple of ALIGNMENT, here and later

    def allocate(self, name: str, data: Array, valid: Array | None = None, phase: int = 0) -> int:
        """Copies bytes to the device. -> address.

        Args:
            name: for reports.
            data: uint8 [n].
            valid: bool [n], the bytes that belong to somebody; default all.
            phase: address modulo :data:`ALIGNMENT`.
        """
        start = self.end + phase
        size = len(data)
        self.allocations.append(Allocation(name, start, size))
        self.contents.append((data, np.ones(size, bool) if valid is None else valid))
        self.end = -(-(start + size + RED_ZONE) // ALIGNMENT) * ALIGNMENT
        return BASE + start

    def free(self, address: int) -> None:
        """Refuses all accesses from now on."""
        self.freed.add(address - BASE)

    def begin(self, order: Order) -> None:
        """Lays everything out for one launch."""
        self.bytes = np.full(self.end // UNIT, POISON, np.uint16).view(np.uint8)
        valid = np.zeros(self.end, bool)
        for a, (data, mask) in zip(self.allocations, self.contents, strict=True):
            self.bytes[a.start : a.start + a.size] = data
            valid[a.start : a.start + a.size] = mask & (a.start not in self.freed)
        self.valid = valid[::UNIT] & valid[1::UNIT]
        self.old = self.bytes.copy()
        self.order = order
        self.shadow = Shadow(self.end // UNIT, order)
        #: The warp that last accessed a unit atomically.
        self.atomics = np.full(self.end // UNIT, NOBODY, np.int32)

    def mixed(self, units: Array, warp: Array) -> Array:
        """-> [n] whether another warp has accessed a unit atomically: no plain access may meet that."""
        last = self.atomics[units]
        return (last != NOBODY) & (last != warp)

    def take(self, address: int) -> Array:
        """The bytes of an allocation after the launch."""
        for a in self.allocations:
            if BASE + a.start == address:
                return self.bytes[a.start : a.start + a.size]
        raise KeyError(address)

    def units(self, address: Array, size: int) -> Array:
        """Checks an access of ``size`` bytes at each address. -> [n, size / UNIT] indices of units."""
        wrong = np.nonzero(address % size)[0]
        if wrong.size:
            raise Bad(
                "alignment", wrong[0], f"{size} bytes at {self.place(int(address[wrong[0]]))}"
            )
        start = address.astype(np.int64) - BASE
        outside = (start < 0) | (start + size > self.end)
        if not outside.any():
            units = (start // UNIT)[:, None] + np.arange(size // UNIT)
            outside = ~self.valid[units].all(1)
            if not outside.any():
                return units
        which = int(np.nonzero(outside)[0][0])
        raise Bad("bounds", which, f"{size} bytes at {self.place(int(address[which]))}")

    def words(self, size: int) -> Array:
        return self.bytes.view(f"u{size}")

    def place(self, address: int) -> str:
        """An address in words: the nearest allocation and the offset from its start and end."""
        at = address - BASE
        if not self.allocations:
            return f"{address:#x}: there is no memory"

        def distance(a: Allocation) -> int:
            return max(a.start - at, at - (a.start + a.size - 1), 0)

        a = min(self.allocations, key=distance)
        if at < a.start:
            where = f"{a.start - at} bytes before {a.name}"
        elif at >= a.start + a.size:
            where = f"{at - a.start - a.size} bytes past the end of {a.name}"
        else:
            where = f"byte {at - a.start} of {a.name}"
        gone = ", which is freed" if a.start in self.freed else ""
        return f"{address:#x}, {where} ({a.size} bytes){gone}"


class Shared:
    """Shared memory of all CTAs of a launch that run at a time, one after the other."""

    def __init__(self, ctas: int, size: int, order: Order) -> None:
        # At least one unit, so that indexing stays simple where a kernel has none.
        self.size = max(-(-size // 16) * 16, 16)
        self.limit = size
        self.bytes = np.full(ctas * self.size // UNIT, POISON, np.uint16).view(np.uint8)
        self.shadow = Shadow(ctas * self.size // UNIT, order)

    def units(self, address: Array, size: int, cta: Array) -> Array:
        """As for global memory; ``cta`` [n] counts the CTAs that run."""
        wrong = np.nonzero(address % size)[0]
        if wrong.size:
            at = int(address[wrong[0]])
            raise Bad("alignment", wrong[0], f"{size} bytes at {at} of shared memory")
        start = address.astype(np.int64)
        outside = np.nonzero(start + size > self.limit)[0]
        if outside.size:
            at = int(address[outside[0]])
            message = f"{size} bytes at {at} of shared memory, which has {self.limit} bytes"
            raise Bad("bounds", outside[0], message)
        return ((start + cta * self.size) // UNIT)[:, None] + np.arange(size // UNIT)

    def words(self, size: int) -> Array:
        return self.bytes.view(f"u{size}")
