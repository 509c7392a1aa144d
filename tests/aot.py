"""Compiles every Triton kernel ahead of time, without a GPU, and prints what came of it as JSON lines.

Run by ``test_triton_aot.py`` in a process of its own, because the interpreter is chosen at import.
Usage: python tests/aot.py sm_90 | sm_80 | sm_100 | gfx942 ... [each | turns]
With ``each`` it takes every variant once, in one dtype or another, instead of in all of them; with
``turns`` every target takes its share of a kernel's variants, and at least one. The machine code is that
of sm_90.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import sass
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from topr_kernels.kernels import triton_linear as lin
from topr_kernels.kernels import triton_logits as tk
from topr_kernels.kernels.triton_rows import NO_FUSION

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
Case = tuple[str, Any, str, dict[str, Any]]
#: Kernels that have no loop over logits.
LATER_STAGES = (tk.sequences_fwd_kernel, tk.loss_fwd_kernel)
FULL = {"SOFTCAP": True, "ENTROPY": True}


def parameters(kernel: Any) -> Any:
    return inspect.signature(kernel.fn).parameters.items()


def cases() -> list[Case]:
    """(name, kernel, dtype of the logits, constants), with the constants of real launches."""
    found = []
    # The arguments of the later stages, which log_prob has no use for.
    absent = dict.fromkeys(n for n, p in parameters(tk.rows_fwd_kernel) if p.default is None)
    for dtype, size in SIZES.items():
        s = tk.settings(128256, size, True, 1 << 20, 132)
        narrow = tk.settings(50257, size, False, 1 << 20, 132).lanes(False) | {"ALIGNED": False}
        rows = dict(
            SHIFT=True, stride_v=None, ALIGNED=True, SOFTCAP=False, ENTROPY=False, **s.lanes(True)
        )
        rows |= dict(RATIO=0, REDUCTION=0, SPLIT=1, BT=tk.BT)
        rows |= dict.fromkeys(("p_parts", "p_row_counter", "p_behavior_low", "p_normalizer"))
        split = {k: v for k, v in rows.items() if k not in ("p_parts", "p_row_counter")}
        backward = dict(SHIFT=True, stride_v=None, out_v=None, ALIGNED=True, SOFTCAP=False)
        backward |= dict(TILES=s.tiles_per_program, U=2, BV=s.BV)
        capped, loose = {"SOFTCAP": True}, {"ALIGNED": False}
        every = rows | FULL | {"RATIO": 2}
        found += [
            ("forward", tk.rows_fwd_kernel, dtype, rows),
            ("forward, narrow", tk.rows_fwd_kernel, dtype, rows | narrow),
            ("forward, all options", tk.rows_fwd_kernel, dtype, every),
            ("forward, all options, narrow", tk.rows_fwd_kernel, dtype, every | narrow),
            ("forward, split", tk.rows_fwd_kernel, dtype, split | {"SPLIT": tk.SPLIT}),
            ("log_prob", tk.rows_fwd_kernel, dtype, rows | absent),
            ("backward", tk.logits_bwd_kernel, dtype, backward),
            ("backward, narrow", tk.logits_bwd_kernel, dtype, backward | loose),
            ("backward, all options", tk.logits_bwd_kernel, dtype, backward | capped),
            (
                "backward, all options, narrow",
                tk.logits_bwd_kernel,
                dtype,
                backward | capped | loose,
            ),
        ]
    stage = dict(SHIFT=True, RATIO=2, REDUCTION=0, BT=tk.BT, p_behavior_low=None)
    found.append(("sequences", tk.sequences_fwd_kernel, "fp32", stage))
    loss = dict(REDUCTION=0, BT=tk.BT, p_normalizer=None)
    found.append(("loss", tk.loss_fwd_kernel, "fp32", loss))
    return found + linear_cases()


def linear_cases() -> list[Case]:
    """The same for the fused-linear path; the dtype is that of J."""
    plain = dict(ALIGNED=True, SOFTCAP=False)
    capped = dict(SOFTCAP=True)
    rows = dict(ENTROPY=False, TOTAL=False, **lin._row_constants(128256, True))
    gradient = dict(TILES=lin.GRADIENT_TILES, U=2, BV=lin.BV)
    columns = lin._column_constants(128256, 8)
    gather = dict(TILES=lin.GATHER_TILES, U=lin.GATHER_U, BA=lin.GATHER_BA)
    more = {
        "linear rows": dict(ENTROPY=True, TOTAL=True),
        "linear columns": lin._column_constants(128256, 9),
    }
    found = []
    for name, kernel, constants, dtypes in (
        ("linear rows", lin.linear_rows_kernel, rows, ("fp32",)),
        ("linear columns", lin.linear_columns_kernel, columns, ("fp32",)),
        ("linear gradient", lin.linear_gradient_kernel, gradient, tuple(SIZES)),
        ("linear gather", lin.linear_gather_kernel, gather, tuple(SIZES)),
    ):
        every = plain | constants | capped | more.get(name, {})
        narrow = {"ALIGNED": False}
        if name == "linear rows":
            narrow |= lin._row_constants(128256, False)
        for dtype in dtypes:
            found += [
                (name, kernel, dtype, plain | constants),
                (f"{name}, narrow", kernel, dtype, plain | constants | narrow),
                (f"{name}, all options", kernel, dtype, every),
                (f"{name}, all options, narrow", kernel, dtype, every | narrow),
            ]
    return found


def grouped(found: list[Case], key: Callable[[Case], str]) -> list[list[Case]]:
    """Cases of one key together, in the order of the first of each."""
    groups: dict[str, list[Case]] = {}
    for case in found:
        groups.setdefault(key(case), []).append(case)
    return list(groups.values())


def each(found: list[Case]) -> list[Case]:
    """Every kernel with every set of options once, the dtypes in turn."""
    dtypes = grouped(found, lambda case: case[0])
    return [same[i % len(same)] for i, same in enumerate(dtypes)]


def share(found: list[Case], turn: int, targets: int) -> list[Case]:
    """Of every kernel the variants whose turn it is, or the first where it has fewer than targets."""
    chosen = []
    for i, same in enumerate(grouped(found, lambda case: str(case[1].__name__))):
        # Each kernel begins with another target, so that no target has one kind of variant alone.
        chosen += same[(turn + i) % targets :: targets] or same[:1]
    return chosen


def argument_type(kernel: Any, name: str, dtype: str) -> str:
    if name in ("p_logits", "p_out"):
        return f"*{dtype}"
    if name == "p_label" and kernel is lin.linear_columns_kernel:
        return "*i32"
    if name in ("p_labels", "p_length", "p_label", "p_columns"):
        return "*i64"
    if name == "p_cu_seqlens" or "counter" in name:
        return "*i32"
    if name.startswith("p_"):
        return "*fp32"
    if name.startswith(("stride_", "out_")):
        return "i64"
    return "fp32" if name.startswith("log_") or name in FLOATS else "i32"


FLOATS = ("inv_softcap", "inv_temperature", "baseline", "factor", "slope_factor")


def compile_case(kernel: Any, dtype: str, constants: dict[str, Any], target: GPUTarget) -> Any:
    names = kernel.arg_names
    signature = {
        n: "constexpr" if n in constants else argument_type(kernel, n, dtype) for n in names
    }
    constexprs = {(names.index(k),): v for k, v in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    return triton.compile(source, target=target, options={"num_warps": 4} | NO_FUSION)


def resources(cubin: bytes) -> dict[str, int]:
    text = sass.run("cuobjdump", cubin, "-res-usage")
    keys = {"registers": "REG", "stack": "STACK", "local": "LOCAL", "shared": "SHARED"}
    return {k: int(re.findall(rf"{v}:(\d+)", text)[-1]) for k, v in keys.items()}


def exponentials(kernel: Any, constants: dict[str, Any]) -> float:
    """Exponentials that a kernel takes per logit, by which the logits of its loop are counted."""
    if kernel in (tk.rows_fwd_kernel, lin.linear_rows_kernel):
        # The maximum moves once for all logits of a lane.
        return 1 + 1 / (constants["U"] * constants["W"])
    return 1


def logits_of(loop: list[sass.Instruction], kernel: Any, constants: dict[str, Any]) -> float:
    """Logits of a thread in one round of its loop, which ptxas may have unrolled."""
    return sum(i.name == "MUFU.EX2" for i in loop) / exponentials(kernel, constants)


def text_report(ptx: str) -> dict[str, Any]:
    return {
        "f64": len(re.findall(r"\.f64", ptx)),
        # Without .rn, which rounds by itself: ptxas may fuse them.
        "fusible": len(re.findall(r"\b(?:add|sub|mul)\.f32", ptx)),
        "fma": len(re.findall(r"\bfma\.rn\.f32", ptx)),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.", ptx)),
        "acq_rel": len(re.findall(r"atom\.global\.gpu\.acq_rel", ptx)),
        "uncached_loads": len(re.findall(r"ld\.global\.cg", ptx)),
    }


def loop_report(code: list[sass.Instruction], case: Case) -> dict[str, Any]:
    _, kernel, _, constants = case
    if kernel in LATER_STAGES:
        return {}
    loop = sass.main_loop(code)
    per_logit = round(len(loop) / logits_of(loop, kernel, constants), 2)
    return {"per_logit": per_logit, "in_flight": sass.in_flight(loop)}


def reports(arch: str, wanted: list[Case], code: bool) -> Iterator[dict[str, Any]]:
    """What came of each case; with ``code`` what ptxas made of it, too."""
    compiled = [
        compile_case(k, dtype, constants, TARGETS[arch]).asm for _, k, dtype, constants in wanted
    ]
    codes = sass.instructions([asm["cubin"] for asm in compiled]) if code else []
    for i, (case, asm) in enumerate(zip(wanted, compiled, strict=True)):
        name, kernel, dtype, _ = case
        report = {"arch": arch, "kernel": name, "dtype": dtype, "function": kernel.__name__}
        if "ptx" in asm:
            report |= text_report(asm["ptx"])
        else:
            spills = re.findall(r"_spill_count:\s*(\d+)", asm["amdgcn"])
            report["spills"] = sum(map(int, spills))
        if code:
            report |= resources(asm["cubin"]) | loop_report(codes[i], case)
        yield report


def main() -> None:
    targets = [a for a in sys.argv[1:] if a not in ("each", "turns")]
    every = cases() if targets == sys.argv[1:] else each(cases())
    for n, arch in enumerate(targets):
        wanted = share(every, n, len(targets)) if "turns" in sys.argv else every
        for report in reports(arch, wanted, code=arch == "sm_90"):
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
