"""The head of a causal language model: what makes its logits, and its input without making them.

``linear_topr_loss`` multiplies hidden states by the head's matrix itself, so a forward pass need only
bring the hidden states to the head, and whatever the model does to its logits must be known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

_REMEDY = "use the logits: completion_logits and topr_loss, in TOPRTrainer fused_head=False"
#: Config attributes that multiply the logits: Cohere's, Falcon-H1's, Muse's.
_SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
#: Config attributes that cap them: Gemma 2 and later (NanoChat, ...), RecurrentGemma's, xLSTM's.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
#: Rows of which ``capture_hidden`` can have the model make logits.
_SAMPLE_ROWS = 4


class Head(NamedTuple):
    """Logits are ``softcap * tanh(z / softcap)`` of ``z = logit_scale * (hidden Wt + bias)``.

    Attributes:
        weight: [V, D], the parameter itself.
        bias: [V] or None (Phi has one).
        logit_scale: multiplies (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``).
        softcap: None for none (Gemma's ``final_logit_softcapping``).
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


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
    the head (MiniCPM3, Inkling) is in its input already. ``check_logits`` finds anything else.

    Args:
        model: Hugging Face causal language model, not wrapped but by PEFT.

    Raises:
        ValueError: if the head is not a plain ``nn.Linear`` (quantised, with LoRA on it, trained by
            PEFT's ``modules_to_save``, ...), or is sharded over processes.
    """
    linear = _linear(model)
    weight = linear.weight
    shape = (linear.out_features, linear.in_features)
    # FSDP2's DTensor, ZeRO-3's placeholder, FSDP1's flat shard.
    sharded = hasattr(weight, "full_tensor") or hasattr(weight, "ds_id")
    if sharded or tuple(weight.shape) != shape:
        raise ValueError(
            f"the head's weight is a {type(weight).__name__} of shape {tuple(weight.shape)}, sharded "
            f"over processes; expected the whole {shape} on each; {_REMEDY}"
        )
    config = base_model(model).config
    kinds = [config.model_type]
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
        kinds.append(config.model_type)
    scale = 1.0
    for name in _SCALES:
        scale *= _number(config, name) or 1.0
    # MiniCPM3 has the name too, for what it does to the hidden states.
    scaling = _number(config, "logits_scaling") or 1.0
    if any(kind.startswith("granite") for kind in kinds):
        scale /= scaling
    elif any(kind.startswith("hyperclovax") for kind in kinds):
        scale *= scaling
    caps = (_number(config, name) for name in _SOFTCAPS)
    return Head(weight, linear.bias, scale, next((cap for cap in caps if cap), None))


class Capture:
    """What ``capture_hidden`` saw of one forward pass."""

    def __init__(self, linear: nn.Linear, sample: bool) -> None:
        self._linear = linear
        self._sample = sample
        self._inputs: list[Tensor] = []
        self._products: list[Tensor] = []

    @property
    def hidden(self) -> Tensor:
        """Input of the head, [B, K, D], attached to the graph.

        Raises:
            ValueError: if the forward pass called the head never or more than once.
        """
        return _only(self._inputs)

    @property
    def product(self) -> Tensor:
        """[1, <= 4, V], hidden Wt + bias of some rows, whose logits the model made."""
        return _only(self._products)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Stands in for the head's forward."""
        self._inputs.append(hidden)
        weight, bias = self._linear.weight, self._linear.bias
        if self._sample:
            product = functional.linear(hidden[-1:, -_SAMPLE_ROWS:], weight, bias)
            # Models may scale their logits in place.
            self._products.append(product.detach().clone())
            return product
        # One column, for what the model does to logits. It keeps head and hidden states in the graph
        # of the outputs, where DistributedDataParallel looks for the parameters in use.
        return functional.linear(hidden, weight[:1], None if bias is None else bias[:1])


@contextmanager
def capture_hidden(model: Any, *, sample: bool = False) -> Iterator[Capture]:
    """Lets forward passes of a model stop at its head, whose input they record.

    Wrappers (DistributedDataParallel, autocast), ``logits_to_keep`` and caches work as ever, only the
    head's product is not made: the ``logits`` of the outputs are [B, K, 1] and mean nothing.

    Args:
        model: Hugging Face causal language model, not wrapped but by PEFT; its wrapper may be called.
        sample: make the logits of up to 4 rows instead, [1, <= 4, V]: what ``check_logits`` needs.

    Yields:
        Capture: its ``hidden`` is there after one forward pass.

    Raises:
        RuntimeError: if the head is being captured already.
        ValueError: as ``find_head``.
    """
    linear = _linear(model)
    before = vars(linear).get("forward")
    if isinstance(before, Capture):
        raise RuntimeError(
            "capture_hidden: this model's head is being captured already; leave the outer context "
            "first, and use one thread per model"
        )
    capture = Capture(linear, sample)
    vars(linear)["forward"] = capture
    try:
        yield capture
    finally:
        if before is None:
            del vars(linear)["forward"]
        else:
            vars(linear)["forward"] = before


def check_logits(head: Head, capture: Capture, logits: Tensor) -> None:
    """Compares the logits a model made of some rows with those of the head.

    Args:
        head: of ``find_head``.
        capture: of a forward pass under ``capture_hidden(model, sample=True)``.
        logits: [1, <= 4, V], what that forward pass returned.

    Raises:
        ValueError: if they differ by more than rounding in their dtype, relative to their norm (1e-5
            in fp32), or in shape: the model does something to its logits that is not known here.
    """
    product = capture.product
    expected = head.logit_scale * product.float()
    if head.softcap is not None:
        expected = head.softcap * torch.tanh(expected / head.softcap)
    known = f"logit_scale={head.logit_scale:g} and softcap={head.softcap}"
    if logits.shape != expected.shape:
        raise ValueError(
            f"the model's logits have shape {tuple(logits.shape)}, its head's {tuple(expected.shape)}: "
            f"beyond {known} it does something to them that is not known; {_REMEDY}"
        )
    # Equal infinities are equal.
    logits = logits.detach().float()
    difference = (logits - expected).masked_fill(logits == expected, 0.0)
    error = float(difference.norm() / expected.masked_fill(expected.isinf(), 0.0).norm())
    # NaN is no agreement, but logits of 0 are fine.
    if difference.any() and not error <= max(torch.finfo(product.dtype).eps, 1e-5):
        raise ValueError(
            f"the model's logits differ by {error:.1e} of their norm from its head's with {known}: it "
            f"does something to them that is not known; {_REMEDY}"
        )


def _linear(model: Any) -> nn.Linear:
    base = base_model(model)
    get = getattr(base, "get_output_embeddings", None)
    linear = get() if callable(get) else None
    # Subclasses and wrappers compute something else: LoRA, quantised weights, modules_to_save.
    if type(linear) is not nn.Linear:
        kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
        found = "no output embeddings" if linear is None else f"a head of type {kind}"
        raise ValueError(
            f"{type(base).__name__} has {found}; expected a plain torch.nn.Linear; {_REMEDY}, or leave "
            "the head out of LoRA and quantisation"
        )
    return linear


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) else None


def _only(tensors: list[Tensor]) -> Tensor:
    if len(tensors) != 1:
        raise ValueError(
            f"the forward pass called its head {len(tensors)} times; expected once; {_REMEDY}"
        )
    return tensors[0]
