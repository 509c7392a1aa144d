"""verl's fused linear cross-entropy kernel (Triton); CUDA only, where verl is installed."""

from __future__ import annotations

from torch import Tensor

from benchmarks.case import Case, Provider, absent, per_token

LINK = "https://github.com/verl-project/verl/blob/main/verl/utils/kernel/linear_cross_entropy.py"


def linear(device: str) -> dict[str, Provider]:
    """From hidden states."""
    name = "verl fused kernel"
    if device != "cuda":
        return {name: Provider(missing="runs on CUDA only")}
    try:
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy
    except Exception as error:  # a broken install raises whatever it likes
        return {name: absent(error)}

    def log_prob(c: Case, h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, c.row_labels(), 1.0, "none")[0]

    return {name: per_token({'reduction="none"': log_prob})}
