"""A tiny model that has learnt how an answer looks, for the tests of the Trainer and the recipe."""

from __future__ import annotations

import string
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS = "<eos>"


@cache
def tiny_tokenizer() -> Any:
    """One token per character; EOS is also the pad token, as in many chat models."""
    vocab = {token: i for i, token in enumerate([EOS, "<unk>", *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def tiny_config(**changes: Any) -> LlamaConfig:
    settings = {
        "vocab_size": len(tiny_tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        # Room for a verifier's prompts.
        "max_position_embeddings": 1024,
        "eos_token_id": tiny_tokenizer().eos_token_id,
        "pad_token_id": tiny_tokenizer().pad_token_id,
        "bos_token_id": None,
    }
    return LlamaConfig(**{**settings, **changes})


def random_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config()).eval()


def save(model: Any, folder: Path) -> Path:
    """The model with its tokenizer in a folder, as a hub has them; returns the folder."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@cache
def _trained_state() -> dict[str, torch.Tensor]:
    model = random_model()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    tokenizer = tiny_tokenizer()
    for _ in range(90):
        # Answers are random digits: the model learns to write a number and to stop, not to add.
        a, b, c = torch.randint(0, 10, (3, 24), generator=generator).tolist()
        lines = [f"{x} + {y} = {z}\n" * 2 for x, y, z in zip(a, b, c, strict=True)]
        ids = torch.tensor(tokenizer(lines)["input_ids"])
        logits = model(ids).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def tiny_model() -> LlamaForCausalLM:
    """Answers sums of two digits with a digit and a newline; right now and then."""
    model = random_model()
    model.load_state_dict(_trained_state())
    return model
