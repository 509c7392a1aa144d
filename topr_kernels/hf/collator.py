"""From prompt + completion records to a batch, padded or packed.

A batch is right-aligned: every row ends with its completion, so all logits that are scored lie in
the last ``K + 1`` columns (K: the longest completion) and the prompts' logits are never computed::

    [ padding | prompt | completion ]
                      ^ last K + 1 columns

With ``share_prefix=True`` the tokens that all prompts of the batch begin with (a few-shot prompt,
a system message) come first and are run through the model once instead of once per row::

    [ common prefix | padding | rest of the prompt | completion ]

Attention never sees the padding and the position ids do not count it: a model of attention alone that
takes its positions from ``position_ids`` gives every token the log-probability it has alone. For
others (states, positions counted otherwise, virtual tokens of an adapter) the padding is moved behind
the tokens before the forward pass, see ``topr_kernels.hf.padding``.

With ``packing=True`` there is no padding: the sequences lie in one row, one after another, and the
attention keeps them apart (``topr_kernels.hf.packing``)::

    [ prompt | completion | prompt | completion | ... ]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topr_kernels.hf.fields import (
    TOKENS,
    behavior_of,
    check_meaning,
    plain,
    reward_of,
    token_ids,
    was_cut,
)
from topr_kernels.hf.packing import pack
from topr_kernels.hf.prefix import common_prefix_length
from topr_kernels.layout import IGNORE_INDEX


@dataclass
class CompletionCollator:
    """Makes a batch of prompt + completion records for ``TOPRTrainer``.

    Each record is a mapping with ``prompt_token_ids`` (P int, P >= 1), ``completion_token_ids``
    (C int, may be empty: such a sequence is not counted), ``behavior_log_prob`` (C float, the
    log-probability of each completion token under the policy that sampled it) and ``reward``
    (float, signed). Token ids are used as they are: tokenising a text again may give other ids.
    ``prepare_records`` makes such records from text and messages. Optional are ``group`` (int or str:
    the question, of which there are several samples) and ``finish_reason`` ("length": cut off) or
    ``truncated``. Numbers may be Python's, NumPy's or torch's; ids also floats that are whole. To weigh
    a record, multiply its reward by the weight: with ``baseline=0`` its loss grows with it.

    The batch holds, for B records and T columns:

    - ``input_ids`` [B, T] int64, ``attention_mask`` [B, T] int64, ``position_ids`` [B, T] int64;
    - ``labels`` [B, T] int64, unshifted, -100 on prompt and padding. They come from the lengths of
      the records, never from comparing ids with the pad id: where pad and EOS are the same token
      the completion's EOS stays scored;
    - ``behavior_log_prob`` [B, T] fp32, aligned with the labels, 0 where unscored;
    - ``reward`` [B] fp32;
    - ``group``, if the records have it: [B] int64, or a list of B str;
    - ``logits_to_keep`` int, K + 1; ``prefix_length`` int, columns of the common prefix.

    With ``packing`` it holds, for N tokens in all, ``input_ids``, ``position_ids``, ``labels`` and
    ``behavior_log_prob`` as [1, N], position ids restarting at 0; ``reward`` [B] and ``group``; and for
    attention and loss ``cu_seq_lens_q``, ``cu_seq_lens_k`` [B + 1] int32 and ``max_length_q``,
    ``max_length_k`` int. It holds no ``attention_mask``: with one, transformers would ignore the
    packing.

    Args:
        pad_token_id: id that fills the padding; any id of the vocabulary will do.
        share_prefix: put the common prefix of the prompts into the first columns, so that it is
            computed once per batch. Exact for models whose attention reaches all earlier tokens.
        packing: lay the sequences out in one row without padding, for models that keep them apart
            (see ``check_packing``).
        mask_truncated: do not score completions that were cut off: their ``finish_reason`` is
            "length" or, if no record of the batch has one, they do not end with ``eos_token_id``.
            Such a sequence is not counted, as if it were empty.
        eos_token_id: id, or ids, that end a completion; for ``mask_truncated``.

    Raises:
        ValueError: if both ``packing`` and ``share_prefix`` are set. On a call: if a record lacks a
            field or has an empty prompt; if its ``behavior_log_prob`` is not as long as its
            completion, or holds anything but finite numbers <= 0; if a token id is negative or a reward
            not finite; if a field means something that would be ignored (see ``prepare_records``); if
            only some records have a ``group`` or ``finish_reason``; if it is unknown which completions
            were cut off. Messages name the record and the position.
        TypeError: on a call, if a field holds something else than numbers; if a ``group`` is neither int
            nor str, or if both kinds occur.
    """

    pad_token_id: int
    share_prefix: bool = False
    packing: bool = False
    mask_truncated: bool = False
    eos_token_id: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.packing and self.share_prefix:
            raise ValueError(
                "packing=True and share_prefix=True: expected one of them; a packed batch has no "
                "columns that its sequences share. Use share_prefix=False, or packing=False if the "
                "prompts begin with a long common text"
            )

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Lays B records out as one batch; see the class for its fields."""
        read = [_read(record, f"record {i} of the batch") for i, record in enumerate(features)]
        prompts = [record.prompt for record in read]
        completions = [record.completion for record in read]
        sequences = [p + c for p, c in zip(prompts, completions, strict=True)]
        scored = [not cut for cut in self._truncated(features, completions)]
        labels = [
            [IGNORE_INDEX] * len(p) + (c if keep else [IGNORE_INDEX] * len(c))
            for p, c, keep in zip(prompts, completions, scored, strict=True)
        ]
        behavior = [
            [0.0] * len(r.prompt) + (r.behavior if keep else [0.0] * len(r.completion))
            for r, keep in zip(read, scored, strict=True)
        ]
        batch: dict[str, Any]
        if self.packing:
            batch = pack(sequences)
            batch["labels"] = torch.tensor([[x for row in labels for x in row]], dtype=torch.int64)
            flat = [x for row in behavior for x in row]
            batch["behavior_log_prob"] = torch.tensor(flat, dtype=torch.float32)[None]
        else:
            prefix = common_prefix_length(prompts) if self.share_prefix else 0
            batch = dict(pad_left(sequences, self.pad_token_id, prefix))
            width = batch["input_ids"].shape[1]
            batch["labels"] = _right_align(labels, width, IGNORE_INDEX, torch.int64)
            batch["behavior_log_prob"] = _right_align(behavior, width, 0.0, torch.float32)
            kept = [len(c) for c, keep in zip(completions, scored, strict=True) if keep]
            batch["logits_to_keep"] = max(kept, default=0) + 1
            batch["prefix_length"] = prefix
        batch["reward"] = torch.tensor([r.reward for r in read], dtype=torch.float32)
        groups = _optional(features, "group")
        if groups is not None:
            batch["group"] = _groups(groups)
        return batch

    def _truncated(
        self, features: Sequence[Mapping[str, Any]], completions: Sequence[Sequence[int]]
    ) -> list[bool]:
        told = [
            {"finish_reason": was_cut(record, f"record {i} of the batch")}
            for i, record in enumerate(features)
        ]
        if not self.mask_truncated:
            return [False] * len(features)
        cut: list[bool] | None = _optional(told, "finish_reason")
        if cut is not None:
            return cut
        if self.eos_token_id is None:
            raise ValueError(
                "mask_truncated=True, but the records have no finish_reason and eos_token_id is None, "
                "so it is not known which completions were cut off; give the records a finish_reason "
                '("length" for those), or CompletionCollator the eos_token_id that ends a completion'
            )
        ids = self.eos_token_id
        ends = set(ids) if isinstance(ids, Sequence) else {ids}
        return [not tokens or tokens[-1] not in ends for tokens in completions]


def pad_left(
    rows: Sequence[Sequence[int]], pad_token_id: int, prefix: int = 0
) -> dict[str, Tensor]:
    """Right-aligns token rows, with padding after their first ``prefix`` common tokens.

    Args:
        rows: B rows of token ids, each longer than ``prefix``.
        pad_token_id: id that fills the padding.
        prefix: number of leading tokens that all rows share.

    Returns:
        ``input_ids``, ``attention_mask`` and ``position_ids``, each [B, T] int64 with T the longest
        row. Position ids count real tokens only, so padding does not move a token.
    """
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens = torch.tensor(row, dtype=torch.int64)
        start = width - (len(row) - prefix)
        input_ids[i, :prefix], input_ids[i, start:] = tokens[:prefix], tokens[prefix:]
        attention_mask[i, :prefix], attention_mask[i, start:] = 1, 1
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
    }


def _right_align(
    rows: Sequence[Sequence[float]], width: int, fill: float, dtype: torch.dtype
) -> Tensor:
    result = torch.full((len(rows), width), fill, dtype=dtype)
    for i, row in enumerate(rows):
        result[i, -len(row) :] = torch.tensor(row, dtype=dtype)
    return result


class _Read(NamedTuple):
    """The fields of a record as Python's numbers."""

    prompt: list[int]
    completion: list[int]
    behavior: list[float]
    reward: float


def check_token_ids(
    record: Mapping[str, Any], where: str, more: Sequence[str], remedy: str
) -> tuple[list[int], list[int]]:
    """Checks that a record has token ids, and a prompt of at least one, and nothing that is ignored.

    Args:
        record: the record.
        where: what the messages call it.
        more: further fields that it must have.
        remedy: what to do about a missing field.

    Returns:
        The ids of prompt and completion.

    Raises:
        ValueError: if a field is missing or the prompt is empty, an id is negative, or as
            ``check_meaning``.
        TypeError: if the ids are none.
    """
    for name in (*TOKENS, *more):
        if record.get(name) is None:
            raise ValueError(f"{where} has no {name!r}; it has {sorted(record)}. {remedy}")
    prompt, completion = (token_ids(record, name, where) for name in TOKENS)
    if not prompt:
        raise ValueError(
            f"{where}: prompt_token_ids is empty, so nothing predicts the first token of the "
            "completion; give the prompt at least a BOS token"
        )
    check_meaning(record, prompt, completion, where)
    return prompt, completion


def _read(record: Mapping[str, Any], where: str) -> _Read:
    remedy = "Score the records first, and keep remove_unused_columns=False"
    prompt, completion = check_token_ids(record, where, ("behavior_log_prob", "reward"), remedy)
    behavior = behavior_of(record, len(completion), where)
    return _Read(prompt, completion, behavior or [], reward_of(record, where))


def _optional(features: Sequence[Mapping[str, Any]], name: str) -> list[Any] | None:
    """The values of a field that all records have; None if none has it."""
    values = [plain(record.get(name)) for record in features]
    absent = [i for i, value in enumerate(values) if value is None]
    if len(absent) == len(values):
        return None
    if absent:
        raise ValueError(
            f"record {absent[0]} of the batch has no {name!r}, but others have; give it to all "
            "records or to none"
        )
    return values


def _groups(values: list[Any]) -> Tensor | list[str]:
    if all(isinstance(x, str) for x in values):
        return values
    for i, x in enumerate(values):
        if not isinstance(x, Integral) or isinstance(x, bool):
            raise TypeError(
                f"record {i} of the batch: group is {x!r} of type {type(x).__name__}; expected an int "
                "in all records, or a str in all"
            )
    return torch.tensor([int(x) for x in values], dtype=torch.int64)
