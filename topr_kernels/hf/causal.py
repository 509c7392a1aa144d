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
from topr_kernels.hf.signature import positions

#: Tokens of a row that is run; the second half differs between the two rows.
_TOKENS = 32


@torch.no_grad()
def check_causal(
    model: nn.Module, batch: Mapping[str, Any], *, signature_of: nn.Module | None = None
) -> None:
    """Runs two rows of 32 tokens that part in the middle, and compares what comes before.

    Compared is each token's input to the head, with the limits of ``check_packing``. The model runs in
    eval mode and without gradients; its modules get their modes back, and no random number is drawn. All
    processes of a sharded model must call it.

    Args:
        model: as in ``completion_logits``.
        batch: with ``input_ids`` [B, T], on the model's device; tokens of its first row are run.
        signature_of: as in ``completion_logits``; needed for every wrapper but PEFT's.

    Raises:
        ValueError: if the model is an encoder and a decoder; if its forward cannot run rows of tokens,
            or returns other logits than a row for each token; if a token sees later ones.
    """
    unwrapped = model if signature_of is None else signature_of
    # Another shape would be another graph to compile.
    model = getattr(model, "_orig_mod", model)
    base = base_model(unwrapped)
    kind = type(base).__name__
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{kind} is an encoder and a decoder: its logits belong to decoder_input_ids, not to the "
            "tokens of a batch; expected a decoder alone, such as AutoModelForCausalLM makes"
        )
    rows = _rows(batch["input_ids"][0], positions(unwrapped))
    inputs = {"input_ids": rows, "use_cache": False}
    with eval_mode(unwrapped):
        # Whatever a model asks for beside tokens, its own error says it best.
        try:
            shape = tuple(model(**inputs).logits.shape)
        except Exception as error:
            raise ValueError(
                f"{kind} cannot run rows of tokens alone: {type(error).__name__}: {error}; give the "
                "batch what its forward asks for, if it is a language model"
            ) from error
        if shape[:2] != tuple(rows.shape) or len(shape) != 3:
            raise ValueError(
                f"{kind} gave logits of shape {shape} for input_ids of shape {tuple(rows.shape)}; "
                "expected a row of the vocabulary for each token"
            )
        states, eps = head_input(model, unwrapped, inputs)
    if len(states) != rows.numel():
        return
    half = rows.shape[1] // 2
    a, b = (row[:half] for row in states.chunk(2))
    difference, allowed = _mean_difference(a, b), allowed_difference(eps)
    # Written so that NaN fails.
    if not difference <= allowed:
        raise ValueError(
            f"{kind} lets tokens see later ones: where these differ, its hidden states differ by "
            f"{difference:.1e} of their norm (mean); expected at most {allowed:.1e}, from rounding. It "
            "would be given what it is to predict: build it with is_decoder=True where its config has "
            "that (BERT and its kin), or give the batch token_type_ids that end its prefix (PaliGemma)"
        )


#: Base model -> the attention implementations with which it has passed ``check_causal``.
_passed: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def check_causal_once(
    model: nn.Module, batch: Mapping[str, Any], *, signature_of: nn.Module | None = None
) -> None:
    """``check_causal``, unless the model has passed it with its attention implementation."""
    unwrapped = model if signature_of is None else signature_of
    passed = _passed.setdefault(base_model(unwrapped), set())
    if attention_of(unwrapped) not in passed:
        check_causal(model, batch, signature_of=signature_of)
        passed.add(attention_of(unwrapped))


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
