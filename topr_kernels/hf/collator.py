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
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topr_kernels.hf.heads import Head, base_model, capture_hidden, check_logits
from topr_kernels.layout import IGNORE_INDEX

#: What a batch holds for the loss, or for the functions below; the rest is the model's.
_NOT_MODEL_INPUTS = frozenset(
    {
        "input_ids",
        "attention_mask",
        "position_ids",
        "labels",
        "behavior_log_prob",
        "reward",
        "logits_to_keep",
        "prefix_length",
    }
)


@dataclass
class CompletionCollator:
    """Pads prompt + completion records to a batch for ``TOPRTrainer``.

    Each record is a mapping with ``prompt_token_ids`` (P int, P >= 1), ``completion_token_ids``
    (C int, may be empty: such a sequence is not counted), ``behavior_log_prob`` (C float, the
    log-probability of each completion token under the policy that sampled it) and ``reward``
    (float, signed). Token ids are used as they are: re-tokenising a completion drifts.

    The batch holds, for B records and T columns:

    - ``input_ids`` [B, T] int64, ``attention_mask`` [B, T] int64, ``position_ids`` [B, T] int64;
    - ``labels`` [B, T] int64, unshifted, -100 on prompt and padding. They come from the lengths of
      the records, never from comparing ids with the pad id: where pad and EOS are the same token
      the completion's EOS stays scored;
    - ``behavior_log_prob`` [B, T] fp32, aligned with the labels, 0 where unscored;
    - ``reward`` [B] fp32;
    - ``logits_to_keep`` int, K + 1; ``prefix_length`` int, columns of the common prefix.

    Args:
        pad_token_id: id that fills the padding; any id of the vocabulary will do.
        share_prefix: lay the common prefix of the prompts out in the first columns, to be computed
            once per batch. Exact for models whose attention reaches all earlier tokens.

    Raises:
        ValueError: on a call, if a record lacks a field, has an empty prompt, or its
            ``behavior_log_prob`` is not as long as its completion.
    """

    pad_token_id: int
    share_prefix: bool = False

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Pads B records to one batch; see the class for its fields."""
        for i, record in enumerate(features):
            _check(record, i)
        prompts = [list(record["prompt_token_ids"]) for record in features]
        completions = [list(record["completion_token_ids"]) for record in features]
        rows = [p + c for p, c in zip(prompts, completions, strict=True)]
        prefix = common_prefix_length(prompts) if self.share_prefix else 0
        batch: dict[str, Any] = dict(pad_left(rows, self.pad_token_id, prefix))
        width = batch["input_ids"].shape[1]
        labels = torch.full((len(rows), width), IGNORE_INDEX, dtype=torch.int64)
        behavior = torch.zeros(len(rows), width, dtype=torch.float32)
        for i, (record, completion) in enumerate(zip(features, completions, strict=True)):
            if completion:
                labels[i, -len(completion) :] = torch.tensor(completion)
                behavior[i, -len(completion) :] = torch.tensor(
                    record["behavior_log_prob"], dtype=torch.float32
                )
        batch["labels"] = labels
        batch["behavior_log_prob"] = behavior
        batch["reward"] = torch.tensor([float(r["reward"]) for r in features])
        batch["logits_to_keep"] = max(map(len, completions)) + 1
        batch["prefix_length"] = prefix
        return batch


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


def completion_logits(
    model: torch.nn.Module, batch: Mapping[str, Any], *, signature_of: torch.nn.Module | None = None
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
        [B, logits_to_keep, V] in the model's dtype.

    Raises:
        ValueError: if the batch has a shared prefix and the model cannot share it (see
            ``check_prefix_sharing``); if padding moves tokens and the model takes no
            ``position_ids``; if there are neither positions nor a mask to count them from; if the
            batch has entries that the model's forward does not name.
    """
    inputs, keep = _model_inputs(model, batch, signature_of)
    logits: Tensor = model(**inputs).logits
    return logits[:, -keep:]


def completion_hidden(
    model: torch.nn.Module,
    batch: Mapping[str, Any],
    *,
    signature_of: torch.nn.Module | None = None,
    check: Head | None = None,
) -> Tensor:
    """What the model's head would make ``completion_logits`` of; the head's product is not made.

    Args:
        model: as in ``completion_logits``.
        batch: as in ``completion_logits``.
        signature_of: as in ``completion_logits``; needed if the model is wrapped but by PEFT.
        check: the model's head, to be compared with the logits the model makes of up to 4 rows.

    Returns:
        [B, logits_to_keep, D], attached to the graph: for ``linear_topr_loss`` with the head of
        ``find_head``.

    Raises:
        ValueError: as ``completion_logits``, ``find_head`` and ``check_logits``.
    """
    inputs, keep = _model_inputs(model, batch, signature_of)
    unwrapped = model if signature_of is None else signature_of
    with capture_hidden(unwrapped, sample=check is not None) as capture:
        logits = model(**inputs).logits
    if check is not None:
        check_logits(check, capture, logits)
    return capture.hidden[:, -keep:]


def _model_inputs(
    model: torch.nn.Module, batch: Mapping[str, Any], signature_of: torch.nn.Module | None
) -> tuple[dict[str, Any], int]:
    """Arguments of the forward pass over a batch, and how many of its last columns to keep."""
    keep = int(batch.get("logits_to_keep", batch["input_ids"].shape[1]))
    prefix = int(batch.get("prefix_length", 0))
    base = model if signature_of is None else signature_of
    inputs = _further_inputs(base, batch)
    if batch.get("attention_mask") is not None:
        inputs["attention_mask"] = batch["attention_mask"]
    # Without explicit positions most models number the padding too, which moves every token.
    position_ids = _position_ids(batch)
    if _accepts(base, "position_ids"):
        inputs["position_ids"] = position_ids[:, prefix:]
    else:
        _check_positions_are_columns(position_ids, batch.get("attention_mask"), base)
    if _accepts(base, "logits_to_keep"):
        inputs["logits_to_keep"] = keep
    if prefix:
        check_prefix_sharing(base)
        inputs["past_key_values"] = prefix_cache(model, batch["input_ids"], prefix)
    inputs |= {"input_ids": batch["input_ids"][:, prefix:], "use_cache": bool(prefix)}
    return inputs, keep


def _accepts(model: Any, name: str) -> bool:
    """Whether a wrapper and the model in it take a keyword argument, by name or as ``**kwargs``."""
    # PEFT's forward hides the base model's arguments behind **kwargs.
    for part in (model, base_model(model)):
        parameters = inspect.signature(part.forward).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if name not in parameters and not open_ended:
            return False
    return True


def _names(model: Any, name: str) -> bool:
    """Whether the model itself knows an argument: what ``**kwargs`` takes may be ignored."""
    return name in inspect.signature(base_model(model).forward).parameters


def _further_inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    inputs = {name: x for name, x in batch.items() if name not in _NOT_MODEL_INPUTS}
    unknown = sorted(n for n in inputs if not (_names(model, n) and _accepts(model, n)))
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


def prefix_cache(model: torch.nn.Module, input_ids: Tensor, prefix: int) -> Any:
    """Keys and values of the first ``prefix`` columns, computed once and repeated for every row.

    Gradients flow back through the repetition: the prefix gets the sum over the rows.
    """
    first = input_ids[:1, :prefix]
    # The prefix's own logits are not needed; one is the least that models offer.
    cache = model(
        input_ids=first, attention_mask=torch.ones_like(first), use_cache=True, logits_to_keep=1
    ).past_key_values
    cache.batch_repeat_interleave(input_ids.shape[0])
    return cache


def check_prefix_sharing(model: torch.nn.Module) -> None:
    """Raises ``ValueError`` where running a common prefix once would not be exact."""
    problem = prefix_sharing_problem(model)
    if problem:
        raise ValueError(
            f"share_prefix=True, but {problem}: the padding after a shared prefix would not be "
            "exact; use share_prefix=False"
        )


def prefix_sharing_problem(model: torch.nn.Module) -> str | None:
    """Says why this model cannot run a common prefix once, or None if it can."""
    config: Any = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds:
        return f"the model has layers of type {', '.join(sorted(kinds))}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"the model attends to a window of {config.sliding_window} tokens only"
    needed = ("logits_to_keep", "past_key_values", "position_ids")
    missing = [name for name in needed if not (_names(model, name) and _accepts(model, name))]
    if missing:
        return f"the model's forward does not take {', '.join(missing)}"
    if model.training and _recomputes_activations(model):
        return "gradient checkpointing keeps no keys and values"
    return None


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
