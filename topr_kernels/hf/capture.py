"""What runs in the place of a model's head: recording its input, or computing a loss from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from topr_kernels.hf.heads import REMEDY, Head, HeadLayer, head_layer, head_of

#: Rows whose logits are computed where the model's own are compared with those of its head.
_SAMPLE_ROWS = 4


class Capture:
    """What ``capture_hidden`` recorded of one forward pass."""

    def __init__(self, sample: bool) -> None:
        self._sample = sample
        self._inputs: list[Tensor] = []
        self._products: list[Tensor] = []

    @property
    def hidden(self) -> Tensor:
        """Input of the head, [B, K, D], with gradient; with LoRA on the head [B, K, D + r].

        Raises:
            ValueError: if the forward pass called the head never or more than once.
        """
        return _only(self._inputs)

    @property
    def product(self) -> Tensor:
        """[1, <= 4, V], hidden Wt + bias of the rows whose logits the model computed."""
        return _only(self._products)

    def __call__(self, layer: HeadLayer, hidden: Tensor) -> Tensor:
        """Stands in for the head's forward."""
        hidden = layer.input(_one_row_each(hidden))
        self._inputs.append(hidden)
        weight, bias = layer.weight(), layer.bias()
        if self._sample:
            product = _sample(hidden, weight, bias)
            # Models may scale their logits in place.
            self._products.append(product.detach().clone())
            return product
        # One column, so that the model has logits to work on. It keeps head and hidden states in the
        # graph of the outputs, where DistributedDataParallel looks for the parameters in use.
        return functional.linear(hidden, weight[:1], None if bias is None else bias[:1])


@contextmanager
def capture_hidden(model: Any, *, sample: bool = False) -> Iterator[Capture]:
    """Has forward passes of a model record the input of its head, in the place of computing logits.

    Wrappers (DistributedDataParallel, autocast), ``logits_to_keep`` and caches work as usual. The
    ``logits`` of the outputs are a placeholder, [B, K, 1].

    Args:
        model: Hugging Face causal language model, without a wrapper other than PEFT's. Calls may go
            through its wrapper.
        sample: compute the logits of up to 4 rows, [1, <= 4, V], which ``check_logits`` needs.

    Yields:
        Capture: its ``hidden`` is there after one forward pass.

    Raises:
        RuntimeError: if the head is being captured already.
        ValueError: as ``find_head``.
    """
    capture = Capture(sample)
    with _standing_in(model, capture):
        yield capture


class HeadLoss:
    """The loss of one forward pass, computed by ``loss_in_head`` inside the head."""

    def __init__(self, model: Any, compute: Callable[[Tensor, Head], Tensor], sample: bool) -> None:
        # Dynamo refuses to trace a module that it also sees through its own wrapper.
        self._model = getattr(model, "_orig_mod", model)
        self._compute, self._sample = compute, sample
        self._losses: list[Tensor] = []
        self._products: list[Tensor] = []
        self._head: Head | None = None
        self._upstream: list[Tensor] = []

    def __call__(self, layer: HeadLayer, hidden: Tensor) -> Tensor:
        """Stands in for the head's forward."""
        head = head_of(self._model, layer)
        hidden = layer.input(_one_row_each(hidden))
        loss = self._compute(hidden, head)
        self._losses.append(loss.detach())
        self._head = head
        if self._sample:
            seen = _sample(hidden.detach(), head.weight.detach(), head.bias).detach()
            self._products.append(seen.clone())
        else:
            seen = hidden.new_zeros((*hidden.shape[:-1], 1))
        carried: Tensor = _Depart.apply(loss, seen, self._upstream)  # type: ignore[no-untyped-call]
        return carried

    def arrive(self, logits: Tensor) -> Tensor:
        """The loss, whose backward goes through the model's outputs and so through every wrapper.

        Args:
            logits: what the forward pass returned.

        Raises:
            ValueError: if the forward pass called the head never or more than once; with ``sample``, as
                ``check_logits``.
        """
        loss = _only(self._losses)
        if self._sample and self._head is not None:
            _check_product(self._head, _only(self._products), logits)
        arrived: Tensor = _Arrive.apply(loss, logits, self._upstream)  # type: ignore[no-untyped-call]
        return arrived


@contextmanager
def loss_in_head(
    model: Any, compute: Callable[[Tensor, Head], Tensor], *, sample: bool = False
) -> Iterator[HeadLoss]:
    """Has a forward pass of a model compute a loss where it would multiply by its head.

    Only there does a wrapper that shards parameters (FSDP2, ZeRO-3) have the whole head, and its hooks
    run for the head as they would for logits. The loss leaves the model through its ``logits``, so that
    the backward starts at the outputs that wrappers watch. The values of ``logits`` mean nothing.

    Args:
        model: Hugging Face causal language model, without a wrapper other than PEFT's. Calls may go
            through its wrapper.
        compute: from the head's input [B, K, D] and the head to the loss, 0-dim; called once per
            forward pass, in its autocast context.
        sample: have ``HeadLoss.arrive`` compare the model's logits of up to 4 rows with the head's.

    Yields:
        HeadLoss: call its ``arrive`` with the logits of the outputs.

    Raises:
        RuntimeError: if the head is being captured already.
        ValueError: as ``find_head``.
    """
    loss = HeadLoss(model, compute, sample)
    with _standing_in(model, loss):
        yield loss


# The backward must run through the model's outputs first and its head then, but what the model does to
# logits (scales, softcaps, dtypes) must not change the gradient of the loss. So the graph leads from the
# loss through the logits to the result, and the gradient's value is passed around them, in ``upstream``.


class _Depart(torch.autograd.Function):
    """(loss, x) -> x. Its backward ignores x and passes on the gradient that ``_Arrive`` stored."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, seen: Tensor, upstream: list[Tensor]) -> Tensor:
        ctx.upstream = upstream
        # Its own memory: models write to their logits in place (Chameleon).
        return seen.clone()

    @staticmethod
    def backward(ctx: Any, d_seen: Tensor) -> tuple[Tensor, None, None]:
        return ctx.upstream[-1], None, None


class _Arrive(torch.autograd.Function):
    """(loss, x) -> loss. Its backward stores the gradient in ``upstream`` and passes zeros to x."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits: Tensor, upstream: list[Tensor]) -> Tensor:
        ctx.upstream = upstream
        ctx.save_for_backward(logits)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[None, Tensor, None]:
        ctx.upstream[:] = [d_loss]
        (logits,) = ctx.saved_tensors
        return None, torch.zeros_like(logits), None


def check_logits(head: Head, capture: Capture, logits: Tensor) -> None:
    """Compares a model's own logits of some rows with those computed from its head.

    Args:
        head: of ``find_head``.
        capture: of a forward pass under ``capture_hidden(model, sample=True)``.
        logits: [1, <= 4, V], what that forward pass returned.

    Raises:
        ValueError: if they differ in shape, or relative to their norm by more than rounding in their
            dtype (1e-5 in fp32): the model transforms its logits in an unknown way.
    """
    _check_product(head, capture.product, logits)


def _check_product(head: Head, product: Tensor, logits: Tensor) -> None:
    expected = head.logit_scale * product.float()
    if head.softcap is not None:
        expected = head.softcap * torch.tanh(expected / head.softcap)
    known = f"logit_scale={head.logit_scale:g} and softcap={head.softcap}"
    if logits.shape != expected.shape:
        raise ValueError(
            f"the model's logits have shape {tuple(logits.shape)}, its head's {tuple(expected.shape)}: "
            f"beyond {known} it does something to them that is not known; {REMEDY}"
        )
    # Without this the difference of equal infinities would be NaN.
    logits = logits.detach().float()
    difference = (logits - expected).masked_fill(logits == expected, 0.0)
    error = float(difference.norm() / expected.masked_fill(expected.isinf(), 0.0).norm())
    # Written so that NaN fails, and logits that are all 0 pass.
    if difference.any() and not error <= max(torch.finfo(product.dtype).eps, 1e-5):
        raise ValueError(
            f"the model's logits differ by {error:.1e} of their norm from its head's with {known}: it "
            f"does something to them that is not known; {REMEDY}"
        )


@contextmanager
def _standing_in(model: Any, compute: Callable[[HeadLayer, Tensor], Tensor]) -> Iterator[None]:
    """Replaces the forward of a model's head."""
    layer = head_layer(model)
    before = vars(layer.module).get("forward")
    if isinstance(before, partial) and isinstance(before.func, (Capture, HeadLoss)):
        raise RuntimeError(
            "capture_hidden: this model's head is being captured already; leave the outer context "
            "first, and use one thread per model"
        )
    vars(layer.module)["forward"] = partial(compute, layer)
    try:
        yield
    finally:
        if before is None:
            del vars(layer.module)["forward"]
        else:
            vars(layer.module)["forward"] = before


def _sample(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(hidden[-1:, -_SAMPLE_ROWS:], weight, bias)


def _one_row_each(hidden: Tensor) -> Tensor:
    """The head's input, which must be one row for each token."""
    if hidden.dim() != 3:
        raise ValueError(
            f"the head's input has shape {tuple(hidden.shape)}; expected [B, T, D], one row for each "
            f"token; {REMEDY}"
        )
    return hidden


def _only(tensors: list[Tensor]) -> Tensor:
    if len(tensors) != 1:
        raise ValueError(
            f"the forward pass called its head {len(tensors)} times; expected once; {REMEDY}"
        )
    return tensors[0]
