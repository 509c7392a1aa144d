"""Turns data sets of text, messages or token ids into the records that ``CompletionCollator`` takes.

Text and messages are tokenised here, once. The border between prompt and completion, and the token that
ends a completion, are found by ids and never by comparing text.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

#: Columns that mean something to the collator, besides the token ids.
_KEPT = ("reward", "behavior_log_prob", "group", "finish_reason")
_TOKENS = ("prompt_token_ids", "completion_token_ids")
_FORMATS = (
    "expected prompt and completion as text, as messages (a list of {'role', 'content'} and one such "
    "message of the assistant), or as prompt_token_ids and completion_token_ids"
)


def prepare_records(
    dataset: Any,
    tokenizer: Any,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
) -> Any:
    """Turns prompt + completion + reward records into token records for ``CompletionCollator``.

    Accepted are, record by record:

    - **token records** (``prompt_token_ids``, ``completion_token_ids``): checked and passed through;
    - **text**: ``prompt`` str and ``completion`` str, tokenised apart, so that the completion's first
      token does not depend on the prompt; special tokens are added to the prompt only. EOS is
      appended to the completion unless it ends with one, or was cut off: a decoder strips EOS, and
      without it the model would never learn to stop;
    - **messages**, as in TRL's conversational prompt-completion format: ``prompt`` a list of messages
      and ``completion`` the assistant's message (or a list of that one). Both go through the chat
      template; the completion is what follows the ids of the prompt with its generation prompt.
      What the template writes after the last EOS is removed, since a sampler would have stopped
      there; if the completion was cut off, EOS is removed too. If the template writes no EOS, the
      completion stays as the template made it. ``tools`` and ``chat_template_kwargs`` of the record
      are passed to the template.

    A completion was cut off if its ``finish_reason`` is "length". Without ``behavior_log_prob`` the
    records can be scored, but not yet collated.

    Args:
        dataset: a list of mappings, or a ``datasets.Dataset`` or ``IterableDataset``. None in a column
            counts as absent.
        tokenizer: of the model; its chat template for messages.
        chat_template_kwargs: for every call of the chat template (``enable_thinking``, ...).
        eos_token_id: id, or ids, that end a completion; the first is appended to text. Pass
            ``model.generation_config.eos_token_id`` if turns end with another token than the
            tokenizer's EOS. None for the tokenizer's.

    Returns:
        Records with ``prompt_token_ids``, ``completion_token_ids`` and ``reward``, and
        ``behavior_log_prob``, ``group`` and ``finish_reason`` where given: a list of dicts, or the data
        set mapped (a data set with token ids is returned as it is; the collator checks it).

    Raises:
        TypeError: if ``dataset`` or a field of a record is of the wrong type.
        ValueError: if a record has no reward, no prompt or a prompt without tokens, or a
            ``behavior_log_prob`` that is not as long as its completion; if messages hold anything but
            one completion of the assistant, or the prompt's ids are not the beginning of the whole;
            if EOS is needed and unknown. All name the record and the field.
    """
    prepare = _Prepare(tokenizer, dict(chat_template_kwargs or {}), _ids(eos_token_id, tokenizer))
    if isinstance(dataset, Mapping):
        raise TypeError(
            f"dataset: got a {type(dataset).__name__} with the keys {sorted(dataset)}; expected a list "
            "of records or one data set; of several splits give one, as in dataset['train']"
        )
    if hasattr(dataset, "map") and hasattr(dataset, "column_names"):
        names = dataset.column_names
        if names is None:
            # A stream that does not know its columns. Reading one record does not consume it.
            names = list(next(iter(dataset), {}))
        if set(_TOKENS) <= set(names):
            return dataset
        drop = [name for name in names if name not in _KEPT]
        return dataset.map(prepare, with_indices=True, remove_columns=drop)
    if isinstance(dataset, str) or not isinstance(dataset, Iterable):
        raise TypeError(
            f"dataset: got a {type(dataset).__name__}; expected a list of mappings, or a "
            "datasets.Dataset or IterableDataset"
        )
    return [prepare(record, i) for i, record in enumerate(dataset)]


class _Prepare:
    """Turns one record into token ids. A class, so that ``Dataset.map`` can pickle it."""

    def __init__(self, tokenizer: Any, template: dict[str, Any], eos: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._eos = eos

    def __call__(self, record: Any, i: int) -> dict[str, Any]:
        if not isinstance(record, Mapping):
            raise TypeError(f"record {i}: got a {type(record).__name__}; expected a mapping")
        _check_reward(record, i)
        if any(record.get(name) is not None for name in _TOKENS):
            prompt, completion = (_token_ids(record, i, name) for name in _TOKENS)
            result = dict(record)
        else:
            prompt, completion = self._tokenise(record, i)
            result = {"prompt_token_ids": prompt, "completion_token_ids": completion}
            result |= {n: record[n] for n in _KEPT if record.get(n) is not None}
        if not prompt:
            raise ValueError(
                f"record {i}, field 'prompt': has no tokens, so nothing predicts the first token of "
                "the completion; give the prompt at least a BOS token"
            )
        _check_behavior(record, i, len(completion))
        return result

    def _tokenise(self, record: Mapping[str, Any], i: int) -> tuple[list[int], list[int]]:
        prompt, completion = record.get("prompt"), record.get("completion")
        for name, value in (("prompt", prompt), ("completion", completion)):
            if value is None:
                raise ValueError(f"record {i}, field {name!r}: is missing; {_FORMATS}")
        if isinstance(prompt, str) and isinstance(completion, str):
            return self._text(prompt, completion, record, i)
        if isinstance(prompt, Sequence) and not isinstance(prompt, str):
            return self._messages(prompt, completion, record, i)
        name = "prompt" if not isinstance(prompt, str) else "completion"
        raise TypeError(
            f"record {i}, field {name!r}: got a {type(record[name]).__name__}, with a prompt of type "
            f"{type(prompt).__name__}; {_FORMATS}"
        )

    def _text(
        self, prompt: str, completion: str, record: Mapping[str, Any], i: int
    ) -> tuple[list[int], list[int]]:
        bare = list(self._tokenizer(prompt, add_special_tokens=False)["input_ids"])
        before = list(self._tokenizer(prompt)["input_ids"])
        # Some tokenizers end every text with EOS, but this text goes on.
        appended = self._ends(before) - self._ends(bare)
        before = before[: len(before) - max(appended, 0)]
        after = list(self._tokenizer(completion, add_special_tokens=False)["input_ids"])
        if record.get("finish_reason") != "length" and not (after and after[-1] in self._eos):
            if not self._eos:
                raise ValueError(
                    f"record {i}, field 'completion': the tokenizer has no eos_token_id to end it "
                    "with; give prepare_records eos_token_id, or the record finish_reason='length' "
                    "if it was cut off"
                )
            after.append(self._eos[0])
        return before, after

    def _ends(self, ids: list[int]) -> int:
        """How many ids at the end are EOS."""
        return sum(1 for _ in itertools.takewhile(lambda x: x in self._eos, reversed(ids)))

    def _messages(
        self, prompt: Sequence[Any], completion: Any, record: Mapping[str, Any], i: int
    ) -> tuple[list[int], list[int]]:
        given = [completion] if isinstance(completion, Mapping) else completion
        before, after = (
            _check_messages(prompt, i, "prompt"),
            _check_messages(given, i, "completion"),
        )
        roles = [message["role"] for message in after]
        if roles != ["assistant"]:
            raise ValueError(
                f"record {i}, field 'completion': got messages of {roles}; expected one of the "
                "assistant, since other turns were not sampled by the policy; make a record of each "
                "turn of the assistant, with all before it in the prompt"
            )
        start = self._render(before, record, add_generation_prompt=True)
        whole = self._render(before + after, record, add_generation_prompt=False)
        if whole[: len(start)] != start:
            pairs = zip(start, whole, strict=False)
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            raise ValueError(
                f"record {i}, field 'completion': the chat template makes {len(start)} ids of the "
                f"prompt with its generation prompt, of which only the first {same} begin the ids of "
                "prompt and completion, so the completion's ids are not known; give prompt_token_ids "
                "and completion_token_ids as they were sampled, or chat_template_kwargs under which "
                "the template writes the prompt alike in both (enable_thinking, ...)"
            )
        ids = whole[len(start) :]
        ends = [k for k, token in enumerate(ids) if token in self._eos]
        if record.get("finish_reason") != "length":
            return start, ids[: ends[-1] + 1] if ends else ids
        if not ends:
            raise ValueError(
                f"record {i}, field 'finish_reason': is 'length', but the chat template ends the "
                f"completion with none of the ids {list(self._eos)}, so what it wrote after the cut is "
                "not known; give prepare_records eos_token_id, or the record completion_token_ids"
            )
        return start, ids[: ends[-1]]

    def _render(self, messages: list[Any], record: Mapping[str, Any], **options: Any) -> list[int]:
        tools = record.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        own = record.get("chat_template_kwargs") or {}
        return list(
            self._tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                tokenize=True,
                return_dict=False,
                **{**self._template, **own, **options},
            )
        )


def _ids(eos_token_id: int | Sequence[int] | None, tokenizer: Any) -> tuple[int, ...]:
    if eos_token_id is None:
        eos_token_id = getattr(tokenizer, "eos_token_id", None)
    if eos_token_id is None:
        return ()
    return (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)


def _check_reward(record: Mapping[str, Any], i: int) -> None:
    reward = record.get("reward")
    if reward is None:
        hint = ": reward = 1.0 if label else -1.0" if "label" in record else ""
        raise ValueError(
            f"record {i}, field 'reward': is missing; it has {sorted(record)}; give every record its "
            f"signed reward{hint}"
        )
    # True would count as 1, but False as 0, which teaches nothing.
    if isinstance(reward, bool) or not isinstance(reward, Real):
        raise TypeError(
            f"record {i}, field 'reward': got {reward!r} of type {type(reward).__name__}; expected a "
            "signed number, such as 1.0 for a success and -1.0 for a failure"
        )
    if not math.isfinite(reward):
        raise ValueError(f"record {i}, field 'reward': got {reward}; expected a finite number")


def _token_ids(record: Mapping[str, Any], i: int, name: str) -> Sequence[int]:
    ids = record.get(name)
    if ids is None:
        raise ValueError(f"record {i}, field {name!r}: is missing; {_FORMATS}")
    integers = not isinstance(ids, str) and hasattr(ids, "__len__")
    if not integers or not all(isinstance(x, Integral) for x in ids):
        raise TypeError(
            f"record {i}, field {name!r}: got {ids!r:.60}; expected a sequence of int token ids"
        )
    return ids  # type: ignore[no-any-return]


def _check_behavior(record: Mapping[str, Any], i: int, tokens: int) -> None:
    values = record.get("behavior_log_prob")
    if values is None:
        return
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise TypeError(
            f"record {i}, field 'behavior_log_prob': got a {type(values).__name__}; expected a sequence "
            "of one float per token of the completion"
        )
    if len(values) != tokens:
        raise ValueError(
            f"record {i}, field 'behavior_log_prob': has {len(values)} entries, but the completion has "
            f"{tokens} tokens (with the EOS that ends it, unless finish_reason is 'length'); give the "
            "completion_token_ids that were sampled, or leave it out and score the records"
        )


def _check_messages(messages: Any, i: int, name: str) -> list[dict[str, Any]]:
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise TypeError(
            f"record {i}, field {name!r}: got a {type(messages).__name__}, with a prompt of messages; "
            f"{_FORMATS}"
        )
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(
                f"record {i}, field {name!r}: got the message {message!r:.60}; expected a mapping with "
                "a role and content"
            )
    if not messages:
        raise ValueError(f"record {i}, field {name!r}: has no messages; {_FORMATS}")
    return [{key: _given(x) for key, x in m.items() if x is not None} for m in messages]


def _given(value: Any) -> Any:
    """A value without the None that Arrow fills in for fields that other messages have."""
    if isinstance(value, Mapping):
        return {key: _given(x) for key, x in value.items() if x is not None}
    if isinstance(value, list):
        return [_given(x) for x in value]
    return value
