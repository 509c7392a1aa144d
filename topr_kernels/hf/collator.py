"""From prompt + completion records to a batch, padded or packed.

A batch is right-aligned: every row ends with its completion, so all logits that are scored lie in
the last ``K + 1`` columns (K: the longest completion) and the prompts' logits are never computed::

    [ padding | prompt | completion ]
                      ^ last K + 1 columns

Attention never sees the padding and the position ids do not count it: a model of attention alone that
takes its positions from ``position_ids`` gives every token the log-probability it has alone. For
others (states, positions counted otherwise, virtual tokens of an adapter) the padding is moved behind
the tokens before the forward pass, see ``topr_kernels.hf.padding``.

With ``packing=True`` there is no padding: the sequences lie in one row, one after another, and the
attention keeps them apart (``topr_kernels.hf.packing``)::

    [ prompt | completion | prompt | completion | ... ]

With ``share_prefix=True`` a prompt is run once for all its completions, and so is what several prompts
begin with, as a few-shot prompt or a system message (``topr_kernels.hf.sharing``)::

    [ common prefix | prompt | completion | completion | prompt | completion | ... | padding ]
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topr_kernels.hf.fields import (
    SEGMENTS,
    TOKENS,
    WEIGHT,
    behavior_of,
    check_meaning,
    mask_of,
    plain,
    reads_behavior,
    reward_of,
    segments_of,
    sign_of,
    token_ids,
    was_cut,
    weight_of,
)
from topr_kernels.hf.images import (
    COUNTS,
    image_inputs,
    images_of,
    right_aligned_kinds,
)
from topr_kernels.hf.packing import pack
from topr_kernels.hf.sampled import check_sampling
from topr_kernels.hf.sharing import BESIDE_IMAGES, tree_batch, warn_unshared
from topr_kernels.hf.signature import POSITIONS
from topr_kernels.layout import IGNORE_INDEX


@dataclass
class CompletionCollator:
    """Makes a batch of prompt + completion records for ``TOPRTrainer``.

    Each record is a mapping with ``prompt_token_ids`` (P int, P >= 1), ``completion_token_ids``
    (C int, may be empty: such a sequence is not counted), ``behavior_log_prob`` (C float, the
    log-probability of each completion token under the policy that sampled it) and ``reward``
    (float, signed). Token ids are used as they are: tokenising a text again may give other ids.
    ``prepare_records`` makes such records from text and messages. Optional are ``completion_mask`` (C 0
    or 1, 1 = written by the policy: results of tools and turns of others are not scored, and log mu
    under 0 is not read), ``sample_weight`` (float >= 0, 1 where it is missing: multiplies the record's
    loss), ``segments`` (C int, for the ratios per segment: tokens of equal ones in a row are a segment;
    without them a run of written tokens is one), ``group`` (int or str: the question, of which there
    are several samples) and ``finish_reason`` ("length": cut off) or ``truncated``. Numbers may be
    Python's, NumPy's or torch's; ids also floats that are whole.

    The batch holds, for B records and T columns:

    - ``input_ids`` [B, T] int64, ``attention_mask`` [B, T] int64, ``position_ids`` [B, T] int64;
    - ``labels`` [B, T] int64, unshifted, -100 on prompt, padding and what the policy did not
      write. They come from lengths and masks of the records, never from comparing ids with the pad id:
      where pad and EOS are the same token the completion's EOS stays scored;
    - ``behavior_log_prob`` [B, T] fp32, aligned with the labels, 0 where unscored;
    - ``reward`` [B] fp32;
    - ``segments`` [B, T] int64, aligned with the labels, if a record has some;
    - ``sequence_weight`` [B] fp32, if a record has a ``sample_weight``;
    - ``behavior_known`` [B] bool, if a record has no ``behavior_log_prob``;
    - ``group``, if the records have it: [B] int64, or a list of B str;
    - ``logits_to_keep`` int, K + 1.

    With ``packing`` it holds, for N tokens in all, ``input_ids``, ``position_ids``, ``labels``,
    ``behavior_log_prob`` and ``segments`` as [1, N], position ids restarting at 0; the entries per
    sequence as above; and for attention and loss ``cu_seq_lens_q``, ``cu_seq_lens_k`` [B + 1] int32 and
    ``max_length_q``, ``max_length_k`` int. It holds no ``attention_mask``: with one, transformers would
    ignore the packing.

    With ``share_prefix`` it is a batch of trees, see ``topr_kernels.hf.sharing``, which also holds the
    batch that it would be without, as ``unshared``. Where less than a tenth of the tokens would be
    saved, or a record has images, it is that batch.

    If a record has ``images`` (a list: paths, bytes, PIL images; see ``prepare_records``) the batch
    also holds what ``processor`` makes of them all, in the records' order (``pixel_values``,
    ``image_grid_thw``, ``image_sizes``, ...), the kinds of tokens [B, T] int64 if the processor has
    them, and ``image_counts`` [B] int64. It then has no ``position_ids``: the model counts its own, or
    they are counted from the mask. Images are read and processed here, in a loader's workers if it has
    some.

    Args:
        pad_token_id: id that fills the padding; any id of the vocabulary will do.
        share_prefix: run what sequences of the batch begin with in common once, for models that keep the
            branches of a tree apart (see ``prove_sharing``).
        packing: lay the sequences out in one row without padding, for models that keep them apart
            (see ``check_packing``).
        mask_truncated: do not score completions that were cut off: their ``finish_reason`` is
            "length" or, if no record of the batch has one, the last token that the policy wrote is not
            ``eos_token_id``. Such a sequence is not counted, as if it were empty.
        eos_token_id: id, or ids, that end a completion; for ``mask_truncated``.
        limits: of the loss, with its ``baseline``: where those of a record's sign are equal (positives
            in TOPR, all in SFT), its weight does not depend on mu and ``behavior_log_prob`` may be
            missing. None, or a custom taper: every record must have it.
        baseline: of the loss.
        temperature: of the loss. Records with log mu that say they were sampled at another, or with
            top-p and the like, are refused.
        processor: the model's processor (``AutoProcessor``), for records with images.

    Raises:
        ValueError: if ``processor`` has no token for images, or its tokenizer no pad token.
        ValueError: on a call, if a record lacks a field or has an empty prompt; if its
            ``behavior_log_prob`` is not as long as its completion, or holds anything but finite numbers
            <= 0; if a token id is negative or a reward not finite; if a field means something that would
            be ignored (see ``prepare_records``); if only some records have a ``group`` or
            ``finish_reason``; if it is unknown which completions were cut off; if a record has images
            without ``processor`` or with ``packing``, one cannot be read, or they are not those that its
            token ids were made with. Messages name the record and the position.
        TypeError: on a call, if a field holds something else than numbers; if a ``group`` is neither int
            nor str, or if both kinds occur.
    """

    pad_token_id: int
    share_prefix: bool = False
    packing: bool = False
    mask_truncated: bool = False
    eos_token_id: int | Sequence[int] | None = None
    limits: Any = None
    baseline: float = 0.0
    temperature: float = 1.0
    processor: Any = None

    def __post_init__(self) -> None:
        self._vision = None if self.processor is None else image_inputs(self.processor)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Lays B records out as one batch; see the class for its fields."""
        read = [
            _read(record, f"record {i} of the batch", self) for i, record in enumerate(features)
        ]
        prompts = [record.prompt for record in read]
        sequences = [record.prompt + record.completion for record in read]
        with_images = self._with_images(read, sequences)
        scored = [
            [0] * len(r.mask) if cut else r.mask
            for r, cut in zip(read, self._truncated(features, read), strict=True)
        ]
        labels = [
            [IGNORE_INDEX] * len(r.prompt)
            + [x if keep else IGNORE_INDEX for x, keep in zip(r.completion, mask, strict=True)]
            for r, mask in zip(read, scored, strict=True)
        ]
        segments = [[0] * len(r.prompt) + (r.segments or [0] * len(r.completion)) for r in read]
        has_segments = any(r.segments is not None for r in read)
        behavior = [
            [0.0] * len(r.prompt)
            + [x if keep else 0.0 for x, keep in zip(_known(r), mask, strict=True)]
            for r, mask in zip(read, scored, strict=True)
        ]
        batch: dict[str, Any]
        if self.packing:
            batch = pack(sequences)
            batch["labels"] = torch.tensor([[x for row in labels for x in row]], dtype=torch.int64)
            flat = [x for row in behavior for x in row]
            batch["behavior_log_prob"] = torch.tensor(flat, dtype=torch.float32)[None]
            if has_segments:
                batch[SEGMENTS] = torch.tensor([[x for row in segments for x in row]])
        else:
            batch = dict(pad_left(sequences, self.pad_token_id))
            width = batch["input_ids"].shape[1]
            batch["labels"] = _right_align(labels, width, IGNORE_INDEX, torch.int64)
            batch["behavior_log_prob"] = _right_align(behavior, width, 0.0, torch.float32)
            if has_segments:
                batch[SEGMENTS] = _right_align(segments, width, 0, torch.int64)
            kept = [len(mask) - mask.index(1) for mask in scored if any(mask)]
            batch["logits_to_keep"] = max(kept, default=0) + 1
            if with_images:
                batch |= self._image_entries(read, sequences, width)
                del batch[POSITIONS]
        batch["reward"] = torch.tensor([r.reward for r in read], dtype=torch.float32)
        if any(record.get(WEIGHT) is not None for record in features):
            weights = [r.weight for r in read]
            batch["sequence_weight"] = torch.tensor(weights, dtype=torch.float32)
        known = [r.behavior is not None for r in read]
        if not all(known):
            batch["behavior_known"] = torch.tensor(known)
        groups = _optional(features, "group")
        if groups is not None:
            batch["group"] = _groups(groups)
        if not self.share_prefix:
            return batch
        if with_images:
            warn_unshared(BESIDE_IMAGES)
            return batch
        completions = [record.completion for record in read]
        return tree_batch(prompts, completions, batch, self.pad_token_id)

    def _with_images(self, read: Sequence[_Read], sequences: Sequence[Sequence[int]]) -> bool:
        """Whether a record of the batch has images."""
        if self._vision is None:
            return False
        if not any(record.images for record in read):
            for i, sequence in enumerate(sequences):
                self._vision.check_runs(sequence, [], f"record {i} of the batch")
            return False
        if self.packing:
            raise ValueError(
                "packing: got True with a batch that has images, whose tokens models join by positions "
                "or masks that count the row as one sequence; use packing=False"
            )
        return True

    def _image_entries(
        self, read: Sequence[_Read], sequences: Sequence[Sequence[int]], width: int
    ) -> dict[str, Tensor]:
        """What a batch of T = ``width`` columns holds besides, if a record of it has images."""
        vision = self._vision
        assert vision is not None
        where = [f"record {i} of the batch" for i in range(len(read))]
        shown = [i for i, record in enumerate(read) if record.images]
        tensors, runs = vision.tensors([read[i].images for i in shown], [where[i] for i in shown])
        expected = dict(zip(shown, runs, strict=True))
        for i, sequence in enumerate(sequences):
            vision.check_runs(sequence, expected.get(i, []), where[i])
        counts = torch.tensor([len(record.images) for record in read])
        return {**tensors, **right_aligned_kinds(vision, sequences, width), COUNTS: counts}

    def _truncated(
        self, features: Sequence[Mapping[str, Any]], read: Sequence[_Read]
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
        written = ([x for x, own in zip(r.completion, r.mask, strict=True) if own] for r in read)
        return [not tokens or tokens[-1] not in ends for tokens in written]


def without_sharing(collator: CompletionCollator) -> CompletionCollator:
    """A copy of a collator that shares no prompts."""
    other = copy.copy(collator)
    other.share_prefix = False
    return other


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
    #: 1 for tokens that the policy wrote.
    mask: list[int]
    segments: list[int] | None
    #: None where it is missing and may be.
    behavior: list[float] | None
    reward: float
    weight: float
    images: list[Any]


def check_token_ids(
    record: Mapping[str, Any],
    where: str,
    more: Sequence[str],
    remedy: str,
    images: bool = False,
) -> tuple[list[int], list[int], list[int]]:
    """Checks that a record has token ids, and a prompt of at least one, and nothing that is ignored.

    Args:
        record: the record.
        where: what the messages call it.
        more: further fields that it must have.
        remedy: what to do about a missing field.
        images: whether images are read.

    Returns:
        The ids of prompt and completion, and a mask of the latter: 1 where the policy wrote it.

    Raises:
        ValueError: if a field is missing or the prompt is empty, an id is negative, or as
            ``check_meaning`` and ``mask_of``.
        TypeError: if the ids are not whole numbers.
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
    mask = mask_of(record, len(completion), where)
    check_meaning(record, prompt, completion, mask, where, images)
    return prompt, completion, [1] * len(completion) if mask is None else mask


def _known(record: _Read) -> list[float]:
    """Log mu of the completion; 0 where it is missing, as ``behavior_known`` says."""
    return [0.0] * len(record.mask) if record.behavior is None else record.behavior


def _read(record: Mapping[str, Any], where: str, collator: CompletionCollator) -> _Read:
    limits, baseline, vision = collator.limits, collator.baseline, collator._vision
    reward = None if record.get("reward") is None else reward_of(record, where)
    remedy = "Score the records first, and keep remove_unused_columns=False"
    if limits is None:
        remedy += "; where the loss reads none, CompletionCollator(limits=...) does without it"
    elif reward is not None:
        remedy = f"With {limits} it is read ({sign_of(reward, baseline)}). {remedy}"
    needed = ["reward"]
    if reward is None or reads_behavior(reward, limits, baseline):
        needed.insert(0, "behavior_log_prob")
    sees = vision is not None
    prompt, completion, mask = check_token_ids(record, where, needed, remedy, images=sees)
    images = []
    if vision is not None:
        images = images_of(record, where)
        if images:
            vision.check_written(completion, mask, len(prompt), where)
    assert reward is not None
    behavior = behavior_of(record, len(completion), where, mask)
    if behavior is not None:
        check_sampling(record, collator.temperature, where)
    return _Read(
        prompt,
        completion,
        mask,
        segments_of(record, len(completion), where),
        behavior,
        reward,
        weight_of(record, where),
        images,
    )


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
