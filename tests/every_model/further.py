"""What models ask for beside tokens: token types, or an image that they do not run without."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Further(NamedTuple):
    """What a model asks for beside its tokens.

    Attributes:
        names: of its arguments.
        config: of the model.
        begin: ids that every prompt begins with.
    """

    names: tuple[str, ...] = ()
    config: Any = None
    begin: tuple[int, ...] = ()

    def __call__(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The arguments for ``input_ids`` and ``labels`` [B, T]."""
        return {name: _made(name, self.config, ids, labels) for name in self.names}


_IMAGE = ("pixel_values",)
_NAMES: dict[str, tuple[str, ...]] = {
    "BlipForConditionalGeneration": _IMAGE,
    "Blip2ForConditionalGeneration": _IMAGE,
    "IdeficsForVisionText2Text": (*_IMAGE, "image_attention_mask"),
    "InstructBlipForConditionalGeneration": (*_IMAGE, "qformer_input_ids"),
    "InstructBlipVideoForConditionalGeneration": (*_IMAGE, "qformer_input_ids"),
    "Kosmos2ForConditionalGeneration": (*_IMAGE, "image_embeds_position_mask"),
    "Molmo2ForConditionalGeneration": ("mm_token_type_ids",),
    "PaliGemmaForConditionalGeneration": ("token_type_ids",),
}


def further_of(model: Any) -> Further:
    """What a model of a class asks for."""
    kind, config = type(model).__name__, model.config
    names = _NAMES.get(kind, ())
    tokens = ("image_token_index", "video_token_index")
    image = next((x for n in tokens if (x := getattr(config, n, None)) is not None), None)
    count = getattr(config, "num_query_tokens", 0) or 0
    if kind.startswith("Kosmos2"):
        image, count = 5, config.latent_query_num
    return Further(names, config, () if image is None or names[:1] != _IMAGE else (image,) * count)


def _made(name: str, config: Any, ids: Tensor, labels: Tensor) -> Tensor:
    rows = len(ids)
    if name == "token_type_ids":
        # What is not scored is the prefix, which is seen from both sides.
        return (labels != -100).long()
    if name == "mm_token_type_ids":
        return torch.zeros_like(ids)
    if name == "image_attention_mask":
        return torch.ones(*ids.shape, 1, dtype=torch.int64)
    if name == "image_embeds_position_mask":
        return (ids == 5).long()
    if name == "qformer_input_ids":
        return torch.tensor([[30, 31, 32]]).repeat(rows, 1)
    size = config.vision_config.image_size
    shape = (1, 3, size, size)
    if config.model_type in ("idefics", "instructblipvideo"):
        shape = (1, 1, *shape[1:])
    image = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    return image.repeat(rows, *[1] * (len(shape) - 1))
