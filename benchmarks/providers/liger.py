"""Liger: the selective log-prob of its fused linear GRPO; Triton kernels on CUDA alone.

Its mean cross-entropy runs with fp32 accumulation, as documented for accuracy. Of GRPO's loss the part
without KL, token ratios clipped at 0.2: the nearest thing to TOPR it can express on logits.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import GRPO_CLIP, Case, LogProb, Provider, absent, per_token

LINK = "https://github.com/linkedin/Liger-Kernel/tree/main/benchmark/scripts"
CHUNKS = (4096, 8192, 16384)
CUDA_ONLY = ImportError("runs on CUDA only")


def _get(module: str, name: str, device: str) -> object:
    if device != "cuda":
        raise CUDA_ONLY
    return getattr(importlib.import_module(f"liger_kernel.{module}"), name)


def linear(device: str) -> dict[str, Provider]:
    """From hidden states."""
    return {
        "Liger selective log-prob": _selective(),
        "Liger scaled cross-entropy": _scaled(device),
        "Liger cross-entropy mean": _mean(device),
    }


def _selective() -> Provider:
    try:
        from liger_kernel.chunked_loss.fused_linear_ppo import (
            _ChunkedSelectiveLogProbFunction as Function,
        )
    except Exception as error:  # a broken install raises whatever it likes
        return absent(error)

    def at(chunk: int) -> LogProb:
        return lambda c, h, w: Function.apply(h, w, c.row_labels(), None, 1.0, chunk)

    return per_token({f"chunk {chunk}": at(chunk) for chunk in CHUNKS})


def _scaled(device: str) -> Provider:
    module = "ops.fused_linear_scaled_cross_entropy"
    try:
        function = _get(module, "LigerFusedLinearScaledCrossEntropyFunction", device)
    except Exception as error:
        return absent(error)
    return per_token({"default": lambda c, h, w: -function.apply(h, w, c.row_labels())})  # type: ignore[attr-defined]


def _mean(device: str) -> Provider:
    module = "ops.fused_linear_cross_entropy"
    try:
        function = _get(module, "LigerFusedLinearCrossEntropyFunction", device)
    except Exception as error:
        return absent(error)
    rest = (None, None, -100, 0.0, 0.0, "mean", None, False, torch.float32)

    def loss(c: Case, h: Tensor, w: Tensor) -> Tensor:
        out = function.apply(h, w, c.row_labels(), *rest)  # type: ignore[attr-defined]
        return out[0] if isinstance(out, tuple) else out

    return Provider({"fp32 accumulation": loss}, kind="mean")


def logits(device: str) -> dict[str, Provider]:
    """From logits."""
    return {
        "liger cross-entropy (mean loss)": _cross_entropy(device),
        "liger GRPO (token weights)": _grpo(device),
    }


def _cross_entropy(device: str) -> Provider:
    try:
        function = _get("ops.cross_entropy", "LigerCrossEntropyFunction", device)
    except Exception as error:
        return absent(error)

    def loss(c: Case, x: Tensor) -> Tensor:
        labels = F.pad(c.labels[:, 1:], (0, 1), value=-100).reshape(-1)  # type: ignore[attr-defined]
        out = function.apply(x.reshape(-1, x.shape[-1]), labels, None)  # type: ignore[attr-defined]
        return out[0] if isinstance(out, tuple) else out

    return Provider({"in place": loss}, kind="mean", inplace=True)


def _grpo(device: str) -> Provider:
    try:
        function = _get("transformers.grpo_loss", "triton_grpo_loss", device)
    except Exception as error:
        return absent(error)

    def loss(c: Case, x: Tensor) -> Tensor:
        labels = c.labels[:, 1:]  # type: ignore[attr-defined]
        mask = torch.ones_like(labels)
        old = c.token_mu[:, 1:]  # type: ignore[attr-defined]
        low = high = GRPO_CLIP
        out = function(x, old, None, labels, c.reward, mask, 1.0, 0.0, low, high, True)  # type: ignore[operator]
        return (out[0] if isinstance(out, tuple) else out).mean()

    return Provider({"in place, beta 0": loss}, kind="grpo", inplace=True)
