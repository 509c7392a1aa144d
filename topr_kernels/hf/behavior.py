"""Scores log mu of records: the log-probabilities under the policy that sampled them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from topr_kernels.hf.causal_lm import causal_lm_log_prob
from topr_kernels.hf.collator import CompletionCollator, check_token_ids
from topr_kernels.hf.packing import eval_mode
from topr_kernels.layout import IGNORE_INDEX


def score_behavior(
    model: nn.Module,
    records: Sequence[Mapping[str, Any]],
    collator: CompletionCollator,
    *,
    batch_size: int,
    temperature: float = 1.0,
    fused_head: bool = True,
    workspace_bytes: int | None = None,
    impl: str = "auto",
    progress: bool = True,
) -> list[list[float]]:
    """Log-probabilities of each record's completion tokens under a model.

    Scored with the collator, batches, settings and autocast of training, they equal to the bit what
    training sees before its first update: every ratio is then exactly 1.

    Args:
        model: the policy that sampled the records, whole on each process; scored in eval mode.
        records: with ``prompt_token_ids``, ``completion_token_ids`` and ``reward``.
        collator: as in training; its ``mask_truncated`` is not applied.
        batch_size: records scored together; use the training batch's.
        temperature: of the sampler.
        fused_head: as in :func:`causal_lm_log_prob`.
        workspace_bytes: as in :func:`causal_lm_log_prob`.
        impl: as in :func:`causal_lm_log_prob`.
        progress: show a progress bar.

    Returns:
        One list of fp32 log-probabilities per record, one per completion token, in nats.

    Raises:
        ValueError: as :func:`causal_lm_log_prob`, or if a record lacks token ids or has an empty prompt.
    """
    check_records(records, "the data")
    return score_checked(
        model,
        records,
        collator,
        batch_size=batch_size,
        temperature=temperature,
        fused_head=fused_head,
        workspace_bytes=workspace_bytes,
        impl=impl,
        progress=progress,
    )


def score_checked(
    model: nn.Module,
    records: Sequence[Mapping[str, Any]],
    collator: CompletionCollator,
    *,
    batch_size: int,
    progress: bool,
    **options: Any,
) -> list[list[float]]:
    """``score_behavior`` of records that ``check_records`` has seen already.

    Args:
        model: as in ``score_behavior``.
        records: as in ``score_behavior``.
        collator: as in ``score_behavior``.
        batch_size: as in ``score_behavior``.
        progress: as in ``score_behavior``.
        **options: ``temperature``, ``fused_head``, ``workspace_bytes`` and ``impl``.

    Returns:
        As ``score_behavior``.
    """
    collate = CompletionCollator(collator.pad_token_id, collator.share_prefix, collator.packing)
    device = next(model.parameters()).device
    scored: list[list[float]] = []
    bar = tqdm(total=len(records), desc="score", unit="record", disable=not progress)
    with eval_mode(model), bar:
        for start in range(0, len(records), batch_size):
            part = [_unscored(r) for r in records[start : start + batch_size]]
            batch = {
                name: x.to(device) if isinstance(x, Tensor) else x
                for name, x in collate(part).items()
            }
            log_prob = causal_lm_log_prob(model, batch, check=start == 0, **options).log_prob
            kept = batch["labels"][:, -log_prob.shape[1] :].ne(IGNORE_INDEX)
            # In row-major order, which is record by record in both layouts.
            values = log_prob[kept].cpu()
            lengths = [len(record["completion_token_ids"]) for record in part]
            scored += [row.tolist() for row in torch.split(values, lengths)]
            bar.update(len(part))
    return scored


def check_records(records: Sequence[Mapping[str, Any]], of: str) -> None:
    """Raises ``ValueError`` if a record cannot be scored; the message calls it a record ``of`` these."""
    remedy = "Give it token ids, which prepare_records makes of text and messages"
    for i, record in enumerate(records):
        check_token_ids(record, f"record {i} of {of}", (), remedy)


def _unscored(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with placeholders for the fields that the collator needs and scoring ignores."""
    completion = record["completion_token_ids"]
    return {
        "prompt_token_ids": record["prompt_token_ids"],
        "completion_token_ids": completion,
        "behavior_log_prob": [0.0] * len(completion),
        "reward": 0.0,
    }
