"""Text and messages to token ids: of the prompt as the policy saw it, of the completion as it wrote it.

Both are tokenised as one text and cut where they meet. A chat template says what stands before an
answer and what ends it; the answer itself is the completion's text and not what a template makes of it.
"""

from __future__ import annotations

import itertools
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from topr_kernels.hf.fields import IMAGES
from topr_kernels.hf.images import ImageInputs, is_image_part

_ANSWER = "answer-goes-here"
_MARKS = re.compile(r"{%-?\s*generation\s*-?%}")
REMEDY = "give prompt_token_ids and completion_token_ids as they were sampled"
#: Kinds of content that a tokenizer cannot give to a model.
_MEDIA = ("image", "video", "audio", "file")

Ids = tuple[list[int], list[int]]
Messages = list[dict[str, Any]]


class Reader:
    """Makes token ids of a record's text or messages; can be sent to other processes.

    Args:
        tokenizer: of the model.
        options: of every call of the chat template.
        eos: ids that end a completion.
        vision: of a processor, whose tokenizer it is; None if there are no images.
    """

    def __init__(
        self,
        tokenizer: Any,
        options: Mapping[str, Any],
        eos: tuple[int, ...],
        vision: ImageInputs | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._options = dict(options)
        self.eos = eos
        self.vision = vision
        if vision is not None and vision.chat_template is not None:
            self._options = {"chat_template": vision.chat_template, **self._options}
        #: What is written in the place of each image of the record that is read.
        self._expansions: Sequence[str] = ()
        self._where = "record"

    @contextmanager
    def showing(self, images: Sequence[Any], where: str) -> Iterator[None]:
        """While a record with these images is read, each stands for its placeholder, in their order."""
        if self.vision is not None:
            self._expansions, self._where = self.vision.expansions(images, where), where
        try:
            yield
        finally:
            self._expansions = ()

    def check_images(self, ids: Sequence[int]) -> None:
        """Raises ``ValueError`` unless a record's ids hold the tokens of all images that are shown."""
        if self.vision is not None:
            each = (
                self._tokenizer(x, add_special_tokens=False)["input_ids"] for x in self._expansions
            )
            expected = [run for tokens in each for run in self.vision.runs(tokens)]
            self.vision.check_runs(ids, expected, self._where)

    def text(self, prompt: str, completion: str, cut: bool, where: str) -> Ids:
        """Ids of a text and of the one that follows it, which ends with EOS unless it was cut off."""
        start, whole = self._with_special(prompt), self._with_special(prompt + completion)
        after = _after(start, whole, "the tokenizer makes {} ids of the prompt", where)
        if cut or (after and after[-1] in self.eos):
            return start, after
        if not self.eos:
            raise ValueError(
                f"{where}, field 'completion': the tokenizer has no eos_token_id to end it with; give "
                "prepare_records eos_token_id, or the record finish_reason='length' if it was cut off"
            )
        return start, [*after, self._end]

    def prompt(self, messages: Messages, where: str) -> list[int]:
        """Ids of messages with the generation prompt, as the policy gets them."""
        return self._bare(self._render(messages, {}, where, add_generation_prompt=True))

    def messages(
        self,
        prompt: Messages,
        answer: dict[str, Any],
        extra: Mapping[str, Any],
        cut: bool,
        where: str,
    ) -> Ids:
        """Ids of messages with the generation prompt, and of the assistant's answer to them.

        Args:
            prompt: messages; if the last is the assistant's it is begun, and the answer continues it.
            answer: message of the assistant.
            extra: the record's own arguments of the template.
            cut: whether the answer was cut off; nothing then ends it.
            where: names the record in messages.
        """
        spoken = isinstance(answer.get("content"), str) and not any(
            value for key, value in answer.items() if key not in ("role", "content")
        )
        if prompt[-1]["role"] == "assistant":
            start, end = self._continued(prompt, answer if spoken else {}, extra, where)
        else:
            start = self._render(prompt, extra, where, add_generation_prompt=True)
            probe = [*prompt, {**answer, "content": _ANSWER}]
            head, mark, end = "", "", ""
            if spoken:
                head, mark, end = self._render(probe, extra, where).rpartition(_ANSWER)
            if not mark or not (head.startswith(start) or start.startswith(head)):
                return self._as_rendered(prompt, answer, start, extra, cut, where)
            if begun := start[len(head) :].strip():
                answer = _inside(answer, begun, start, where)
            between = head[len(start) :]
            # A template without a generation prompt writes here what the policy had to write. What a
            # template with one adds (an empty thinking block) was not sampled.
            if between and (not between.strip() or start == self._render(prompt, extra, where)):
                answer = {**answer, "content": between + answer["content"]}
        content: str = answer["content"]
        before = self._bare(start)
        said = self._bare(start + content)
        after = _after(
            before,
            said,
            "the chat template makes {} ids of the prompt with its generation prompt",
            where,
        )
        if cut or (after and after[-1] in self.eos):
            return before, after
        whole = self._bare(start + content + end)
        if whole[: len(said)] == said:
            ending = whole[len(said) :]
            stop = next((k for k, x in enumerate(ending) if x in self.eos), len(ending) - 1)
            return before, after + ending[: stop + 1]
        ids = _after(before, whole, "the chat template makes {} ids of the prompt", where)
        return before, self._up_to_the_end(ids)

    def _continued(
        self, prompt: Messages, answer: dict[str, Any], extra: Mapping[str, Any], where: str
    ) -> tuple[str, str]:
        """The text before and after the rest of an answer that the prompt's last message begins."""
        begun = prompt[-1]
        if not isinstance(begun.get("content"), str) or not isinstance(answer.get("content"), str):
            raise ValueError(
                f"{where}, field 'prompt': ends with a message of the assistant, which the completion "
                f"continues; expected text in both and nothing else; {REMEDY}"
            )
        probe = [*prompt[:-1], {**begun, "content": begun["content"] + _ANSWER}]
        start, mark, end = self._render(probe, extra, where).rpartition(_ANSWER)
        if not mark or not start.endswith(begun["content"]):
            raise ValueError(
                f"{where}, field 'prompt': ends with a message of the assistant, which the completion "
                f"continues, but the chat template does not write it as it is; {REMEDY}"
            )
        return start, end

    def _as_rendered(
        self,
        prompt: Messages,
        answer: dict[str, Any],
        start: str,
        extra: Mapping[str, Any],
        cut: bool,
        where: str,
    ) -> Ids:
        """Ids of an answer of which the template makes the text: tool calls, parts, reasoning."""
        text = self._render([*prompt, answer], extra, where)
        before = self._bare(start)
        ids = _after(
            before,
            self._bare(text),
            "the chat template makes {} ids of the prompt with its generation prompt",
            where,
        )
        said = text[len(start) :]
        lost = next((x for x in _texts(answer) if not any(form in said for form in x)), None)
        if lost is not None:
            raise ValueError(
                f"{where}, field 'completion': the chat template does not write {lost[0]!r:.40} as it "
                f"is, so it would not be what the policy wrote; {REMEDY}"
            )
        if not cut:
            return before, self._up_to_the_end(ids)
        ends = [k for k, token in enumerate(ids) if token in self.eos]
        if not ends:
            raise ValueError(
                f"{where}, field 'finish_reason': is 'length', but the chat template ends the "
                f"completion with none of the ids {list(self.eos)}, so what it wrote after the cut is "
                "not known; give prepare_records eos_token_id, or the record completion_token_ids"
            )
        return before, ids[: ends[-1]]

    def marked(
        self, messages: Messages, extra: Mapping[str, Any], where: str
    ) -> tuple[list[int], list[int]] | None:
        """Ids of messages, and which of them the template marks as generated.

        None where it has no ``{% generation %}`` marks, or a tokenizer that cannot tell where they are.
        """
        options = {**self._options, **extra}
        if not getattr(self._tokenizer, "is_fast", False):
            return None
        try:
            template = self._tokenizer.get_chat_template(
                options.get("chat_template"), tools=options.get("tools")
            )
        except ValueError:
            # There is no template, which rendering reports.
            return None
        if not _MARKS.search(template):
            return None
        if self._expansions:
            raise ValueError(
                f"{where}: the chat template has {{% generation %}} marks, which are not read in a "
                f"completion of several messages beside images; {REMEDY}, with completion_mask"
            )
        options |= {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        rendered = self._applied(messages, {**options, "add_generation_prompt": False}, where)
        return list(rendered["input_ids"]), list(rendered["assistant_masks"])

    def shown(self, ids: Sequence[int]) -> str:
        """The text of some ids, for messages."""
        return str(self._tokenizer.decode(ids))

    def _up_to_the_end(self, ids: list[int]) -> list[int]:
        """Without what the template writes after the last EOS: a sampler would have stopped there."""
        ends = [k for k, token in enumerate(ids) if token in self.eos]
        return ids[: ends[-1] + 1] if ends else ids

    def _render(
        self, messages: Messages, extra: Mapping[str, Any], where: str, **options: Any
    ) -> str:
        given = {"add_generation_prompt": False, **options, "tokenize": False}
        text: str = self._applied(messages, {**self._options, **extra, **given}, where)
        return text

    def _applied(self, messages: Messages, options: Mapping[str, Any], where: str) -> Any:
        lost = self._lost_as_text
        messages = [_in_parts(m) if _speaker(m) in lost else m for m in messages]
        try:
            return self._tokenizer.apply_chat_template(messages, **options)
        # Templates raise errors of any type.
        except Exception as error:
            raise ValueError(
                f"{where}: the chat template failed: {type(error).__name__}: {error}; write the "
                f"messages as it wants them, or {REMEDY}"
            ) from error

    @cached_property
    def _lost_as_text(self) -> set[str]:
        """Roles whose text a processor's template writes only if it is given as a list of parts."""
        template = self._options.get("chat_template")
        if self.vision is None or template is None:
            return set()
        lost: set[str] = set()
        talk: Messages = []

        def keeps(message: dict[str, Any]) -> bool:
            try:
                text: str = self._tokenizer.apply_chat_template(
                    [*talk, message], chat_template=template, tokenize=False
                )
            # Templates raise errors of any type.
            except Exception:
                return False
            return _ANSWER in text

        for role in ("user", "assistant"):
            said = {"role": role, "content": _ANSWER}
            if not keeps(said) and keeps(_in_parts(said)):
                lost.add(role)
            asked = {"role": "user", "content": "?"}
            talk = [_in_parts(asked) if lost else asked]
        return lost

    def _expanded(self, text: str) -> str:
        """A text with all tokens of its images."""
        if self.vision is None:
            return text
        first, *rest = text.split(self.vision.placeholder)
        if len(rest) > len(self._expansions):
            raise ValueError(
                f"{self._where}, field {IMAGES!r}: holds {len(self._expansions)} images, but the text "
                f"of the messages has {self.vision.placeholder!r}, which stands for one, {len(rest)} "
                "times; write it as a part {'type': 'image'} and nowhere else"
            )
        pairs = zip(self._expansions, rest, strict=False)
        return first + "".join(image + part for image, part in pairs)

    def _bare(self, text: str) -> list[int]:
        return list(self._tokenizer(self._expanded(text), add_special_tokens=False)["input_ids"])

    def _with_special(self, text: str) -> list[int]:
        """Ids with the special tokens that begin a text, each once, and none that ends it."""
        bare, ids = self._bare(text), list(self._tokenizer(self._expanded(text))["input_ids"])
        # Some tokenizers end every text with EOS: here the text goes on.
        appended = max(self._ends(ids) - self._ends(bare), 0)
        ids = ids[: len(ids) - appended]
        added = len(ids) - len(bare)
        # A text that a template rendered has them already.
        return bare if added > 0 and bare[:added] == ids[:added] else ids

    def _ends(self, ids: list[int]) -> int:
        """How many ids at the end are EOS."""
        return sum(1 for _ in itertools.takewhile(lambda x: x in self.eos, reversed(ids)))

    @cached_property
    def _end(self) -> int:
        """Which of several ids ends a text: the one that ends a turn, else the tokenizer's EOS."""
        if len(self.eos) == 1:
            return self.eos[0]
        own, turn = getattr(self._tokenizer, "eos_token_id", None), self._end_of_turn()
        chosen = next((x for x in (turn, own) if x in self.eos), self.eos[0])
        if own is not None and chosen != own:
            names = self._tokenizer.convert_ids_to_tokens([chosen, own])
            why = (
                "with which the chat template ends a turn" if chosen == turn else "the first given"
            )
            warnings.warn(
                f"text completions are ended with {names[0]!r}, {why}; the tokenizer's EOS is "
                f"{names[1]!r}. If that is wrong give prepare_records the one eos_token_id that ends "
                "them (of TOPRTrainer: model.generation_config.eos_token_id), or end the completions "
                "yourself",
                UserWarning,
                stacklevel=2,
            )
        return chosen

    def _end_of_turn(self) -> int | None:
        """The first stop token that the chat template writes after an answer, if any."""
        own = getattr(self._tokenizer, "chat_template", None)
        if not (own or self._options.get("chat_template")):
            return None
        talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
        try:
            end = self._render(talk, {}, "").rpartition(_ANSWER)[2]
        except ValueError:
            # The template refuses these messages.
            return None
        return next((x for x in self._bare(end) if x in self.eos), None)


def check_messages(
    messages: Any, name: str, formats: str, where: str, images: bool = False
) -> Messages:
    """Messages of a record as a list of dicts.

    Args:
        messages: as given.
        name: of their field.
        formats: what is expected, for messages.
        where: names the record in messages.
        images: whether images are given to the model.

    Raises:
        TypeError: if they are not mappings with a role.
        ValueError: if there are none, or one holds an image, video or sound.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise TypeError(
            f"{where}, field {name!r}: got a {type(messages).__name__}, with a prompt of messages; "
            f"{formats}"
        )
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(
                f"{where}, field {name!r}: got the message {message!r:.60}; expected a mapping with "
                "a role and content"
            )
        _check_parts(message.get("content"), name, where, images)
    if not messages:
        raise ValueError(f"{where}, field {name!r}: has no messages; {formats}")
    return [dict(message) for message in messages]


def tools_of(value: Any) -> list[Any] | None:
    """The tools of a record: a list, or JSON of one, or of each."""
    tools = json.loads(value) if isinstance(value, str) else value
    return [json.loads(x) if isinstance(x, str) else x for x in tools] if tools else None


def _check_parts(content: Any, name: str, where: str, images: bool) -> None:
    for part in content if isinstance(content, (list, tuple)) else []:
        if images and is_image_part(part):
            continue
        kind = str(part.get("type", "")) if isinstance(part, Mapping) else ""
        held = [key for key in _MEDIA if isinstance(part, Mapping) and part.get(key) is not None]
        if held or any(key in kind for key in _MEDIA):
            raise ValueError(
                f"{where}, field {name!r}: got a message with content of type {kind or held[0]!r}; "
                "expected text, or images with the model's processor in the place of its tokenizer "
                "(processing_class of TOPRTrainer); video, sound and files are not given to the model; "
                "leave the record out"
            )


def _speaker(message: Mapping[str, Any]) -> str:
    return "assistant" if message.get("role") == "assistant" else "user"


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its text as a part."""
    text = message.get("content")
    parts = [{"type": "text", "text": text}] if isinstance(text, str) else text
    return {**message, "content": parts}


def _inside(answer: dict[str, Any], begun: str, start: str, where: str) -> dict[str, Any]:
    """The answer without what the generation prompt has begun of it (``<think>``)."""
    content: str = answer["content"]
    written = start[start.rindex(begun) :]
    if content.startswith(written):
        return {**answer, "content": content[len(written) :]}
    if content.lstrip().startswith(begun):
        raise ValueError(
            f"{where}, field 'completion': begins with {begun!r:.40}, which the generation prompt "
            f"writes as {written!r:.40}; leave it out of the completion, or {REMEDY}"
        )
    return answer


def _after(start: list[int], whole: list[int], makes: str, where: str) -> list[int]:
    """The ids of the whole that follow those of its beginning."""
    if whole[: len(start)] == start:
        return whole[len(start) :]
    pairs = zip(start, whole, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    raise ValueError(
        f"{where}, field 'completion': {makes.format(len(start))}, of which only the first {same} begin "
        "the ids of prompt and completion, so the completion's ids are not known; "
        f"{REMEDY}, or write the border where no token lies across it (of a chat template: with "
        "chat_template_kwargs under which it writes the prompt alike in both)"
    )


def _texts(message: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What a message says and the tools it calls, each in the forms that count as written."""
    texts = (x for key, x in message.items() if key != "role" and isinstance(x, str))
    forms: list[tuple[str, ...]] = [(x.strip(),) for x in texts]
    content = message.get("content")
    for part in content if isinstance(content, list) else []:
        forms += [(x.strip(),) for key, x in part.items() if key != "type" and isinstance(x, str)]
    for call in message.get("tool_calls") or []:
        called = (call.get("function") or call) if isinstance(call, Mapping) else {}
        forms += [(called["name"],)] if isinstance(called.get("name"), str) else []
        # JSON in a string is the policy's own text.
        given = called.get("arguments")
        forms += [(given.strip(),)] if isinstance(given, str) else list(_leaves(given))
    return forms


def _leaves(arguments: Any) -> Iterator[tuple[str, ...]]:
    """Names and texts among the arguments of a call, as they are or as JSON writes them."""
    if isinstance(arguments, str):
        yield (
            arguments,
            json.dumps(arguments, ensure_ascii=False)[1:-1],
            json.dumps(arguments)[1:-1],
        )
    elif isinstance(arguments, Mapping):
        for name, x in arguments.items():
            yield (str(name),)
            yield from _leaves(x)
    elif isinstance(arguments, (list, tuple)):
        for x in arguments:
            yield from _leaves(x)
