"""Sums worked digit by digit, as tokens: the tasks of the small world.

A question of n columns is two numbers of n digits, lowest digit first, each column under its letter:
``a58b47=`` asks for 45 + 78 (8 and 7 are the lowest digits of neither: column a adds 5 and 8). An answer
has six tokens a column, its letter, the two digits, the carry that comes in and their sum in two digits,
and ends with a newline: ``a58013b47112``. A longer answer works the sum in several passes, under letters
that run on: ``a58013b47112c58013d47112``. What counts is the result of the last pass: the low digit of
every column and the last carry.
"""

from __future__ import annotations

import string

import torch
from torch import Tensor

#: One token a character; the space pads.
ALPHABET = string.digits + string.ascii_lowercase + string.ascii_uppercase[:7] + "=\n "
LETTER, EQUALS, END, PAD = 10, 43, 44, 45
#: Numbers are written in base four: 32 sums of two digits and a carry to learn in place of 200.
BASE = 4
#: Tokens of a column in an answer.
STEP = 6


def draw(count: int, columns: int, generator: torch.Generator) -> Tensor:
    """Questions [count, columns, 2] in which a carry decides the result.

    A solution that forgets every carry is wrong on each of them, so the share of right answers is
    that of honest solutions.
    """
    kept: list[Tensor] = []
    found = 0
    while found < count:
        digits = torch.randint(BASE, (2 * count, columns, 2), generator=generator)
        # A carry out of the last column is written, not carried.
        carries = (digits[:, :-1].sum(2) >= BASE).any(1)
        kept.append(digits[carries])
        found += int(carries.sum())
    return torch.cat(kept)[:count]


def prompts(questions: Tensor) -> Tensor:
    """Token ids [Q, 3 columns + 1] of questions [Q, columns, 2]."""
    count, columns, _ = questions.shape
    letters = torch.arange(LETTER, LETTER + columns).expand(count, columns)
    body = torch.cat([letters[..., None], questions], 2).flatten(1)
    return torch.cat([body, torch.full((count, 1), EQUALS)], 1)


def solutions(questions: Tensor, forget: Tensor, passes: int = 1) -> Tensor:
    """Token ids [Q, 6 columns passes + 1] of worked answers; ``forget`` [Q] bool: without carrying."""
    count, columns, _ = questions.shape
    steps = []
    for i in range(columns * passes):
        if i % columns == 0:
            carry = torch.zeros(count, dtype=torch.long)
        digits = questions[:, i % columns]
        total = digits.sum(1) + carry
        letter = torch.full((count,), LETTER + i)
        steps += [letter, *digits.unbind(1), carry, total // BASE, total % BASE]
        carry = torch.where(forget, 0, total // BASE)
    return torch.stack([*steps, torch.full((count,), END)], 1)


def results(answers: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """What answers [B, T] say: digits [B, columns + 1], and whether each can be read [B] bool.

    T is 6 columns + 1, or that of several passes. Readable: every letter in its place, digits where the
    result stands, and the end where it belongs.
    """
    steps = answers[:, :-1].unflatten(1, (-1, STEP))
    said = torch.cat([steps[:, -columns:, 5], steps[:, -1:, 4]], 1)
    letters = torch.arange(LETTER, LETTER + steps.shape[1])
    readable = (steps[..., 0] == letters).all(1) & (said < BASE).all(1) & (answers[:, -1] == END)
    return said, readable


def truth(questions: Tensor) -> Tensor:
    """Digits [Q, columns + 1] of the right results."""
    honest = torch.zeros(len(questions), dtype=torch.bool)
    return results(solutions(questions, honest), questions.shape[1])[0]
