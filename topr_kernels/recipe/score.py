"""Scores log mu with the kernel that training uses, so that pi and mu agree at the start."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from topr_kernels.hf.behavior import fitting, score_behavior
from topr_kernels.hf.collator import CompletionCollator
from topr_kernels.hf.heads import head_shape
from topr_kernels.recipe.models import dtype_name
from topr_kernels.recipe.record_checks import check_dtype, check_full_softmax, check_images
from topr_kernels.recipe.records import Record, RecordError, read_records, write_records

#: Rows of a tile of logits. A batch of short answers has few tokens, and larger tiles would be padding.
_TILE_ROWS = 64
#: Batches that are scored between two writes to the disk.
_SHARD_BATCHES = 16


def workspace_bytes(model: Any) -> int | None:
    """Budget of the fused head in scoring and in training, which must be equal for equal log-probs."""
    if model.device.type != "cpu":
        return None
    return _TILE_ROWS * head_shape(model)[0] * 4


def score(
    model: Any,
    records: Sequence[Record],
    *,
    pad_token_id: int,
    batch_size: int,
    shards: Path | None = None,
    take: Callable[[int], Iterable[int]] = range,
    progress: bool = True,
    processor: Any = None,
) -> list[Record]:
    """Fills in ``behavior_log_prob``: log-probabilities under the policy that sampled.

    That is the model's full softmax at the temperature of each record's ``sampling``. ``train``
    trains the model at temperature 1: records that were sampled at another one are off-policy from
    the first update on, as their ratios show.

    Args:
        model: the policy that sampled the records, in eval mode.
        records: with or without ``behavior_log_prob``.
        pad_token_id: fills the padding.
        batch_size: records scored together; use the training batch's.
        shards: folder for finished parts. Parts found there are not scored again.
        take: maps the number of parts to the indices of those to do, in rising order. For one of several
            processes, which leaves its share in ``shards``.
        progress: whether to show a progress bar.
        processor: of the model, for records with images.

    Returns:
        The records (of the parts taken, if not all) with one fp32 log-probability per completion token,
        0 for those that the policy did not write.

    Raises:
        RecordError: if a record was sampled greedily (temperature 0) or with top-k or top-p: the
            full softmax is not the policy that sampled it; or in another dtype than the model's; or has
            images that cannot be read, or without ``processor``. If a shard is damaged; delete it.
        ValueError: if the model's head cannot be fused, see ``topr_kernels.hf.find_head``.
    """
    check_full_softmax(records)
    check_dtype(records, dtype_name(model))
    check_images(records, processor)
    scored: list[Record] = []
    starts = range(0, len(records), _SHARD_BATCHES * batch_size)
    with tqdm(total=len(records), desc="score", unit="sample", disable=not progress) as bar:
        for i in take(len(starts)):
            start = starts[i]
            # The parts in between belong to other processes.
            bar.update(start - bar.n)
            part = records[start : start + _SHARD_BATCHES * batch_size]
            shard = None if shards is None else shards / f"from-{start:07d}.parquet"
            if shard is not None and shard.exists():
                done = read_records(shard)
                if [r.completion_token_ids for r in done] != [r.completion_token_ids for r in part]:
                    raise RecordError(
                        f"{shard}: holds other records than its part; delete it and run again"
                    )
                bar.update(len(part))
            else:
                done = []
                for first in range(0, len(part), batch_size):
                    batch = part[first : first + batch_size]
                    log_probs = _token_log_probs(model, batch, pad_token_id, processor)
                    done += [
                        dataclasses.replace(
                            record, behavior_log_prob=values.tolist(), behavior_source="score"
                        )
                        for record, values in zip(batch, log_probs, strict=True)
                    ]
                    bar.update(len(batch))
                if shard is not None:
                    write_records(shard, done)
            scored += done
    return scored


def max_log_ratio(
    model: Any,
    records: Sequence[Record],
    *,
    pad_token_id: int,
    batch_size: int,
    processor: Any = None,
) -> float:
    """Largest |log_ratio| of a sequence, between the model and the stored log-probabilities, in nats.

    Both are taken at the temperature of each record's ``sampling``, as in ``score``.

    Before the first update this is numerical noise: zero if the batches are those that were scored,
    otherwise the effect that other batches have on the hidden states.

    Args:
        model: the policy, in eval mode.
        records: scored records.
        pad_token_id: fills the padding.
        batch_size: records evaluated together.
        processor: as in ``score``.
    """
    largest = 0.0
    for start in range(0, len(records), batch_size):
        part = records[start : start + batch_size]
        log_probs = _token_log_probs(model, part, pad_token_id, processor)
        for record, values in zip(part, log_probs, strict=True):
            # Sum the differences: the difference of two sums would lose digits.
            difference = values - torch.tensor(record.behavior_log_prob)
            if record.completion_mask is not None:
                difference = difference[torch.tensor(record.completion_mask) == 1]
            largest = max(largest, abs(float(difference.sum())))
    return largest


def _token_log_probs(
    model: Any, records: Sequence[Record], pad_token_id: int, processor: Any
) -> list[Tensor]:
    """Log-probabilities of each record's completion tokens, [C] fp32 on the host."""
    names = ("prompt_token_ids", "completion_token_ids", "completion_mask", "images")
    token_records = [{name: getattr(record, name) for name in names} for record in records]
    collator = CompletionCollator(pad_token_id, share_prefix=True, processor=processor)
    collate = fitting(collator, model, token_records)
    # One forward pass per temperature; nearly always there is one.
    values = {
        t: score_behavior(
            model,
            token_records,
            collate,
            batch_size=len(token_records),
            temperature=t,
            workspace_bytes=workspace_bytes(model),
            progress=False,
        )
        for t in {record.sampling.temperature for record in records}
    }
    return [torch.tensor(values[r.sampling.temperature][i]) for i, r in enumerate(records)]
