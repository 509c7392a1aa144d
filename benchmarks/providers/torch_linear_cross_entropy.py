"""``F.linear_cross_entropy``: the per-token form TOPR needs, and the cheaper mean."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.case import LogProb, Loss, Provider, absent, per_token

LINK = "https://github.com/pytorch/pytorch/pull/175039"
CHUNKS = (128, 512, 2048)


def linear(device: str) -> dict[str, Provider]:
    """Without options it materialises the logits: the reference path, one of the settings."""
    names = ("F.linear_cross_entropy", "F.linear_cross_entropy mean")
    if not hasattr(F, "linear_cross_entropy"):
        return dict.fromkeys(names, absent(ImportError(f"not in torch {torch.__version__}")))
    from torch.nn import LinearCrossEntropyOptions as Options

    settings = {"no options": None, "default": Options()}
    settings |= {f"{rows} rows a chunk": Options(batch_chunk_size=rows) for rows in CHUNKS}

    def none(options: Any) -> LogProb:
        return lambda c, h, w: (
            -F.linear_cross_entropy(h, w, c.row_labels(), reduction="none", options=options)
        )

    def mean(options: Any) -> Loss:
        return lambda c, h, w: F.linear_cross_entropy(h, w, c.row_labels(), options=options)

    return {
        names[0]: per_token({k: none(o) for k, o in settings.items()}),
        names[1]: Provider({k: mean(o) for k, o in settings.items()}, kind="mean"),
    }
