"""Reads the PTX that Triton emits: registers, parameters, instructions in blocks."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

#: Bytes of a type; predicates are not in memory.
BITS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64}


class Unknown(Exception):
    """A construct that the executor does not know; it never skips one."""


class Register(NamedTuple):
    name: str


class Immediate(NamedTuple):
    """A constant: an integer, or with ``is_float`` the bits of a float."""

    value: int
    is_float: bool


class Symbol(NamedTuple):
    """A label, a parameter or a variable in shared memory."""

    name: str


class Address(NamedTuple):
    """[base + offset]."""

    base: Register | Symbol | Immediate
    offset: int


class Vector(NamedTuple):
    """{a, b, ...}; ``_`` is None: a part that is dropped."""

    items: tuple[Register | Immediate | None, ...]


Operand = Register | Immediate | Symbol | Address | Vector


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        form: name with all modifiers, "ld.global.cg.b32".
        operands: destination first.
        predicate: (register, negated) or None.
        line: in the PTX, from 1.
        text: as it stands there.
        source: "file:line" of the Triton source, "" where the PTX does not say.
    """

    form: str
    operands: tuple[Operand, ...]
    predicate: tuple[str, bool] | None
    line: int
    text: str
    source: str

    def __str__(self) -> str:
        where = f", {self.source}" if self.source else ""
        return f"`{self.text}` (PTX line {self.line}{where})"


class Parameter(NamedTuple):
    name: str
    type: str
    offset: int


class Program(NamedTuple):
    """An entry function.

    Attributes:
        blocks: in the order of the text. Control enters at the top; the last instruction may branch.
            Where CTAs talk to each other a block ends before every access to global memory.
        labels: label -> index of its block.
        registers: name -> "pred", "b16", "b32" or "b64".
        shared: name -> offset in the shared memory of a CTA.
        static_shared: bytes of it whose size the PTX states; the rest is said at launch.
        communicates: has atomics or fences.
    """

    name: str
    parameters: tuple[Parameter, ...]
    blocks: tuple[tuple[Instruction, ...], ...]
    labels: dict[str, int]
    registers: dict[str, str]
    shared: dict[str, int]
    static_shared: int
    threads: int
    communicates: bool


REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%\w+)(?:<(\d+)>)?$")
PARAMETER = re.compile(
    r"\.param\s+\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)*?)?(?:\.align\s+\d+\s+)?(\w+)$"
)
ENTRY = re.compile(r"\.visible\s+\.entry\s+(\w+)\s*\(")
SHARED = re.compile(
    r"(\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)(?:\[(\d*)\])?$", re.MULTILINE
)
LABEL = re.compile(r"^([\w$]+):$")
LOC = re.compile(r"^\.loc\s+(\d+)\s+(\d+)")
FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]+)"', re.MULTILINE)
INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?$")
ENDS = ("bra", "ret", "exit", "bar", "barrier", "trap")
COMMUNICATION = ("atom", "red", "fence", "membar")
WIDTHS = {"u": "b", "s": "b", "f": "b", "b": "b"}


def parse(text: str) -> Program:
    """The one entry function of a PTX module.

    Raises:
        Unknown: at a construct that is not known, with its line.
    """
    entry = ENTRY.search(text)
    if not entry:
        raise Unknown("no .visible .entry in this PTX")
    opening = text.index("{", entry.end())
    header = _strip(text[entry.end() : opening])
    files = {number: name for number, name in FILE.findall(text)}
    body, registers = _statements(text, opening + 1, files)
    labels, instructions = _label(body)
    communicates = any(i.form.split(".")[0] in COMMUNICATION for i in instructions)
    targets = {o.name for i in instructions for o in i.operands if isinstance(o, Symbol)}
    blocks, at = _blocks(
        instructions, {k: v for k, v in labels.items() if k in targets}, communicates
    )
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:,\s*1)*\s*$", header, re.MULTILINE)
    if not threads:
        raise Unknown(f"{entry[1]}: no .reqntid")
    shared, static = _shared(_strip(text[: entry.start()]))
    return Program(
        entry[1],
        _parameters(header),
        blocks,
        at,
        registers,
        shared,
        static,
        int(threads[1]),
        communicates,
    )


def forms(text: str) -> set[str]:
    """The forms of instruction that a PTX module uses."""
    return {i.form for block in parse(text).blocks for i in block}


def _strip(text: str) -> str:
    return re.sub(r"[ \t]*//[^\n]*", "", text)


def _parameters(header: str) -> tuple[Parameter, ...]:
    found, offset = [], 0
    for line in header.split(")")[0].split(","):
        if not line.strip():
            continue
        match = PARAMETER.match(line.strip())
        if not match:
            raise Unknown(f"parameter: {line.strip()!r}")
        size = int(match[1][1:]) // 8
        offset = -(-offset // size) * size
        found.append(Parameter(match[2], match[1], offset))
        offset += size
    return tuple(found)


def _shared(prologue: str) -> tuple[dict[str, int], int]:
    """Statically sized variables first; what is sized at launch begins behind them."""
    shared, end, dynamic = {}, 0, []
    for extern, align, name, size in SHARED.findall(prologue.replace(";", "")):
        if extern:
            dynamic.append(name)
        else:
            end = -(-end // int(align)) * int(align)
            shared[name] = end
            end += int(size)
    end = -(-end // 16) * 16
    return shared | {name: end for name in dynamic}, end


def _statements(
    text: str, start: int, files: dict[str, str]
) -> tuple[list[str | Instruction], dict[str, str]]:
    """Labels (as strings) and instructions up to the brace that closes the function."""
    registers: dict[str, str] = {}
    found: list[str | Instruction] = []
    depth, source = 1, ""
    line = text.count("\n", 0, start) + 1
    for raw in text[start:].split("\n"):
        code = _strip(raw).strip()
        if loc := LOC.match(code):
            source = f"{files.get(loc[1], loc[1])}:{loc[2]}"
        elif code in ("{", "}"):
            depth += 1 if code == "{" else -1
            if depth == 0:
                return found, registers
        elif label := LABEL.match(code):
            found.append(label[1])
        elif code:
            for statement in filter(None, (s.strip() for s in code.split(";"))):
                if match := REGISTERS.match(statement):
                    _declare(match, registers)
                elif not statement.startswith(".pragma"):
                    found.append(_instruction(statement, line, source))
        line += 1
    raise Unknown("the function does not end")


def _declare(match: re.Match[str], registers: dict[str, str]) -> None:
    kind, prefix, count = match[1], match[2], match[3]
    kind = kind if kind == "pred" else WIDTHS[kind[0]] + kind[1:]
    if kind not in BITS:
        raise Unknown(f"registers of type .{match[1]}")
    names = [prefix] if count is None else [f"{prefix}{i}" for i in range(int(count))]
    for name in names:
        if name in registers:
            raise Unknown(f"register {name} declared twice: scopes are not known")
        registers[name] = kind


# A mutant of a program differs from it in one statement.
@functools.cache
def _instruction(text: str, line: int, source: str) -> Instruction:
    text = re.sub(r"\s+", " ", text)
    rest, predicate = text, None
    if match := re.match(r"@(!?)(%\w+) ", rest):
        predicate, rest = (match[2], match[1] == "!"), rest[match.end() :]
    form, _, operands = rest.partition(" ")
    if not re.match(r"[a-z][\w.:]*$", form):
        raise Unknown(f"PTX line {line}: {text!r}")
    try:
        parts = tuple(_operand(o) for o in _split(operands))
    except ValueError as error:
        raise Unknown(f"PTX line {line}: {text!r}: {error}") from None
    return Instruction(form, parts, predicate, line, text, source)


def _split(operands: str) -> list[str]:
    """At commas outside of braces and brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(operands):
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            parts.append(operands[start:i])
            start = i + 1
    return [p.strip() for p in (*parts, operands[start:]) if p.strip()]


def _operand(text: str) -> Operand:
    if text[0] == "{":
        items = [i.strip() for i in text[1:-1].split(",")]
        return Vector(tuple(None if i == "_" else _scalar(i) for i in items))  # type: ignore[misc]
    if text[0] == "[":
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(_scalar(base), int(offset or "0", 0))
    return _scalar(text)


def _scalar(text: str) -> Register | Immediate | Symbol:
    if text[0] == "%":
        return Register(text)
    if match := re.match(r"0[fF]([0-9a-fA-F]{8})$|0[dD]([0-9a-fA-F]{16})$", text):
        return Immediate(int(match[1] or match[2], 16), True)
    if INTEGER.match(text):
        return Immediate(int(text.rstrip("U"), 0), False)
    if re.match(r"[\w$]+$", text):
        return Symbol(text)
    raise ValueError(f"operand {text!r}")


def _label(body: list[str | Instruction]) -> tuple[dict[str, int], list[Instruction]]:
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    for item in body:
        if isinstance(item, str):
            labels[item] = len(instructions)
        else:
            instructions.append(item)
    return labels, instructions


def _blocks(
    instructions: list[Instruction], labels: dict[str, int], communicates: bool
) -> tuple[tuple[tuple[Instruction, ...], ...], dict[str, int]]:
    starts = {0, *labels.values()}
    for i, instruction in enumerate(instructions):
        parts = instruction.form.split(".")
        if parts[0] in ENDS:
            starts.add(i + 1)
        if communicates and "global" in parts:
            starts.add(i)
    cuts = sorted(s for s in starts if s < len(instructions))
    ends = [*cuts[1:], len(instructions)]
    blocks = tuple(tuple(instructions[a:b]) for a, b in zip(cuts, ends, strict=True))
    index = {start: i for i, start in enumerate(cuts)}
    # A label behind the last instruction is the end of the function.
    return blocks, {name: index.get(at, len(blocks)) for name, at in labels.items()}
