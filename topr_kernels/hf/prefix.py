"""The tokens that all prompts of a batch begin with, run through the model once.

Exact for models whose attention reaches all earlier tokens; ``prefix_sharing_problem`` names the others.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from topr_kernels.hf.heads import base_model
from topr_kernels.hf.signature import (
    CACHE,
    KEEP,
    POSITIONS,
    cache_argument,
    cache_of,
    counts_from_padding_id,
    takes,
    virtual_tokens,
)

logger = logging.getLogger(__name__)


def common_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """Number of tokens that all prompts begin with, leaving each at least one token of its own."""
    length = min(map(len, prompts)) - 1
    first = prompts[0]
    for prompt in prompts[1:]:
        length = next((i for i in range(length) if prompt[i] != first[i]), length)
    return length


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
        The keyword argument that passes them to the model, under the name that its forward has.

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
    # The prefix's own logits are not needed; one column of them is the fewest that models compute.
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
    if virtual_tokens(model):
        return "an adapter puts virtual tokens in front of the prefix and of what follows it"
    if counts_from_padding_id(model) is not None:
        return "the model counts its positions from its padding id on"
    if model.training and _recomputes_activations(model):
        return "gradient checkpointing keeps no keys and values"
    return None


def shares_prefix(model: nn.Module) -> bool:
    """Whether this model can run a common prefix once; if not, the reason is logged, once."""
    problem = prefix_sharing_problem(model)
    if problem:
        _log_once(f"The common prefix of a batch's prompts is run once per prompt: {problem}")
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
