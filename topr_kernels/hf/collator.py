"""From prompt + completion records to a batch, and the forward pass that fits its layout.

A batch is right-aligned: every row ends with its completion, so all logits that are scored lie in
the last ``K + 1`` columns (K: the longest completion) and the prompts' logits are never computed::

    [ padding | prompt | completion ]
                      ^ last K + 1 columns

With ``share_prefix=True`` the tokens that all prompts of the batch begin with (a few-shot prompt,
a system message) come first and are run through the model once instead of once per row::

    [ common prefix | padding | rest of the prompt | completion ]

Attention never sees the padding and the position ids do not count it, so both layouts give every
token the log-probability it has alone.

With ``packing=True`` there is no padding: the sequences lie in one row, one after another, and the
attention keeps them apart (``topr_kernels.hf.packing``)::

    [ prompt | completion | prompt | completion | ... ]
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from topr_kernels.hf.heads import Head, base_model, capture_hidden, check_logits
from topr_kernels.hf.packing import is_packed, pack, packed_inputs
from topr_kernels.hf.signature import (
    CACHE,
    KEEP,
    POSITIONS,
    VARLEN,
    accepts,
    cache_argument,
    cache_of,
    takes,
)
from topr_kernels.layout import IGNORE_INDEX

logger = logging.getLogger(__name__)

#: What a batch holds for the loss, or for the functions below; the rest is the model's.
_NOT_MODEL_INPUTS = frozenset(
    {
        "input_ids",
        "attention_mask",
        "position_ids",
        "labels",
        "behavior_log_prob",
        "reward",
        "group",
        "logits_to_keep",
        "prefix_length",
        *VARLEN,
    }
)


@dataclass
class CompletionCollator:
    """Makes a batch of prompt + completion records for ``TOPRTrainer``.

    Each record is a mapping with ``prompt_token_ids`` (P int, P >= 1), ``completion_token_ids``
    (C int, may be empty: such a sequence is not counted), ``behavior_log_prob`` (C float, the
    log-probability of each completion token under the policy that sampled it) and ``reward``
    (float, signed). Token ids are used as they are: re-tokenising a completion drifts.
    ``prepare_records`` makes such records from text and messages. Optional are ``group`` (int or str:
    the question, of which there are several samples) and ``finish_reason`` ("length": cut off).

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
        share_prefix: lay the common prefix of the prompts out in the first columns, to be computed
            once per batch. Exact for models whose attention reaches all earlier tokens.
        packing: lay the sequences out in one row without padding, for models that keep them apart
            (see ``check_packing``).
        mask_truncated: do not score completions that were cut off: their ``finish_reason`` is
            "length" or, where no record of the batch has one, they do not end with ``eos_token_id``.
            Such a sequence is not counted, as if it were empty.
        eos_token_id: id, or ids, that end a completion; for ``mask_truncated``.

    Raises:
        ValueError: if ``packing`` and ``share_prefix`` are both asked for; on a call, if a record
            lacks a field, has an empty prompt, or its ``behavior_log_prob`` is not as long as its
            completion, if only some have a ``group`` or ``finish_reason``, or if it is not known
            which completions were cut off.
        TypeError: on a call, if a ``group`` is neither int nor str, or both occur.
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
        for i, record in enumerate(features):
            _check(record, i)
        prompts = [list(record["prompt_token_ids"]) for record in features]
        completions = [list(record["completion_token_ids"]) for record in features]
        rows = [p + c for p, c in zip(prompts, completions, strict=True)]
        scored = [not cut for cut in self._truncated(features)]
        labels = [
            [IGNORE_INDEX] * len(p) + (c if keep else [IGNORE_INDEX] * len(c))
            for p, c, keep in zip(prompts, completions, scored, strict=True)
        ]
        behavior = [
            [0.0] * len(p) + (list(r["behavior_log_prob"]) if keep else [0.0] * len(c))
            for p, c, keep, r in zip(prompts, completions, scored, features, strict=True)
        ]
        batch: dict[str, Any]
        if self.packing:
            batch = pack(rows)
            batch["labels"] = torch.tensor([x for row in labels for x in row])[None]
            flat = [x for row in behavior for x in row]
            batch["behavior_log_prob"] = torch.tensor(flat, dtype=torch.float32)[None]
        else:
            prefix = common_prefix_length(prompts) if self.share_prefix else 0
            batch = dict(pad_left(rows, self.pad_token_id, prefix))
            width = batch["input_ids"].shape[1]
            batch["labels"] = _right_align(labels, width, IGNORE_INDEX, torch.int64)
            batch["behavior_log_prob"] = _right_align(behavior, width, 0.0, torch.float32)
            kept = [len(c) for c, keep in zip(completions, scored, strict=True) if keep]
            batch["logits_to_keep"] = max(kept, default=0) + 1
            batch["prefix_length"] = prefix
        batch["reward"] = torch.tensor([float(r["reward"]) for r in features])
        groups = _optional(features, "group")
        if groups is not None:
            batch["group"] = _groups(groups)
        return batch

    def _truncated(self, features: Sequence[Mapping[str, Any]]) -> list[bool]:
        if not self.mask_truncated:
            return [False] * len(features)
        reasons = _optional(features, "finish_reason")
        if reasons is not None:
            return [reason == "length" for reason in reasons]
        if self.eos_token_id is None:
            raise ValueError(
                "mask_truncated=True, but the records have no finish_reason and eos_token_id is None, "
                "so it is not known which completions were cut off; give the records a finish_reason "
                '("length" for those), or CompletionCollator the eos_token_id that ends a completion'
            )
        ids = self.eos_token_id
        ends = set(ids) if isinstance(ids, Sequence) else {ids}
        completions = [list(record["completion_token_ids"]) for record in features]
        return [not tokens or tokens[-1] not in ends for tokens in completions]


def common_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Number of tokens that all prompts begin with, leaving each at least one token of its own."""
    length = min(map(len, prompts)) - 1
    first = prompts[0]
    for prompt in prompts[1:]:
        length = next((i for i in range(length) if prompt[i] != first[i]), length)
    return length


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


def completion_logits(
    model: nn.Module, batch: Mapping[str, Any], *, signature_of: nn.Module | None = None
) -> Tensor:
    """Logits of the last ``logits_to_keep`` columns of a batch, and of no others.

    Equal to ``model(...).logits[:, -logits_to_keep:]`` of a forward pass over whole rows. Models
    whose forward takes no ``logits_to_keep`` compute all logits, which are then sliced.

    Args:
        model: a Hugging Face causal language model, wrapped (PEFT, DistributedDataParallel) or not.
        batch: what ``CompletionCollator`` returned, on the model's device, or another collator's
            batch. Without ``logits_to_keep`` all columns are kept; without ``position_ids`` they
            are counted from ``attention_mask`` [B, T]. Further entries (``token_type_ids``, ...)
            go to the model if its forward names them.
        signature_of: the unwrapped model, to be asked which arguments its forward takes. A PEFT
            model is asked for its base model, whose arguments it passes on.

    Returns:
        [B, logits_to_keep, V] in the model's dtype; of a packed batch [1, N, V].

    Raises:
        ValueError: as ``model_inputs``.
    """
    inputs, keep = model_inputs(model, batch, signature_of=signature_of)
    logits: Tensor = model(**inputs).logits
    return logits[:, -keep:]


def completion_hidden(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    signature_of: nn.Module | None = None,
    check: Head | None = None,
) -> Tensor:
    """What the model's head would make ``completion_logits`` of; the head's product is not made.

    Args:
        model: as in ``completion_logits``.
        batch: as in ``completion_logits``.
        signature_of: as in ``completion_logits``; needed if the model is wrapped but by PEFT.
        check: the model's head, to be compared with the logits the model makes of up to 4 rows.

    Returns:
        [B, logits_to_keep, D], of a packed batch [1, N, D], attached to the graph: for
        ``linear_topr_loss`` with the head of ``find_head``.

    Raises:
        ValueError: as ``completion_logits``, ``find_head`` and ``check_logits``.
    """
    inputs, keep = model_inputs(model, batch, signature_of=signature_of)
    unwrapped = model if signature_of is None else signature_of
    with capture_hidden(unwrapped, sample=check is not None) as capture:
        logits = model(**inputs).logits
    if check is not None:
        check_logits(check, capture, logits)
    return capture.hidden[:, -keep:]


def model_inputs(
    model: nn.Module, batch: Mapping[str, Any], *, signature_of: nn.Module | None = None
) -> tuple[dict[str, Any], int]:
    """Arguments of the forward pass over a batch, and how many of its last columns to keep.

    Args:
        model: as in ``completion_logits``; runs the common prefix, if there is one.
        batch: as in ``completion_logits``, or packed: with ``cu_seq_lens_q`` and the like, see
            ``CompletionCollator``.
        signature_of: as in ``completion_logits``.

    Returns:
        ``(inputs, keep)``: keyword arguments for ``model``, and ``logits_to_keep`` of a padded batch,
        all columns N of a packed one.

    Raises:
        ValueError: if the batch has a shared prefix and the model cannot share it (see
            ``check_prefix_sharing``); if padding moves tokens and the model takes no
            ``position_ids``; if there are neither positions nor a mask to count them from; if the
            batch has entries that the model's forward does not name; if the batch is packed and
            has an ``attention_mask``, lacks a field, or the model would let its sequences see each
            other (see ``packing_problem``).
    """
    base = model if signature_of is None else signature_of
    inputs = _further_inputs(base, batch)
    if is_packed(batch):
        return inputs | packed_inputs(base, batch), batch["input_ids"].shape[1]
    keep = int(batch.get("logits_to_keep", batch["input_ids"].shape[1]))
    prefix = int(batch.get("prefix_length", 0))
    if batch.get("attention_mask") is not None:
        inputs["attention_mask"] = batch["attention_mask"]
    # Without explicit positions most models number the padding too, which moves every token.
    position_ids = _position_ids(batch)
    if accepts(base, POSITIONS):
        inputs[POSITIONS] = position_ids[:, prefix:]
    else:
        _check_positions_are_columns(position_ids, batch.get("attention_mask"), base)
    if accepts(base, KEEP):
        inputs[KEEP] = keep
    if prefix:
        check_prefix_sharing(base)
        inputs |= prefix_cache(model, batch["input_ids"], prefix, signature_of=base)
    inputs |= {"input_ids": batch["input_ids"][:, prefix:], "use_cache": bool(prefix)}
    return inputs, keep


def _further_inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    inputs = {name: x for name, x in batch.items() if name not in _NOT_MODEL_INPUTS}
    unknown = sorted(n for n in inputs if not takes(model, n))
    if unknown:
        raise ValueError(
            f"the batch holds {', '.join(unknown)}, which {type(base_model(model)).__name__}.forward "
            "does not take by name and the loss does not use; drop them in the data collator, or "
            "name them in the model's forward"
        )
    if inputs and batch.get("prefix_length", 0):
        raise ValueError(
            f"share_prefix=True, but the batch holds further model inputs ({', '.join(inputs)}), "
            "which a prefix that is run once would not see; use share_prefix=False"
        )
    return inputs


def _position_ids(batch: Mapping[str, Any]) -> Tensor:
    position_ids: Tensor | None = batch.get("position_ids")
    if position_ids is not None:
        return position_ids
    mask: Tensor | None = batch.get("attention_mask")
    if mask is None or mask.dim() != 2:
        found = "no attention_mask" if mask is None else f"a {mask.dim()}-dim attention_mask"
        raise ValueError(
            f"the batch has no position_ids and {found}, so real tokens cannot be counted; give it "
            "attention_mask [B, T] or position_ids in the data collator"
        )
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def _check_positions_are_columns(position_ids: Tensor, mask: Tensor | None, model: Any) -> None:
    columns = torch.arange(position_ids.shape[-1], device=position_ids.device)
    moved = position_ids.ne(columns)
    if mask is not None and mask.dim() == 2:
        moved = moved & mask.bool()
    if bool(moved.any()):
        raise ValueError(
            f"{type(base_model(model)).__name__}.forward takes no position_ids, but the batch is "
            "padded before its tokens: the model would count the padding and move them; use "
            "batches without padding (one sequence each), or let the model's forward take "
            "position_ids (and ignore them where it needs no positions)"
        )


def prefix_cache(
    model: nn.Module, input_ids: Tensor, prefix: int, *, signature_of: nn.Module | None = None
) -> dict[str, Any]:
    """Keys and values of the first ``prefix`` columns, computed once and repeated for every row.

    Gradients flow back through the repetition: the prefix gets the sum over the rows.

    Args:
        model: runs the prefix.
        input_ids: [B, T], equal in the first ``prefix`` columns.
        prefix: number of columns, at least 1.
        signature_of: as in ``completion_logits``.

    Returns:
        The keyword argument that gives them to the model, under the name that it knows.

    Raises:
        ValueError: if the model takes no keys and values.
    """
    base = model if signature_of is None else signature_of
    name = cache_argument(base)
    if name is None:
        raise ValueError(
            f"{type(base_model(base)).__name__}.forward takes no {' or '.join(CACHE)}, which hold the "
            "prefix; use share_prefix=False"
        )
    first = input_ids[:1, :prefix]
    # The prefix's own logits are not needed; one is the least that models offer.
    outputs = model(
        input_ids=first, attention_mask=torch.ones_like(first), use_cache=True, **{KEEP: 1}
    )
    prefixes = cache_of(outputs)
    prefixes.batch_repeat_interleave(input_ids.shape[0])
    return {name: prefixes}


def check_prefix_sharing(model: nn.Module) -> None:
    """Raises ``ValueError`` where running a common prefix once would not be exact."""
    problem = prefix_sharing_problem(model)
    if problem:
        raise ValueError(
            f"share_prefix=True, but {problem}: the padding after a shared prefix would not be "
            "exact; use share_prefix=False"
        )


def prefix_sharing_problem(model: nn.Module) -> str | None:
    """Says why this model cannot run a common prefix once, or None if it can."""
    config: Any = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds:
        return f"the model has layers of type {', '.join(sorted(kinds))}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"the model attends to a window of {config.sliding_window} tokens only"
    missing = [name for name in (KEEP, POSITIONS) if not takes(model, name)]
    if cache_argument(model) is None:
        missing.append(" or ".join(CACHE))
    if missing:
        return f"the model's forward does not take {', '.join(missing)}"
    if getattr(base_model(model), "_is_stateful", False):
        return "the model carries a state, which padding after the prefix would change"
    if model.training and _recomputes_activations(model):
        return "gradient checkpointing keeps no keys and values"
    return None


def shares_prefix(model: nn.Module) -> bool:
    """Whether ``prefix_sharing_problem`` knows none; a problem is logged, once."""
    problem = prefix_sharing_problem(model)
    if problem:
        _log_once(f"What the prompts of a batch have in common is run once per prompt: {problem}")
    return problem is None


@cache
def _log_once(message: str) -> None:
    logger.warning(message)


def _recomputes_activations(model: Any) -> bool:
    # transformers renames is_gradient_checkpointing; the old name warns where the new one exists.
    name = "is_activation_checkpointing"
    if not hasattr(model, name):
        name = "is_gradient_checkpointing"
    return bool(getattr(model, name, False))


def _check(record: Mapping[str, Any], i: int) -> None:
    for name in ("prompt_token_ids", "completion_token_ids", "behavior_log_prob", "reward"):
        if record.get(name) is None:
            raise ValueError(
                f"record {i} of the batch has no {name!r}; it has {sorted(record)}. Score the "
                "records first, and keep remove_unused_columns=False"
            )
    if len(record["prompt_token_ids"]) == 0:
        raise ValueError(
            f"record {i} of the batch: prompt_token_ids is empty, so nothing predicts the first "
            "token of the completion; give the prompt at least a BOS token"
        )
    scored, tokens = len(record["behavior_log_prob"]), len(record["completion_token_ids"])
    if scored != tokens:
        raise ValueError(
            f"record {i} of the batch: behavior_log_prob has {scored} entries for {tokens} "
            "completion tokens; one per token is expected"
        )


def _optional(features: Sequence[Mapping[str, Any]], name: str) -> list[Any] | None:
    """A column that all records have, or None where none has it."""
    values = [record.get(name) for record in features]
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
    return torch.tensor([int(x) for x in values])
