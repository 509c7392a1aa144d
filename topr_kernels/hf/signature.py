"""What a model's forward pass takes. Every detection by the name of an argument is in this module.

Such a detection fails silently when upstream renames the argument, as transformers 5.24 did
(``past_key_values`` became ``cache``). So each name is listed once, and a test compares the list with
the installed transformers.
"""

from __future__ import annotations

import inspect
from typing import Any

from topr_kernels.hf.heads import base_model

#: Names of the argument and of the output that hold keys and values, the newest first.
CACHE = ("cache", "past_key_values")
#: Number of last columns of the logits to compute.
KEEP = "logits_to_keep"
#: Position of each token in its sequence; without it a model counts the padding.
POSITIONS = "position_ids"
#: The method of models whose positions have several dimensions (Qwen-VL kinds), of them or their body.
OWN_POSITIONS = "get_rope_index"
#: How many tokens a sequence may have, in a configuration.
POSITION_COUNT = "max_position_embeddings"
#: A table of learned positions; with a padding id its positions begin behind that (RoBERTa kinds).
POSITION_TABLE = "position_embeddings"
#: Offsets of packed sequences, by transformers' names.
VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def accepts(model: Any, name: str) -> bool:
    """Whether a wrapper and the model in it take a keyword argument, by name or as ``**kwargs``."""
    # PEFT's forward hides the base model's arguments behind **kwargs.
    for part in (model, base_model(model)):
        parameters = inspect.signature(part.forward).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if name not in parameters and not open_ended:
            return False
    return True


def names(model: Any, name: str) -> bool:
    """Whether the model's forward names an argument: what ``**kwargs`` takes may be ignored."""
    return name in inspect.signature(base_model(model).forward).parameters


def takes(model: Any, name: str) -> bool:
    """Whether a model's forward names an argument, and its wrapper passes it on."""
    return names(model, name) and accepts(model, name)


def counts_positions(model: Any) -> bool:
    """Whether a model has its own method of counting positions, of several dimensions."""
    base = base_model(model)
    parts = (base, getattr(base, "model", None))
    return any(callable(getattr(part, OWN_POSITIONS, None)) for part in parts)


def cache_argument(model: Any) -> str | None:
    """The name under which a model takes keys and values, or None if it takes none."""
    return next((name for name in CACHE if takes(model, name)), None)


def cache_of(outputs: Any) -> Any:
    """Keys and values in a model's outputs, under their name in the installed transformers.

    Raises:
        ValueError: if they hold none.
    """
    # The newest name first: asking for the old one warns where both exist.
    name = next((name for name in CACHE if hasattr(outputs, name)), None)
    if name is None:
        raise ValueError(
            f"the model gave a {type(outputs).__name__} without {' or '.join(CACHE)}, which hold the "
            "prefix"
        )
    return getattr(outputs, name)


def virtual_tokens(model: Any) -> int:
    """Tokens that PEFT's prompt learning puts in front of every row; it then drops position ids."""
    adapter: Any = getattr(model, "active_peft_config", None)
    if not getattr(adapter, "is_prompt_learning", False):
        return 0
    return int(adapter.num_virtual_tokens)


def counts_from_padding_id(model: Any) -> int | None:
    """The padding id of a table of positions (RoBERTa kinds), which then begin behind it; or None."""
    for path, module in base_model(model).named_modules():
        padding = getattr(module, "padding_idx", None)
        if path.endswith(POSITION_TABLE) and padding is not None:
            return int(padding)
    return None


def positions(model: Any) -> int | None:
    """Tokens that a sequence may have: those a model's table or its training has room for.

    None if its configuration does not tell. What a scaling of rotary positions adds is counted; what
    virtual tokens of an adapter take is not, nor the positions up to a table's padding id.
    """
    config: Any = getattr(base_model(model), "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    most = getattr(config, POSITION_COUNT, None)
    if not isinstance(most, int):
        return None
    scaling = (
        getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    )
    # Of models with several kinds of layers each has its own.
    scalings = [scaling, *scaling.values()] if isinstance(scaling, dict) else []
    for x in scalings:
        if isinstance(x, dict) and isinstance(x.get("factor"), (int, float)):
            original = x.get("original_max_position_embeddings") or most
            most = max(most, int(original * x["factor"]))
    padding = counts_from_padding_id(model)
    return most - virtual_tokens(model) - (0 if padding is None else padding + 1)


def vocabulary(model: Any) -> int | None:
    """Number of token ids that a model embeds; None if it does not tell."""
    embeddings = getattr(base_model(model), "get_input_embeddings", None)
    try:
        table = embeddings() if embeddings is not None else None
    except NotImplementedError:
        return None
    return getattr(table, "num_embeddings", None)
