"""Counts the instructions of a kernel's main loop in the machine code that ptxas makes of it."""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import triton.backends.nvidia as nvidia

TOOLS = Path(nvidia.__file__).parent / "bin"
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
#: Of an instruction.
BYTES = 16


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str


def run(tool: str, content: bytes, *options: str) -> str:
    """What one of the tools beside Triton's compiler prints about a file."""
    with tempfile.NamedTemporaryFile() as f:
        f.write(content)
        f.flush()
        command = [TOOLS / tool, *options, f.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def machine_code(cubin: bytes) -> bytes:
    """The section of an ELF file that holds its one kernel."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    # Of each section: where its name is, its type, flags, address, offset and length.
    sections = [struct.unpack_from("<2I4Q", cubin, table + i * size) for i in range(count)]
    start = sections[names][4]
    (code,) = (s for s in sections if cubin.startswith(b".text.", start + s[0]))
    return cubin[code[4] : code[4] + code[5]]


def instructions(cubins: Sequence[bytes]) -> list[list[Instruction]]:
    """Of each kernel, for sm_90, with the addresses they have when they stand one after the other.

    All in one call: the disassembler takes a third of a second to start.
    """
    if not cubins:
        return []
    codes = [machine_code(cubin) for cubin in cubins]
    text = run("nvdisasm", b"".join(codes), "-b", "SM90", "-ndf")
    found = [Instruction(int(a, 16), n, operands.strip()) for a, n, operands in _LINE.findall(text)]
    assert sum(map(len, codes)) == BYTES * len(found), "a line that was not understood"
    parts = iter(found)
    return [list(itertools.islice(parts, len(code) // BYTES)) for code in codes]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Bodies of the innermost loops: from the target of a branch back to the branch."""
    spans = []
    for i in code:
        target = re.search(r"0x([0-9a-f]+)$", i.operands) if i.name.startswith("BRA") else None
        if target and int(target[1], 16) < i.address:
            spans.append((int(target[1], 16), i.address))
    inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [[i for i in code if a <= i.address <= b] for a, b in inner]


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The loop over whole tiles: of those with the widest loads the one with the most exponentials."""

    def weight(loop: list[Instruction]) -> tuple[bool, int]:
        names = [i.name for i in loop]
        return any(n.startswith("LDG.E.128") for n in names), names.count("MUFU.EX2")

    return usual(max(loops(code), key=weight))


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
