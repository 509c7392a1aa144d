"""Scores log mu of records: the log-probabilities under the policy that sampled them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from topr_kernels.hf.causal_lm import causal_lm_log_prob
from topr_kernels.hf.collator import CompletionCollator
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

    With the collator, the batches, the settings and the autocast of training they are bitwise those that
    training sees before its first update: every ratio is then exactly 1.

    Args:
        model: the policy that sampled the records, whole on each process; scored in eval mode.
        records: with ``prompt_token_ids``, ``completion_token_ids`` and ``reward``.
        collator: as in training; its ``mask_truncated`` is not applied.
        batch_size: records scored together; use the training batch's.
        temperature: that of the sampler.
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
            log_prob = causal_lm_log_prob(
                model,
                batch,
                temperature=temperature,
                fused_head=fused_head,
                workspace_bytes=workspace_bytes,
                impl=impl,
                check=start == 0,
            ).log_prob
            kept = batch["labels"][:, -log_prob.shape[1] :].ne(IGNORE_INDEX)
            # Row-major, so record by record in both layouts.
            values = log_prob[kept].cpu()
            lengths = [len(record["completion_token_ids"]) for record in part]
            scored += [row.tolist() for row in torch.split(values, lengths)]
            bar.update(len(part))
    return scored


def check_records(records: Sequence[Mapping[str, Any]], of: str) -> None:
    """Raises ``ValueError`` where a record cannot be scored, naming it as one ``of`` these."""
    for i, record in enumerate(records):
        for name in ("prompt_token_ids", "completion_token_ids"):
            if record.get(name) is None:
                raise ValueError(
                    f"record {i} of {of} has no {name!r}; it has {sorted(record)}. Give it token ids, "
                    "which prepare_records makes of text and messages"
                )
        if len(record["prompt_token_ids"]) == 0:
            raise ValueError(
                f"record {i} of {of}: prompt_token_ids is empty, so nothing predicts the first "
                "token of the completion; give the prompt at least a BOS token"
            )


def _unscored(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with what the collator asks for and scoring does not read."""
    completion = record["completion_token_ids"]
    return {
        "prompt_token_ids": record["prompt_token_ids"],
        "completion_token_ids": completion,
        "behavior_log_prob": [0.0] * len(completion),
        "reward": 0.0,
    }
