"""What a model makes of padding, measured once on a few tokens, and moving it behind the tokens.

Attention hides padding from the tokens, and position ids do not count it. But layers that carry a
state see what stands before a token, some models count positions by themselves (RoBERTa from its
padding id on, BART by columns), and PEFT's prompt learning drops the position ids. To all of these
padding *behind* the tokens is harmless, as long as no token sees a later one::

    as it is        [ padding | prompt | completion ]    position_ids from the mask
    behind          [ prompt | completion | padding ]    the model counts
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle, islice
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from topr_kernels.hf.heads import base_model
from topr_kernels.hf.packing import (
    allowed_difference,
    attention_of,
    eval_mode,
    head_input,
    median_difference,
    other_layers,
)
from topr_kernels.hf.signature import (
    POSITIONS,
    accepts,
    counts_positions,
    positions,
    virtual_tokens,
)

#: Columns of the batch that is run, of which the padded row's tokens take half.
_COLUMNS = 32
#: Entries of a batch that have a column for each token.
_PER_TOKEN = (
    "input_ids",
    "attention_mask",
    "labels",
    "behavior_log_prob",
    "segments",
    "token_type_ids",
    "mm_token_type_ids",
    "inputs_embeds",
    POSITIONS,
)


class PaddingCheck(NamedTuple):
    """What ``check_padding`` measured.

    Attributes:
        as_it_is: median relative difference of hidden states, padded in front, from the row alone.
        behind: the same, padded behind, the model counting its positions.
        allowed: what rounding explains.
        state: what of the model carries a state over padding, or counts it; None if nothing is known.
    """

    as_it_is: float
    behind: float
    allowed: float
    state: str | None

    # Comparisons are written so that NaN fails.
    @property
    def exact_behind(self) -> bool:
        """Whether padding behind the tokens is harmless."""
        return self.behind <= self.allowed

    @property
    def exact_as_it_is(self) -> bool:
        """Whether padding in front is harmless.

        A state may fade within the few tokens that are run: a model known to have one gets its padding
        behind, if that is exact.
        """
        harmless = self.as_it_is <= self.allowed
        return harmless and (self.state is None or not self.exact_behind)


@torch.no_grad()
def check_padding(
    model: nn.Module, batch: Mapping[str, Any], *, signature_of: nn.Module | None = None
) -> PaddingCheck:
    """Runs a row of 16 tokens alone, padded in front and padded behind, and compares its hidden states.

    Compared is each token's input to the head, with the limits of ``check_packing``. The model runs in
    eval mode and without gradients; its modules get their modes back, and no random number is drawn. All
    processes of a sharded model must call it, and then run alike, whatever their batches.

    Args:
        model: as in ``completion_logits``.
        batch: with ``input_ids`` and ``attention_mask`` [B, T], on the model's device; tokens of its
            first and of its last row are run.
        signature_of: as in ``completion_logits``; needed for every wrapper but PEFT's.
    """
    unwrapped = model if signature_of is None else signature_of
    # Another shape would be another graph to compile.
    model = getattr(model, "_orig_mod", model)
    width = max(2, min(_COLUMNS, positions(unwrapped) or _COLUMNS))
    ids, mask = batch["input_ids"], batch["attention_mask"] != 0
    tokens = [list(islice(cycle(_tokens(ids[i], mask[i])), width)) for i in (0, -1)]
    short = tokens[0][: width // 2]
    unseen = ids[~mask][:1].tolist() or short[:1]
    padding, n = unseen * (width - len(short)), len(short)

    def padded(row: list[int], real: slice) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": ids.new_tensor([row, tokens[1]]), "use_cache": False}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0] = 0
        inputs["attention_mask"][0, real] = 1
        return inputs

    front = padded(padding + short, slice(width - n, width))
    # PEFT's prompt learning drops positions, with a warning.
    own = counts_positions(unwrapped) or virtual_tokens(unwrapped)
    if accepts(unwrapped, POSITIONS) and not own:
        front[POSITIONS] = counted_positions(front["attention_mask"])
    back = padded(short + padding, slice(0, n))
    single = {"input_ids": ids.new_tensor([short]), "use_cache": False}
    with eval_mode(unwrapped):
        alone, eps = head_input(model, unwrapped, single)
        in_front, in_back = (
            # Before the columns there may be virtual tokens.
            head_input(model, unwrapped, inputs)[0].chunk(2)[0][-width:]
            for inputs in (front, back)
        )
    alone = alone[-n:]
    return PaddingCheck(
        median_difference(in_front[-n:], alone),
        median_difference(in_back[:n], alone),
        allowed_difference(eps),
        _state(unwrapped),
    )


#: Unwrapped model -> what ``check_padding`` found, by attention implementation and number of virtual
#: tokens, which adapters change.
_checks: WeakKeyDictionary[nn.Module, dict[tuple[str, int], PaddingCheck]] = WeakKeyDictionary()


def check_padding_once(
    model: nn.Module, batch: Mapping[str, Any], *, signature_of: nn.Module | None = None
) -> PaddingCheck:
    """``check_padding``, or what it found when this model was first asked for."""
    unwrapped = model if signature_of is None else signature_of
    key = (attention_of(unwrapped), virtual_tokens(unwrapped))
    checks = _checks.setdefault(unwrapped, {})
    if key not in checks:
        checks[key] = check_padding(model, batch, signature_of=signature_of)
    return checks[key]


def check_unpadded(model: nn.Module, batch: Mapping[str, Any], check: PaddingCheck) -> None:
    """Refuses a padded batch for a model whose tokens see padding on both sides.

    Raises:
        ValueError: naming the model and the remedy.
    """
    if bool((batch["attention_mask"] == 0).any()):
        raise ValueError(
            f"the batch is padded, but {type(base_model(model)).__name__} gives a token other hidden "
            f"states beside padding: in front of it they differ by {check.as_it_is:.1e} of their norm "
            f"(median) from those of the row alone, behind it by {check.behind:.1e}; expected at most "
            f"{check.allowed:.1e}, from rounding; use batches without padding: of one record each "
            "(per_device_train_batch_size=1, batch_size=1), or packing=True where the model can"
        )


class Moved(NamedTuple):
    """A batch whose padding is behind its tokens.

    Attributes:
        batch: with ``logits_to_keep``, and without ``position_ids`` that only count tokens.
        column: [B, K], where in its last columns each of the last K of the original is; or None if the
            batch is the original.
    """

    batch: Mapping[str, Any]
    column: Tensor | None

    @property
    def counted(self) -> bool:
        """Whether positions must be counted here, since the model would count the padding in front."""
        return self.column is None

    def restored(self, values: Tensor) -> Tensor:
        """Values of the batch's last columns, [B, L, ...], in the original's, [B, K, ...]."""
        if self.column is None:
            return values
        trailing = (1,) * (values.dim() - 2)
        return values.take_along_dim(self.column.reshape(*self.column.shape, *trailing), dim=1)


def moved_behind(batch: Mapping[str, Any]) -> Moved:
    """Moves the padding of each row behind its tokens, whose order stays.

    Args:
        batch: with ``attention_mask`` [B, T].
    """
    mask: Tensor = batch["attention_mask"]
    width = mask.shape[1]
    # 0 keeps all columns, as in transformers.
    keep = int(batch.get("logits_to_keep", width)) or width
    order = (mask == 0).long().argsort(dim=1, stable=True)
    everywhere = Moved(batch, order)
    moved = {
        name: everywhere.restored(x)
        if name in _PER_TOKEN and isinstance(x, Tensor) and x.shape[:2] == mask.shape
        else x
        for name, x in batch.items()
    }
    if POSITIONS in batch and _only_count(batch[POSITIONS], mask):
        del moved[POSITIONS]
    column = order.argsort(dim=1)[:, width - keep :]
    first = int(column.min())
    return Moved(moved | {"logits_to_keep": width - first}, column - first)


def counted_positions(mask: Tensor) -> Tensor:
    """Numbers of the tokens of each row from 0, [B, T] int64; padding in front counts as 0."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def _only_count(position_ids: Tensor | None, mask: Tensor) -> bool:
    if position_ids is None:
        return True
    return bool(((position_ids == counted_positions(mask)) | (mask == 0)).all())


def _tokens(ids: Tensor, mask: Tensor) -> list[int]:
    """The tokens of a row; of an empty one its padding."""
    return ids[mask].tolist() or ids.tolist()


def _state(model: nn.Module) -> str | None:
    """What is known to make padding in front of the tokens visible to them."""
    base = base_model(model)
    others = other_layers(model)
    if others:
        return f"layers of type {', '.join(others)}"
    if getattr(base, "_is_stateful", False):
        return "a state"
    return "virtual tokens of an adapter" if virtual_tokens(model) else None
