"""Samples completions in batches: full softmax, KV cache, one line each, seeded per batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig

from topr_kernels.hf.collator import pad_left
from topr_kernels.hf.heads import base_model
from topr_kernels.hf.images import (
    ImageInputs,
    image_inputs,
    right_aligned_kinds,
    tokenizer_of,
)
from topr_kernels.hf.padding import check_padding_once
from topr_kernels.hf.signature import (
    KEEP,
    POSITIONS,
    cache_argument,
    cache_of,
    counts_from_padding_id,
)
from topr_kernels.hf.signature import positions as positions_of
from topr_kernels.hf.tokenise import Reader
from topr_kernels.recipe.files import read_json, write_json
from topr_kernels.recipe.models import dtype_name, tokenizer_fingerprint
from topr_kernels.recipe.options import SettingsError
from topr_kernels.recipe.prompt_cache import caches_prefix, common_prefix_length, prefix_cache
from topr_kernels.recipe.records import (
    FinishReason,
    Record,
    RecordError,
    Sampling,
    read_records,
    write_records,
)
from topr_kernels.recipe.scoring import Verdict, verdicts
from topr_kernels.recipe.tasks import AnyTask, Question


@dataclass(frozen=True)
class Completion:
    """What the model wrote after one prompt.

    Args:
        prompt_token_ids: ids of the prompt as the model saw them.
        token_ids: sampled ids; the last one is the stop token if ``finish_reason`` is "stop".
        text: the completion without special tokens.
        finish_reason: "stop" if the model ended it, "length" if it was cut.
        log_prob: what the sampling engine says of each token, where it does.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    log_prob: list[float] | None = None


def stop_token_ids(tokenizer: Any, *, one_line: bool = True, model: Any = None) -> list[int]:
    """Ids that end a completion: EOS, those of the model, and every token with a newline in it.

    Args:
        tokenizer: of the model.
        one_line: whether a newline ends a completion.
        model: whose generation settings may name more ids that end a turn; None for no more.
    """
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None}
    if one_line:
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        stops |= {token for token, text in enumerate(texts) if "\n" in text}
    return sorted(stops)


def prompt_token_ids(
    tokenizer: Any, prompt: str, *, chat: bool = False, images: Sequence[str] = ()
) -> list[int]:
    """Ids of a prompt; with ``chat`` as the user's turn of the tokenizer's chat template.

    Args:
        tokenizer: of the model; for images its processor.
        prompt: a text.
        chat: ask it through the chat template.
        images: shown before the prompt, with ``chat``.

    Raises:
        ValueError: if there are images without ``chat`` or a processor, or one cannot be read.
    """
    return _token_ids_of_each(tokenizer, [(prompt, images)], chat)[0]


def _token_ids_of_each(
    tokenizer: Any, asked: Iterable[tuple[str, Sequence[str]]], chat: bool
) -> list[list[int]]:
    """As ``prompt_token_ids``, of prompts with their images; equal ones are read once."""
    keys = [(prompt, tuple(images)) for prompt, images in asked]
    reader = _image_reader(tokenizer) if chat or any(images for _, images in keys) else None
    ids: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for prompt, images in dict.fromkeys(keys):
        if images or (chat and reader is not None):
            ids[prompt, images] = _ids_with_images(reader, prompt, chat, images)
        else:
            ids[prompt, images] = _ids_of_text(tokenizer, prompt, chat)
    return [list(ids[key]) for key in keys]


def _ids_of_text(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    tokenizer = tokenizer_of(tokenizer)
    if not chat:
        return list(tokenizer(prompt)["input_ids"])
    message = [{"role": "user", "content": prompt}]
    return list(
        tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    )


def _image_reader(tokenizer: Any) -> Reader | None:
    """Reads prompts with images, and keeps what it asked of the processor; None of a tokenizer."""
    vision = image_inputs(tokenizer)
    return None if vision is None else Reader(vision.tokenizer, {}, (), vision)


def _ids_with_images(
    reader: Reader | None, prompt: str, chat: bool, images: Sequence[str]
) -> list[int]:
    where = f"question {prompt[:40]!r}"
    if reader is None or not chat:
        raise ValueError(
            f"{where}: has {len(images)} images; expected the model's processor in the place of its "
            "tokenizer, and chat=True (--chat): its chat template says where images stand"
        )
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
    with reader.showing(images, where):
        ids = reader.prompt([{"role": "user", "content": parts}], where)
        reader.check_images(ids)
    return ids


def answer_seed(seed: int, i: int) -> int:
    """The seed of completion ``i`` of a batch, where each is sampled by its own.

    Equal prompts of a batch must not get equal completions.
    """
    return (seed * 4099 + i) % 2**31


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts that the model has read, to be answered by ``complete``.

    Args:
        token_ids: ids of each prompt.
        inputs: ``input_ids``, ``attention_mask`` and ``position_ids``, one row per prompt; with images
            their tensors and kinds of tokens in the place of positions, which the model then counts.
        cache: the argument that passes keys and values of all columns but the last to the model, one
            row per distinct prompt; {} if the model computes them anew.
        rows: [B], the row of each prompt in ``cache``.
    """

    token_ids: list[list[int]]
    inputs: dict[str, Tensor]
    cache: dict[str, Any]
    rows: Tensor


@torch.no_grad()
def read_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    chat: bool = False,
    images: Sequence[Sequence[str]] | None = None,
) -> Prompts:
    """Runs the prompts through the model: their common prefix once, and equal prompts once.

    Prompts with images are left to ``complete``.

    Args:
        model: a causal language model in eval mode.
        tokenizer: its tokenizer, with a pad token; for images its processor.
        prompts: texts, at least one.
        chat: ask each prompt as the user's turn of the chat template.
        images: shown before each prompt; None for none.

    Raises:
        ValueError: if padding or positions would make the model answer otherwise than a prompt alone.
    """
    if images is not None and any(images):
        return _prompts_with_images(model, tokenizer, prompts, chat, images)
    token_ids = [prompt_token_ids(tokenizer, prompt, chat=chat) for prompt in prompts]
    tokenizer = tokenizer_of(tokenizer)
    distinct = list(dict.fromkeys(map(tuple, token_ids)))
    row = {ids: i for i, ids in enumerate(distinct)}
    rows = torch.tensor([row[tuple(ids)] for ids in token_ids], device=model.device)
    caches = caches_prefix(model)
    prefix = common_prefix_length(distinct) if caches else 0
    once = {
        name: x.to(model.device)
        for name, x in pad_left(distinct, tokenizer.pad_token_id, prefix).items()
    }
    _check_padding(model, once)
    cache: dict[str, Any] = {}
    # The last token is left for generate, which needs one to start from.
    if caches and once["input_ids"].shape[1] > prefix + 1:
        cache = prefix_cache(model, once["input_ids"], prefix) if prefix else {}
        outputs = model(
            input_ids=once["input_ids"][:, prefix:-1],
            attention_mask=once["attention_mask"][:, :-1],
            position_ids=once["position_ids"][:, prefix:-1],
            use_cache=True,
            **{KEEP: 1},
            **cache,
        )
        cache = {cast(str, cache_argument(model)): cache_of(outputs)}
    elif prefix:
        cache = prefix_cache(model, once["input_ids"], prefix)
    inputs = {name: x[rows] for name, x in once.items()}
    return Prompts(token_ids, inputs, cache, rows)


def _prompts_with_images(
    model: Any,
    processor: Any,
    prompts: Sequence[str],
    chat: bool,
    images: Sequence[Sequence[str]],
) -> Prompts:
    pairs = list(zip(prompts, images, strict=True))
    token_ids = _token_ids_of_each(processor, pairs, chat)
    vision = cast(ImageInputs, image_inputs(processor))
    inputs = pad_left(token_ids, vision.tokenizer.pad_token_id)
    # The model counts its own: in three dimensions, or from the mask.
    del inputs[POSITIONS]
    tensors, _ = vision.tensors(
        [shown for _, shown in pairs if shown], [f"question {p[:40]!r}" for p, x in pairs if x]
    )
    inputs |= tensors | right_aligned_kinds(vision, token_ids, inputs["input_ids"].shape[1])
    inputs = {name: x.to(model.device) for name, x in inputs.items()}
    _check_padding(model, inputs)
    return Prompts(token_ids, inputs, {}, torch.arange(len(prompts), device=model.device))


def _check_padding(model: Any, inputs: dict[str, Tensor]) -> None:
    """Refuses padded prompts for a model that sees padding in front of its tokens."""
    own = counts_from_padding_id(model) is not None
    if not own and bool(inputs["attention_mask"].all()):
        return
    check = check_padding_once(model, inputs)
    if not check.exact_as_it_is:
        remedy = "" if own else "batches of one prompt (--batch-size 1), or "
        raise ValueError(
            f"{type(base_model(model)).__name__} sees padding in front of its tokens "
            f"({check.state or 'it counts its positions itself'}), so the prompts of a batch would get "
            f"other answers than alone; expected {remedy}another sampler (--backend vllm, --server)"
        )


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str] | Prompts,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stop_ids: Sequence[int],
    chat: bool = False,
    images: Sequence[Sequence[str]] | None = None,
) -> list[Completion]:
    """Completes one batch of prompts up to a stop token.

    Args:
        model: a causal language model in eval mode.
        tokenizer: its tokenizer, with a pad token; for images its processor.
        prompts: texts, or what ``read_prompts`` made of them, to complete them several times.
        max_new_tokens: length at which a completion is cut.
        temperature: divides the logits; 0 for greedy. No top-k, no top-p, no penalties: the
            sampler's distribution is the full softmax that ``score`` evaluates.
        seed: of this batch; the same prompts and seed give the same completions, whatever was
            sampled before.
        stop_ids: token ids that end a completion (see ``stop_token_ids``).
        chat: ask each prompt as the user's turn of the chat template.
        images: as in ``read_prompts``.

    Returns:
        One completion per prompt, in order.
    """
    if not isinstance(prompts, Prompts):
        prompts = read_prompts(model, tokenizer, prompts, chat=chat, images=images)
    tokenizer = tokenizer_of(tokenizer)
    # A copy, since generation changes it.
    cache = copy.deepcopy(prompts.cache)
    for keys_and_values in cache.values():
        keys_and_values.batch_select_indices(prompts.rows)
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
        with _without_own_settings(model):
            output: Tensor = model.generate(**prompts.inputs, **cache, generation_config=settings)
    stops = set(stop_ids)
    new = output[:, prompts.inputs["input_ids"].shape[1] :].tolist()
    return [
        as_completion(tokenizer, p, c, stops) for p, c in zip(prompts.token_ids, new, strict=True)
    ]


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """Removes the model's own generation settings while the block runs.

    transformers takes from them whatever the given settings leave open: with a ``min_p`` or suppressed
    tokens it would not sample from the full softmax.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own


def as_completion(
    tokenizer: Any,
    prompt: list[int],
    row: list[int],
    stops: set[int],
    log_prob: list[float] | None = None,
) -> Completion:
    """A sampled row up to its first stop token.

    Args:
        tokenizer: of the model.
        prompt: ids of the prompt.
        row: sampled ids, at most padded after the first stop token.
        stops: ids that end a completion.
        log_prob: one per entry of ``row``, or None.
    """
    # Whatever follows the first stop token is padding. The stop token itself was sampled, so it is
    # part of the completion; a completion that was cut has none and gets none.
    end = next((i for i, token in enumerate(row) if token in stops), None)
    ids = row if end is None else row[: end + 1]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    known = None if log_prob is None else log_prob[: len(ids)]
    return Completion(prompt, ids, text, "length" if end is None else "stop", known)


def generate(
    model: Any,
    tokenizer: Any,
    task: AnyTask,
    questions: Sequence[Question],
    *,
    model_name: str,
    samples: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    temperature: float = 1.0,
    shards: Path | None = None,
    chat: bool = False,
    weights: str = "",
    sampler: Callable[..., list[Completion]] | None = None,
    dtype: str | None = None,
    positions: int | None = None,
    label: str = "generate",
    take: Callable[[int], Iterable[int]] = range,
    progress: bool = True,
    judged: list[Verdict] | None = None,
) -> list[Record]:
    """Samples completions of every question and rewards them.

    Args:
        model: the behavior policy, in eval mode.
        tokenizer: its tokenizer; for questions with images its processor.
        task: parses and rewards the answers.
        questions: Q questions.
        model_name: name of the model in the records.
        samples: completions per question.
        max_new_tokens: length at which a completion is cut.
        batch_size: completions sampled together.
        seed: batch i is sampled with a seed made of this one and i, so a resumed run continues
            with the same records as an unbroken one.
        temperature: of the sampler; 1 is the policy itself. At any other, ``score`` gives the
            log-probabilities of the sampler at that temperature and ``train`` trains the model at
            temperature 1, so training starts off-policy. Greedy samples (0) are not scored.
        shards: folder for finished batches. Batches found there are not sampled again.
        chat: ask each prompt as the user's turn of the chat template.
        weights: fingerprint of the model's weights, for the records.
        sampler: called as ``complete`` is, in its place, for instance one of ``vllm_backend``.
        dtype: what ``sampler`` computes in, for the records; "" if not known. By default the model's.
        positions: tokens that the sampler has room for, prompt and completion together; by default those
            of the model's configuration, if it tells.
        label: named on the progress bar.
        take: given the number of batches, gives those to do, in rising order: for one of several
            processes, which leaves its share in ``shards``.
        progress: whether to show a bar.
        judged: takes the verdict on each record, in their order; those of finished batches too.

    Returns:
        Q * samples records in the order of the questions (of the batches taken, if not all); without
        ``behavior_log_prob``, unless a ``sampler`` reports it.

    Raises:
        RecordError: if a shard is damaged; delete it and run again.
        ScoringError: if the answers cannot be judged.
        SettingsError: naming the question, if a prompt leaves no room for ``max_new_tokens``; before
            anything is sampled.
    """
    if positions is None:
        positions = positions_of(model)
    if positions is not None:
        check_room(tokenizer, questions, max_new_tokens, positions, chat=chat)
    if dtype is None:
        dtype = dtype_name(model) if sampler is None else ""
    sample = complete if sampler is None else sampler
    fingerprint = tokenizer_fingerprint(tokenizer_of(tokenizer))
    work = [question for question in questions for _ in range(samples)]
    starts = range(0, len(work), batch_size)
    stop_ids = stop_token_ids(tokenizer_of(tokenizer), one_line=task.one_line, model=model)
    records: list[Record] = []
    with tqdm(total=len(work), desc=label, unit="sample", disable=not progress) as bar:
        for i in take(len(starts)):
            start = starts[i]
            part = work[start : start + batch_size]
            shard = None if shards is None else shards / f"batch-{i:05d}.parquet"
            # Beside the batch: records tell neither an answer's form nor why it has no verdict.
            noted = None if shard is None else shard.with_suffix(".verdicts.json")
            if shard is not None and noted is not None and shard.exists() and noted.exists():
                batch = read_records(shard)
                if [record.group for record in batch] != [question.group for question in part]:
                    raise RecordError(
                        f"{shard}: holds other questions than its batch; delete it and run again"
                    )
                part_verdicts = [Verdict(**verdict) for verdict in read_json(noted)]
            else:
                batch_seed = seed * 1_000_003 + i
                completions = sample(
                    model,
                    tokenizer,
                    [question.prompt for question in part],
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    seed=batch_seed,
                    stop_ids=stop_ids,
                    chat=chat,
                    **_shown(part),
                )
                sampling = Sampling(
                    *(model_name, temperature, 0, 1.0, max_new_tokens, batch_seed),
                    *(fingerprint, weights, dtype),
                )
                part_verdicts = verdicts(
                    task,
                    [(c.text, c.finish_reason, q) for q, c in zip(part, completions, strict=True)],
                )
                batch = [
                    _record(question, completion, verdict, sampling)
                    for question, completion, verdict in zip(
                        part, completions, part_verdicts, strict=True
                    )
                ]
                if shard is not None and noted is not None:
                    # First: a batch that is there is not judged again.
                    write_json(noted, [asdict(verdict) for verdict in part_verdicts])
                    write_records(shard, batch)
            if judged is not None:
                judged += part_verdicts
            records += batch
            # Batches in between belong to other processes.
            bar.update(start + len(batch) - bar.n)
    return records


def _shown(questions: Sequence[Question]) -> dict[str, Any]:
    """The argument by which a sampler gets images; {} without, for samplers that take none."""
    images = [question.images for question in questions]
    return {"images": images} if any(images) else {}


def check_room(
    tokenizer: Any,
    questions: Iterable[Question],
    max_new_tokens: int,
    positions: int,
    *,
    chat: bool = False,
) -> None:
    """Refuses prompts that leave no room for a completion.

    Args:
        tokenizer: of the model.
        questions: whose prompts are asked.
        max_new_tokens: longest completion.
        positions: tokens that prompt and completion may be together.
        chat: as in ``prompt_token_ids``.

    Raises:
        SettingsError: naming the question and the lengths.
    """
    questions = list(questions)
    asked = [(question.prompt, question.images) for question in questions]
    for question, ids in zip(questions, _token_ids_of_each(tokenizer, asked, chat), strict=True):
        length = len(ids)
        if length + max_new_tokens > positions:
            raise SettingsError(
                f"max_new_tokens: question {question.group} has a prompt of {length} tokens, and "
                f"answers may have {max_new_tokens}; the sampler has room for {positions} together. "
                f"Ask for at most {max(0, positions - length)}, leave the question out, or take a model "
                "with more positions (with vLLM: raise --engine max_model_len, if given)"
            )


def _record(
    question: Question, completion: Completion, verdict: Verdict, sampling: Sampling
) -> Record:
    return Record(
        group=question.group,
        prompt=question.prompt,
        completion=completion.text,
        prompt_token_ids=completion.prompt_token_ids,
        completion_token_ids=completion.token_ids,
        reward=verdict.reward,
        finish_reason=completion.finish_reason,
        sampling=sampling,
        behavior_log_prob=completion.log_prob,
        behavior_source="" if completion.log_prob is None else "sampler",
        valid=verdict.answer is not None,
        images=list(question.images) or None,
    )
