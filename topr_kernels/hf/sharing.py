"""One forward pass per prompt: the batch of a prefix tree, its masks, and the proof that it is exact.

A batch of B sequences with a completion of M tokens in all, laid out by ``topr_kernels.hf.tree``::

    input_ids, position_ids, tree_ends   [R, W]    rows of the tree; padding sees itself alone
    logits_to_keep                       [U]       columns in which a row predicts a label
    label_rows                           [M]       the row of each label, in the [R, U] that are kept
    labels, behavior_log_prob            [1, M]    completions one after another, in the records' order
    label_offsets                        [B + 1]   where each begins
    unshared                             the same records as a batch without sharing

The row that predicts the first token of a completion is the last of its prompt: samples of one prompt
have it in common, and the backward of the gather adds their gradients up. A completion's last token
predicts nothing and is not run.

Attention gets a mask of 4 dimensions (``sdpa``, ``eager``) or a ``BlockMask`` (``flex_attention``), for
each kind of layer its own. Models that ignore it, that carry a state, or that count positions by
themselves would be wrong without a word: hence ``prove_sharing``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

from topr_kernels.hf.heads import base_model
from topr_kernels.hf.packing import (
    DENSE,
    allowed_difference,
    attention_of,
    eval_mode,
    head_input,
    median_difference,
    state_problem,
    text_config,
    weights_dtype,
)
from topr_kernels.hf.signature import POSITIONS, counts_positions, takes
from topr_kernels.hf.tree import Tree, plant

logger = logging.getLogger(__name__)

#: Entries of a batch of trees, beside those that all batches have.
TREE = ("tree_ends", "label_rows", "label_offsets", "unshared")
_FLEX = "flex_attention"
#: Entries of a batch with a value for each label, and with one for each record.
_PER_TOKEN = ("labels", "behavior_log_prob", "segments")
_PER_RECORD = ("reward", "group", "sequence_weight", "behavior_known")
REMEDY = "use share_prefix=False"
BESIDE_IMAGES = (
    "records hold images: equal token ids may stand for different images, and models join the tokens of "
    "an image by positions or masks of their own"
)
#: Share of the tokens that must be saved; less is not worth masks of other kinds.
_LEAST_SAVED = 0.1
#: Tokens of a sequence that the proof runs at most: its masks are dense.
_PROOF_TOKENS = 4096
#: Parts of a sequence whose medians are compared: a window hides from the last tokens alone.
_PROOF_PARTS = 4


def is_tree(batch: Mapping[str, Any]) -> bool:
    """Whether a batch is one of prefix trees."""
    return batch.get("tree_ends") is not None


def tree_batch(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    batch: dict[str, Any],
    pad_token_id: int,
) -> dict[str, Any]:
    """The batch of trees, or the given one if it has next to nothing to share.

    Args:
        prompts: B prompts of at least one token id.
        completions: B completions, which may be empty.
        batch: of the same records, padded or packed.
        pad_token_id: fills the rows up.
    """
    sequences = [
        [*prompt, *completion[:-1]] for prompt, completion in zip(prompts, completions, strict=True)
    ]
    tree = plant(sequences)
    total = sum(map(len, sequences))
    if not any(completions) or sum(map(len, tree.tokens)) > (1 - _LEAST_SAVED) * total:
        return batch
    where = [
        (row, column)
        for prompt, completion, row, columns in zip(
            prompts, completions, tree.row, tree.columns, strict=True
        )
        for column in columns[len(prompt) - 1 :][: len(completion)]
    ]
    kept = sorted({column for _, column in where})
    place = {column: i for i, column in enumerate(kept)}
    lengths = [len(completion) for completion in completions]
    labels = _completion_places(batch, lengths)
    return {
        **_cells(tree, pad_token_id),
        "logits_to_keep": torch.tensor(kept),
        "label_rows": torch.tensor([row * len(kept) + place[column] for row, column in where]),
        "label_offsets": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        **{name: batch[name].flatten()[labels][None] for name in _PER_TOKEN if name in batch},
        **{name: batch[name] for name in _PER_RECORD if name in batch},
        "unshared": batch,
    }


def unshared(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The same records as a batch without sharing; one that shares nothing is returned as it is."""
    return dict(batch["unshared"]) if is_tree(batch) else dict(batch)


def saved_share(batch: Mapping[str, Any]) -> float:
    """Share of a batch's tokens, with their padding, that its trees need not run."""
    if not is_tree(batch):
        return 0.0
    run, whole = (int(b["input_ids"].numel()) for b in (batch, batch["unshared"]))
    return 1 - run / whole


def tree_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the forward pass over the rows of trees.

    Args:
        model: the unwrapped model, as ``signature_of`` in ``completion_logits``.
        batch: with ``input_ids``, ``position_ids`` and ``tree_ends`` [R, W].

    Returns:
        ``input_ids``, ``position_ids``, ``attention_mask`` (for layers of several kinds a mapping, as
        transformers takes it) and ``use_cache=False``.

    Raises:
        ValueError: if the model cannot run trees (see ``sharing_problem``).
    """
    problem = sharing_problem(model)
    if problem:
        raise ValueError(f"share_prefix=True, but {problem}; {REMEDY}")
    return {
        "input_ids": batch["input_ids"],
        POSITIONS: batch[POSITIONS],
        "attention_mask": tree_masks(model, batch["tree_ends"], batch[POSITIONS]),
        "use_cache": False,
    }


def tree_masks(model: nn.Module, ends: Tensor, depths: Tensor) -> Any:
    """Masks by which each token sees its ancestors and itself, within its layer's window or chunk.

    Args:
        model: the unwrapped model.
        ends: [R, W], ``tree_ends`` of the batch.
        depths: [R, W], its position ids.

    Returns:
        For layers of one kind their mask, for several a mapping from kind to mask. A mask is
        [R, 1, W, W], 0 where a token sees another and the least number elsewhere, in the dtype of the
        computation; for ``flex_attention`` a ``BlockMask``.
    """
    config = text_config(model)
    rows, width = ends.shape
    masks: dict[str, Any] = {}
    for kind in _layer_kinds(config):
        visible = _visible(config, kind, ends, depths)
        if attention_of(model) == _FLEX:
            masks[kind] = create_block_mask(visible, rows, None, width, width, str(ends.device))
            continue
        column = torch.arange(width, device=ends.device)
        row = torch.arange(rows, device=ends.device)[:, None, None]
        seen = visible(row, row, column[:, None], column)
        dtype = _dtype(model, ends.device.type)
        # One mask for all layers. Of a bool, sdpa would make and keep a float one in each.
        mask = torch.zeros(seen.shape, dtype=dtype, device=ends.device)
        masks[kind] = mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
    return next(iter(masks.values())) if len(masks) == 1 else masks


def sharing_problem(model: nn.Module) -> str | None:
    """Says why this model cannot run trees, or None if nothing is known against it.

    What it says follows from the config and the signature of the forward pass; only ``prove_sharing``
    measures.
    """
    model_name = type(base_model(model)).__name__
    config = text_config(model)
    if config is None:
        return f"{model_name} has no config, which would tell its attention and windows"
    attention = attention_of(model)
    if attention not in DENSE | {_FLEX}:
        return (
            f"attn_implementation={attention!r} of {model_name} takes no mask that is not causal; sdpa, "
            "eager and flex_attention (the fastest on a GPU) do"
        )
    if not takes(model, POSITIONS):
        return f"{model_name}.forward names no position_ids, by which a tree tells depths"
    if counts_positions(model):
        return f"{model_name} has positions of several dimensions, which it counts from its other inputs"
    if problem := state_problem(model):
        return problem
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return f"{model_name} has layers that see a window of columns, not of positions"
    if getattr(config, "output_router_logits", False):
        return (
            f"the balancing loss of {model_name}'s routers (output_router_logits=True) would count the "
            "tokens of a prompt once instead of once for every completion"
        )
    return None


#: Base model -> attention implementation -> what ``prove_sharing`` said last.
_proven: WeakKeyDictionary[nn.Module, dict[str, str | None]] = WeakKeyDictionary()


def prove_sharing(
    model: nn.Module, tokens: Tensor, *, signature_of: nn.Module | None = None
) -> str | None:
    """Runs a sequence in a tree and alone, compares its hidden states, and remembers what it found.

    The tree forks in the middle of the sequence: between its two halves stand the tokens of the second
    one in reverse, as the other child of the first. The second pass runs the sequence alone, without any
    mask. Compared is each token's input to the head behind the fork: the norm of the difference relative
    to the norm, as a median over each quarter of the tokens, and of those the largest. The limits are
    those of ``check_packing``.

    The model runs in eval mode and without gradients, in the dtype, autocast and attention of the
    caller; its modules get their modes back. All processes of a sharded model must call it, and do the
    same whatever their tokens.

    Args:
        model: as in ``completion_logits``.
        tokens: [T], a sequence of the batch, on the model's device. The longest is best: windows are
            seen only where it reaches beyond them. At most 4096 tokens of it are run.
        signature_of: as in ``completion_logits``; needed for every wrapper but PEFT's.

    Returns:
        What is wrong, or None if the tree is exact.
    """
    unwrapped = model if signature_of is None else signature_of
    problem = sharing_problem(unwrapped) or _measured(model, unwrapped, tokens)
    _proven.setdefault(base_model(unwrapped), {})[attention_of(unwrapped)] = problem
    return problem


def shares_prefix(model: nn.Module, tokens: Tensor) -> bool:
    """Whether a model runs trees exactly, which is proven once; if not, the reason is logged once."""
    problem = _problem_once(model, lambda: tokens, None)
    if problem:
        warn_unshared(problem)
    return problem is None


def check_sharing_once(
    model: nn.Module, batch: Mapping[str, Any], *, signature_of: nn.Module | None = None
) -> None:
    """Raises ``ValueError`` unless this model has passed ``prove_sharing`` with its attention."""
    problem = _problem_once(model, lambda: longest_sequence(batch), signature_of)
    if problem:
        raise ValueError(f"share_prefix=True, but {problem}; {REMEDY}")


def longest_sequence(batch: Mapping[str, Any]) -> Tensor:
    """Token ids [T] of the longest sequence of a padded, packed or shared batch."""
    batch = unshared(batch)
    ids: Tensor = batch["input_ids"]
    offsets = batch.get("cu_seq_lens_q")
    if offsets is not None:
        longest = int(offsets.diff().argmax())
        return ids[0, int(offsets[longest]) : int(offsets[longest + 1])]
    mask = batch.get("attention_mask")
    if mask is None:
        return ids[0]
    longest = int(mask.sum(1).argmax())
    return ids[longest][mask[longest].bool()]


@cache
def warn_unshared(problem: str) -> None:
    """Logs, once, why a model runs every prompt anew."""
    logger.warning("Every completion runs its prompt anew, since %s", problem)


def _problem_once(
    model: nn.Module, tokens: Callable[[], Tensor], signature_of: nn.Module | None
) -> str | None:
    unwrapped = model if signature_of is None else signature_of
    known = _proven.get(base_model(unwrapped), {})
    attention = attention_of(unwrapped)
    if attention not in known:
        return prove_sharing(model, tokens(), signature_of=signature_of)
    return known[attention]


@torch.no_grad()
def _measured(model: nn.Module, unwrapped: nn.Module, tokens: Tensor) -> str | None:
    """What the two passes of ``prove_sharing`` show."""
    # Another shape would be another graph to compile.
    model = getattr(model, "_orig_mod", model)
    alone = tokens[:_PROOF_TOKENS]
    fork = len(alone) // 2
    tree, begin = _forked(alone.tolist(), fork)
    batch = {name: x.to(tokens.device) for name, x in _cells(tree, 0).items()}
    model_name = type(base_model(unwrapped)).__name__
    with eval_mode(unwrapped):
        # A model that such a mask breaks still works without sharing.
        try:
            in_tree, _ = head_input(model, unwrapped, tree_inputs(unwrapped, batch))
        except Exception as error:
            return f"{model_name} given the mask of a tree raises {type(error).__name__}: {error}"
        expected, eps = head_input(model, unwrapped, {"input_ids": alone[None], "use_cache": False})
    parts = zip(
        in_tree[begin:].tensor_split(_PROOF_PARTS),
        expected[fork:].tensor_split(_PROOF_PARTS),
        strict=True,
    )
    differences = [median_difference(a, b) for a, b in parts if len(a)]
    allowed = allowed_difference(eps)
    # Written so that NaN fails.
    if all(x <= allowed for x in differences):
        return None
    return (
        f"{model_name} with attn_implementation={attention_of(unwrapped)!r} does not keep the branches "
        "of a tree apart: beside another branch the hidden states of a token differ by "
        f"{max(differences):.1e} of their norm (median) from those of the sequence alone; expected at "
        f"most {allowed:.1e}, from rounding"
    )


def _completion_places(batch: Mapping[str, Any], lengths: Sequence[int]) -> Tensor:
    """Where the tokens of all completions are in a padded or packed batch, flattened."""
    offsets = batch.get("cu_seq_lens_q")
    if offsets is not None:
        ends = offsets[1:].tolist()
        return torch.cat([torch.arange(j - n, j) for j, n in zip(ends, lengths, strict=True)])
    mask = batch["attention_mask"]
    columns = [row.nonzero()[:, 0] for row in mask]
    return torch.cat(
        [
            i * mask.shape[1] + places[len(places) - n :]
            for i, (places, n) in enumerate(zip(columns, lengths, strict=True))
        ]
    )


def _cells(tree: Tree, pad_token_id: int) -> dict[str, Tensor]:
    """The rows of a tree as tensors; padding is a token at depth 0 that sees itself alone."""
    shape = len(tree.tokens), tree.width
    ids, depths = torch.full(shape, pad_token_id), torch.zeros(shape, dtype=torch.int64)
    ends = torch.arange(1, tree.width + 1).repeat(shape[0], 1)
    for i, row in enumerate(tree.tokens):
        ids[i, : len(row)] = torch.tensor(row)
        depths[i, : len(row)] = torch.tensor(tree.depths[i])
        ends[i, : len(row)] = torch.tensor(tree.ends[i])
    return {"input_ids": ids, POSITIONS: depths, "tree_ends": ends}


def _forked(sequence: list[int], fork: int) -> tuple[Tree, int]:
    """A sequence with another branch at ``fork``, before its own, and the column of its own."""
    tail = sequence[fork:]
    # Another first token, so that they part there.
    branch = [int(tail[0] == 0), *tail[:0:-1]]
    begin, end = fork + len(branch), fork + 2 * len(branch)
    depths = [*range(begin), *range(fork, fork + len(tail))]
    ends = [end] * fork + [begin] * len(branch) + [end] * len(tail)
    tokens = sequence[:fork] + branch + tail
    return Tree([tokens], [depths], [ends], [], []), begin


def _visible(
    config: Any, kind: str, ends: Tensor, depths: Tensor
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether query column ``q`` of row ``b`` sees column ``k``, in layers of that kind."""

    def ancestor(b: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
        behind: Tensor = q < ends[b, k]
        return behind & (k <= q)

    def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        near: Tensor = depths[b, q] - depths[b, k] < config.sliding_window
        return near & ancestor(b, h, q, k)

    def chunk(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        size: int = config.attention_chunk_size
        same: Tensor = depths[b, q] // size == depths[b, k] // size
        return same & ancestor(b, h, q, k)

    return {"sliding_attention": window, "chunked_attention": chunk}.get(kind, ancestor)


def _layer_kinds(config: Any) -> list[str]:
    """Kinds of a model's attention layers, as transformers names them."""
    layers = getattr(config, "layer_types", None)
    if layers:
        return sorted(set(layers))
    # As transformers.masking_utils.create_masks_for_generate reads it.
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return ["sliding_attention"]
    if getattr(config, "attention_chunk_size", None):
        return ["chunked_attention"]
    return ["full_attention"]


def _dtype(model: nn.Module, device: str) -> torch.dtype:
    """The dtype that attention computes in."""
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weights_dtype(base_model(model))
