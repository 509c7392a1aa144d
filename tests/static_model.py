"""What the machine code of the row kernels says of their speed: instructions, registers, times.

No kernel is run. Instructions per logit are counted in the loop over whole tiles, as ptxas makes it for
sm_90; a time is that of 8192 rows of 128256 logits if nothing else cost any, and a kernel takes at least
the longest. Usage, without the interpreter: python tests/static_model.py [part of a kernel's name ...];
all of it is benchmarks/results/static_model.md.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import aot
import sass
import triton

from topr_kernels.kernels import triton_linear as lin
from topr_kernels.kernels import triton_logits as tk

LOGITS = 8192 * 128256
#: Multiprocessors, their clock in Hz (sustained), and 90 % of the bandwidth in bytes per second.
PROCESSORS, CLOCK = 132, 1.755e9
BANDWIDTH = {"H100": 0.9 * 3.35e12, "H200": 0.9 * 4.8e12}
#: Threads of a program, and what a multiprocessor has of them and of registers.
THREADS, MOST_THREADS, REGISTERS = 128, 2048, 65536
#: Lanes that a multiprocessor issues, and that its special functions serve, per cycle.
ISSUE, SPECIAL = 128, 16

HEAD = """# Static model of the Triton kernels

Printed by `python tests/static_model.py`; nothing was run on a GPU. Instructions per logit by the pipe
that executes them and registers per thread, from the machine code for sm_90 (`ptxas` of Triton);
programs of 128 threads per multiprocessor by registers; microseconds for 8192 x 128256 logits at the
bound of issue, of special functions (132 multiprocessors, 1.755 GHz) and of memory (90 % of 3.35 and
4.8 TB/s), in brackets the share of H200's memory time. "narrow" kernels serve rows that are not aligned
to 16 elements. The columns kernel works on tiles of some 2048 rows, a quarter of this.

The aim is 60 % at issue and special functions without options, 120 % with all. One kind of kernel
misses it: the forward with softcap and entropy in half precision, for 2 bytes per logit leave time for
16.5 instructions at 120 %. What each logit needs there, as the results are defined:

| step | instructions |
| --- | ---: |
| its share of a 128-bit load, and fp32 from half precision | 1.1 |
| tanh to 2e-7: bound, square, polynomial (6), argument of the root, root (MUFU), product | 11 |
| running maximum | 1 |
| difference from the maximum, scale, exponential (MUFU), sum | 4 |
| entropy: product and sum, fused | 1 |
| all | 18.1 (132 %) |

The two MUFU alone are 117 %. No tanh that was tried is cheaper: an exponential and a quotient take one
MUFU more (175 %), the same form with one operation less is 9e-7 off, three times what it may be,
`tanh.approx` 5e-4. One fused operation for difference and scale makes log-probs of confident rows
positive. Packed instructions for the bound and the maximum, which Triton does not take, would leave
17.1 (125 %).
"""


class Profile(NamedTuple):
    """Of one kernel: per logit, the instructions by pipe and the bytes of memory."""

    name: str
    dtype: str
    registers: int
    pipes: dict[str, float]
    bytes: float

    @property
    def instructions(self) -> float:
        return sum(self.pipes.values())

    @property
    def programs(self) -> int:
        """Per multiprocessor, by registers, which are given out in eights."""
        each = -(-self.registers // 8) * 8 * THREADS
        return min(REGISTERS // each, MOST_THREADS // THREADS)

    def seconds(self, device: str) -> tuple[float, float, float]:
        """At the bounds of issue, of special functions and of memory."""
        cycle = LOGITS / (PROCESSORS * CLOCK)
        special = self.pipes.get("MUFU", 0.0)
        issue, special = self.instructions * cycle / ISSUE, special * cycle / SPECIAL
        return issue, special, self.bytes * LOGITS / BANDWIDTH[device]


def traffic(kernel: Any, dtype: str, constants: dict[str, Any]) -> float:
    """Bytes per logit, read and written, as the heads of the kernels' files have it."""
    size = aot.SIZES[dtype]
    if kernel is lin.linear_columns_kernel:
        return 4 + 2 * 4 * (1 + constants["K"]) / constants["ROWS"]
    return {
        tk.rows_fwd_kernel: size,
        tk.logits_bwd_kernel: 2 * size,
        lin.linear_rows_kernel: 4,
        lin.linear_gradient_kernel: 4 + size,
        # A sector for each of columns that lie far apart.
        lin.linear_gather_kernel: 32 + size,
    }[kernel]


def profile(case: aot.Case, cubin: bytes, code: list[sass.Instruction]) -> Profile:
    name, kernel, dtype, constants = case
    loop = sass.main_loop(code)
    logits = aot.logits_of(loop, kernel, constants)
    pipes = {pipe: n / logits for pipe, n in sass.by_pipe(loop).items()}
    registers = aot.resources(cubin)["registers"]
    return Profile(name, dtype, registers, pipes, traffic(kernel, dtype, constants))


def table(profiles: list[Profile]) -> list[str]:
    pipes = [*sass.PIPES, "other"]
    header = ["kernel", "dtype", "registers", "programs", *pipes, "all", "issue", "MUFU"]
    header += [f"memory {device}" for device in BANDWIDTH]
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    for p in profiles:
        counts = [f"{p.pipes.get(k, 0.0):.2f}" for k in pipes]
        issue, special, _ = p.seconds("H200")
        memory = [p.seconds(device)[2] for device in BANDWIDTH]
        # Shares of the time of the faster memory.
        times = [f"{1e6 * t:.0f} ({t / memory[-1]:.0%})" for t in (issue, special)]
        times += [f"{1e6 * t:.0f}" for t in memory]
        first = [p.name, p.dtype, str(p.registers), str(p.programs)]
        lines.append([*first, *counts, f"{p.instructions:.1f}", *times])
    return ["| " + " | ".join(line) + " |" for line in lines]


def main() -> None:
    wanted = sys.argv[1:]
    cases, cubins = [], []
    for case in aot.cases():
        name, kernel, dtype, constants = case
        if dtype == "fp16" or (wanted and not any(w in name for w in wanted)):
            continue
        if kernel in aot.LATER_STAGES:
            continue
        cases.append(case)
        done = aot.compile_case(kernel, dtype, constants, aot.TARGETS["sm_90"])
        cubins.append(done.asm["cubin"])
    codes = sass.instructions(cubins)
    print(HEAD)
    print(f"Triton {triton.__version__}; per logit and in microseconds, {LOGITS} logits\n")
    print("\n".join(table([profile(*each) for each in zip(cases, cubins, codes, strict=True)])))


if __name__ == "__main__":
    main()
