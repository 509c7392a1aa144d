"""The tokens that all prompts of a batch begin with, run once before sampling, with their cache.

Sampling goes on from keys and values, so it keeps those of the common prefix. Training and scoring need
none, and share prompts by prefix trees (``topr_kernels.hf.sharing``). The cache is exact where attention
reaches all earlier tokens; a window would count the padding behind the prefix, which trees do not have.
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


def prefix_cache(model: nn.Module, input_ids: Tensor, prefix: int) -> dict[str, Any]:
    """Keys and values of the first ``prefix`` columns, computed once and repeated for every row.

    Args:
        model: runs the prefix; ``caches_prefix`` says whether it can.
        input_ids: [B, T], equal in the first ``prefix`` columns.
        prefix: number of columns, at least 1.

    Returns:
        The keyword argument that passes them to the model, under the name that its forward has.
    """
    first = input_ids[:1, :prefix]
    # The prefix's own logits are not needed; one column of them is the fewest that models compute.
    outputs = model(
        input_ids=first, attention_mask=torch.ones_like(first), use_cache=True, **{KEEP: 1}
    )
    prefixes = cache_of(outputs)
    prefixes.batch_repeat_interleave(input_ids.shape[0])
    return {str(cache_argument(model)): prefixes}


def cache_problem(model: nn.Module) -> str | None:
    """Says why this model cannot keep a common prefix, or None if it can."""
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
    return None


def caches_prefix(model: nn.Module) -> bool:
    """Whether this model can keep a common prefix; if not, the reason is logged, once."""
    problem = cache_problem(model)
    if problem:
        _log_once(
            f"Sampling runs the common prefix of a batch's prompts once per prompt: {problem}"
        )
    return problem is None


@cache
def _log_once(message: str) -> None:
    logger.warning(message)
