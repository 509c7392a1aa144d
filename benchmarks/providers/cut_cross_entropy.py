"""Apple's cut cross-entropy: on CUDA exact and filtered, elsewhere its torch twin."""

from __future__ import annotations

from typing import Any

from benchmarks.case import LogProb, Provider, absent, per_token

LINK = "https://github.com/apple/ml-cross-entropy"


def linear(device: str) -> dict[str, Provider]:
    """From hidden states."""
    names = ("cut cross-entropy", "cut cross-entropy filtered")
    if device != "cuda":
        names = ("cut cross-entropy (torch)",)
    try:
        from cut_cross_entropy import linear_cross_entropy as cce
    except Exception as error:  # a broken install raises whatever it likes
        return dict.fromkeys(names, absent(error))

    def at(impl: str, eps: Any) -> LogProb:
        return lambda c, h, w: (
            -cce(h, w, c.row_labels(), reduction="none", filter_eps=eps, impl=impl)
        )

    if device != "cuda":
        return {names[0]: per_token({"torch_compile": at("torch_compile", None)})}
    return {
        names[0]: per_token({"exact": at("cce", None)}),
        names[1]: per_token({'filter_eps="auto"': at("cce", "auto")}),
    }
