"""Tiny configurations of any class of transformers: by rules, and a table of exceptions."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

VOCAB = 96
WIDTH = 64
HEADS = 4
HEAD_DIM = WIDTH // HEADS
#: Ids below are those of special tokens.
FIRST_TOKEN = 24

#: What an integer becomes by its name: the first rule that fits, and None leaves it as it is.
RULES: list[tuple[str, int | None]] = [
    (r"(\w+_)?type_vocab_size|(pronunciation|shape)_vocab_size", None),
    (r"(\w+_)?vocab_size(_base|_per_layer_input)?|\w+_vocab", VOCAB),
    (r"sliding_window|(attention_)?window_size|local_attention(_window_len)?|keep_window_size", 4),
    (r"(conf_)?attention_chunk_size", 4),
    (r"linear_num_key_heads|hc_mult|hc_count|\w*cycles", 2),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"(\w+_)?(num_attention_heads|attention_heads|n_heads?|num_heads|num_value_heads)", HEADS),
    (r"index_topk", 8),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"(\w+_)?(head_dim|headdim|d_head|dim_head|d_kv|attention_head_size|rotary_dim)", HEAD_DIM),
    (r"num_experts_per_tok(en)?|(\w+_)?top_?k(_experts)?|moe_k", 2),
    (r"n_group|topk_group|num_expert_group|n_groups?", 1),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|zero_expert_num", 4),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|first_num_dense_layers|max_window_layers", 1),
    (r"(\w+_)?(lora_rank|_rank|lowrank)", 8),
    (r"(\w+_)?(hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|depth)", 2),
    (r"num_query_tokens|latent_query_num", 2),
    (r"num_layers_per_stack|n_(input|recurrent|output)_layers|prefetch", 1),
    (r"max_position_embeddings|n_positions|n_ctx|context_length|max_seq_len|mem_len", 128),
    (r"(\w+_)?(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|d_ff|dim_ff|dff)", WIDTH),
    (r"n_inner|d_inner|mlp_dim|feed_forward_size|share_expert_dim|mamba_d_ssm", 2 * WIDTH),
    (
        r"(\w+_)?(hidden_size(_per_layer_input|_global)?|hidden_dim|d_model|n_embd|emb(ed)?_dim)",
        WIDTH,
    ),
    (r"(\w+_)?(embedding_dim|embedding_size|proj_dim|projection_dim|lru_width|output_dim)", WIDTH),
    (r"(\w+_)?(state_size|d_state|ssm_state_size)", 8),
    (r"base_channels|latent_channels", 32),
    (r"chunk_size|mamba_chunk_size", 4),
]
#: What a field that is None by default becomes by its name.
SET = r"head_dim|n_routed_experts|num_experts_per_tok|n_shared_experts|moe_intermediate_size"
KV_HEADS = r"(\w+_)?(num_key_value_heads|kv_n_heads|num_kv_heads|num_query_groups)"
DROPOUT = r".*(dropout|pdrop|drop_rate|drop_path|layerdrop|jitter|drop_prob).*"
SPECIAL = r".*token_(id|index)|pad_index|(start|end|newline|patch)_id"
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
HEADS_OF = ("num_attention_heads", "n_head", "n_heads", "num_heads")

#: Positions of three dimensions where no rule sees them.
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
_ASSISTANT = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 30,
}
#: By the name of a configuration's class; ``...`` leaves a field out, whatever the rules say.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": MROPE}},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 5, "IMGIMGA": 6, "IMGIMGB": 7}},
    "DbrxAttentionConfig": {"rope_theta": 1e4, "clip_qkv": 8.0},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "DiffusionGemmaTextConfig": {"num_experts": 4, "top_k_experts": 2},
    "DoryConfig": {"num_hidden_layers": 3, "layer_types": ...},
    "Dots3NoteTextConfig": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 2 * HEAD_DIM,
        "swa_qk_nope_head_dim": HEAD_DIM,
        "swa_v_head_dim": HEAD_DIM,
        "sliding_window": 4,
    },
    "Dots3NoteAudioConfig": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    "Dots3NoteVisionConfig": {"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
    "Apertus1p5Config": {"image_token_offset": 32, "audio_token_offset": 64},
    "Blip2Config": {"image_token_index": 5},
    "InstructBlipConfig": {"image_token_index": 5},
    "InstructBlipVideoConfig": {"video_token_index": 5},
    "Emu3Config": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}},
    "Ernie4_5_VLMoeTextConfig": {"rope_parameters": {**MROPE, "mrope_section": [2, 2, 4]}},
    "Gemma3nTextConfig": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": WIDTH,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "Gemma4TextConfig": {"global_head_dim": 2 * HEAD_DIM},
    "Gemma4AssistantConfig": {
        "text_config": {
            **_ASSISTANT,
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_attention_heads": HEADS,
            "head_dim": HEAD_DIM,
            "num_hidden_layers": 2,
            "num_kv_shared_layers": 2,
        },
    },
    "Gemma4UnifiedTextConfig": {"global_head_dim": 2 * HEAD_DIM},
    "Glm5NextTextConfig": {"index_kpool": 2},
    "Florence2VisionConfig": {
        "embed_dim": (16, 16, 16, 16),
        "depths": (1, 1, 1, 1),
        "num_heads": (2, 2, 2, 2),
        "num_groups": (2, 2, 2, 2),
    },
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "attention_layers": ...},
    "Granite4VisionConfig": {"deepstack_layer_map": [(-1, 0)], "downsample_rate": "1/2"},
    "InklingVisionConfig": {"num_hidden_layers": 8, "patch_size": 8},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "Mamba2Config": {"num_heads": 8},
    "Molmo2AdapterConfig": {"vision_feature_layer": [-1, -2]},
    "PaddleOCRTextConfig": {"rope_parameters": MROPE},
    "Qwen4ExpTextConfig": {
        "eos_token_id": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "heads_per_ngram": 2,
        "make_ngram_vocab_size_divisible_by": 1,
        "split_ngram_parts": 1,
    },
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": 20},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 20},
    "RadioConfig": {"video_temporal_patch_size": 2},
    "ReformerConfig": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 1,
        "lsh_attn_chunk_length": 1,
        "hash_seed": 0,
    },
    "TimmWrapperConfig": {"model_args": {"embed_dim": WIDTH}, "hidden_size": WIDTH},
    "Step3p7TextConfig": {"sliding_window": 4},
    "WavTokenizerEncoderConfig": {"codebook_dim": WIDTH, "codebook_size": 32},
    "Apertus1p5VisionTokenizerConfig": {"codebook_size": 32},
    "VisionEncoderDecoderConfig": {
        "encoder": {
            "model_type": "vit",
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
        },
        "decoder": {
            "model_type": "gpt2",
            "vocab_size": VOCAB,
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": HEADS,
        },
    },
    "XLMConfig": {"causal": True},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * HEAD_DIM,
    },
    "ZayaConfig": {"num_experts_per_tok": 1},
}
_MUSIC = {
    "text_encoder": {"model_type": "t5"},
    "audio_encoder": {"model_type": "encodec"},
    "decoder": {},
}
#: Without which not even the default is valid, or lacks a part.
NEEDED: dict[str, dict[str, Any]] = {
    "DiffusionGemmaConfig": {"vision_config": {"model_type": "gemma4_vision"}},
    "Gemma4AssistantConfig": {"text_config": _ASSISTANT},
    "Gemma4UnifiedAssistantConfig": {"text_config": {"model_type": "gemma4_unified_text"}},
    "Granite4VisionConfig": {"text_config": {"model_type": "granite"}},
    "VisionEncoderDecoderConfig": {
        "encoder": {"model_type": "vit"},
        "decoder": {"model_type": "gpt2"},
    },
    "MusicgenConfig": _MUSIC,
    "MusicgenMelodyConfig": _MUSIC,
}


def tiny_config(kind: type[PreTrainedConfig]) -> Any:
    """The smallest configuration of a class that keeps each kind of its layers."""
    # Some write into what they are given.
    default = kind(**deepcopy(NEEDED.get(kind.__name__, {})))
    return kind(**settings(default))


def settings(default: PreTrainedConfig) -> dict[str, Any]:
    """Small values in the place of a default configuration's."""
    kind = type(default)
    # What differs by layer cannot be read of the whole.
    given = {f.name: vars(default).get(f.name, f.default) for f in fields(kind)}
    own = EXCEPTIONS.get(kind.__name__, {})
    result: dict[str, Any] = {}
    for name, value in given.items():
        if name in own:
            continue
        if isinstance(value, PreTrainedConfig):
            result[name] = type(value)(**settings(value))
        elif isinstance(value, float | int) and re.fullmatch(DROPOUT, name):
            result[name] = type(value)(0)
        elif re.fullmatch(KV_HEADS, name) and not isinstance(value, bool):
            result[name] = _kv_heads(value, given)
        elif value == 0:
            continue
        elif _is_count(value) or (value is None and re.fullmatch(SET, name)):
            small = next((small for rule, small in RULES if re.fullmatch(rule, name)), None)
            if small is not None:
                result[name] = small
    result |= _special_tokens(given) | _layers(given)
    if "mrope_section" in (getattr(kind, "ignore_keys_at_rope_validation", None) or ()):
        result["rope_parameters"] = _mrope(given)
    result |= own
    return {name: value for name, value in result.items() if value is not ...}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kv_heads(value: int | None, given: dict[str, Any]) -> int:
    heads = next((given[n] for n in HEADS_OF if given.get(n)), None)
    if value is None or value == heads:
        return HEADS
    return 1 if value == 1 else HEADS // 2


def _mrope(given: dict[str, Any]) -> dict[str, Any]:
    """Positions of three dimensions, each with its share of a head's columns."""
    rope = dict(given.get("rope_parameters") or {"rope_type": "default", "rope_theta": 1e4})
    half = int(HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2
    rope["mrope_section"] = [half - 2 * (half // 4), half // 4, half // 4]
    return rope


def _special_tokens(given: dict[str, Any]) -> dict[str, int]:
    """Distinct ids below those of a batch's tokens."""
    places = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    free = iter(range(3, FIRST_TOKEN))
    names = [n for n, x in given.items() if re.fullmatch(SPECIAL, n) and _is_count(x) and x >= 0]
    return {n: places[n] if n in places else next(free) for n in names}


def _layers(given: dict[str, Any]) -> dict[str, Any]:
    """Of lists with an entry for each layer the first of each kind."""
    name = next((n for n in LAYERS if _is_count(given.get(n))), None)
    if name is None:
        return {}
    lists = {
        n: x for n, x in given.items() if isinstance(x, list | tuple) and len(x) == given[name]
    }
    kinds = list(zip(*(x for x in lists.values() if isinstance(x[0], str)), strict=True))
    first = {kind: i for i, kind in reversed(list(enumerate(kinds)))}
    places = sorted(first.values()) or [0, 1]
    if len(places) == 1:
        places *= 2
    return {name: len(places), **{n: [x[i] for i in places] for n, x in lists.items()}}
