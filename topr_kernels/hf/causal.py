"""What a model makes of plain rows of tokens, measured once: does a token see only what is before it?

The log-prob of a completion is the sum over its tokens, each given those before it. A model that sees
later tokens (an encoder that is not told to be a decoder, a prefix model that is not told where the
prefix ends) is given what it is to predict, and no error says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle, islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from topr_kernels.hf.heads import base_model
from topr_kernels.hf.packing import (
    allowed_difference,
    attention_of,
    eval_mode,
    head_input,
)
from topr_kernels.hf.signature import positions, virtual_tokens

#: Tokens of a row that is run; the second half differs between the two rows.
_TOKENS = 32


@torch.no_grad()
def causal_problem(
    model: nn.Module, batch: Mapping[str, Any], *, signature_of: nn.Module | None = None
) -> str | None:
    """Runs two rows of 32 tokens that part in the middle, and compares what comes before.

    Compared is each token's input to the head, as a mean over the tokens, with the limits of
    ``check_packing``. The model runs in eval mode and without gradients; its modules get their modes
    back, and no random number is drawn. All processes of a sharded model must call it.

    Args:
        model: as in ``completion_logits``.
        batch: with ``input_ids`` [B, T], on the model's device; tokens of its first row are run.
        signature_of: as in ``completion_logits``; needed for every wrapper but PEFT's.

    Returns:
        What is wrong: the model is an encoder and a decoder, its forward cannot run a row of tokens, or
        returns other logits than a row for each token, or a token sees later ones. Or None.
    """
    unwrapped = model if signature_of is None else signature_of
    # Another shape would be another graph to compile.
    model = getattr(model, "_orig_mod", model)
    base = base_model(unwrapped)
    kind = type(base).__name__
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return (
            f"{kind} is an encoder and a decoder: its logits belong to decoder_input_ids, not to the "
            "tokens of a batch; expected a decoder alone, such as AutoModelForCausalLM makes"
        )
    rows = _rows(batch["input_ids"][0], positions(unwrapped))
    width, half = rows.shape[1], rows.shape[1] // 2
    shapes: list[tuple[int, ...]] = []
    hook = model.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.logits.shape)))
    states = []
    try:
        with eval_mode(unwrapped):
            # One row at a time, as packed batches have them.
            for row in rows:
                inputs = {"input_ids": row[None], "use_cache": False}
                found, eps = head_input(model, unwrapped, inputs)
                states.append(found)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # What a model asks for beside tokens, its own error says best.
        return (
            f"{kind} cannot run a row of tokens alone: {type(error).__name__}: {error}; give the batch "
            "what its forward asks for, if it is a language model"
        )
    finally:
        hook.remove()
    # Virtual tokens of an adapter stand before the others.
    expected = (1, width + virtual_tokens(unwrapped))
    if len(shapes[0]) != 3 or shapes[0][:2] not in (expected, (1, width)):
        return (
            f"{kind} gave logits of shape {shapes[0]} for input_ids of shape (1, {width}); expected a "
            "row of the vocabulary for each token"
        )
    # Of several streams (ProphetNet) it is not known which row is whose.
    if len(states[0]) != shapes[0][1]:
        return None
    difference = _mean_difference(*(x[-width:][:half] for x in states))
    allowed = allowed_difference(eps)
    # Written so that NaN fails.
    if difference <= allowed:
        return None
    return (
        f"{kind} lets tokens see later ones: where these differ, its hidden states differ by "
        f"{difference:.1e} of their norm (mean); expected at most {allowed:.1e}, from rounding. It "
        "would be given what it is to predict: build it with is_decoder=True where its config has that "
        "(BERT and its kin), or give the batch token_type_ids that end its prefix (PaliGemma)"
    )


#: Base model -> attention implementation -> what ``causal_problem`` said.
_found: WeakKeyDictionary[nn.Module, dict[str, str | None]] = WeakKeyDictionary()


def check_causal_once(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    tokens_alone: bool,
    signature_of: nn.Module | None = None,
) -> None:
    """Asks ``causal_problem`` of a model's first batch, and raises ``ValueError`` with what it said.

    Of a batch that holds more than tokens it does not raise: with an image, or token types, a model may
    see others. It asks all the same, since processes of a sharded model must run alike.
    """
    unwrapped = model if signature_of is None else signature_of
    found = _found.setdefault(base_model(unwrapped), {})
    attention = attention_of(unwrapped)
    if attention not in found:
        found[attention] = causal_problem(model, batch, signature_of=signature_of)
    if tokens_alone and found[attention] is not None:
        raise ValueError(found[attention])


def _mean_difference(found: Tensor, alone: Tensor) -> float:
    """Mean over the tokens of the norm of a difference relative to the norm; both [T, D] fp32."""
    norms = alone.norm(dim=-1).clamp(min=torch.finfo(alone.dtype).tiny)
    return float(((found - alone).norm(dim=-1) / norms).mean())


def _rows(tokens: Tensor, most: int | None) -> Tensor:
    """Two rows that begin alike and part in the middle."""
    width = max(2, min(_TOKENS, most or _TOKENS))
    row = list(islice(cycle(tokens.tolist()), width))
    half = width // 2
    other = row[:half] + row[: half - 1 : -1]
    other[half] = int(row[half] == 0)
    return tokens.new_tensor([row, other])
