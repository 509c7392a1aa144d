"""The classes of transformers' mappings, and tiny random models of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from every_model.tiny_configs import tiny_config

TEXT, IMAGE = "text", "image"
_MAPPINGS = {
    TEXT: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    IMAGE: modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}


class Entry(NamedTuple):
    """A model's class, and the first of the configurations that the mappings give it."""

    model: str
    config: str
    kind: str


def entries() -> list[Entry]:
    """Every class of both mappings, once."""
    found: dict[str, Entry] = {}
    for kind, mapping in _MAPPINGS.items():
        for config, models in mapping.items():
            for model in models if isinstance(models, list | tuple) else [models]:
                entry = Entry(model, config, kind)
                # Llama's class serves configurations of other names too.
                if model not in found or _is_named_after(entry):
                    found[model] = entry
    return sorted(found.values(), key=lambda entry: entry.model.lower())


def _is_named_after(entry: Entry) -> bool:
    return entry.model.lower().startswith(entry.config.replace("_", "").replace("-", "") + "for")


class Tower(PreTrainedModel):
    """In the place of towers that need timm; text does not pass it."""

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.layer = nn.Linear(1, 1)


def _without_timm() -> None:
    towers = AutoModel._model_mapping._extra_content
    for name in ("Gemma3nVisionConfig", "TimmWrapperConfig"):
        if hasattr(transformers, name):
            towers[getattr(transformers, name)] = Tower


def build(entry: Entry, seed: int = 0) -> Any:
    """A tiny random model in which each token that is seen, and each position, changes the logits."""
    _without_timm()
    torch.manual_seed(seed)
    model_class = getattr(transformers, entry.model)
    config = _own_config(model_class, tiny_config(CONFIG_MAPPING[entry.config]))
    if entry.kind == TEXT and getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    if model_class._can_set_experts_implementation():
        config._experts_implementation = "eager"
    model = model_class._from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms, biases and decays keep their sense, but none stays exactly 0 or 1.
            noise = torch.randn_like(parameter)
            parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        nn.init.normal_(head.weight, std=0.5)
    return model.train()


def _own_config(model_class: Any, config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a configuration that a model's class takes."""
    own = model_class.config_class
    parts = [config, *(x for x in vars(config).values() if isinstance(x, PreTrainedConfig))]
    return next((part for part in parts if isinstance(part, own)), config)
