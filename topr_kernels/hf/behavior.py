"""Scores log mu of records: the log-probabilities under the policy that sampled them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from topr_kernels.hf.causal_lm import causal_lm_log_prob
from topr_kernels.hf.collator import CompletionCollator, check_token_ids, without_sharing
from topr_kernels.hf.fields import TOKENS
from topr_kernels.hf.images import has_images
from topr_kernels.hf.packing import eval_mode
from topr_kernels.hf.sharing import BESIDE_IMAGES, shares_prefix, warn_unshared
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
        collator: as in training; its ``mask_truncated`` and ``temperature`` are not applied.
        batch_size: records scored together; use the training batch's.
        temperature: of the sampler; records that say another are refused.
        fused_head: as in :func:`causal_lm_log_prob`.
        workspace_bytes: as in :func:`causal_lm_log_prob`.
        impl: as in :func:`causal_lm_log_prob`.
        progress: show a progress bar.

    Returns:
        One list of fp32 log-probabilities per record, one per completion token, in nats; 0 for those
        that ``completion_mask`` says the policy did not write.

    Raises:
        ValueError: as :func:`causal_lm_log_prob`; if a record lacks token ids or has an empty prompt, or
            says that it was sampled otherwise; if the model gives one of its tokens NaN.
    """
    reads = not isinstance(collator, CompletionCollator) or collator._vision is not None
    check_records(records, "the data", images=reads)
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
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
    *,
    batch_size: int,
    progress: bool,
    **options: Any,
) -> list[list[float]]:
    """``score_behavior`` of records that ``check_records`` has seen already.

    Args:
        model: as in ``score_behavior``.
        records: as in ``score_behavior``.
        collator: as in ``score_behavior``; any other that passes log mu on, too.
        batch_size: as in ``score_behavior``.
        progress: as in ``score_behavior``.
        **options: ``temperature``, ``fused_head``, ``workspace_bytes`` and ``impl``.

    Returns:
        As ``score_behavior``.
    """
    collate = copy.copy(collator)
    if isinstance(collate, CompletionCollator):
        collate.mask_truncated = False
        collate.temperature = options.get("temperature", 1.0)
    device = _device(model)
    scored: list[list[float]] = []
    bar = tqdm(total=len(records), desc="score", unit="record", disable=not progress)
    with eval_mode(model), bar:
        for start in range(0, len(records), batch_size):
            part = _numbered(records[start : start + batch_size])
            batch = {
                name: x.to(device) if isinstance(x, Tensor) else x
                for name, x in collate(part).items()
            }
            log_prob = causal_lm_log_prob(model, batch, check=start == 0, **options).log_prob
            lengths = [len(record["completion_token_ids"]) for record in part]
            values, known = _in_order(log_prob, batch, sum(lengths))
            if values.isnan().any():
                wrong = int(values.isnan().nonzero()[0])
                record = next(i for i, end in enumerate(accumulate(lengths)) if wrong < end)
                raise ValueError(
                    f"record {start + record}: the model gives one of its tokens a log-probability of "
                    "NaN, which is no log mu; look for NaN in the weights, or an overflow in fp16"
                )
            if not known.all():
                again = collate(part)["labels"]
                if not torch.equal(again, batch["labels"].to(again.device)):
                    raise ValueError(
                        "data_collator: it scores other tokens of the same records at each call, so "
                        "that their log mu cannot be computed beforehand; score all of them, or use "
                        "behavior='recorded'"
                    )
            scored += [row.tolist() for row in torch.split(values, lengths)]
            bar.update(len(part))
    return scored


def fitting(collator: Any, model: nn.Module, records: Sequence[Mapping[str, Any]]) -> Any:
    """The collator, or a copy of it that shares no prompts where the model is not exact with sharing.

    Args:
        collator: as in ``score_checked``.
        model: as in ``score_behavior``.
        records: as in ``score_behavior``; the longest is run to find out, once for a model. With images
            none are shared.
    """
    if not (records and isinstance(collator, CompletionCollator) and collator.share_prefix):
        return collator
    if has_images(list(records)):
        warn_unshared(BESIDE_IMAGES)
        return without_sharing(collator)
    longest = max(([x for name in TOKENS for x in record[name]] for record in records), key=len)
    shares = shares_prefix(model, torch.tensor(longest, device=_device(model)))
    return collator if shares else without_sharing(collator)


def _device(model: nn.Module) -> torch.device:
    """Where the inputs of a model go; the weights of an offloaded one are elsewhere, or nowhere."""
    for p in model.parameters():
        if not p.is_meta:
            return p.device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((d for d in devices if d is not None), "cpu"))


def _numbered(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The records of a batch with -1, -2, ... in the place of log mu: a number for every token.

    So the batch of any collator tells where it put each token.
    """
    numbered, first = [], 1
    for record in records:
        end = first + len(record["completion_token_ids"])
        numbers = [-float(n) for n in range(first, end)]
        numbered.append({"reward": 0.0, **record, "behavior_log_prob": numbers})
        first = end
    return numbered


def _in_order(log_prob: Tensor, batch: Mapping[str, Any], count: int) -> tuple[Tensor, Tensor]:
    """Log-probs of the ``count`` tokens that ``_numbered`` numbered, and which are scored; on the CPU.

    Those that the collator leaves out are 0: they are never read.

    Raises:
        ValueError: if the collator does not pass ``behavior_log_prob`` on per token.
    """
    labels, numbers = batch["labels"], batch["behavior_log_prob"]
    if numbers.shape == labels.shape:
        width = log_prob.shape[1]
        kept = labels[:, -width:].ne(IGNORE_INDEX)
        index = -numbers[:, -width:][kept].double().cpu() - 1
        sound = (index == index.round()) & (index >= 0) & (index < count)
        if sound.all() and len(index.unique()) == len(index):
            values = torch.zeros(count, dtype=torch.float32)
            known = torch.zeros(count, dtype=torch.bool)
            values[index.long()] = log_prob[kept].float().cpu()
            known[index.long()] = True
            return values, known
    raise ValueError(
        "data_collator: expected the values of each record's behavior_log_prob in the batch's "
        "behavior_log_prob, [B, T] like the labels; it changes, sums or drops them, so that it is not "
        "known where log mu belongs. Pass them on as they are, or score the records beforehand "
        "(score_behavior) and use behavior='recorded'"
    )


def check_records(records: Sequence[Mapping[str, Any]], of: str, images: bool = True) -> None:
    """Raises ``ValueError`` if a record cannot be scored; the message calls it a record ``of`` these.

    Args:
        records: to be scored.
        of: what they are called.
        images: whether the collator reads images.
    """
    remedy = "Give it token ids, which prepare_records makes of text and messages"
    for i, record in enumerate(records):
        check_token_ids(record, f"record {i} of {of}", (), remedy, images=images)
