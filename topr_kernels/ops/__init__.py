"""Operator contracts: schemas, fakes and autograd. Imports torch alone; ``kernels`` implement them."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of logits, sums and results: fp64 for fp64 inputs, fp32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def savable(x: Tensor | None) -> Tensor | None:
    """An input that autograd may save: a copy of one that was made under ``torch.inference_mode``."""
    return x.clone() if x is not None and x.is_inference() else x
