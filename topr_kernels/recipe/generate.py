"""Samples completions in batches: full softmax, KV cache, one line each, seeded per batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig

from topr_kernels.hf.collator import (
    common_prefix_length,
    pad_left,
    prefix_cache,
    prefix_sharing_problem,
)
from topr_kernels.recipe.records import (
    FinishReason,
    Record,
    Sampling,
    read_records,
    write_records,
)
from topr_kernels.recipe.tasks import Question, Task


@dataclass(frozen=True)
class Completion:
    """What the model wrote after one prompt.

    Args:
        prompt_token_ids: ids of the prompt as the model saw them.
        token_ids: sampled ids; the last one is the stop token if ``finish_reason`` is "stop".
        text: the completion without special tokens.
        finish_reason: "stop" if the model ended it, "length" if it was cut.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason


def stop_token_ids(tokenizer: Any) -> list[int]:
    """Ids that end a completion: EOS and every token with a newline in it."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    stops = {token for token, text in enumerate(texts) if "\n" in text}
    return sorted(stops | {tokenizer.eos_token_id})


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stop_ids: Sequence[int],
) -> list[Completion]:
    """Completes one batch of prompts up to the end of a line.

    Args:
        model: a causal language model in eval mode.
        tokenizer: its tokenizer, with a pad token.
        prompts: texts; the tokens they begin with in common are run once.
        max_new_tokens: length at which a completion is cut.
        temperature: divides the logits; 0 for greedy. No top-k, no top-p, no penalties: the
            sampler's distribution is the full softmax that ``score`` evaluates.
        seed: of this batch; the same prompts and seed give the same completions, whatever was
            sampled before.
        stop_ids: token ids that end a completion (see ``stop_token_ids``).

    Returns:
        One completion per prompt, in order.
    """
    token_ids = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    prefix = 0 if prefix_sharing_problem(model) else common_prefix_length(token_ids)
    batch = {
        name: x.to(model.device)
        for name, x in pad_left(token_ids, tokenizer.pad_token_id, prefix).items()
    }
    cache = {"past_key_values": prefix_cache(model, batch["input_ids"], prefix)} if prefix else {}
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        top_k=0 if temperature > 0 else None,
        top_p=1.0 if temperature > 0 else None,
        repetition_penalty=1.0,
        eos_token_id=list(stop_ids),
        pad_token_id=tokenizer.pad_token_id,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    # Forked, so that sampling neither depends on nor disturbs the caller's random numbers.
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        output: Tensor = model.generate(**batch, **cache, generation_config=settings)
    stops = set(stop_ids)
    new = output[:, batch["input_ids"].shape[1] :].tolist()
    return [_completion(tokenizer, p, c, stops) for p, c in zip(token_ids, new, strict=True)]


def _completion(tokenizer: Any, prompt: list[int], row: list[int], stops: set[int]) -> Completion:
    # Whatever follows the first stop token is padding. The stop token itself was sampled, so it is
    # part of the completion; a completion that was cut has none and gets none.
    end = next((i for i, token in enumerate(row) if token in stops), None)
    ids = row if end is None else row[: end + 1]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return Completion(prompt, ids, text, "length" if end is None else "stop")


def generate(
    model: Any,
    tokenizer: Any,
    task: Task,
    questions: Sequence[Question],
    *,
    model_name: str,
    samples: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    temperature: float = 1.0,
    shards: Path | None = None,
) -> list[Record]:
    """Samples completions of every question and rewards them.

    Args:
        model: the behavior policy, in eval mode.
        tokenizer: its tokenizer.
        task: parses and rewards the answers.
        questions: Q questions.
        model_name: what the records call the model.
        samples: completions per question.
        max_new_tokens: length at which a completion is cut.
        batch_size: completions sampled together.
        seed: batch i is sampled with a seed made of this one and i, so a resumed run continues
            with the same records as an unbroken one.
        temperature: of the sampler; 1 is the policy itself. At any other, ``score`` gives the
            log-probabilities of the sampler at that temperature and ``train`` trains the model at
            temperature 1, so training starts off-policy. Greedy samples (0) are not scored.
        shards: folder for finished batches. Batches found there are not sampled again.

    Returns:
        Q * samples records without ``behavior_log_prob``, in the order of the questions.

    Raises:
        RecordError: if a shard is damaged; delete it and run again.
    """
    work = [question for question in questions for _ in range(samples)]
    starts = range(0, len(work), batch_size)
    stop_ids = stop_token_ids(tokenizer)
    records: list[Record] = []
    with tqdm(total=len(work), desc="generate", unit="sample") as bar:
        for i, start in enumerate(starts):
            part = work[start : start + batch_size]
            shard = None if shards is None else shards / f"batch-{i:05d}.parquet"
            if shard is not None and shard.exists():
                batch = read_records(shard)
            else:
                batch_seed = seed * 1_000_003 + i
                completions = complete(
                    model,
                    tokenizer,
                    [question.prompt for question in part],
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    seed=batch_seed,
                    stop_ids=stop_ids,
                )
                sampling = Sampling(model_name, temperature, 0, 1.0, max_new_tokens, batch_seed)
                batch = [
                    _record(task, question, completion, sampling)
                    for question, completion in zip(part, completions, strict=True)
                ]
                if shard is not None:
                    write_records(shard, batch)
            records += batch
            bar.update(len(batch))
    return records


def _record(task: Task, question: Question, completion: Completion, sampling: Sampling) -> Record:
    answer = task.parse(completion.text, completion.finish_reason, question)
    return Record(
        group=question.group,
        prompt=question.prompt,
        completion=completion.text,
        prompt_token_ids=completion.prompt_token_ids,
        completion_token_ids=completion.token_ids,
        reward=task.reward(answer, question),
        finish_reason=completion.finish_reason,
        sampling=sampling,
    )
