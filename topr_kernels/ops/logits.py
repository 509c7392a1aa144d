"""Contracts of the logits path: ``log_prob_fwd``, ``topr_fwd``, ``logits_bwd``, ``logits_bwd_``.

Shapes: logits [O, T, V] with any strides; labels [O, T] int64, label-aligned, -100 = not scored;
cu_seqlens [B + 1] or None. Packed input has O = 1. Token results are label-aligned [O, T], 0 where
nothing is scored. Arithmetic dtype: fp64 for fp64 logits, fp32 for all others.

An implementation is a module under ``kernels`` that calls :func:`register` with its four functions. The
gradient of both forwards is the same row kernel: a row of logits gets ``d_log_prob * (onehot -
softmax)``, times the slope of softcap and temperature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topr_kernels.ops import accumulate_dtype, savable
from topr_kernels.ops.options import Objective, Tokens, Transforms


class Saved(NamedTuple):
    """What the backward knows of each token, [O, T], and of the batch, 0-dim."""

    lse: Tensor
    lse_low: Tensor
    log_prob: Tensor
    d_log_prob: Tensor
    d_loss: Tensor | None
    denominator: Tensor | None


class Kernels(NamedTuple):
    """One implementation of the logits path; returns what the operators return.

    log_prob_fwd(logits, tokens, transforms, entropy)
    topr_fwd(logits, tokens, objective, transforms, entropy)
    logits_bwd(logits, tokens, saved, transforms); ``logits_bwd_`` the same, over the logits.
    """

    log_prob_fwd: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    topr_fwd: Callable[..., tuple[Tensor, ...]]
    logits_bwd: Callable[..., Tensor]
    logits_bwd_: Callable[..., None]


_KERNELS: dict[str, Kernels] = {}
#: Short, for the results of an operator that has many.
_T = Tensor


def register(impl: str, kernels: Kernels) -> None:
    """Makes an implementation callable as ``impl`` from the operators of this module."""
    _KERNELS[impl] = kernels


@torch.library.custom_op("topr_kernels::log_prob_fwd", mutates_args=())
def log_prob_fwd(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    shift: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> (log_prob, lse, lse_low, entropy), each [O, T]; entropy is NaN unless asked for.

    lse + lse_low is the log-sum-exp to twice the digits: under a large common offset of the logits lse
    alone would cost the gradient its precision.
    """
    tokens, transforms = Tokens(labels, cu_seqlens, shift), Transforms(1.0, softcap, temperature)
    return _KERNELS[impl].log_prob_fwd(logits, tokens, transforms, entropy)


@log_prob_fwd.register_fake
def _log_prob_fwd_fake(logits: Tensor, labels: Tensor, *_: Any) -> tuple[Tensor, ...]:
    def token() -> Tensor:
        return logits.new_empty(labels.shape, dtype=accumulate_dtype(logits.dtype))

    return token(), token(), token(), token()


@torch.library.custom_op("topr_kernels::topr_fwd", mutates_args=())
def topr_fwd(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    behavior_log_prob: Tensor,
    reward: Tensor,
    normalizer: Tensor | None,
    log_pos_min: float,
    log_pos_max: float,
    log_neg_min: float,
    log_neg_max: float,
    ratio: str,
    baseline: float,
    reduction: str,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    shift: bool,
    inplace: bool,
    impl: str,
) -> tuple[_T, _T, _T, _T, _T, _T, _T, _T, _T, _T, _T, _T, _T]:
    """-> (two of the batch, five of tokens, five of sequences, gradient of tokens).

    loss, denominator: 0-dim. log_prob, lse, lse_low, entropy, token_log_ratio: [O, T]. log_ratio,
    weight, objective, reward, length: [B], the last int64. d_log_prob: [O, T]; over the denominator it
    is the gradient of the loss by each log-prob.
    """
    objective = Objective(
        *(behavior_log_prob, reward, normalizer),
        *(log_pos_min, log_pos_max, log_neg_min, log_neg_max),
        *(ratio, baseline, reduction),
    )
    return _KERNELS[impl].topr_fwd(  # type: ignore[return-value]
        logits,
        Tokens(labels, cu_seqlens, shift),
        objective,
        Transforms(1.0, softcap, temperature),
        entropy,
    )


@topr_fwd.register_fake
def _topr_fwd_fake(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    behavior_log_prob: Tensor,
    reward: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    dtype = accumulate_dtype(logits.dtype)

    def token() -> Tensor:
        return logits.new_empty(labels.shape, dtype=dtype)

    def sequence(dtype: torch.dtype = dtype) -> Tensor:
        return logits.new_empty(reward.shape, dtype=dtype)

    return (
        *(logits.new_empty((), dtype=dtype) for _ in range(2)),
        *(token() for _ in range(5)),
        *(sequence() for _ in range(4)),
        sequence(torch.int64),
        token(),
    )


@torch.library.custom_op("topr_kernels::logits_bwd", mutates_args=())
def logits_bwd(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    lse: Tensor,
    lse_low: Tensor,
    log_prob: Tensor,
    d_log_prob: Tensor,
    d_loss: Tensor | None,
    denominator: Tensor | None,
    temperature: float,
    softcap: float | None,
    shift: bool,
    impl: str,
) -> Tensor:
    """-> d_logits [O, T, V] in the dtype of the logits; rows with coefficient 0 are zero-filled.

    The coefficient of a token is ``d_log_prob``, times ``d_loss / denominator`` where those 0-dim
    tensors are given: the upstream gradient is applied on the device.
    """
    return _KERNELS[impl].logits_bwd(
        logits,
        Tokens(labels, cu_seqlens, shift),
        Saved(lse, lse_low, log_prob, d_log_prob, d_loss, denominator),
        Transforms(1.0, softcap, temperature),
    )


@logits_bwd.register_fake
def _logits_bwd_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.custom_op("topr_kernels::logits_bwd_", mutates_args=("logits",))
def logits_bwd_(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    lse: Tensor,
    lse_low: Tensor,
    log_prob: Tensor,
    d_log_prob: Tensor,
    d_loss: Tensor | None,
    denominator: Tensor | None,
    temperature: float,
    softcap: float | None,
    shift: bool,
    impl: str,
) -> None:
    """Like :func:`logits_bwd`, but overwrites the logits with their gradient."""
    _KERNELS[impl].logits_bwd_(
        logits,
        Tokens(labels, cu_seqlens, shift),
        Saved(lse, lse_low, log_prob, d_log_prob, d_loss, denominator),
        Transforms(1.0, softcap, temperature),
    )


def _log_prob_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, cu_seqlens, temperature, softcap, _, shift, impl = inputs
    log_prob, lse, lse_low, entropy = output
    ctx.save_for_backward(logits, savable(labels), savable(cu_seqlens), lse, lse_low, log_prob)
    ctx.settings = (temperature, softcap, shift, impl)
    ctx.mark_non_differentiable(lse, lse_low, entropy)
    ctx.set_materialize_grads(False)


def _log_prob_backward(ctx: Any, *d: Tensor | None) -> tuple[Tensor | None, ...]:
    d_log_prob = d[0]
    if d_log_prob is None or not ctx.needs_input_grad[0]:
        return (None,) * 8
    *saved, log_prob = ctx.saved_tensors
    d_log_prob = d_log_prob.to(log_prob.dtype)
    d_logits = logits_bwd(*saved, log_prob, d_log_prob, None, None, *ctx.settings)
    return (d_logits, *(None,) * 7)


def _topr_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, cu_seqlens = inputs[:3]
    *_, temperature, softcap, _, shift, inplace, impl = inputs
    _, denominator, log_prob, lse, lse_low, *_, d_log_prob = output
    constants = savable(labels), savable(cu_seqlens)
    # A denominator that the caller gave is handed through.
    means = d_log_prob, savable(denominator)
    ctx.save_for_backward(logits, *constants, lse, lse_low, log_prob, *means)
    ctx.settings = (temperature, softcap, shift, impl)
    ctx.inplace = inplace
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _topr_backward(ctx: Any, *d: Tensor | None) -> tuple[Tensor | None, ...]:
    d_loss = d[0]
    if d_loss is None or not ctx.needs_input_grad[0]:
        return (None,) * 19
    logits, *saved, denominator = ctx.saved_tensors
    # The upstream gradient (loss scaling, accumulation) stays on the device: no test, no sync.
    row_args = (*saved, d_loss, denominator, *ctx.settings)
    if ctx.inplace:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "inplace=True overwrites the logits with their gradient and cannot run under "
                "create_graph=True; pass inplace=False"
            )
        # Writing bumps the version counter of the saved logits, so a second backward through the
        # same graph is refused by autograd rather than wrong.
        logits_bwd_(logits, *row_args)
        d_logits = logits.detach()
    else:
        d_logits = logits_bwd(logits, *row_args)
    return (d_logits, *(None,) * 18)


def _refuse_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "the gradient of topr_kernels is not differentiable a second time; for second derivatives "
        "use topr_kernels.reference"
    )


log_prob_fwd.register_autograd(_log_prob_backward, setup_context=_log_prob_setup)
topr_fwd.register_autograd(_topr_backward, setup_context=_topr_setup)
logits_bwd.register_autograd(_refuse_double_backward)
