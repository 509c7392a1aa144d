"""The head of a causal language model, which turns hidden states into logits, and the head's input.

``linear_topr_loss`` multiplies hidden states by the head's matrix itself. So a forward pass need only
bring the hidden states to the head, but what the model does to its logits must be known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

_REMEDY = "use the logits: completion_logits and topr_loss, in TOPRTrainer fused_head=False"
#: Config attributes that multiply the logits: Cohere's, Falcon-H1's, Muse's.
_SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
#: Config attributes that cap the logits: Gemma 2 and later (NanoChat, ...), RecurrentGemma's, xLSTM's.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
#: Rows whose logits are computed where the model's own are compared with those of its head.
_SAMPLE_ROWS = 4


class Head(NamedTuple):
    """Logits are ``softcap * tanh(z / softcap)`` of ``z = logit_scale * (hidden Wt + bias)``.

    Attributes:
        weight: [V, D], the parameter itself. With LoRA of rank r on the head it is [V, D + r], LoRA's B
            beside the weight, and the ``hidden`` of ``capture_hidden`` has r more columns,
            ``scaling * A(dropout(hidden))``: added to the weight, low-rank updates far below its
            rounding would be lost.
        bias: [V] or None (Phi has one).
        logit_scale: multiplies (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``).
        softcap: None for none (Gemma's ``final_logit_softcapping``).
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    @property
    def options(self) -> dict[str, Any]:
        """All but the weight: ``linear_topr_loss(hidden, head.weight, ..., **head.options)``."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}


def base_model(model: Any) -> Any:
    """The model inside a PEFT wrapper, or the model itself."""
    # PEFT may not be installed, so ask for the method and not for the class.
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def find_head(model: Any) -> Head:
    """Finds the head of a causal language model and what its config says is done to the logits.

    Known are the config's ``logit_scale`` (Cohere), ``lm_head_multiplier`` (Falcon-H1) and
    ``output_multiplier`` (Muse), which multiply; ``logits_scaling``, which divides in Granite and
    multiplies in HyperCLOVA X; ``final_logit_softcapping`` (Gemma), ``logits_soft_cap``
    (RecurrentGemma) and ``output_logit_soft_cap`` (xLSTM). What is done to the hidden states before
    the head (MiniCPM3, Inkling) is part of its input. ``check_logits`` detects anything else.

    PEFT's LoRA and ``modules_to_save`` on the head are supported: of the adapters the active ones
    count, and none if they are disabled or merged.

    Args:
        model: Hugging Face causal language model, without a wrapper other than PEFT's.

    Raises:
        ValueError: if the head is not a plain ``nn.Linear`` (quantised, with DoRA on it, ...), or is
            sharded over processes.
    """
    return _find_head(model, _layer(model))


def head_shape(model: Any) -> tuple[int, int]:
    """[V, D] of the head, sharded over processes or not.

    Raises:
        ValueError: as ``find_head``, but for sharding.
    """
    linear = _layer(model).linear
    return linear.out_features, linear.in_features


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

    def __call__(self, layer: _Layer, hidden: Tensor) -> Tensor:
        """Stands in for the head's forward."""
        hidden = layer.input(hidden)
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
        self._model, self._compute, self._sample = model, compute, sample
        self._losses: list[Tensor] = []
        self._products: list[Tensor] = []
        self._head: Head | None = None
        self._upstream: list[Tensor] = []

    def __call__(self, layer: _Layer, hidden: Tensor) -> Tensor:
        """Stands in for the head's forward."""
        head = _find_head(self._model, layer)
        hidden = layer.input(hidden)
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
        return seen.view_as(seen)

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
            f"beyond {known} it does something to them that is not known; {_REMEDY}"
        )
    # Without this the difference of equal infinities would be NaN.
    logits = logits.detach().float()
    difference = (logits - expected).masked_fill(logits == expected, 0.0)
    error = float(difference.norm() / expected.masked_fill(expected.isinf(), 0.0).norm())
    # Written so that NaN fails, and logits that are all 0 pass.
    if difference.any() and not error <= max(torch.finfo(product.dtype).eps, 1e-5):
        raise ValueError(
            f"the model's logits differ by {error:.1e} of their norm from its head's with {known}: it "
            f"does something to them that is not known; {_REMEDY}"
        )


class _Adapter(NamedTuple):
    """A LoRA: adds ``scaling * up(down(dropout(x)))`` to the head's product."""

    down: nn.Linear
    up: nn.Linear
    dropout: nn.Module
    scaling: float


class _Layer(NamedTuple):
    """The parts of a head's module. Call its methods inside the forward, where parameters are whole."""

    #: The module whose forward computes the product; hooks of wrappers on it gather its parameters.
    module: nn.Module
    linear: nn.Linear
    adapters: tuple[_Adapter, ...]

    def input(self, hidden: Tensor) -> Tensor:
        parts = [hidden]
        for down, _, dropout, scaling in self.adapters:
            low = down(dropout(hidden.to(down.weight.dtype)))
            parts.append((scaling * low).to(hidden.dtype))
        return torch.cat(parts, dim=-1) if self.adapters else hidden

    def weight(self) -> Tensor:
        weight = self.linear.weight
        if not self.adapters:
            return weight
        ups = (adapter.up.weight.to(weight.dtype) for adapter in self.adapters)
        return torch.cat([weight, *ups], dim=1)

    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.linear.bias
        for adapter in self.adapters:
            if adapter.up.bias is not None:
                up = adapter.scaling * adapter.up.bias
                bias = up if bias is None else bias + up.to(bias.dtype)
        return bias


def _find_head(model: Any, layer: _Layer) -> Head:
    linear = layer.linear
    shape = (linear.out_features, linear.in_features)
    # FSDP2's DTensor; ZeRO-3's placeholder and FSDP1's flat shard have another shape.
    if hasattr(linear.weight, "full_tensor") or tuple(linear.weight.shape) != shape:
        raise ValueError(
            f"the head's weight is a {type(linear.weight).__name__} of shape "
            f"{tuple(linear.weight.shape)}, sharded over processes; expected the whole {shape} on each: "
            f"let causal_lm_topr_loss or TOPRTrainer call the wrapped model, or {_REMEDY}"
        )
    return Head(layer.weight(), layer.bias(), *_transforms(base_model(model).config))


def _transforms(config: Any) -> tuple[float, float | None]:
    """(logit_scale, softcap) of a model's config."""
    kinds = [config.model_type]
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
        kinds.append(config.model_type)
    scale = 1.0
    for name in _SCALES:
        scale *= _number(config, name) or 1.0
    # MiniCPM3 uses the same name for a scale of the hidden states.
    scaling = _number(config, "logits_scaling") or 1.0
    if any(kind.startswith("granite") for kind in kinds):
        scale /= scaling
    elif any(kind.startswith("hyperclovax") for kind in kinds):
        scale *= scaling
    caps = (_number(config, name) for name in _SOFTCAPS)
    return scale, next((cap for cap in caps if cap), None)


def _layer(model: Any) -> _Layer:
    base = base_model(model)
    get = getattr(base, "get_output_embeddings", None)
    module: Any = get() if callable(get) else None
    # PEFT may not be installed, so its classes are recognised by their attributes. modules_to_save holds
    # a trained copy of the module for each adapter; the first active one runs.
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        active = [] if module.disable_adapters else module.active_adapters
        module = module.modules_to_save[active[0]] if active else module.original_module
    linear, adapters = module, tuple[_Adapter, ...]()
    if _name(_kind(module)) == "peft.tuners.lora.layer.Linear":
        linear, adapters = module.base_layer, _active_adapters(module)
    # Subclasses and other wrappers (quantised weights, other adapters) compute something else.
    if _kind(linear) is not nn.Linear:
        got = "no output embeddings" if linear is None else f"a head of type {_name(type(linear))}"
        raise ValueError(
            f"{type(base).__name__} has {got}; expected a plain torch.nn.Linear, with or without "
            f"LoRA; {_REMEDY}, or leave the head out of adapters and quantisation"
        )
    return _Layer(module, linear, adapters)


def _active_adapters(module: Any) -> tuple[_Adapter, ...]:
    """The LoRAs that this module of PEFT adds to its base layer."""
    if module.disable_adapters and module.merged:
        module.unmerge()  # as its forward would
    if module.disable_adapters or module.merged:
        return ()
    names = [name for name in module.active_adapters if name in module.lora_A]
    for name in names:
        if variant := getattr(module, "lora_variant", {}).get(name):
            raise ValueError(
                f"the head has adapter {name!r} of type {type(variant).__name__} on it; expected plain "
                f"LoRA; {_REMEDY}, or leave the head out of it (exclude_modules)"
            )
    return tuple(
        _Adapter(
            module.lora_A[name],
            module.lora_B[name],
            module.lora_dropout[name],
            module.scaling[name],
        )
        for name in names
    )


@contextmanager
def _standing_in(model: Any, compute: Callable[[_Layer, Tensor], Tensor]) -> Iterator[None]:
    """Replaces the forward of a model's head."""
    layer = _layer(model)
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


def _kind(module: Any) -> type:
    """The class of a module; the original one if ``fully_shard`` has made a subclass of it."""
    kind = type(module)
    # Without torch.distributed there is no FSDP2 either.
    fsdp = getattr(getattr(torch.distributed, "fsdp", None), "FSDPModule", None)
    return kind.__bases__[-1] if fsdp is not None and issubclass(kind, fsdp) else kind


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) else None


def _only(tensors: list[Tensor]) -> Tensor:
    if len(tensors) != 1:
        raise ValueError(
            f"the forward pass called its head {len(tensors)} times; expected once; {_REMEDY}"
        )
    return tensors[0]
