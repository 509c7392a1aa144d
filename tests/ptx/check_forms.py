"""Every variant of every kernel is read and known, and `forms.txt` lists the instructions they use.

`python -m ptx.check_forms` (in tests/, without the interpreter) adds what is missing to the list.
"""

from __future__ import annotations

from pathlib import Path

import aot
import pytest

from ptx.execute import Machine
from ptx.memory import Global
from ptx.parse import forms, parse

FILE = Path(__file__).with_name("forms.txt")


def used() -> set[str]:
    """The forms of the kernels' PTX under this version of Triton, all decoded."""
    found: set[str] = set()
    for _, kernel, dtype, constants in aot.cases():
        ptx = aot.compile_case(kernel, dtype, constants, aot.TARGETS["sm_90"]).asm["ptx"]
        program = parse(ptx)
        Machine(program, [0] * len(program.parameters), Global(), 1, 1 << 16)
        found |= forms(ptx)
    return found


@pytest.mark.timeout(900)
def test_every_variant_is_known() -> None:
    new = used() - set(FILE.read_text().split())
    # The executor knows them, or this would have failed before; did it get them right?
    assert not new, f"forms that no kernel had so far: {sorted(new)}"


if __name__ == "__main__":
    FILE.write_text("\n".join(sorted(used() | set(FILE.read_text().split()))) + "\n")
