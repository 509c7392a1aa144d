"""Prefix trees: token sequences in rows of bounded length, in which equal beginnings stand once.

A row holds its sequences in depth-first order. Samples of two questions behind one system prompt::

    tokens     | system | question 1 | answer | answer | question 2 | answer | padding |
    depths       0 1 ..   n n + 1 ..   m ..     m ..     n n + 1 ..

The position id of a token is its depth. Token i sees its ancestors and itself: the columns j <= i whose
subtree has not ended, ``ends[j] > i``. All here is plain Python over lists; ``hf.sharing`` runs it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

#: Tokens of a row, unless one sequence is longer.
ROW_TOKENS = 2048
#: Length of a row at which its attention costs as much as all else: 6 hidden sizes, of small models.
_ATTENTION_EQUALS = 4096
#: Tokens that a row costs by itself, so that a few short sequences are not spread over several.
_ROW = 8
#: How many times fewer rows are tried than the narrowest, and how much wider than full ones.
_FEWER = (1, 1.1, 1.2, 1.35, 1.5, 1.75, 2, 2.5, 3, 4, 6, 8)
_WIDER = (1.0, 1.03, 1.06, 1.1)


class Tree(NamedTuple):
    """B token sequences in R rows of different length.

    Args:
        tokens: R rows of token ids.
        depths: the depth of each token, 0 at the root.
        ends: the column behind the last descendant of each token.
        row: [B], the row that each sequence lies in.
        columns: B lists, the column of each token of a sequence in its row.
    """

    tokens: list[list[int]]
    depths: list[list[int]]
    ends: list[list[int]]
    row: list[int]
    columns: list[list[int]]

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.tokens))


def plant(sequences: Sequence[Sequence[int]], row_tokens: int = ROW_TOKENS) -> Tree:
    """Lays sequences out as trees.

    Args:
        sequences: B token sequences, each of at least one token.
        row_tokens: most tokens of a row. A sequence that is longer makes rows as long as itself.

    Returns:
        Tree: rows of like length. Which sequences share one is chosen for the least cost of all rows,
        with padding, products and attention counted. It does not depend on the sequences' order.
    """
    lists = [list(sequence) for sequence in sequences]
    order = sorted(range(len(lists)), key=lists.__getitem__)
    runs, sizes = _runs([lists[i] for i in order], row_tokens)
    rows = [
        sorted(place for run in part for place in runs[run])
        for part in fill(sizes, max(row_tokens, *map(len, lists)))
    ]
    tree = Tree([], [], [], [0] * len(lists), [[]] * len(lists))
    for number, places in enumerate(rows):
        members = [order[place] for place in places]
        tokens, depths, ends, paths = _row([lists[i] for i in members])
        for i, path in zip(members, paths, strict=True):
            tree.row[i], tree.columns[i] = number, path
        tree.tokens.append(tokens)
        tree.depths.append(depths)
        tree.ends.append(ends)
    return tree


def fill(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Puts parts into rows of equal width, for the least cost of all rows.

    The width is at least that of the largest part, so that the rows never cost more than one row for
    each part, padded to the largest.

    Args:
        sizes: tokens of each part, at least one.
        most: width up to which rows are tried; that of the largest part is always.

    Returns:
        The parts of each row, by their index.
    """
    largest, total = max(sizes), sum(sizes)
    # The largest first; equal ones in the order given.
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    best = _first_fit(order, sizes, largest)
    fewer = dict.fromkeys(math.ceil(len(best) / share) for share in _FEWER)
    for count in fewer:
        for slack in _WIDER:
            width = math.ceil(total / count * slack)
            if largest < width <= most:
                rows = _first_fit(order, sizes, width)
                best = min(best, rows, key=lambda rows: _rows_cost(rows, sizes))
    return best


def common_length(a: list[int], b: list[int]) -> int:
    """Number of tokens that both lists begin with."""
    low, high = 0, min(len(a), len(b))
    # By halves, since Python compares slices fast.
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _cost(tokens: int) -> float:
    """Cost of a row, in tokens of a short one: attention computes all pairs."""
    return _ROW + tokens * (1 + tokens / _ATTENTION_EQUALS)


def _runs(ordered: list[list[int]], row_tokens: int) -> tuple[list[list[int]], list[int]]:
    """Runs of neighbours that are cheaper in one row than apart, and the tokens of each run."""
    most = max(row_tokens, *map(len, ordered))
    runs: list[list[int]] = [[0]]
    sizes = [len(ordered[0])]
    for i in range(1, len(ordered)):
        length = len(ordered[i])
        joined = sizes[-1] + length - common_length(ordered[i - 1], ordered[i])
        if joined <= most and _cost(joined) < _cost(sizes[-1]) + _cost(length):
            runs[-1].append(i)
            sizes[-1] = joined
        else:
            runs.append([i])
            sizes.append(length)
    return runs, sizes


def _first_fit(order: Sequence[int], sizes: Sequence[int], width: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for part in order:
        row = next((r for r, free in enumerate(room) if free >= sizes[part]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(part)
        room[row] -= sizes[part]
    return rows


def _rows_cost(rows: list[list[int]], sizes: Sequence[int]) -> float:
    return len(rows) * _cost(max(sum(sizes[part] for part in row) for row in rows))


def _row(
    ordered: list[list[int]],
) -> tuple[list[int], list[int], list[int], list[list[int]]]:
    """Tokens, depths and ends of one row, and the columns of each of its sequences."""
    tokens: list[int] = []
    depths: list[int] = []
    ends: list[int] = []
    path: list[int] = []
    paths: list[list[int]] = []
    before: list[int] = []
    for sequence in ordered:
        shared = common_length(before, sequence)
        for column in path[shared:]:
            ends[column] = len(tokens)
        path = path[:shared] + list(range(len(tokens), len(tokens) + len(sequence) - shared))
        tokens += sequence[shared:]
        depths += range(shared, len(sequence))
        ends += [0] * (len(sequence) - shared)
        paths.append(path)
        before = sequence
    for column in path:
        ends[column] = len(tokens)
    return tokens, depths, ends, paths
