"""What a model makes of plain rows of tokens, measured once: does a token see only what is before it?

The log-prob of a completion is the sum over its tokens, each given those before it. A model that sees
later tokens (an encoder that is not told to be a decoder, a prefix model that is not told where the
prefix ends) is given what it is to predict, and no error says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from itertools import cycle, islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from topr_kernels.hf.heads import base_model
from topr_kernels.hf.images import KINDS, TENSORS
from topr_kernels.hf.packing import (
    allowed_difference,
    attention_of,
    eval_mode,
    head_input,
    token_differences,
)
from topr_kernels.hf.signature import positions, takes, virtual_tokens

#: Tokens of a row that is run; the second half differs between the two rows.
_TOKENS = 32


def causal_problem(
    model: nn.Module, batch: Mapping[str, Any], *, signature_of: nn.Module | None = None
) -> str | None:
    """Runs two rows of 32 tokens that part in the middle, and compares what comes before.

    Compared is each token's input to the head, as a mean over the tokens, with the limits of
    ``check_packing``. The model runs in eval mode and without gradients; its modules get their modes
    back, and no random number is drawn. All processes of a sharded model must call it.

    Args:
        model: as in ``completion_logits``.
        batch: with ``input_ids`` [B, T], on the model's device; tokens of its first row are run, with
            the kinds (``token_type_ids``, ...) that its scored tokens have, if the model takes them.
        signature_of: as in ``completion_logits``; needed for every wrapper but PEFT's.

    Returns:
        What is wrong: the model is an encoder and a decoder, its forward cannot run a row of tokens, or
        returns other logits than a row for each token, or a token sees later ones. Or None.
    """
    unwrapped = model if signature_of is None else signature_of
    return _decoder_problem(unwrapped) or _measured(model, unwrapped, batch)[0]


def _decoder_problem(unwrapped: nn.Module) -> str | None:
    """What is wrong with a model that is an encoder and a decoder; no forward is needed to tell."""
    base = base_model(unwrapped)
    if not getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return None
    return (
        f"{type(base).__name__} is an encoder and a decoder: its logits belong to decoder_input_ids, "
        "not to the tokens of a batch; expected a decoder alone, such as AutoModelForCausalLM makes"
    )


@torch.no_grad()
def _measured(
    model: nn.Module, unwrapped: nn.Module, batch: Mapping[str, Any]
) -> tuple[str | None, bool]:
    """What two rows show to be wrong, and whether it is that tokens see later ones."""
    # Another shape would be another graph to compile.
    model = getattr(model, "_orig_mod", model)
    model_name = type(base_model(unwrapped)).__name__
    rows = _rows(_tokens(batch), positions(unwrapped))
    width, half = rows.shape[1], rows.shape[1] // 2
    kinds = {name: _token_kinds(name, batch, width) for name in _taken(unwrapped, batch)}
    shapes: list[tuple[int, ...]] = []
    hook = model.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.logits.shape)))
    states = []
    try:
        with eval_mode(unwrapped):
            # One row at a time, as packed batches have them.
            for row in rows:
                inputs = {"input_ids": row[None], "use_cache": False, **kinds}
                hidden, eps = head_input(model, unwrapped, inputs)
                states.append(hidden)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # Its own error tells best what else the model asks for.
        problem = (
            f"{model_name} cannot run a row of tokens alone: {type(error).__name__}: {error}; give the "
            "batch what its forward asks for, if it is a language model"
        )
        return problem, False
    finally:
        hook.remove()
    # Virtual tokens of an adapter stand before the others.
    expected = (1, width + virtual_tokens(unwrapped))
    if len(shapes[0]) != 3 or shapes[0][:2] not in (expected, (1, width)):
        problem = (
            f"{model_name} gave logits of shape {shapes[0]} for input_ids of shape (1, {width}); "
            "expected a row of the vocabulary for each token"
        )
        return problem, False
    # Of several streams (ProphetNet) it is not known which row is whose.
    if len(states[0]) != shapes[0][1]:
        return None, False
    difference = float(token_differences(*(x[-width:][:half] for x in states)).mean())
    allowed = allowed_difference(eps)
    # Written so that NaN fails.
    if difference <= allowed:
        return None, False
    problem = (
        f"{model_name} lets tokens see later ones: where these differ, its hidden states differ by "
        f"{difference:.1e} of their norm (mean); expected at most {allowed:.1e}, from rounding. It "
        "would be given what it is to predict: build it with is_decoder=True where its config has that "
        "(BERT and its kin), or give the batch token_type_ids that end its prefix (PaliGemma)"
    )
    return problem, True


#: Base model -> attention implementation and names of kinds -> what ``_measured`` said.
_told: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], tuple[str | None, bool]]] = (
    WeakKeyDictionary()
)


def check_causal_once(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    further: Set[str],
    signature_of: nn.Module | None = None,
) -> None:
    """Runs ``causal_problem`` on a model's first batch, and raises ``ValueError`` with what it said.

    It always runs, since all processes of a sharded model must. Its result does not count where further
    entries of the batch may change it: a model that sees later tokens is refused only if all of them
    are images or kinds of tokens, and one that cannot run tokens alone only if there are none. An
    encoder with a decoder is always refused.

    Args:
        model: as in ``causal_problem``.
        batch: as in ``causal_problem``.
        further: names of the batch's entries that go to the model beside tokens, mask and positions.
        signature_of: as in ``causal_problem``.
    """
    unwrapped = model if signature_of is None else signature_of
    if problem := _decoder_problem(unwrapped):
        raise ValueError(problem)
    told = _told.setdefault(base_model(unwrapped), {})
    key = (str(attention_of(unwrapped)), *_taken(unwrapped, batch))
    if key not in told:
        told[key] = _measured(model, unwrapped, batch)
    problem, sees_later = told[key]
    counts = further <= TENSORS.union(KINDS) if sees_later else not further
    if problem is not None and counts:
        raise ValueError(problem)


def _taken(unwrapped: nn.Module, batch: Mapping[str, Any]) -> list[str]:
    """Names of the kinds of tokens that a batch has and the model takes."""
    return [name for name in KINDS if name in batch and takes(unwrapped, name)]


def _tokens(batch: Mapping[str, Any]) -> Tensor:
    """Tokens to run: those of the first row; of one with images only the scored ones, which are text."""
    ids: Tensor = batch["input_ids"][0]
    labels = batch.get("labels")
    if labels is not None and labels.shape[1:] == ids.shape and not TENSORS.isdisjoint(batch):
        scored = ids[labels[0] != -100]
        return scored if len(scored) else ids
    return ids


def _token_kinds(name: str, batch: Mapping[str, Any], width: int) -> Tensor:
    """Kinds [1, width] for a row that is run: those of the first scored tokens, or zeros."""
    kinds: Tensor = batch[name]
    labels = batch.get("labels")
    if labels is not None and labels.shape == kinds.shape:
        scored = kinds[labels != -100][:width].tolist()
        if scored:
            return kinds.new_tensor([list(islice(cycle(scored), width))])
    return kinds.new_zeros(1, width)


def _rows(tokens: Tensor, most: int | None) -> Tensor:
    """Two rows that begin alike and part in the middle."""
    width = max(2, min(_TOKENS, most or _TOKENS))
    row = list(islice(cycle(tokens.tolist()), width))
    half = width // 2
    other = row[:half] + row[: half - 1 : -1]
    other[half] = int(row[half] == 0)
    return tokens.new_tensor([row, other])
