"""Counts the instructions of a kernel's main loop in the machine code that ptxas makes of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton.backends.nvidia as nvidia

TOOLS = Path(nvidia.__file__).parent / "bin"
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str


def cuobjdump(cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        command = [TOOLS / "cuobjdump", *options, f.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def instructions(cubin: bytes) -> list[Instruction]:
    found = _LINE.findall(cuobjdump(cubin, "-sass"))
    return [Instruction(int(a, 16), name, operands.strip()) for a, name, operands in found]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Bodies of the innermost loops: from the target of a branch back to the branch."""
    spans = []
    for i in code:
        target = re.search(r"0x([0-9a-f]+)$", i.operands) if i.name.startswith("BRA") else None
        if target and int(target[1], 16) < i.address:
            spans.append((int(target[1], 16), i.address))
    inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [[i for i in code if a <= i.address <= b] for a, b in inner]


def main_loop(cubin: bytes) -> list[Instruction]:
    """The loop over whole tiles: of those with the widest loads the one with the most exponentials."""

    def weight(loop: list[Instruction]) -> tuple[bool, int]:
        names = [i.name for i in loop]
        return any(n.startswith("LDG.E.128") for n in names), names.count("MUFU.EX2")

    return usual(max(loops(instructions(cubin)), key=weight))


def usual(loop: list[Instruction]) -> list[Instruction]:
    """Without what a branch jumps over: the block of columns that holds the label, one of many."""
    path, resume = [], 0
    for i in loop:
        if i.address >= resume:
            path.append(i)
            target = re.search(r"0x([0-9a-f]+)$", i.operands) if i.name == "BRA" else None
            if target and i.address < int(target[1], 16) <= loop[-1].address:
                resume = int(target[1], 16)
    return path


def in_flight(loop: list[Instruction]) -> int:
    """128-bit loads that are issued before the result of one of them is used."""
    loads, waiting = 0, set[int]()
    for i in loop:
        registers = [int(r) for r in re.findall(r"\bR(\d+)", i.operands)]
        if i.name.startswith("LDG.E.128"):
            loads += 1
            waiting |= {registers[0] + n for n in range(4)}
        elif waiting.intersection(registers[not i.name.startswith("ST") :]):
            break
    return loads


#: Pipes of a multiprocessor by the first letters of an instruction's name.
PIPES = {
    "MUFU": ("MUFU",),
    "memory": ("LD", "ST", "ATOM", "RED"),
    "FMA": ("FFMA", "FADD", "FMUL", "IMAD", "FSWZ"),
    "ALU": (
        *("FMNMX", "FSEL", "FSETP", "ISETP", "SEL", "LOP3", "PRMT", "SHF", "IADD", "VIADD", "LEA"),
        *("F2F", "IMNMX", "VIMNMX", "PLOP3", "IABS", "LOP", "MOV"),
    ),
}


def pipe(name: str) -> str:
    for found, prefixes in PIPES.items():
        if name.startswith(prefixes):
            return found
    return "other"


def by_pipe(loop: list[Instruction]) -> Counter[str]:
    return Counter(pipe(i.name) for i in loop)
