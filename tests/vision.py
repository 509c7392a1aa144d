"""Tiny models of images with their processors, built offline, for the tests of images."""

from __future__ import annotations

import string
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

#: Tokens that one family or another writes around and for an image.
TOKENS = {
    "image_token": "<image>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}
SPECIAL = [
    "<eos>",
    "<unk>",
    *TOKENS.values(),
    "<image_soft_token>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
    "<video>",
    *(f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)),
]
#: What a template writes for an image.
SHOWN = {
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": "<start_of_image>",
    "llava": "<image>",
    "llava_next": "<image>",
    "idefics3": "<image>",
    "smolvlm": "<image>",
}
FAMILIES = tuple(SHOWN)
_TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}SHOWN{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}{% if m.role == 'assistant' %}<eos>{% endif %};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def tokenizer(family: str) -> Any:
    """One token per character, and those of images; EOS is also the pad token."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *string.printable])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    extra = {}
    if family == "gemma3":
        extra = {**TOKENS, "image_token": "<image_soft_token>"}
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<eos>",
        pad_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=extra or None,
    )
    made.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    return made


def without_videos(kind: type) -> type:
    """A processor's class without the processor of videos, which needs torchvision."""

    def __init__(
        self: Any, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any
    ) -> None:
        kind.__init__(self, image_processor, tokenizer, None, **kwargs)

    return type(kind.__name__, (kind,), {"__init__": __init__})


@cache
def processor(family: str) -> Any:
    """The family's processor, with few tokens for an image; skips the test if it wants torchvision."""
    try:
        return _processor(family)
    except ImportError as error:
        pytest.skip(f"{family}: {' '.join(str(error).split())[:80]}")


def _processor(family: str) -> Any:
    options: dict[str, Any] = {
        "tokenizer": tokenizer(family),
        "chat_template": _TEMPLATE.replace("SHOWN", SHOWN[family]),
    }
    square = {"height": 16, "width": 16}
    if family.startswith("qwen2"):
        patches = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
        images = transformers.Qwen2VLImageProcessorPil(
            size={"shortest_edge": 64, "longest_edge": 1024}, **patches
        )
        name = "Qwen2VLProcessor" if family == "qwen2_vl" else "Qwen2_5_VLProcessor"
        return without_videos(getattr(transformers, name))(image_processor=images, **options)
    if family == "gemma3":
        images = transformers.Gemma3ImageProcessorPil(size=square)
        return transformers.Gemma3Processor(images, image_seq_length=4, **options)
    if family in ("idefics3", "smolvlm"):
        edges = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
        if family == "idefics3":
            images = transformers.Idefics3ImageProcessorPil(**edges)
            return transformers.Idefics3Processor(images, image_seq_len=4, **options)
        from transformers.models.smolvlm import processing_smolvlm

        # Numbers in words are for videos.
        processing_smolvlm.num2words = processing_smolvlm.num2words or str
        images = transformers.SmolVLMImageProcessorPil(**edges)
        kind = without_videos(transformers.SmolVLMProcessor)
        return kind(image_processor=images, image_seq_len=4, **options)
    options |= {"patch_size": 8, "vision_feature_select_strategy": "default"}
    options |= {"num_additional_image_tokens": 1}
    crops = {"size": {"shortest_edge": 16}, "crop_size": square}
    if family == "llava":
        return transformers.LlavaProcessor(transformers.CLIPImageProcessorPil(**crops), **options)
    points = [[16, 32], [32, 16], [32, 32]]
    images = transformers.LlavaNextImageProcessorPil(image_grid_pinpoints=points, **crops)
    return transformers.LlavaNextProcessor(images, **options)


def model(family: str) -> Any:
    """A random model of the family, in eval mode."""
    ids = processor(family).tokenizer
    text = {
        **{"vocab_size": 144, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
        **{
            "pad_token_id": ids.pad_token_id,
            "eos_token_id": ids.eos_token_id,
            "bos_token_id": None,
        },
    }
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}

    def number(token: str) -> int:
        return ids.convert_tokens_to_ids(token)

    if family.startswith("qwen2"):
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 100.0}
        patches = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
        if family == "qwen2_vl":
            kind = "Qwen2VL"
            sizes = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
        else:
            kind = "Qwen2_5_VL"
            sizes = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2}
            sizes |= {"intermediate_size": 32, "fullatt_block_indexes": [1], "window_size": 16}
        config = getattr(transformers, f"{kind}Config")(
            text_config={**text, "rope_parameters": rope},
            vision_config={**sizes, **patches},
            image_token_id=number("<|image_pad|>"),
            video_token_id=number("<|video_pad|>"),
            vision_start_token_id=number("<|vision_start|>"),
            vision_end_token_id=number("<|vision_end|>"),
        )
        kind = f"{kind}ForConditionalGeneration"
    elif family == "gemma3":
        kind = "Gemma3ForConditionalGeneration"
        config = transformers.Gemma3Config(
            text_config={
                **text,
                "head_dim": 8,
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 16,
            },
            vision_config=small,
            mm_tokens_per_image=4,
            image_token_id=number("<image_soft_token>"),
            boi_token_id=number("<start_of_image>"),
            eoi_token_id=number("<end_of_image>"),
        )
    elif family in ("idefics3", "smolvlm"):
        name = "Idefics3" if family == "idefics3" else "SmolVLM"
        kind = f"{name}ForConditionalGeneration"
        config = getattr(transformers, f"{name}Config")(
            text_config={**text, "model_type": "llama"},
            vision_config={**small, "patch_size": 4},
            scale_factor=2,
            image_token_id=number("<image>"),
            pad_token_id=ids.pad_token_id,
        )
    else:
        name = "Llava" if family == "llava" else "LlavaNext"
        kind = f"{name}ForConditionalGeneration"
        more = {} if family == "llava" else {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
        config = getattr(transformers, f"{name}Config")(
            text_config={**text, "model_type": "llama"},
            vision_config={**small, "model_type": "clip_vision_model"},
            image_token_id=number("<image>"),
            image_seq_length=4,
            **more,
        )
    torch.manual_seed(0)
    made = getattr(transformers, kind)(config).eval()
    for p in made.parameters():
        # Large enough that a wrong picture, position or mask shows.
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.15)
    return made


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture in which every patch is another."""
    numbers = torch.Generator().manual_seed(seed)
    small = torch.randint(256, (height // 4, width // 4, 3), generator=numbers, dtype=torch.uint8)
    return Image.fromarray(small.numpy()).resize((width, height), Image.Resampling.NEAREST)
