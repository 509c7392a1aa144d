"""The parts of an answer: elements of lists, sets, tuples and intervals, and names before "="."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_OPENING, _CLOSES = ("(", "[", r"\{"), (")", "]", r"\}")
_TOKEN = re.compile(r"\\[{}]|[(){}\[\]]|[,;]?\s+(?:and|or)\s+|[,;]", re.IGNORECASE)
_LABEL = re.compile(
    r"\s*((?:\([A-Za-z](?:,\s*[A-Za-z])+\)|\\?[A-Za-z][A-Za-z0-9_{}\\()' ,|]*|\|[A-Za-z]+\|))\s*"
    r"(?:=(?!=)|\\in(?![a-z]))\s*"
)


class Parts(NamedTuple):
    """Elements of a list, a set, a tuple or an interval, and its brackets ("" for a bare list)."""

    elements: list[str]
    opening: str
    closing: str


def split_top(text: str) -> list[str]:
    """Splits a plain text at commas, semicolons, "and" and "or" outside of brackets."""
    elements, depth, start = [], 0, 0
    for match in _TOKEN.finditer(text):
        token = match.group().strip().lower()
        if token in _OPENING or token == "{":
            depth += 1
        elif token in _CLOSES or token == "}":
            depth -= 1
        elif not depth and token.strip(" ,;") in ("and", "or", ""):
            elements.append(text[start : match.start()].strip())
            start = match.end()
    return [*elements, text[start:].strip()]


def in_group(text: str, comma: int) -> bool:
    """Whether a comma groups the digits of one number, as in 1,000."""
    return bool(
        re.match(r",\d{3}(?!\d)", text[comma : comma + 5]) and text[comma - 1 : comma].isdigit()
    )


def parts(text: str) -> Parts | None:
    """The elements of a normalised text that has several, or is a set in braces; None for others."""
    opening, closing, inner = _brackets(text)
    if opening:
        elements = split_top(inner)
        if len(elements) > 1 or opening == r"\{":
            return Parts(_spread(elements), opening, closing)
        return None
    elements = _spread([e for e in split_top(text) if e])
    if len(elements) < 2:
        return None
    label, rest = labelled(elements[0])
    # "n = 2, 3, 4"
    if label and not any(labelled(e)[0] for e in elements[1:]):
        elements[0] = rest
    return Parts(elements, "", "")


def _spread(elements: Sequence[str]) -> list[str]:
    r"""The elements; one with ``\pm`` becomes two, one for each sign."""
    spread = []
    for element in elements:
        if r"\pm" not in element:
            spread.append(element)
            continue
        spread.append(
            element.replace(r"\pm", "+").replace(r"\mp", "-").strip().removeprefix("+").strip()
        )
        spread.append(element.replace(r"\pm", "-").replace(r"\mp", "+").strip())
    return spread


def _brackets(text: str) -> tuple[str, str, str]:
    """The brackets around all of a text, and what they hold; empty if there are none."""
    opening = next((b for b in _OPENING if text.startswith(b)), "")
    closing = next((b for b in _CLOSES if text.endswith(b)), "")
    if not opening or not closing or (opening == r"\{") != (closing == r"\}"):
        return "", "", text
    depth = 0
    for match in re.finditer(r"\\[{}]|[()\[\]]", text):
        depth += 1 if match.group() in _OPENING else -1
        if not depth:
            if match.end() != len(text):
                return "", "", text
            break
    return opening, closing, text[len(opening) : len(text) - len(closing)].strip()


def labelled(text: str) -> tuple[str, str]:
    r"""The name before "=" or "\in", "" if there is none, and the rest of the text."""
    if len(split_top(text)) > 1:
        return "", text
    sides = re.split(r"(?<![<>!\\])=(?!=)", text)
    if len(sides) > 2 or (len(sides) == 2 and not re.search(r"[A-Za-z]", sides[0])):
        # "x = 10/2 = 5", "5 + 5 = 10"
        label = _LABEL.fullmatch(sides[0] + "=")
        return (label.group(1).strip() if label else ""), sides[-1].strip()
    match = _LABEL.match(text)
    if match and match.end() < len(text):
        return re.sub(r"\s", "", match.group(1)), text[match.end() :].strip()
    if len(sides) == 2 and re.fullmatch(r"\s*[A-Za-z]\s*", sides[1]):
        return sides[1].strip(), sides[0].strip()
    return "", text
