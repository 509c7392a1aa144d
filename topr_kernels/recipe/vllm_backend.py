"""Sampling with vLLM, where it is installed. vLLM is never imported unless it is used."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

from topr_kernels.recipe.generate import Completion, as_completion, prompt_token_ids
from topr_kernels.recipe.models import SMOLLM2
from topr_kernels.recipe.steps import SettingsError


def choose_backend(backend: str, model: str) -> str:
    """What samples: "hf" or "vllm"; "auto" is vLLM where it and a GPU are there.

    Args:
        backend: "hf", "vllm" or "auto".
        model: as in ``load_model``; "smollm2" is a GGUF file, which transformers samples.

    Raises:
        SettingsError: if "vllm" is asked for and not installed, or for "smollm2".
    """
    found = importlib.util.find_spec("vllm") is not None
    if backend == "vllm" and not found:
        raise SettingsError(
            "backend: got 'vllm', which is not installed; pip install vllm, or use backend='hf'"
        )
    if backend == "vllm" and model == SMOLLM2:
        raise SettingsError(
            "backend: got 'vllm' with the model 'smollm2', a GGUF file; expected a folder or a hub id"
        )
    if backend == "auto":
        found = found and model != SMOLLM2
        return "vllm" if found and torch.cuda.is_available() else "hf"
    return backend


def vllm_sampler(model: str) -> Callable[..., list[Completion]]:
    """A function to give ``generate`` as ``sampler``; called as ``complete`` is.

    Its log-probabilities are those of the distribution that was sampled ("processed": after the
    temperature). They are vLLM's, not those of this package's kernel: score the records again before
    training, so that pi and mu agree at the start.

    Args:
        model: local folder or hub id.
    """
    vllm: Any = importlib.import_module("vllm")
    engine = vllm.LLM(model=model, logprobs_mode="processed_logprobs")

    def sample(
        model: Any,
        tokenizer: Any,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        stop_ids: Sequence[int],
        chat: bool = False,
    ) -> list[Completion]:
        ids = [prompt_token_ids(tokenizer, prompt, chat=chat) for prompt in prompts]
        settings = [
            # Own seeds: equal prompts of a batch must not get equal completions.
            vllm.SamplingParams(
                max_tokens=max_new_tokens,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                seed=(seed * 4099 + i) % 2**31,
                stop_token_ids=list(stop_ids),
                logprobs=0,
                skip_special_tokens=True,
            )
            for i in range(len(ids))
        ]
        outputs = engine.generate([{"prompt_token_ids": row} for row in ids], settings)
        stops = set(stop_ids)
        completions = []
        for row, output in zip(ids, outputs, strict=True):
            drawn = output.outputs[0]
            tokens = list(drawn.token_ids)
            # One mapping per token, from ids to their log-probabilities; the drawn id is among them.
            log_prob = [
                min(0.0, float(known[token].logprob))
                for token, known in zip(tokens, drawn.logprobs, strict=True)
            ]
            completions.append(as_completion(tokenizer, row, tokens, stops, log_prob))
        return completions

    return sample
