"""The table of ``mutants.py`` still fits the code; ``make mutants`` runs it."""

from __future__ import annotations

from mutants import MUTANTS, ROOT, Mutant


def is_in_place(mutant: Mutant) -> bool:
    """Whether the fault can be made, and the tests that should notice it are there."""
    found = [test.partition("::") for test in mutant.tests]
    return (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1 and all(
        f"def {name}" in (ROOT / file).read_text(encoding="utf-8") for file, _, name in found
    )


def test_every_fault_can_still_be_made():
    assert [mutant.name for mutant in MUTANTS if not is_in_place(mutant)] == []
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
