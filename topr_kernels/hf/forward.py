"""The forward pass over a batch: the model's arguments, and the rows that are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from topr_kernels.hf.capture import capture_hidden, check_logits
from topr_kernels.hf.causal import check_causal_once
from topr_kernels.hf.heads import Head, base_model
from topr_kernels.hf.images import COUNTS
from topr_kernels.hf.packing import CELLS, ROWS, in_rows, is_packed, packed_inputs
from topr_kernels.hf.padding import (
    Moved,
    check_padding_once,
    check_unpadded,
    counted_positions,
    moved_behind,
)
from topr_kernels.hf.sharing import REMEDY, TREE, is_tree, tree_inputs
from topr_kernels.hf.signature import KEEP, POSITIONS, VARLEN, accepts, counts_positions, takes

#: Entries from which no model computes positions.
_NO_POSITIONS = frozenset({"token_type_ids", "inputs_embeds"})
#: Entries of a batch for the loss or the functions below; all others go to the model.
_NOT_MODEL_INPUTS = frozenset(
    {
        "input_ids",
        "attention_mask",
        "position_ids",
        "labels",
        "behavior_log_prob",
        "reward",
        "sequence_weight",
        "behavior_known",
        "segments",
        "group",
        "logits_to_keep",
        COUNTS,
        *ROWS,
        *TREE,
        *VARLEN,
    }
)


def completion_logits(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    signature_of: nn.Module | None = None,
    check_padded: bool = True,
) -> Tensor:
    """Logits of the last ``logits_to_keep`` columns of a batch, and of no others.

    Equal to ``model(...).logits[:, -logits_to_keep:]`` of a forward pass over whole rows. Models
    whose forward takes no ``logits_to_keep`` compute all logits, which are then sliced.

    Args:
        model: a Hugging Face causal language model, wrapped (PEFT, DistributedDataParallel) or not.
        batch: what ``CompletionCollator`` returned, on the model's device, or another collator's
            batch. Without ``logits_to_keep`` all columns are kept; without ``position_ids`` they
            are counted from ``attention_mask`` [B, T], but not for a model that counts its own, as
            those with positions in three dimensions do (Qwen-VL), nor beside further entries from
            which it may (those of ``CompletionCollator`` for images are known not to, in other
            models). Further entries (``token_type_ids``, ...) go to the model if its forward names them.
        signature_of: the unwrapped model, whose forward says which arguments it takes. Of a PEFT
            model it is the base model's forward, to which PEFT passes arguments on.
        check_padded: refuse a model in which tokens see later ones (``causal_problem``, measured once),
            and run :func:`check_padding` on a model's first batch that has a mask. One that sees
            padding in front of its tokens then gets it behind them, and counts its positions itself;
            what is returned is in the batch's columns again. All processes of a sharded model must
            agree on it.

    Returns:
        [B, logits_to_keep, V] in the model's dtype; of a packed batch [1, N, V]; of a shared one
        [1, M, V], a row for each label (``shift=False``).

    Raises:
        ValueError: as ``model_inputs``; with what ``causal_problem`` says.
    """
    moved, batch, inputs, keep = laid_out(
        model, batch, signature_of=signature_of, check_padded=check_padded
    )
    logits: Tensor = model(**inputs).logits
    return moved.restored(kept_rows(logits, keep, batch))


def completion_hidden(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    signature_of: nn.Module | None = None,
    check: Head | None = None,
    check_padded: bool = True,
) -> Tensor:
    """The hidden states that ``completion_logits`` are computed from; logits are not computed.

    Args:
        model: as in ``completion_logits``.
        batch: as in ``completion_logits``.
        signature_of: as in ``completion_logits``; needed for every wrapper but PEFT's.
        check: the model's head, to compare its logits of up to 4 rows with the model's own.
        check_padded: as in ``completion_logits``.

    Returns:
        [B, logits_to_keep, D], of a packed batch [1, N, D], of a shared one [1, M, D], with gradient:
        for ``linear_topr_loss`` with the head of ``find_head``.

    Raises:
        ValueError: as ``completion_logits``, ``find_head`` and ``check_logits``.
    """
    moved, batch, inputs, keep = laid_out(
        model, batch, signature_of=signature_of, check_padded=check_padded
    )
    unwrapped = model if signature_of is None else signature_of
    with capture_hidden(unwrapped, sample=check is not None) as capture:
        logits = model(**inputs).logits
    if check is not None:
        check_logits(check, capture, logits)
    return moved.restored(kept_rows(capture.hidden, keep, batch))


def arranged(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    signature_of: nn.Module | None = None,
    check: bool = True,
) -> Moved:
    """A batch as its model can read it: as it is, or with its padding moved behind the tokens.

    Args:
        model: as in ``completion_logits``.
        batch: as in ``model_inputs``.
        signature_of: as in ``completion_logits``.
        check: False leaves the batch as it is.

    Raises:
        ValueError: as ``check_tokens_once``; if the batch is padded and the model's tokens see it on
            both sides.
    """
    mask, given = batch.get("attention_mask"), batch.get(POSITIONS)
    unwrapped = model if signature_of is None else signature_of
    # Of what CompletionCollator adds for images only the kinds of tokens have columns; they are moved.
    further = COUNTS not in batch and set(batch) - _NOT_MODEL_INPUTS - _NO_POSITIONS
    countable = isinstance(mask, Tensor) and mask.dim() == 2
    # Positions of another shape, or further inputs, come from a collator that arranged the batch itself.
    if not check or is_packed(batch) or not countable or further or _is_own(given, mask):
        return Moved(batch, None)
    check_tokens_once(model, batch, signature_of=signature_of)
    padding = check_padding_once(model, batch, signature_of=signature_of)
    if padding.exact_as_it_is:
        return Moved(batch, None)
    if not padding.exact_behind:
        check_unpadded(unwrapped, batch, padding)
    return moved_behind(batch)


def laid_out(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    signature_of: nn.Module | None,
    check_padded: bool,
) -> tuple[Moved, Mapping[str, Any], dict[str, Any], int]:
    """Everything that comes before a forward pass; arguments as of ``completion_logits``.

    Returns:
        What ``arranged`` gave, its batch in rows, and inputs and columns of ``model_inputs``.

    Raises:
        ValueError: as ``arranged``, ``model_inputs`` and ``check_tokens_once``.
    """
    moved = arranged(model, batch, signature_of=signature_of, check=check_padded)
    batch = in_rows(model if signature_of is None else signature_of, moved.batch)
    inputs, keep = model_inputs(model, batch, signature_of=signature_of, count=moved.counted)
    if check_padded:
        check_tokens_once(model, batch, signature_of=signature_of)
    return moved, batch, inputs, keep


def check_tokens_once(
    model: nn.Module, batch: Mapping[str, Any], *, signature_of: nn.Module | None = None
) -> None:
    """Refuses a model whose tokens see later ones, or that runs no tokens (``check_causal_once``)."""
    further = set(batch) - _NOT_MODEL_INPUTS
    check_causal_once(model, batch, further=further, signature_of=signature_of)


def _is_own(position_ids: Tensor | None, mask: Tensor | None) -> bool:
    """Whether positions are others than one number for each token."""
    return position_ids is not None and mask is not None and position_ids.shape != mask.shape


def model_inputs(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    signature_of: nn.Module | None = None,
    count: bool = True,
) -> tuple[dict[str, Any], int]:
    """Arguments of the forward pass over a batch, and how many of its last columns to keep.

    Args:
        model: as in ``completion_logits``.
        batch: as in ``completion_logits``; or packed, with ``cu_seq_lens_q`` and the like; or of trees,
            see ``CompletionCollator``.
        signature_of: as in ``completion_logits``.
        count: count positions from the mask if the batch has none; False leaves it to the model.

    Returns:
        ``(inputs, keep)``: keyword arguments for ``model``, and ``logits_to_keep`` of a padded batch,
        all columns N of a packed one, all labels M of a shared one.

    Raises:
        ValueError: if the batch is shared and the model cannot run trees (see
            ``sharing_problem``); if padding moves tokens and the model takes no
            ``position_ids``, or may compute them from other entries; if there are neither positions
            nor a mask to count them from; if the batch has entries that the model's forward does not
            name; if a packed batch has an ``attention_mask`` or lacks a field, or the model would let
            its sequences see each other (see ``packing_problem``).
    """
    base = model if signature_of is None else signature_of
    inputs = _further_inputs(base, batch)
    if is_tree(batch):
        kept = {KEEP: batch[KEEP]} if accepts(base, KEEP) else {}
        return tree_inputs(base, batch) | kept, batch["labels"].shape[1]
    if is_packed(batch):
        return inputs | packed_inputs(base, batch), batch["input_ids"].shape[1]
    keep = int(batch.get("logits_to_keep", batch["input_ids"].shape[1]))
    if batch.get("attention_mask") is not None:
        inputs["attention_mask"] = batch["attention_mask"]
    further = sorted(n for n in inputs if n not in ("attention_mask", *_NO_POSITIONS))
    if COUNTS in batch and not counts_positions(base):
        # Of CompletionCollator: without a method of its own a model numbers images' tokens like others.
        further = []
    # Without explicit positions most models number the padding too, which moves every token.
    position_ids = _position_ids(batch)
    if batch.get(POSITIONS) is None and (further or counts_positions(base)):
        _check_counted_by_model(position_ids, batch["attention_mask"], base, further)
    elif batch.get(POSITIONS) is None and not count:
        pass
    elif accepts(base, POSITIONS):
        inputs[POSITIONS] = position_ids
    else:
        _check_positions_are_columns(position_ids, batch.get("attention_mask"), base)
    if accepts(base, KEEP):
        inputs[KEEP] = keep
    inputs |= {"input_ids": batch["input_ids"], "use_cache": False}
    return inputs, keep


def kept_rows(states: Tensor, keep: int, batch: Mapping[str, Any]) -> Tensor:
    """The rows of hidden states or logits that the loss takes.

    Args:
        states: [B, K, ·] of the columns that the model kept; of a packed batch in rows [R, W, ·]; of a
            shared one [R, U, ·], or [R, W, ·] if it kept all.
        keep: as ``model_inputs`` gave it.
        batch: which was run.

    Returns:
        [B, keep, ·]; of a shared batch [1, M, ·], a row for each label.
    """
    if CELLS in batch:
        return states.flatten(0, 1)[batch[CELLS]][None]
    if not is_tree(batch):
        return states[:, -keep:]
    columns = batch[KEEP]
    if states.shape[1] != len(columns):
        states = states[:, columns]
    return states.flatten(0, 1)[batch["label_rows"]][None]


def label_layout(batch: Mapping[str, Any]) -> dict[str, Any]:
    """``cu_seqlens`` and ``shift`` of a batch's labels, as the functions of the loss take them."""
    if is_tree(batch):
        return {"cu_seqlens": batch["label_offsets"], "shift": False}
    return {"cu_seqlens": batch.get("cu_seq_lens_q"), "shift": True}


def _further_inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    inputs = {name: x for name, x in batch.items() if name not in _NOT_MODEL_INPUTS}
    unknown = sorted(n for n in inputs if not takes(model, n))
    if unknown:
        raise ValueError(
            f"the batch holds {', '.join(unknown)}, which {type(base_model(model)).__name__}.forward "
            "does not take by name and the loss does not use; drop them in the data collator, or "
            "name them in the model's forward"
        )
    if inputs and is_tree(batch):
        raise ValueError(
            f"share_prefix=True, but the batch holds further model inputs ({', '.join(inputs)}), "
            f"which are not laid out as its trees are; {REMEDY}"
        )
    beside = sorted(set(inputs) - _NO_POSITIONS)
    if beside and is_packed(batch):
        raise ValueError(
            f"packing=True, but the batch holds further model inputs ({', '.join(beside)}), which "
            "check_packing would have to do without; use packing=False"
        )
    return inputs


def _position_ids(batch: Mapping[str, Any]) -> Tensor:
    position_ids: Tensor | None = batch.get("position_ids")
    if position_ids is not None:
        return position_ids
    mask: Tensor | None = batch.get("attention_mask")
    if mask is None or mask.dim() != 2:
        got = "no attention_mask" if mask is None else f"a {mask.dim()}-dim attention_mask"
        raise ValueError(
            f"the batch has no position_ids and {got}, so real tokens cannot be counted; give it "
            "attention_mask [B, T] or position_ids in the data collator"
        )
    return counted_positions(mask)


def _check_counted_by_model(
    position_ids: Tensor, mask: Tensor, model: Any, further: Sequence[str]
) -> None:
    """Whether a model that may count positions from its other inputs can be left to do so."""
    if not counts_positions(model) and _are_moved(position_ids, mask):
        raise ValueError(
            f"the batch is padded before its tokens and holds {', '.join(further)}, from which "
            f"{type(base_model(model)).__name__} may compute positions, but no position_ids; give the "
            "batch position_ids as the model counts them, or pad behind the tokens"
        )


def _check_positions_are_columns(position_ids: Tensor, mask: Tensor | None, model: Any) -> None:
    if _are_moved(position_ids, mask):
        raise ValueError(
            f"{type(base_model(model)).__name__}.forward takes no position_ids, but the batch is "
            "padded before its tokens: the model would count the padding and move them; use "
            "batches without padding (one sequence each), or let the model's forward take "
            "position_ids (and ignore them where it needs no positions)"
        )


def _are_moved(position_ids: Tensor, mask: Tensor | None) -> bool:
    """Whether a token is not in the column of its position."""
    columns = torch.arange(position_ids.shape[-1], device=position_ids.device)
    moved = position_ids.ne(columns)
    if mask is not None and mask.dim() == 2:
        moved = moved & mask.bool()
    return bool(moved.any())
