"""The TOPR loss of any Hugging Face causal language model, backbone and fused loss in one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from topr_kernels import (
    TOPR,
    Limits,
    LogProbOutput,
    TOPROutput,
    linear_log_prob,
    linear_topr_loss,
    log_prob,
    topr_loss,
)
from topr_kernels.hf.capture import loss_in_head
from topr_kernels.hf.forward import kept_rows, label_layout, laid_out
from topr_kernels.hf.heads import Head, base_model
from topr_kernels.hf.packing import check_packing_once, is_packed
from topr_kernels.hf.padding import Moved
from topr_kernels.hf.sharing import check_sharing_once, is_tree
from topr_kernels.layout import IGNORE_INDEX
from topr_kernels.limits import Taper
from topr_kernels.validation import values_readable

#: Entries of a batch that are options of the loss.
OPTIONAL = ("sequence_weight", "behavior_known", "segments")
#: What models call the weight of their routers' balancing loss.
_ROUTER_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")


def causal_lm_topr_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    unwrapped: nn.Module | None = None,
    limits: Limits | Taper = TOPR,
    ratio: str = "sequence",
    baseline: float = 0.0,
    reduction: str = "sequence_mean",
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    fused_head: bool = True,
    grad_tolerance: float | None = None,
    workspace_bytes: int | None = None,
    impl: str = "auto",
    check: bool = False,
    check_packed: bool = True,
    check_padded: bool = True,
) -> TOPROutput:
    """Runs a causal language model over a batch and computes its TOPR loss, without logits.

    The loss is computed inside the model's own forward, where it would multiply by its head: logit
    scale, softcap, bias and LoRA of the head are read from the model, and the hooks of wrappers
    (DistributedDataParallel, FSDP2, ZeRO-3) fire as in any other forward and backward. Where the model
    returns a router's balancing loss (mixtures of experts with ``output_router_logits=True`` in their
    config) it is added with the model's own weight, times this batch's share of ``normalizer``.

    Args:
        model: Hugging Face causal language model, wrapped or not.
        batch: what :class:`CompletionCollator` returns, padded, packed or shared, on the model's device:
            at least ``input_ids`` [B, T], ``labels``, ``behavior_log_prob``, ``reward`` [B], and
            positions or a mask to count them from; ``sequence_weight`` and ``behavior_known`` [B], and
            ``segments`` [B, T], where there are such.
        unwrapped: the model inside its wrapper; needed for every wrapper but PEFT's.
        limits: as in :func:`topr_kernels.topr_loss`.
        ratio: as in :func:`topr_kernels.topr_loss`.
        baseline: as in :func:`topr_kernels.topr_loss`.
        reduction: as in :func:`topr_kernels.topr_loss`.
        normalizer: as in :func:`topr_kernels.topr_loss`.
        temperature: as in :func:`topr_kernels.topr_loss`.
        entropy: as in :func:`topr_kernels.topr_loss`.
        fused_head: False has the model compute the logits of the completions: for heads that
            :func:`find_head` refuses.
        grad_tolerance: of the fused head, as in :func:`topr_kernels.linear_topr_loss`.
        workspace_bytes: of the fused head, as in :func:`topr_kernels.linear_topr_loss`.
        impl: as in :func:`topr_kernels.topr_loss`.
        check: compare the model's own logits of up to 4 rows with those computed from its head, since a
            model may transform its logits in ways that its config does not say; and check, also off
            the CPU, that ``logits_to_keep`` leaves out no scored label. Meant for the first batch.
        check_packed: run :func:`check_packing` on the first packed batch of a model, which many models
            fail without a word, and ``prove_sharing`` on the first shared one. It is remembered as long
            as the model lives and keeps its ``attn_implementation``; all processes of a sharded model
            must agree on it.
        check_padded: refuse a model in which tokens see later ones (``causal_problem``, measured on the
            first batch), run :func:`check_padding` on the first batch of a model that has a mask, and do
            as it says: a model whose states or positions see padding gets it behind its tokens, see
            :func:`completion_logits`. Remembered and to be agreed on like ``check_packed``.

    Returns:
        TOPROutput; its tensors per token are [B, K], of the last K columns of the batch that hold all
        scored labels (``logits_to_keep``), [1, N] packed, or [1, M] of the completions of a shared one.

    Raises:
        ValueError: if the batch does not suit the model (see :func:`completion_logits`), or its head
            cannot be fused (see :func:`find_head`), or a check finds a difference; if labels that
            are scored lie before the columns of ``logits_to_keep``, where it is read: on eager CPU
            tensors and with ``check``.
    """
    _check_kept(batch, check)
    moved, batch, inputs, keep = laid_out(
        model, batch, signature_of=unwrapped, check_padded=check_padded
    )
    if check_packed:
        check_apart_once(model, batch, unwrapped)
    labels, behavior = _kept(batch["labels"], keep), _kept(batch["behavior_log_prob"], keep)
    options: dict[str, Any] = {
        **label_layout(batch),
        "limits": limits,
        "ratio": ratio,
        "baseline": baseline,
        "reduction": reduction,
        "normalizer": normalizer,
        "temperature": temperature,
        "entropy": entropy,
        "impl": impl,
    }
    options |= {n: _kept(batch[n], keep) for n in OPTIONAL if batch.get(n) is not None}
    reward = batch["reward"]
    base = base_model(model if unwrapped is None else unwrapped)
    if not fused_head:
        outputs = model(**inputs)
        out = topr_loss(kept_rows(outputs.logits, keep, batch), labels, behavior, reward, **options)
        out = _restored(out, moved)
        return _with_router_loss(out, base, outputs, reduction, normalizer)

    captured: list[TOPROutput] = []

    def compute(hidden: Tensor, head: Head) -> Tensor:
        out = linear_topr_loss(
            kept_rows(hidden, keep, batch),
            head.weight,
            labels,
            behavior,
            reward,
            **head.options,
            grad_tolerance=grad_tolerance,
            workspace_bytes=workspace_bytes,
            **options,
        )
        captured.append(out)
        return out.loss

    with loss_in_head(model if unwrapped is None else unwrapped, compute, sample=check) as inside:
        outputs = model(**inputs)
    loss = inside.arrive(outputs.logits)
    out = _restored(captured[0]._replace(loss=loss), moved)
    return _with_router_loss(out, base, outputs, reduction, normalizer)


def causal_lm_log_prob(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    unwrapped: nn.Module | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    fused_head: bool = True,
    workspace_bytes: int | None = None,
    impl: str = "auto",
    check: bool = False,
    check_packed: bool = True,
    check_padded: bool = True,
) -> LogProbOutput:
    """Runs a causal language model over a batch and scores its labels: the log mu of a frozen policy.

    With the batches, ``workspace_bytes`` and ``temperature`` of training the log-probs equal to the bit
    those that :func:`causal_lm_topr_loss` sees before the first update.

    Args:
        model: as in :func:`causal_lm_topr_loss`.
        batch: as in :func:`causal_lm_topr_loss`; ``behavior_log_prob`` and ``reward`` are not read.
        unwrapped: as in :func:`causal_lm_topr_loss`.
        temperature: divides the logits; use the sampler's.
        entropy: also compute the entropy of every scored row.
        fused_head: as in :func:`causal_lm_topr_loss`.
        workspace_bytes: as in :func:`causal_lm_topr_loss`.
        impl: as in :func:`causal_lm_topr_loss`.
        check: as in :func:`causal_lm_topr_loss`.
        check_packed: as in :func:`causal_lm_topr_loss`.
        check_padded: as in :func:`causal_lm_topr_loss`.

    Returns:
        LogProbOutput, detached: [B, K] of the last K columns, [1, N] packed, or [1, M] of the
        completions of a shared batch.

    Raises:
        ValueError: as :func:`causal_lm_topr_loss`.
    """
    _check_kept(batch, check)
    moved, batch, inputs, keep = laid_out(
        model, batch, signature_of=unwrapped, check_padded=check_padded
    )
    if check_packed:
        check_apart_once(model, batch, unwrapped)
    labels = _kept(batch["labels"], keep)
    options: dict[str, Any] = {
        **label_layout(batch),
        "temperature": temperature,
        "entropy": entropy,
        "impl": impl,
    }
    with torch.no_grad():
        if not fused_head:
            logits = kept_rows(model(**inputs).logits, keep, batch)
            out = log_prob(logits, labels, **options)
            return LogProbOutput(*map(moved.restored, out))
        captured: list[LogProbOutput] = []

        def compute(hidden: Tensor, head: Head) -> Tensor:
            out = linear_log_prob(
                kept_rows(hidden, keep, batch),
                head.weight,
                labels,
                **head.options,
                workspace_bytes=workspace_bytes,
                **options,
            )
            captured.append(out)
            return out.log_prob.sum()

        base = model if unwrapped is None else unwrapped
        with loss_in_head(base, compute, sample=check) as inside:
            inside.arrive(model(**inputs).logits)
    return LogProbOutput(*map(moved.restored, captured[0]))


def _restored(out: TOPROutput, moved: Moved) -> TOPROutput:
    """With the tensors per token in the columns of the batch as it was given."""
    token = ("log_prob", "entropy", "token_log_ratio")
    return out._replace(**{name: moved.restored(getattr(out, name)) for name in token})


def check_apart_once(
    model: nn.Module, batch: Mapping[str, Any], unwrapped: nn.Module | None
) -> None:
    """Checks, once, that a model keeps the sequences of a packed or shared batch apart."""
    if is_packed(batch):
        check_packing_once(model, batch, signature_of=unwrapped)
    elif is_tree(batch):
        check_sharing_once(model, batch, signature_of=unwrapped)


def _kept(tokens: Tensor, keep: int) -> Tensor:
    """The last columns of a tensor with one value per token; others are returned unchanged."""
    return tokens[:, -keep:] if tokens.dim() == 2 else tokens


def _check_kept(batch: Mapping[str, Any], check: bool) -> None:
    labels: Tensor = batch["labels"]
    keep = 0 if is_packed(batch) or is_tree(batch) else int(batch.get("logits_to_keep", 0))
    # 0 keeps all columns, as in transformers.
    if not keep or not (values_readable(labels, False) or check):
        return
    # The first kept column predicts the label of the second; the first label of a row is never scored.
    before = labels[:, 1 : max(labels.shape[1] - keep, 0) + 1] != IGNORE_INDEX
    if before.any():
        least = int(before.int().argmax(1)[before.any(1)].min())
        raise ValueError(
            f"logits_to_keep: got {keep}, with which {int(before.sum())} scored labels, the first in "
            f"column {least + 1} of {labels.shape[1]}, would be left out; expected at least "
            f"{labels.shape[1] - least}: the columns from the first scored label on, and the one before "
            "it. Count it so in the data collator, or leave it out of the batch"
        )


def _with_router_loss(
    out: TOPROutput, base: Any, outputs: Any, reduction: str, normalizer: float | Tensor | None
) -> TOPROutput:
    balancing: Tensor | None = getattr(outputs, "aux_loss", None)
    # Models return None, or the number 0, unless their config asks for it.
    if not isinstance(balancing, Tensor):
        return out
    weights = (getattr(part, n, None) for n in _ROUTER_WEIGHTS for part in (base, base.config))
    weight = next((w for w in weights if w is not None), None)
    if weight is None:
        raise ValueError(
            f"{type(base).__name__} returned an aux_loss, but neither it nor its config has a weight "
            f"for it ({' or '.join(_ROUTER_WEIGHTS)}); set config.router_aux_loss_coef (0 for none)"
        )
    share: Tensor | float = 1.0
    if normalizer is not None:
        units = out.length > 0 if reduction == "sequence_mean" else out.length
        share = units.sum().to(out.loss.dtype) / normalizer
    return out._replace(loss=out.loss + share * weight * balancing.to(out.loss.device))
