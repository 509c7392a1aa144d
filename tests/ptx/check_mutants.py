"""The PTX of the package's kernels, broken on purpose: the executor notices every time.

A mutant edits one place of the text; what it does to a batch is a fault, or other results.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from ptx import launch
from ptx.execute import Options
from ptx.memory import Fault
from topr_kernels import topr_loss
from topr_kernels.kernels import triton_logits
from topr_kernels.testing import make_batch, pack

FORWARD, BACKWARD = "rows_fwd_kernel", "logits_bwd_kernel"
LENGTHS = [(2, 4), (1, 2), (3, 0), (2, 6)]
#: Fewer columns than threads, so that the mask of every thread matters.
VOCAB = 97
SEEDS = range(int(os.environ.get("PTX_SEEDS", "6")))


@pytest.fixture(autouse=True)
def one_word_per_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    # What a sequence of this size does not reach cannot be caught: no second word per thread.
    monkeypatch.setattr(triton_logits, "BT", 128)


def step(mutate: launch.Mutation | None = None, seed: int = 0, late: bool = False) -> list[Tensor]:
    """Every result of a forward and a backward; token level and entropy, so that all stages run."""
    packed = pack(make_batch(LENGTHS, VOCAB, dtype=torch.float32), LENGTHS)
    logits = packed.logits.detach().requires_grad_()
    with launch.device(Options(seed=seed, late=late, poison=not late, steps=20_000), mutate):
        out = topr_loss(
            logits,
            *packed[1:4],
            cu_seqlens=packed.cu_seqlens,
            impl="triton",
            ratio="token",
            entropy=True,
        )
        out.loss.backward()
    assert logits.grad is not None
    return [*(x.detach() for x in out), logits.grad]


@functools.cache
def text(kernel: str) -> str:
    """The PTX of a kernel as ``step`` launches it."""
    found: list[str] = []

    def look(ptx: str) -> str:
        if f".entry {kernel}(" in ptx:
            found.append(ptx)
        return ptx

    step(look)
    return found[0]


@functools.cache
def right() -> list[Tensor]:
    return step()


def outcome(mutate: launch.Mutation, seed: int = 0, late: bool = False) -> str:
    """The kind of fault, "other results" or "nothing"."""
    try:
        got = step(mutate, seed, late)
    except Fault as fault:
        return fault.kind
    same = all(
        torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(got, right(), strict=True)
    )
    return "nothing" if same else "other results"


Span = tuple[int, int]


def spans(kernel: str, pattern: str) -> Iterator[Span]:
    for match in re.finditer(pattern, text(kernel), re.MULTILINE):
        yield match.span()


def edit(kernel: str, span: Span, change: Callable[[str], str]) -> launch.Mutation:
    """Changes one place of one kernel's PTX."""
    original = text(kernel)
    start, end = span
    mutant = original[:start] + change(original[start:end]) + original[end:]
    assert mutant != original
    return lambda ptx: mutant if ptx == original else ptx


def replaced(pattern: str, by: str) -> Callable[[str], str]:
    return lambda found: re.sub(pattern, by, found)


def test_unchanged_it_is_right_for_every_seed() -> None:
    for seed in SEEDS:
        assert outcome(lambda ptx: ptx, seed, late=seed % 2 == 1) == "nothing"


MEMORY = r"bar\.sync\s+0;|(?:ld|st)\.shared|ldmatrix|stmatrix|atom\."


def barriers(kernel: str) -> Iterator[tuple[Span, str, str]]:
    """Runs of barriers, with what of shared memory and atomics stands before and behind in the text."""
    marks = [(m.span(), m[0]) for m in re.finditer(MEMORY, text(kernel))]
    i = 0
    while i < len(marks):
        j = i
        while j < len(marks) and marks[j][1].startswith("bar"):
            j += 1
        if j > i:
            before = marks[i - 1][1] if i else ""
            yield (
                (marks[i][0][0], marks[j - 1][0][1]),
                before,
                marks[j][1] if j < len(marks) else "",
            )
        i = max(j, i + 1)


def test_a_barrier_taken_out() -> None:
    results: dict[str, list[str]] = {}
    for span, before, behind in barriers(FORWARD):
        kind = "other"
        if behind == "atom.":
            kind = "before an atomic"
        elif before.startswith("st") and behind.startswith("ld"):
            kind = "between a store and a load"
        got = outcome(edit(FORWARD, span, replaced(r"bar\.sync\s+0;", "")))
        results.setdefault(kind, []).append(got)
    assert set(results["before an atomic"]) == {"race"} and len(results["before an atomic"]) == 2
    assert set(results["between a store and a load"]) == {"race"}
    assert len(results["between a store and a load"]) >= 5
    # Some of those that keep a load ahead of the next store stand between others that do so too.
    assert set(results["other"]) <= {"race", "nothing"}


@pytest.mark.parametrize("seed", SEEDS[:3])
@pytest.mark.parametrize(
    "change",
    [("acq_rel", "relaxed"), ("acq_rel", "acquire"), ("acq_rel", "release"), ("gpu", "cta")],
)
def test_a_weaker_atomic(change: tuple[str, str], seed: int) -> None:
    places = list(spans(FORWARD, r"atom\.global\.gpu\.acq_rel"))
    assert len(places) == 2
    for span in places:
        assert outcome(edit(FORWARD, span, replaced(*change)), seed) == "race"


def test_what_a_weaker_atomic_does_to_the_results() -> None:
    for span in spans(FORWARD, r"atom\.global\.gpu\.acq_rel"):
        mutant = edit(FORWARD, span, replaced("acq_rel", "relaxed"))
        assert outcome(mutant, late=True) == "other results"


def test_a_cached_load_of_what_others_wrote() -> None:
    places = list(spans(FORWARD, r"ld\.global\.cg"))
    assert len(places) >= 4
    for span in places:
        cached = edit(FORWARD, span, replaced(r"\.cg", ".ca"))
        assert outcome(cached) == "stale"
        assert outcome(cached, late=True) == "other results"


@pytest.mark.parametrize("kernel", [FORWARD, BACKWARD])
@pytest.mark.parametrize("to", ["@!", ""])
def test_a_predicate_of_a_store_inverted_or_dropped(kernel: str, to: str) -> None:
    places = list(spans(kernel, r"@%p\d+ st\.global"))
    assert len(places) >= 8
    missed = [
        span
        for span in places
        if outcome(edit(kernel, span, replaced(r"@(%p\d+ )", rf"{to}\1" if to else "")))
        == "nothing"
    ]
    assert not missed, [text(kernel).count("\n", 0, start) + 1 for start, _ in missed]


@pytest.mark.parametrize("kernel", [FORWARD, BACKWARD])
def test_a_mask_off_by_one(kernel: str) -> None:
    results = (
        outcome(edit(kernel, span, replaced(r"\.(.)t\.", r".\1e.")))
        for span in spans(kernel, r"setp\.[lg]t\.[su](32|64)")
    )
    # Most threads' masks do not meet the end of the row; the one that does is seen.
    seen = itertools.islice((r for r in results if r != "nothing"), 2)
    assert len(list(seen)) == 2


def test_an_address_too_wide_or_too_narrow() -> None:
    for kernel in (FORWARD, BACKWARD):
        span = next(spans(kernel, r"^\s*ld\.global\.b64 \{ %rd\d+ \}, \[ %rd\d+ \+ 0 \]"))
        for by in ("4", "1048576"):
            got = outcome(edit(kernel, span, replaced(r"\+ 0", f"+ {by}")))
            assert got == ("alignment" if by == "4" else "bounds")
