"""Prefix trees: what stands in a row, who sees whom, and how full the rows are."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topr_kernels.hf.tree import _cost, common_length, fill, plant
from topr_kernels.hf.tree_sampler import SiblingSampler, siblings

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=8)


@given(st.lists(TOKENS, min_size=1, max_size=9), st.integers(1, 40))
def test_every_token_sees_its_own_sequence_in_order_and_nothing_else(
    sequences: list[list[int]], row_tokens: int
):
    tree = plant(sequences, row_tokens)
    longest = max(map(len, sequences))
    assert all(len(row) <= max(row_tokens, longest) for row in tree.tokens)
    for sequence, row, columns in zip(sequences, tree.row, tree.columns, strict=True):
        assert [tree.tokens[row][j] for j in columns] == sequence
        assert [tree.depths[row][j] for j in columns] == list(range(len(sequence)))
        for depth, i in enumerate(columns):
            seen = [j for j in range(i + 1) if tree.ends[row][j] > i]
            assert seen == columns[: depth + 1]


@given(st.lists(TOKENS, min_size=1, max_size=9), st.integers(1, 40))
def test_a_prefix_stands_once_in_a_row_and_no_token_is_idle(
    sequences: list[list[int]], row_tokens: int
):
    tree = plant(sequences, row_tokens)
    for number, tokens in enumerate(tree.tokens):
        here = [s for s, row in zip(sequences, tree.row, strict=True) if row == number]
        prefixes = {tuple(s[: n + 1]) for s in here for n in range(len(s))}
        assert len(tokens) == len(prefixes)


@given(st.lists(TOKENS, min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_the_order_of_the_records_moves_no_token(
    sequences: list[list[int]], shuffler: random.Random
):
    order = list(range(len(sequences)))
    shuffler.shuffle(order)
    one, other = plant(sequences), plant([sequences[i] for i in order])
    assert one.tokens == other.tokens
    assert [one.columns[i] for i in order] == other.columns
    assert [one.row[i] for i in order] == other.row


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 200))
def test_filling_rows_keeps_every_part_and_never_costs_more_than_padding(
    sizes: list[int], most: int
):
    rows = fill(sizes, most)
    assert sorted(part for row in rows for part in row) == list(range(len(sizes)))
    width = max(sum(sizes[part] for part in row) for row in rows)
    assert width <= max(most, *sizes)
    assert len(rows) * _cost(width) <= len(sizes) * _cost(max(sizes))


@given(TOKENS, TOKENS)
def test_the_common_length_is_that_of_the_first_difference(a: list[int], b: list[int]):
    n = common_length(a, b)
    assert a[:n] == b[:n]
    assert n in (len(a), len(b)) or a[n] != b[n]


@pytest.mark.parametrize("seed", range(3))
def test_padding_stays_under_a_tenth_on_mixed_lengths(seed: int):
    """32 sequences of 20 to 500 tokens, alone and as eight questions with four answers each."""
    generator = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [generator.randrange(1000) for _ in range(n)]

    alone = [tokens(generator.randint(20, 500)) for _ in range(32)]
    prompts = [tokens(generator.randint(50, 300)) for _ in range(8)]
    groups = [prompts[i // 4] + tokens(generator.randint(10, 200)) for i in range(32)]
    for sequences in (alone, groups):
        tree = plant(sequences)
        cells = len(tree.tokens) * tree.width
        assert sum(map(len, tree.tokens)) > 0.9 * cells


def test_sixteen_answers_stand_behind_their_question_once():
    """2 questions of 256 tokens, 16 answers of 16: 8704 tokens become 1024, in two rows."""
    generator = random.Random(0)
    prompts = [[generator.randrange(100) for _ in range(256)] for _ in range(2)]
    answers = [[1000 + i, *(generator.randrange(100) for _ in range(15))] for i in range(32)]
    tree = plant([prompts[i % 2] + answer for i, answer in enumerate(answers)])
    assert [len(row) for row in tree.tokens] == [512, 512]
    # Behind one long text all questions share a row.
    shared = plant([[7] * 1000 + prompts[i % 2][:20] + a for i, a in enumerate(answers)])
    assert [len(row) for row in shared.tokens] == [1000 + 2 * 20 + 32 * 16]
    # A row that would be too long is parted, and its question repeated.
    assert len(plant([prompts[0] + a for a in answers], 512).tokens) == 2


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 3))
def test_an_epoch_is_a_permutation_that_keeps_groups_together(prompts: list[int], seed: int):
    dataset = [{"prompt_token_ids": [prompt]} for prompt in prompts]
    assert siblings([{"text": prompt} for prompt in prompts]) is None
    groups = siblings(dataset)
    if groups is None:
        assert len(set(prompts)) == len(prompts)
        return
    epoch = [0]
    sampler = SiblingSampler(groups, seed, lambda: epoch[0])
    orders = []
    for epoch[0] in range(3):
        order = list(sampler)
        orders.append(order)
        assert order == list(sampler)
        assert sorted(order) == list(range(len(prompts))) and len(sampler) == len(prompts)
        changes = sum(prompts[a] != prompts[b] for a, b in pairwise(order))
        assert changes == len(groups) - 1
    if len(prompts) > 8:
        assert orders[0] != orders[1] or orders[1] != orders[2]
