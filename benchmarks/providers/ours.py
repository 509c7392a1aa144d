"""This package: every implementation, exact and at a tolerance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case, LinearCase, Loss, Provider, absent
from topr_kernels import kernels, linear_topr_loss, topr_loss
from topr_kernels.kernels import native_library

LINK = ""
LOG2_TAU = {"cpu": (-10,), "cuda": (-10, -16)}
#: What "auto" is not, per kind of device; "auto" itself is the one without a name.
OTHERS = {"cpu": ("torch",), "cuda": ("torch",)}
LOGITS = {"cpu": ("torch", "native"), "cuda": ("triton", "triton_staged")}


def outputs(c: LinearCase, h: Tensor, w: Tensor, tolerance: float, **options: Any) -> Any:
    """``linear_topr_loss`` of a case."""
    d = c.data
    return linear_topr_loss(
        h,
        w,
        d.labels,
        d.behavior_log_prob,
        d.reward,
        cu_seqlens=d.cu_seqlens,
        shift=False,
        grad_tolerance=tolerance,
        **options,
    )


def from_hidden(tolerance: float, setting: str = "", **options: Any) -> Provider:
    """From hidden states; notes the share of columns touched and what was left out.

    Args:
        tolerance: ``grad_tolerance``.
        setting: name of the only setting.
        options: of ``linear_topr_loss``.
    """

    def loss(c: LinearCase, h: Tensor, w: Tensor) -> Tensor:
        out = outputs(c, h, w, tolerance, **options)
        # Kept as tensors: reading them here would put a device sync into the timing.
        c.aside = {"active_share": out.active_share, "left_out": out.left_out}
        return out.loss

    def log_probs(c: Case, h: Tensor, w: Tensor) -> Any:
        return outputs(c, h, w, tolerance, **options)  # type: ignore[arg-type]

    return Provider({setting: loss}, {setting: log_probs}, ours=True, tolerance=tolerance)


def serving(impl: str, device: str) -> str:
    """What "auto" is on a device, or the name itself: the column "setting" of ours."""
    return kernels.resolve(impl, torch.empty(0, device=device), kernels.LINEAR)


def linear(device: str) -> dict[str, Provider]:
    """What "auto" is on the device, then the others."""
    found: dict[str, Provider] = {}
    for impl in ("auto", *OTHERS[device]):
        suffix, setting = "" if impl == "auto" else f", {impl}", serving(impl, device)
        found[f"topr exact{suffix}"] = from_hidden(0.0, setting, impl=impl)
        for k in LOG2_TAU[device]:
            found[f"topr tau 2^{k}{suffix}"] = from_hidden(2.0**k, setting, impl=impl)
    return found


def logits(device: str) -> dict[str, Provider]:
    """Every implementation of the logits path, fresh gradient and in place."""
    found = {}
    for impl in LOGITS[device]:
        for inplace in (False, True):
            name = f"topr {impl}" + (" inplace" if inplace else "")
            if impl == "native" and not native_library.PATH.exists():
                found[name] = absent(ImportError("the native library is not built"))
                continue
            found[name] = Provider({impl: _loss(impl, inplace)}, ours=True, inplace=inplace)
    return found


def _loss(impl: str, inplace: bool) -> Loss:
    return lambda c, x: (
        topr_loss(x, c.labels, c.token_mu, c.reward, impl=impl, inplace=inplace).loss
    )
