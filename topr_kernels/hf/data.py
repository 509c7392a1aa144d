"""From the data sets people have to the records that ``CompletionCollator`` takes.

Lists, data sets and streams in any format go through the same checks, here and once. Where the border
between prompt and completion lies is decided by ids and never by comparing text.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from os import PathLike
from typing import Any, cast

from torch.utils.data import Dataset, IterableDataset

from topr_kernels.choices import TRUNCATIONS
from topr_kernels.hf import fields
from topr_kernels.hf.images import (
    ImageInputs,
    check_readable,
    image_inputs,
    images_of,
    matched,
    take_images,
    tokenizer_of,
)
from topr_kernels.hf.sampled import check_sampling
from topr_kernels.hf.tokenise import Ids, Messages, Reader, check_messages, tools_of
from topr_kernels.hf.turns import Turns, read_turns
from topr_kernels.validation import check_choice

#: Fields of text and messages, of which token ids are made; the others are kept.
_READ = ("prompt", "completion", "tools", "documents", "chat_template_kwargs")
_FORMATS = (
    "expected prompt and completion as text, as messages (two lists of {'role', 'content'}, the second "
    "with the assistant's), or as prompt_token_ids and completion_token_ids"
)
_KINDS = "expected a list of mappings, or a Dataset or IterableDataset of datasets or torch"
#: Features of a data set that does not tell them; equal to itself in other processes too.
_UNKNOWN = "unknown"


def prepare_records(
    dataset: Any,
    tokenizer: Any,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    max_length: int | None = None,
    truncate: str | None = None,
    vocabulary: int | None = None,
    temperature: float = 1.0,
) -> Any:
    """Turns prompt + completion + reward records into token records for ``CompletionCollator``.

    Accepted are, record by record:

    - **token records** (``prompt_token_ids``, ``completion_token_ids``): checked and passed through;
    - **text**: ``prompt`` str and ``completion`` str, tokenised as one text and cut where they meet.
      The special tokens that begin a text are there once, whether the prompt has them or not. EOS is
      appended to the completion unless it ends with one, or was cut off: a decoder strips EOS, and
      without it the model would never learn to stop;
    - **messages**, as in TRL's conversational prompt-completion format: ``prompt`` a list of messages
      and ``completion`` the assistant's message, or a list with several of its turns, and between them
      what tools, users and others said, which is not scored (the record gets a ``completion_mask``).
      What stands before each turn must begin with all that was seen and written before, token for
      token: a template that rewrites earlier turns is refused, with the place. Where the template has
      ``{% generation %}`` marks they say what of a turn the policy wrote. The prompt goes through the
      chat template with its generation prompt. The completion is the message's text as it is and the
      token with which the template ends it; what the template writes after that is cut, since a
      sampler would have stopped there. If the completion was cut off, nothing ends it. Where the
      template writes no EOS it ends as the template ends it. A message of tool calls, parts or
      reasoning is what the template makes of it, unless that loses some of it. A prompt that ends with
      a message of the assistant is continued. ``tools``, ``documents`` and ``chat_template_kwargs`` of
      the record are given to the template.

    A completion was cut off if its ``finish_reason`` is "length" or ``truncated`` is True. Without
    ``behavior_log_prob`` the records can be scored, but not yet collated.

    With the model's processor in the place of the tokenizer a record may have ``images``: a list of
    paths, bytes of files, data URLs in base64, PIL images, or the mappings of bytes and path of an
    undecoded column. In text each stands where the processor's image token does; in messages where a
    part ``{"type": "image"}`` does, or in the part itself (under ``image``, ``path``, ``url``,
    ``base64`` or ``image_url``). Images are kept as they are given and processed once here: the token
    ids hold all tokens that the processor makes of each. ``truncate`` never cuts a record with images.

    ``completion_mask`` has one 0 or 1 per token of the completion, 1 where the policy wrote it; without
    it that is all of them. ``sample_weight`` multiplies the record's loss; ``segments``, one integer per
    token of the completion, are for the ratios per segment.

    Fields that are known to mean something which training does not do (masks and weights under another
    name, labels, video, sound, positions; log mu under another name) are refused unless they change
    nothing; unknown ones are kept.

    Args:
        dataset: a list of mappings, a ``datasets.Dataset`` or ``IterableDataset`` in any format, or one
            of torch. A column that a data set has in some records only is None in the others
            and counts as absent there; so do fields of messages and tools, which Arrow fills up with
            None. Those of a list reach the template as they are. Streams are read as they are used.
        tokenizer: of the model; its chat template for messages. For images the model's processor.
        chat_template_kwargs: for every call of the chat template (``enable_thinking``, ...).
        eos_token_id: id, or ids, that end a completion. Give ``model.generation_config.eos_token_id``
            where turns end with another token than the tokenizer's EOS. Of several, the one that ends a
            turn of the chat template is appended to text, else the tokenizer's. None: the tokenizer's.
        max_length: most tokens of prompt and completion together: the model's positions. None: any.
        truncate: what to do with longer records: None refuses them, "prompt_left" cuts tokens off the
            beginning of the prompt (log mu that was recorded is then that of another prompt).
        vocabulary: number of ids of the model; None: not checked.
        temperature: of the loss. Records with log mu that say they were sampled at another, or with
            top-p and the like, are refused.

    Returns:
        Records with ``prompt_token_ids``, ``completion_token_ids`` and ``reward``, and the other fields:
        a list of dicts, or the data set mapped (one with token ids is checked and returned as it is, in
        the format of Python).

    Raises:
        TypeError: if ``dataset`` or a field of a record is of the wrong type.
        ValueError: if a record has no finite reward, no prompt or one without tokens, ids outside of the
            vocabulary, a ``behavior_log_prob`` that is not as long as its completion or not of finite
            numbers <= 0, a ``completion_mask`` that is not as long or not of 0 and 1, a negative
            ``sample_weight``, a field that would be ignored, or more than ``max_length`` tokens; if
            messages of a completion are not turns of the assistant, or their template rewrites earlier
            ones; if a token lies across the border of prompt and completion; if EOS is needed and
            unknown; if an image cannot be read, there are more or fewer than places for them, there is
            no processor, or a record with images is longer than ``max_length``. All name the record and
            the field.

    Warns:
        UserWarning: if text is ended with one of several ``eos_token_id`` and it is not the tokenizer's;
            once, if the policy wrote nothing of a completion: such a record is not counted.
    """
    if truncate is not None:
        check_choice("truncate", truncate, TRUNCATIONS)
        if max_length is None:
            raise ValueError(
                f"truncate: got {truncate!r} without max_length; give the length to cut to"
            )
    vision, tokenizer = image_inputs(tokenizer), tokenizer_of(tokenizer)
    reader = Reader(tokenizer, chat_template_kwargs or {}, _ids(eos_token_id, tokenizer), vision)
    prepare = _Prepare(reader, max_length, truncate, vocabulary, temperature=temperature)
    if isinstance(dataset, Mapping):
        raise TypeError(
            f"dataset: got a {type(dataset).__name__} with the keys {sorted(dataset)}; expected a list "
            "of records or one data set; of several splits give one, as in dataset['train']"
        )
    if hasattr(dataset, "map") and hasattr(dataset, "column_names"):
        return _mapped(dataset, prepare)
    if isinstance(dataset, IterableDataset):
        return _Stream(dataset, prepare)
    return [prepare(record, i) for i, record in enumerate(_listed(dataset))]


def _mapped(dataset: Any, prepare: _Prepare) -> Any:
    form = getattr(dataset, "format", None) or {"type": None}
    if form["type"] == "custom":
        # The columns are those before the transform; what it makes of them is not known.
        return [prepare(dataset[i], i) for i in range(len(dataset))]
    if not hasattr(dataset, "__len__"):
        dataset = dataset.with_format(None)
    elif form["type"] is not None:
        dataset = dataset.with_format(
            None, columns=form["columns"], output_all_columns=form["output_all_columns"]
        )
    # Reading a record here consumes nothing: a new iteration starts from the beginning.
    names = dataset.column_names or list(next(iter(dataset), {}))
    dataset = _undecoded(dataset)
    features = dataset.features
    prepare = prepare.reading(_UNKNOWN if features is None else dict(features))
    tokens = hasattr(dataset, "__len__") and set(fields.TOKENS) <= set(names)
    if tokens and all(prepare.keeps(record, i) for i, record in enumerate(dataset)):
        return dataset
    drop = [name for name in _READ if name in names]
    return dataset.map(prepare, with_indices=True, remove_columns=drop)


def _undecoded(dataset: Any) -> Any:
    """A data set whose images are the bytes and paths that it stores: decoded they take more memory."""
    feature = (dataset.features or {}).get(fields.IMAGES)
    inner = getattr(feature, "feature", None)
    if not (hasattr(inner, "decode_example") and getattr(inner, "decode", False)):
        return dataset
    raw: Any = copy(inner)
    whole: Any = copy(feature)
    raw.decode = False
    whole.feature = raw
    return dataset.cast_column(fields.IMAGES, whole)


def _listed(dataset: Any) -> Sequence[Any]:
    """A list, or a data set that is not of ``datasets``, as a sequence of records.

    Raises:
        TypeError: for anything else; a generator could be read once only, or without end.
    """
    if isinstance(dataset, Sequence) and not isinstance(dataset, (str, bytes)):
        return dataset
    table = hasattr(dataset, "columns") or hasattr(dataset, "column_names")
    if isinstance(dataset, Dataset) or (
        hasattr(dataset, "__len__")
        and hasattr(dataset, "__getitem__")
        and not table
        and not isinstance(dataset, (str, bytes))
    ):
        return [dataset[i] for i in range(len(cast(Any, dataset)))]
    remedy = ""
    if table:
        remedy = "; of a table make one with datasets.Dataset.from_pandas, or a list of its rows"
    elif isinstance(dataset, (str, bytes, PathLike)):
        remedy = "; load it, as with datasets.load_dataset(...)"
    elif isinstance(dataset, Iterator) or hasattr(dataset, "__iter__"):
        remedy = "; of what can be iterated over make one with list(...), or a stream with "
        remedy += "datasets.IterableDataset.from_generator"
    raise TypeError(f"dataset: got a {type(dataset).__name__}; {_KINDS}{remedy}")


class _Stream(IterableDataset[dict[str, Any]]):
    """A torch stream, each record prepared as it is read."""

    def __init__(self, records: Any, prepare: _Prepare) -> None:
        self._records = records
        self._prepare = prepare

    def set_epoch(self, epoch: int) -> None:
        """Passed on, for streams that shuffle anew."""
        if hasattr(self._records, "set_epoch"):
            self._records.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i, record in enumerate(self._records):
            yield self._prepare(record, i)


class _Prepare:
    """One record to token ids; a class, so that ``Dataset.map`` can send it to other processes."""

    def __init__(
        self,
        reader: Reader,
        max_length: int | None,
        truncate: str | None,
        vocabulary: int | None,
        features: Any = None,
        temperature: float = 1.0,
    ) -> None:
        self._reader = reader
        self._max_length = max_length
        self._truncate = truncate
        self._vocabulary = vocabulary
        self._temperature = temperature
        self._features = features
        self._warned = False

    def reading(self, features: Any) -> _Prepare:
        """The same for records of a data set with these features."""
        same = self._reader, self._max_length, self._truncate, self._vocabulary
        return _Prepare(*same, features, self._temperature)

    def keeps(self, record: Mapping[str, Any], i: int) -> bool:
        """Checks a record and tells whether it can stay as it is."""
        prepared = self(record, i)
        return all(
            record[name] is not None and len(record[name]) == len(prepared[name])
            for name in fields.TOKENS
        )

    def __call__(self, record: Any, i: int) -> dict[str, Any]:
        where = f"record {i}"
        if not isinstance(record, Mapping):
            raise TypeError(f"{where}: got a {type(record).__name__}; expected a mapping")
        reward, told = fields.reward_of(record, where), None
        cut = fields.was_cut(record, where) is True
        images = images_of(record, where) if self._vision is not None else []
        if any(record.get(name) is not None for name in fields.TOKENS):
            prompt, completion = self._given(record, where)
            # Rows of a data set that is mapped have the same columns, whatever they hold.
            read = () if self._features is None else _READ
            result = {n: x for n, x in record.items() if n not in read}
            for k, image in enumerate(images):
                check_readable(image, k, where)
            if self._vision is not None and not images:
                self._vision.check_runs(prompt + completion, [], where)
        else:
            prompt, completion, told, images = self._tokenise(record, images, cut, where)
            result = {n: x for n, x in record.items() if n not in _READ and x is not None}
            if images and self._features is None:
                result[fields.IMAGES] = images
        if not prompt:
            raise ValueError(
                f"{where}, field 'prompt': has no tokens, so nothing predicts the first token of "
                "the completion; give the prompt at least a BOS token"
            )
        fields.weight_of(record, where)
        fields.segments_of(record, len(completion), where)
        mask = self._mask(record, completion, told, where)
        behavior = fields.behavior_of(record, len(completion), where, mask)
        fields.check_meaning(
            record, prompt, completion, mask, where, images=self._vision is not None
        )
        if behavior is not None:
            check_sampling(record, self._temperature, where)
        prompt = self._fitted(prompt, len(completion), len(images), where)
        result |= dict(zip(fields.TOKENS, (prompt, completion), strict=True)) | {"reward": reward}
        if mask is not None:
            self._warn_of_nothing_written(mask, where)
            result[fields.MASK] = mask
        return result if behavior is None else result | {"behavior_log_prob": behavior}

    def _mask(
        self, record: Mapping[str, Any], completion: list[int], told: list[int] | None, where: str
    ) -> list[int] | None:
        """Which tokens the policy wrote: as the record says, or as its messages told."""
        mask = fields.mask_of(record, len(completion), where)
        if None not in (mask, told) and mask != told:
            raise ValueError(
                f"{where}, field {fields.MASK!r}: says otherwise than the roles of the messages, of "
                "which the assistant's are the policy's; drop it, or give it with token ids"
            )
        if mask is None and told is None and self._messages_elsewhere:
            return [1] * len(completion)
        return told if mask is None else mask

    @property
    def _vision(self) -> ImageInputs | None:
        return self._reader.vision

    @property
    def _messages_elsewhere(self) -> bool:
        """Whether records of a data set may be messages: then all need a mask, columns being alike."""
        feature = None if self._features in (None, _UNKNOWN) else self._features.get("completion")
        return feature is not None and getattr(feature, "dtype", None) not in (
            "string",
            "large_string",
        )

    def _warn_of_nothing_written(self, mask: list[int], where: str) -> None:
        # Once: a whole column may be zeros.
        if mask and not any(mask) and not self._warned:
            self._warned = True
            warnings.warn(
                f"{where}, field {fields.MASK!r}: is all zeros, so the policy wrote nothing of the "
                "completion: the record is not counted, like one with an empty completion; leave it "
                "out, or mark what the policy wrote with 1 (said of the first such record alone)",
                UserWarning,
                stacklevel=2,
            )

    def _given(self, record: Mapping[str, Any], where: str) -> Ids:
        for name in fields.TOKENS:
            if record.get(name) is None:
                raise ValueError(f"{where}, field {name!r}: is missing; {_FORMATS}")
        prompt, completion = (
            fields.token_ids(record, name, where, self._vocabulary) for name in fields.TOKENS
        )
        return prompt, completion

    def _tokenise(
        self, record: Mapping[str, Any], images: list[Any], cut: bool, where: str
    ) -> tuple[list[int], list[int], list[int] | None, list[Any]]:
        """Ids of text or messages, of messages also which the policy wrote; and all images in order."""
        prompt, completion = record.get("prompt"), record.get("completion")
        for name, value in (("prompt", prompt), ("completion", completion)):
            if value is None:
                raise ValueError(f"{where}, field {name!r}: is missing; {_FORMATS}")
        if isinstance(prompt, str) and isinstance(completion, str):
            if record.get("tools"):
                raise ValueError(
                    f"{where}, field 'tools': expected none with a prompt of text, which holds what the "
                    "model is to see of them; drop the field, or give messages"
                )
            self._check_placeholders(prompt + completion, images, where)
            with self._reader.showing(images, where):
                before, after = self._reader.text(prompt, completion, cut, where)
            return before, after, None, images
        if isinstance(prompt, Sequence) and not isinstance(prompt, str):
            turns, images = self._messages(record, images, cut, where)
            return *turns, images
        name = "prompt" if not isinstance(prompt, str) else "completion"
        raise TypeError(
            f"{where}, field {name!r}: got a {type(record[name]).__name__}, with a prompt of type "
            f"{type(prompt).__name__}; {_FORMATS}"
        )

    def _check_placeholders(self, text: str, images: list[Any], where: str) -> None:
        if self._vision is None:
            return
        placeholder = self._vision.placeholder
        if text.count(placeholder) != len(images):
            raise ValueError(
                f"{where}, field {fields.IMAGES!r}: holds {len(images)} images, but prompt and "
                f"completion have {placeholder!r}, which stands for one, {text.count(placeholder)} "
                "times; expected it once for each image, in their order"
            )

    def _messages(
        self, record: Mapping[str, Any], images: list[Any], cut: bool, where: str
    ) -> tuple[Turns, list[Any]]:
        read = {name: record[name] for name in _READ if record.get(name) is not None}
        results = [
            self._read(reading, images, cut, where) for reading in _readings(read, self._features)
        ]
        if any(turns != results[0][0] for turns, _ in results):
            raise ValueError(
                f"{where}, field 'prompt': holds a null that the chat template writes otherwise than an "
                "absent field, and a data set cannot say which it was; write '' for the null, or give "
                "the records as a list"
            )
        return results[0]

    def _read(
        self, record: Mapping[str, Any], images: list[Any], cut: bool, where: str
    ) -> tuple[Turns, list[Any]]:
        completion = record["completion"]
        given = [completion] if isinstance(completion, Mapping) else completion
        sees = self._vision is not None
        before = check_messages(record["prompt"], "prompt", _FORMATS, where, sees)
        after = check_messages(given, "completion", _FORMATS, where, sees)
        if sees:
            before, after, images = self._with_images(before, after, images, where)
        extra = dict(record.get("chat_template_kwargs") or {})
        for name, value in (
            ("tools", tools_of(record.get("tools"))),
            ("documents", record.get("documents")),
        ):
            if value:
                extra[name] = value
        with self._reader.showing(images, where):
            turns = read_turns(self._reader, before, after, extra, cut, where)
            self._reader.check_images(turns.prompt + turns.completion)
        return turns, images

    def _with_images(
        self, before: Messages, after: Messages, images: list[Any], where: str
    ) -> tuple[Messages, Messages, list[Any]]:
        """Messages with bare placeholders, and the images of those that are read."""
        before, seen = take_images(before, "prompt", where)
        after, later = take_images(after, "completion", where)
        if self._features is not None and any(x is not None for x in seen + later):
            raise ValueError(
                f"{where}, field 'prompt': got an image part of a data set that holds its image "
                f"itself; expected the images in a column {fields.IMAGES!r} and parts "
                "{'type': 'image'}, or the records as a list"
            )
        last = max((k for k, m in enumerate(after) if m["role"] == "assistant"), default=-1)
        if take_images(after[last + 1 :], "completion", where)[1]:
            raise ValueError(
                f"{where}, field 'completion': has images after the last message of the assistant, "
                "which teach nothing; leave those messages and their images out"
            )
        return before, after, matched(seen + later, images, where)

    def _fitted(self, prompt: list[int], tokens: int, images: int, where: str) -> list[int]:
        most = self._max_length
        if most is None or len(prompt) + tokens <= most:
            return prompt
        if images and tokens < most:
            raise ValueError(
                f"{where}, field {fields.IMAGES!r}: with the tokens of {images} images it has "
                f"{len(prompt)} tokens of prompt and {tokens} of completion; expected at most {most} "
                "together (max_length, or the model's positions), and a record with images is not cut; "
                "leave it out, or give the processor a smaller size of images (Qwen's max_pixels)"
            )
        if self._truncate is None or tokens >= most:
            cut = "" if tokens >= most else ", or use truncate='prompt_left'"
            raise ValueError(
                f"{where}: has {len(prompt)} tokens of prompt and {tokens} of completion; expected at "
                f"most {most} together (max_length, or the model's positions); leave it out{cut}"
            )
        return prompt[len(prompt) + tokens - most :]


def _readings(record: Mapping[str, Any], features: Any) -> list[Any]:
    """What a record may have been before it became a row of a data set, the likeliest first.

    Arrow gives every nested record the fields of all, as None. A message has its content, be it None,
    so there a null may be the user's.
    """
    if features is None:
        return [record]
    without = _without_nulls(record, features)
    if features == _UNKNOWN:
        return [record] if without == record else [without, dict(record)]
    restored = {name: _with_content(without[name], x) for name, x in record.items()}
    return [without] if restored == without else [restored, without]


def _without_nulls(value: Any, feature: Any) -> Any:
    if isinstance(value, Mapping) and (feature == _UNKNOWN or isinstance(feature, Mapping)):
        known: Mapping[str, Any] = feature if isinstance(feature, Mapping) else {}
        inside = {key: known.get(key, feature if feature == _UNKNOWN else None) for key in value}
        return {
            key: _without_nulls(x, inside[key])
            for key, x in value.items()
            # Nulls in a column of nothing else are the user's.
            if x is not None or getattr(inside[key], "dtype", None) == "null"
        }
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_without_nulls(x, _UNKNOWN if feature == _UNKNOWN else inner) for x in value]
    return value


def _with_content(cleaned: Any, value: Any) -> Any:
    """Messages with the contents that were None."""
    if isinstance(value, list):
        return [_with_content(a, b) for a, b in zip(cleaned, value, strict=True)]
    if isinstance(value, Mapping) and "role" in value and value.get("content", 0) is None:
        return {**cleaned, "content": None}
    return cleaned


def _ids(eos_token_id: int | Sequence[int] | None, tokenizer: Any) -> tuple[int, ...]:
    if eos_token_id is None:
        eos_token_id = getattr(tokenizer, "eos_token_id", None)
    if eos_token_id is None:
        return ()
    return (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
