"""The head of a causal language model, which turns hidden states into logits.

``linear_topr_loss`` multiplies hidden states by the head's matrix itself. So a forward pass need only
bring the hidden states to the head, but what the model does to its logits must be known.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

#: What messages about heads that are not supported suggest.
REMEDY = "use the logits: completion_logits and topr_loss, in TOPRTrainer fused_head=False"
#: Config attributes that multiply the logits: Cohere's, Falcon-H1's, Muse's.
_SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
#: Model types that do not apply the scale that the config of their text model has.
_UNSCALED = ("aya_vision", "cohere2_vision")
#: Where models for images keep their language model.
_LANGUAGE_MODELS = ("language_model", "text_decoder")
#: Config attributes that cap the logits: Gemma 2 and later (NanoChat, ...), RecurrentGemma's, xLSTM's.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


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


def output_embeddings(model: Any) -> Any:
    """The module of a model's head, or of the language model inside it; None if there is none."""
    base = base_model(model)
    # Some models for images do not pass on what their language model says (Nemotron-H Omni, BLIP).
    for part in (base, *(getattr(base, name, None) for name in _LANGUAGE_MODELS)):
        get = getattr(part, "get_output_embeddings", None)
        module = get() if callable(get) else None
        if module is not None:
            return module
    return None


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
    return head_of(model, head_layer(model))


def head_shape(model: Any) -> tuple[int, int]:
    """[V, D] of the head, sharded over processes or not.

    Raises:
        ValueError: as ``find_head``, but for sharding.
    """
    linear = head_layer(model).linear
    return linear.out_features, linear.in_features


class _Adapter(NamedTuple):
    """A LoRA: adds ``scaling * up(down(dropout(x)))`` to the head's product."""

    down: nn.Linear
    up: nn.Linear
    dropout: nn.Module
    scaling: float


class HeadLayer(NamedTuple):
    """The parts of a head's module. Call its methods inside the forward, where parameters are whole."""

    #: The module whose forward computes the product; hooks of wrappers on it gather its parameters.
    module: nn.Module
    linear: nn.Linear
    adapters: tuple[_Adapter, ...]

    def input(self, hidden: Tensor) -> Tensor:
        """The head's input [..., D], with LoRA [..., D + r]."""
        parts = [hidden]
        for down, _, dropout, scaling in self.adapters:
            low = down(dropout(hidden.to(down.weight.dtype)))
            parts.append((scaling * low).to(hidden.dtype))
        return torch.cat(parts, dim=-1) if self.adapters else hidden

    def weight(self) -> Tensor:
        """[V, D], with LoRA [V, D + r]."""
        weight = self.linear.weight
        if not self.adapters:
            return weight
        ups = (adapter.up.weight.to(weight.dtype) for adapter in self.adapters)
        return torch.cat([weight, *ups], dim=1)

    def bias(self) -> Tensor | None:
        """[V] or None, that of LoRA added."""
        bias: Tensor | None = self.linear.bias
        for adapter in self.adapters:
            if adapter.up.bias is not None:
                up = adapter.scaling * adapter.up.bias
                bias = up if bias is None else bias + up.to(bias.dtype)
        return bias


def head_of(model: Any, layer: HeadLayer) -> Head:
    """The ``Head`` of a model whose head was taken apart.

    Raises:
        ValueError: if its weight is sharded over processes.
    """
    linear = layer.linear
    shape = (linear.out_features, linear.in_features)
    # FSDP2's DTensor; ZeRO-3's placeholder and FSDP1's flat shard have another shape.
    if hasattr(linear.weight, "full_tensor") or tuple(linear.weight.shape) != shape:
        raise ValueError(
            f"the head's weight is a {type(linear.weight).__name__} of shape "
            f"{tuple(linear.weight.shape)}, sharded over processes; expected the whole {shape} on each: "
            f"let causal_lm_topr_loss or TOPRTrainer call the wrapped model, or {REMEDY}"
        )
    return Head(layer.weight(), layer.bias(), *_transforms(base_model(model).config))


def _transforms(config: Any) -> tuple[float, float | None]:
    """(logit_scale, softcap) of a model's config."""
    types = [config.model_type]
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
        types.append(config.model_type)
    scale = 1.0
    for name in _SCALES:
        scale *= 1.0 if types[0] in _UNSCALED else _number(config, name) or 1.0
    # MiniCPM3 uses the same name for a scale of the hidden states.
    scaling = _number(config, "logits_scaling") or 1.0
    if any(x.startswith("granite") for x in types):
        scale /= scaling
    elif any(x.startswith("hyperclovax") for x in types):
        scale *= scaling
    caps = (_number(config, name) for name in _SOFTCAPS)
    return scale, next((cap for cap in caps if cap), None)


def head_layer(model: Any) -> HeadLayer:
    """Takes a model's head apart.

    Raises:
        ValueError: as ``find_head``, but for sharding.
    """
    base = base_model(model)
    module = output_embeddings(model)
    # PEFT may not be installed, so its classes are recognised by their attributes. modules_to_save holds
    # a trained copy of the module for each adapter; the first active one runs.
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        active = [] if module.disable_adapters else module.active_adapters
        module = module.modules_to_save[active[0]] if active else module.original_module
    linear, adapters = module, tuple[_Adapter, ...]()
    if _name(_class_of(module)) == "peft.tuners.lora.layer.Linear":
        linear, adapters = module.base_layer, _active_adapters(module)
    # Subclasses and other wrappers (quantised weights, other adapters) compute something else.
    if _class_of(linear) is not nn.Linear:
        got = "no output embeddings" if linear is None else f"a head of type {_name(type(linear))}"
        raise ValueError(
            f"{type(base).__name__} has {got}; expected a plain torch.nn.Linear, with or without "
            f"LoRA; {REMEDY}, or leave the head out of adapters and quantisation"
        )
    _check_weight(linear)
    return HeadLayer(module, linear, adapters)


def _check_weight(linear: nn.Linear) -> None:
    """Refuses a head whose weight is not a tensor of numbers that is there."""
    weight = linear.weight.data
    # Quantisation by the type of the weight (torchao) leaves the layer an nn.Linear.
    if type(weight).__module__.partition(".")[0] != "torch":
        raise ValueError(
            f"the head's weight is a {_name(type(weight))}; expected a plain tensor; {REMEDY}, or leave "
            "the head out of quantisation"
        )
    if weight.is_meta and hasattr(linear, "_hf_hook"):
        raise ValueError(
            "the head's weight is offloaded (device_map, cpu_offload), so it is not there before the "
            f"head runs; {REMEDY}, or keep the head on its device"
        )


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
                f"LoRA; {REMEDY}, or leave the head out of it (exclude_modules)"
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


def _class_of(module: Any) -> type:
    """The class of a module; the original one if ``fully_shard`` has made a subclass of it."""
    cls = type(module)
    # Without torch.distributed there is no FSDP2 either.
    fsdp = getattr(getattr(torch.distributed, "fsdp", None), "FSDPModule", None)
    return cls.__bases__[-1] if fsdp is not None and issubclass(cls, fsdp) else cls


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) else None
