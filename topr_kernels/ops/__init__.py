"""Operator contracts: schemas, fakes and autograd. Imports torch alone; ``kernels`` implement them."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of logits, sums and results: fp64 for fp64 inputs, fp32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32
