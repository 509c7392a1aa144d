"""Contracts of the fused-linear path: ``linear_log_prob_{fwd,bwd}`` and ``linear_topr_fwd``.

Shapes: hidden [O, T, D] with any strides; head_weight [V, D], bias [V] or None; labels, cu_seqlens and
token results as in :mod:`topr_kernels.ops.logits`. The logits are logit_scale (hidden Wt + bias), then
softcap, then over the temperature; they never exist as a whole. Operands of the matmuls have
``compute_dtype``; logits, sums and d_weight are fp32 (fp64 for fp64).

``linear_topr_fwd`` returns the gradients with the loss, so nothing is recomputed: d_weight, d_bias, and
d_hidden without the coefficients of its rows. The backward multiplies the upstream gradient in.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topr_kernels.ops import accumulate_dtype, savable
from topr_kernels.ops.options import HeadWeights, Objective, Tokens, Transforms, Units, Wanted


class Kernels(NamedTuple):
    """One implementation of the fused-linear path; returns what the operators return.

    log_prob_fwd(hidden, head, tokens, transforms, entropy, workspace_bytes)
    log_prob_bwd(hidden, head, tokens, d_log_prob, transforms, workspace_bytes, wanted)
    topr_fwd(hidden, head, tokens, objective, transforms, entropy, workspace_bytes, wanted)
    """

    log_prob_fwd: Callable[..., tuple[Tensor, Tensor, Tensor]]
    log_prob_bwd: Callable[..., tuple[Tensor, Tensor, Tensor]]
    topr_fwd: Callable[..., tuple[Tensor, ...]]


_KERNELS: dict[str, Kernels] = {}
#: Short, for the results of an operator that has many.
_T = Tensor


def register(impl: str, kernels: Kernels) -> None:
    """Makes an implementation callable as ``impl`` from the operators of this module."""
    _KERNELS[impl] = kernels


def is_registered(impl: str) -> bool:
    """Whether ``impl`` is callable from the operators of this module."""
    return impl in _KERNELS


def unregister(impl: str) -> None:
    """Forgets an implementation, if it is there."""
    _KERNELS.pop(impl, None)


class Lent:
    """Handle of a callable taper: a schema takes its number. Forgotten with this object."""

    def __init__(self, taper: Taper) -> None:
        self.taper, self.number = taper, next(_COUNT)
        _LENT[self.number] = self


Taper = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_LENT: weakref.WeakValueDictionary[int, Lent] = weakref.WeakValueDictionary()
_COUNT = itertools.count(1)


def lend(taper: Taper | None) -> Lent | None:
    """Makes a taper callable from :func:`linear_topr_fwd`, as long as its result or a graph lives.

    Raises:
        ValueError: in a compiled graph, which cannot hold it.
    """
    if taper is None:
        return None
    if torch.compiler.is_compiling():
        raise ValueError(
            "limits: a callable in linear_topr_loss cannot be part of a compiled graph; call it outside "
            "(torch.compiler.disable), or use topr_loss"
        )
    return Lent(taper)


@torch.library.custom_op("topr_kernels::linear_log_prob_fwd", mutates_args=())
def linear_log_prob_fwd(
    hidden: Tensor,
    head_weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    compute_dtype: torch.dtype,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    entropy: bool,
    shift: bool,
    grad_tolerance: float,
    workspace_bytes: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (log_prob, lse, entropy), each [O, T]; entropy is NaN unless asked for."""
    return _KERNELS[impl].log_prob_fwd(
        hidden,
        HeadWeights(head_weight, bias, compute_dtype),
        Tokens(labels, cu_seqlens, shift),
        Transforms(logit_scale, softcap, temperature),
        entropy,
        workspace_bytes,
    )


@linear_log_prob_fwd.register_fake
def _log_prob_fwd_fake(
    hidden: Tensor, head_weight: Tensor, bias: Tensor | None, labels: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    dtype = accumulate_dtype(args[1])
    return tuple(hidden.new_empty(labels.shape, dtype=dtype) for _ in range(3))


@torch.library.custom_op("topr_kernels::linear_log_prob_bwd", mutates_args=())
def linear_log_prob_bwd(
    hidden: Tensor,
    head_weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    d_log_prob: Tensor,
    compute_dtype: torch.dtype,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    shift: bool,
    grad_tolerance: float,
    workspace_bytes: int,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (d_hidden, d_weight, d_bias) in the dtypes of their inputs; [0] where not wanted."""
    return _KERNELS[impl].log_prob_bwd(
        hidden,
        HeadWeights(head_weight, bias, compute_dtype),
        Tokens(labels, cu_seqlens, shift),
        d_log_prob,
        Transforms(logit_scale, softcap, temperature),
        workspace_bytes,
        Wanted(grad_tolerance, grad_hidden, grad_weight, grad_bias),
    )


@linear_log_prob_bwd.register_fake
def _log_prob_bwd_fake(
    hidden: Tensor, head_weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    *_, grad_hidden, grad_weight, grad_bias, _ = args
    like = head_weight if bias is None else bias
    return (
        hidden.new_empty(hidden.shape if grad_hidden else 0),
        head_weight.new_empty(head_weight.shape if grad_weight else 0),
        like.new_empty(head_weight.shape[0] if grad_bias else 0),
    )


@torch.library.custom_op("topr_kernels::linear_topr_fwd", mutates_args=())
def linear_topr_fwd(
    hidden: Tensor,
    head_weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    behavior_log_prob: Tensor,
    reward: Tensor,
    normalizer: Tensor | None,
    log_limits: Sequence[float],
    ratio: str,
    baseline: float,
    reduction: str,
    sequence_weight: Tensor | None,
    units: Tensor | None,
    taper: int | None,
    compute_dtype: torch.dtype,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    entropy: bool,
    shift: bool,
    grad_tolerance: float,
    workspace_bytes: int,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
    impl: str,
) -> tuple[_T, _T, _T, _T, _T, _T, _T, _T, _T, _T, _T, _T, _T, _T, _T, _T, _T]:
    """Returns in this order.

    - ``loss``, ``sound``: 0-dim; sound is 1, or NaN for unsound offsets or a NaN anywhere.
    - ``log_prob``, ``lse``, ``entropy``, ``token_log_ratio``: [O, T].
    - ``log_ratio``, ``weight``, ``objective``, ``reward``, ``length``: [B], the last int64.
    - ``active_share``, ``left_out``: 0-dim, NaN without gradient.
    - ``row_coefficient``: [O, T], one per row of hidden; times it ``d_hidden``, [O, T, D] in the dtype
      of hidden, is the gradient. ``d_weight``: [V, D] fp32. ``d_bias``: [V]. A gradient that is not
      wanted has shape [0].
    """
    objective = Objective(
        *(behavior_log_prob, reward, normalizer),
        *(log_limits[0], log_limits[1], log_limits[2], log_limits[3]),
        *(ratio, baseline, reduction),
        sequence_weight=sequence_weight,
        units=None if units is None else Units.unpacked(units),
        taper=None if taper is None else _LENT[taper].taper,
    )
    return _KERNELS[impl].topr_fwd(  # type: ignore[return-value]
        hidden,
        HeadWeights(head_weight, bias, compute_dtype),
        Tokens(labels, cu_seqlens, shift),
        objective,
        Transforms(logit_scale, softcap, temperature),
        entropy,
        workspace_bytes,
        Wanted(grad_tolerance, grad_hidden, grad_weight, grad_bias),
    )


@linear_topr_fwd.register_fake
def _topr_fwd_fake(
    hidden: Tensor,
    head_weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    behavior_log_prob: Tensor,
    reward: Tensor,
    *args: Any,
) -> tuple[Tensor, ...]:
    *_, grad_hidden, grad_weight, grad_bias, _ = args
    dtype = accumulate_dtype(args[8])

    def new(*shape: Any, dtype: torch.dtype = dtype) -> Tensor:
        return hidden.new_empty(*shape, dtype=dtype)

    return (
        *(new(()) for _ in range(2)),
        *(new(labels.shape) for _ in range(4)),
        *(new(reward.shape) for _ in range(4)),
        new(reward.shape, dtype=torch.int64),
        *(new(()) for _ in range(2)),
        new(labels.shape),
        new(hidden.shape if grad_hidden else 0, dtype=hidden.dtype),
        new(head_weight.shape if grad_weight else 0),
        new(head_weight.shape[0] if grad_bias else 0),
    )


def _log_prob_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, head_weight, bias, labels, cu_seqlens, *rest = inputs
    compute_dtype, logit_scale, softcap, temperature, _, shift, tolerance, workspace, impl = rest
    ctx.save_for_backward(*map(savable, (hidden, head_weight, bias, labels, cu_seqlens)))
    ctx.settings = (compute_dtype, logit_scale, softcap, temperature, shift, tolerance, workspace)
    ctx.impl = impl
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _log_prob_backward(ctx: Any, *d: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    if d[0] is None or not any(wanted):
        return (None,) * 14
    gradients = linear_log_prob_bwd(
        *ctx.saved_tensors, d[0].contiguous(), *ctx.settings, *wanted, ctx.impl
    )
    return (*(g if w else None for g, w in zip(gradients, wanted, strict=True)), *(None,) * 11)


def _topr_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, sound, *_, row_coefficient, _, _, _ = output
    ctx.save_for_backward(sound, row_coefficient, *map(savable, inputs[:3]))
    # Copies, a few bytes per token: the caller may refill its buffers, and a log mu that was scored in
    # inference mode cannot be saved.
    ctx.constants = tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs[3:])
    # As long as the graph lives the taper can be called again.
    ctx.lent = None if inputs[14] is None else _LENT[inputs[14]]
    # Not saved tensors: the first backward scales them in place and hands them over.
    ctx.gradients = output[-3:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _topr_backward(ctx: Any, *d: Tensor | None) -> tuple[Tensor | None, ...]:
    d_loss = d[0]
    wanted = ctx.needs_input_grad[:3]
    if d_loss is None or not any(wanted):
        return (None,) * 27
    # torch 2.10 traces a backward without saying so; what it traces is a subclass that has no values.
    compiling = torch.compiler.is_compiling() or type(d_loss) is not Tensor
    if torch.is_grad_enabled() and not compiling:
        raise RuntimeError(
            "the gradient of linear_topr_loss is not differentiable a second time "
            "(create_graph=True); for second derivatives use topr_kernels.reference"
        )
    sound, coefficient, *inputs = ctx.saved_tensors
    gradients = ctx.gradients
    if gradients is None:
        # A retained graph: what the first backward handed over must be computed again.
        gradients = linear_topr_fwd(*inputs, *ctx.constants)[-3:]
    elif not compiling:
        ctx.gradients = None
    # The upstream gradient (loss scaling, accumulation) stays on the device: no test, no sync.
    scale = d_loss * sound
    # A coefficient of exactly 0 stays 0 by selection, also under an infinite loss scale, not a NaN one.
    row_factor = torch.where((coefficient == 0) & ~d_loss.isnan(), 0.0, coefficient * d_loss)
    factors = (row_factor.unsqueeze(-1), scale, scale)
    # A plain loss.backward() on a CPU, where looking costs nothing: a pass over d_weight less.
    plain = not compiling and scale.device.type == "cpu" and scale.item() == 1
    result: list[Tensor | None] = []
    for x, gradient, factor, want in zip(inputs, gradients, factors, wanted, strict=True):
        if not want:
            result.append(None)
        elif plain and factor is scale and gradient.dtype == x.dtype:
            result.append(gradient)
        elif compiling:
            result.append((gradient * factor).to(x.dtype))
        elif gradient.dtype != x.dtype:
            out = gradient.new_empty(gradient.shape, dtype=x.dtype)
            result.append(torch.mul(gradient, factor, out=out))
        else:
            # In its own memory: a head's gradient may be the largest tensor of the step.
            result.append(gradient.mul_(factor))
    return (*result, *(None,) * 24)


def _refuse_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "the gradient of linear_log_prob is not differentiable a second time; for second derivatives "
        "use topr_kernels.reference"
    )


linear_log_prob_fwd.register_autograd(_log_prob_backward, setup_context=_log_prob_setup)
linear_log_prob_bwd.register_autograd(_refuse_double_backward)
linear_topr_fwd.register_autograd(_topr_backward, setup_context=_topr_setup)
