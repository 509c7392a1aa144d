"""The final answer of a completion, and the right answer in a line of a data file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from topr_kernels.recipe.plain_text import starts_with_money

_THINKING = re.compile(
    r"<(/?)(?:think|thinking|thought|thoughts|reasoning|scratchpad)>"
    r"|<\|(?:(begin|end)_of_thought)\|>|\[(/?)THINK\]",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# "\boxed 7": up to the end of the formula or of the word.
_BARE = re.compile(r"\\?[^\s$\\{}]+(?:\{[^{}]*\})*")
_LONGEST_TAIL = 2000
# Statements of one kind that are looked at, from the end.
_LATEST = 20
#: What stands between two boxes that are one answer: "\boxed{2} and x = \boxed{3}".
_BETWEEN = re.compile(
    r"(?:\s|\$|\\[()\[\],; ]|\\q?quad)*(?:,|;|&|and|or|\\text\s*\{\s*,?\s*(?:and|or)\s*\}"
    r"|,\s*(?:and|or))"
    r"(?:\s|\$|\\[()\[\],; ]|\\q?quad)*(?:[A-Za-z](?:_\{?\w\}?)?\s*=\s*)?\$?\s*"
)
_PHRASE = re.compile(
    r"\banswers?\b(?:,?\s{1,3}(?:then|therefore|thus|to|in|for)\b[^.\n:?!]{0,40}?)?(?:\*\*|__)?\s{0,3}"
    r"(?::|=|,?\s{0,3}(?:is|are|was|should be|would be|will be|must be|has to be|equals|comes to|"
    r"comes out to|turns out to be|becomes)\b)[\s:*_]*",
    re.IGNORECASE,
)
_QUOTED = re.compile(
    r"[\"“'‘`](?:(?:the|my|our|your|a|final|correct|right|exact)\s+){0,3}$", re.IGNORECASE
)
_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_TAGGED = re.compile(r"<answer>([^<]*)</answer>", re.IGNORECASE)
_DISPLAY = {r"\[": r"\]", "$$": "$$", r"\(": r"\)"}
# The prompts' own instructions, which a completion may repeat.
_ECHO = re.compile(
    r"end with a line of the form\s+\S{0,3}the answer is:?\s*\S{0,3}\s+and the number"
    r"|put (?:the|your) final answer (?:within|in|inside) \S{0,3}\\boxed\s*\{[^{}]{0,20}\}",
    re.IGNORECASE,
)
# "The answer is correct", "the answer is in simplest form": no answers.
_FILLER = re.compile(
    r"(?:correct|right|wrong|incorrect|reasonable|in|within|as|given|found|obtained|what|that|this|"
    r"verified|unique|consistent|valid|clear|positive|negative integer|an integer|a number|the same|"
    r"therefore correct|indeed correct)\b(?![^\n]{0,80}\d)",
    re.IGNORECASE,
)
# A later sentence that takes the answer back.
_RETRACTED = re.compile(
    r"(?:^|[.,;!?\n—–-])\s*(?:no,? )?(?:wait|oops|hold on|sorry|apologies|hmm)\b"
    r"|\b(?:wait|oops|hold on)(?:[,!:]|\.\.)"
    r"|\b(?:scratch that|correction|my mistake)\b"
    r"|\bi\s+(?:\w+\s+)?(?:made|have made|see|found)\s+(?:an?|my|the)\s+(?:\w+\s+)?(?:mistake|error)"
    r"|\bi\s+(?:was|am)\s+(?:wrong|mistaken)"
    r"|\b(?:that|this|it|which|answer)(?:\s+(?:is|was)|'s)\s+(?:wrong|incorrect|not (?:right|correct))"
    r"|\b(?:isn't|wasn't)\s+(?:right|correct)"
    r"|\blet me\s+(?:redo|recalculate|recompute|reconsider|try again|start over|correct)"
    r"|[.,;!?\n—–-]\s*(?:actually|rather)\b|[.!?\n—–-]\s*no\b[,.!:]|,\s*no\b[,.!:]"
    r"|\bor (?:maybe|perhaps|rather)\b",
    re.IGNORECASE,
)
_ABBREVIATED = re.compile(
    r"(?:\b(?:Rs|No|approx|ca|Mr|Mrs|Dr|St|U\.S|i\.e|e\.g)|\b[ap]\.m|\bsq|\bcu)$", re.I
)
_CLAUSE = re.compile(
    r"(?P<stop>[.?]|(?<!\d)!)(?=\s|$)"
    r"|</|<\|"
    r"|,\s+(?!and\b|or\b)(?=[a-z]{2,})"
    r"|;\s+(?=[a-zA-Z]{2,})"
    r"|\s+(?:because|since|so that|so|as|which|where|when|after|if|given that|but|due to)\s+(?=\S)"
    r"|\s+and\s+(?=(?:she|he|they|it|there|we|you|that|this|the|so|therefore|thus)\b)"
    r"|\s+[-–—]+\s+(?=[a-zA-Z]{2,})|\s*—\s*(?=[a-zA-Z]{2,})"
    r"|\s+\((?!or\b)(?=[^()\n]*(?:[a-z]{2,}|=|\d%))(?=[^()\n]*\)\W*(?:\s|$))"
)


# "The answer is that Ann has 18 eggs"
_SUBJECT = re.compile(
    r"(?!(?:[A-Za-z']{1,20}\s{1,3}){0,6}(?:not|least|most|than|between|minus|negative|or|no)\s)(?:[A-Za-z']{1,20}\s{1,3}){1,6}"
    r"(?:has|have|had|is|are|was|were|makes?|made|earns?|earned|costs?|spends?|spent|needs?|gets?|of|be)\s{1,3}"
    r"(?=-?[$€£¥]?\d)"
)


class Statement(NamedTuple):
    """An answer that a text states, and where."""

    start: int
    end: int
    answer: str


def without_thinking(text: str) -> str:
    """A text without the contents of thinking tags; an unclosed tag removes the rest of the text."""
    kept: list[str] = []
    start, inside = 0, False
    for tag in _THINKING.finditer(text):
        closes = bool(tag.group(1) or tag.group(3) or tag.group(2) == "end")
        if not closes and not inside:
            kept.append(text[start : tag.start()])
            inside = True
        elif closes:
            # Without an opening tag it was the prompt that opened it: all before is thinking.
            kept = kept if inside else []
            inside, start = False, tag.end()
    return "".join(kept) + ("" if inside else text[start:])


def boxes(text: str) -> tuple[list[Statement], bool]:
    r"""Contents of ``\boxed`` and ``\fbox``, nested ones once; and whether the last one is unclosed."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for brace in _BRACE.finditer(text):
        if brace.group() == "{":
            opened.append(brace.start())
        elif brace.group() == "}" and opened:
            closing[opened.pop()] = brace.start()
    statements: list[Statement] = []
    unclosed = False
    for box in _BOX.finditer(text):
        at = box.end()
        if text[at : at + 1] == "{":
            end = closing.get(at, -1)
            unclosed = end < 0
            if end < 0:
                continue
            statement = Statement(box.start(), end + 1, text[at + 1 : end].strip())
        else:
            bare = _BARE.match(text, at)
            unclosed = False
            if bare is None:
                continue
            statement = Statement(box.start(), bare.end(), bare.group().rstrip(".,;:"))
        if statements and statement.end <= statements[-1].end:
            # Of a box that holds just a box the inner one counts.
            if statement.end - statement.start == len(statements[-1].answer):
                statements[-1] = Statement(
                    statements[-1].start, statements[-1].end, statement.answer
                )
            continue
        statements.append(statement)
    return statements, unclosed


def boxed_answers(text: str) -> list[Statement]:
    """The boxes of a text that are not empty; those joined by "and", "or" or a comma count as one."""
    joined: list[Statement] = []
    previous = ""
    for box in boxes(text)[0]:
        if not box.answer:
            continue
        between = text[joined[-1].end : box.start] if joined else ""
        if joined and len(between) < 60 and _BETWEEN.fullmatch(between):
            start, _, answer = joined.pop()
            answer = answer if box.answer == previous else f"{answer}, {box.answer}"
            joined.append(Statement(start, box.end, answer))
        else:
            joined.append(box)
        previous = box.answer
    return joined


def final_answer(text: str, *, boxed: bool) -> str | None:
    r"""The answer that a text ends with, or None if it gives none or takes it back.

    That is the last of "The answer is: ...", "#### ..." and ``<answer>``, outside of thinking tags.

    Args:
        text: a completion.
        boxed: whether a ``\boxed{}`` states an answer on its own.
    """
    text = _ECHO.sub(" ", without_thinking(text))
    framed = boxed_answers(text)
    stated = [*_phrases(text, framed), *(framed if boxed else [])]
    if not stated:
        return None
    last = max(stated, key=lambda s: s.end)
    return None if _RETRACTED.search(text, last.end) else last.answer or None


def _phrases(text: str, framed: Sequence[Statement]) -> list[Statement]:
    statements = []
    at = 0
    for phrase in list(_PHRASE.finditer(text))[-_LATEST:]:
        tail, start = _tail(text, phrase.end())
        quoted = _QUOTED.search(text[max(0, phrase.start() - 40) : phrase.start()])
        if quoted and tail[:1] in tuple("\"”'’`"):
            continue
        while at < len(framed) and framed[at].end <= start:
            at += 1
        inside = [b for b in framed[at : at + 1] if b.start < start + len(tail)]
        if inside:
            statements.append(inside[0])
            continue
        clause = first_clause(tail)
        answer = _without_subject(clause)
        if tail and not _FILLER.match(answer):
            statements.append(Statement(phrase.start(), start + len(clause), clean(answer)))
    for line in list(_HASHES.finditer(text))[-_LATEST:]:
        if re.match(r"\W{0,9}\d", line.group(1)) and not _PHRASE.search(line.group(1)):
            answer = first_clause(line.group(1))
            statements.append(Statement(line.start(), line.start(1) + len(answer), clean(answer)))
    for tag in list(_TAGGED.finditer(text))[-_LATEST:]:
        if not _PHRASE.search(tag.group(1)) and "\\boxed" not in tag.group(1):
            statements.append(Statement(tag.start(), tag.end(), clean(tag.group(1))))
    return statements


def _tail(text: str, start: int) -> tuple[str, int]:
    """What follows a phrase: the rest of the line, or a displayed formula; and where it starts."""
    opening = text[start : start + 2]
    if opening in _DISPLAY:
        end = text.find(_DISPLAY[opening], start + 2, start + _LONGEST_TAIL)
        line = text.find("\n", end if end >= 0 else start, start + 2 * _LONGEST_TAIL)
        stop = min(line if line >= 0 else len(text), start + 2 * _LONGEST_TAIL)
        return text[start:stop], start
    line = text.find("\n", start, start + _LONGEST_TAIL + 1)
    return text[start : line if line >= 0 else start + _LONGEST_TAIL + 1], start


def first_clause(tail: str) -> str:
    """What follows "the answer is", up to the end of the sentence or a clause that explains it."""
    for match in _CLAUSE.finditer(tail[:500]):
        before = tail[: match.start()]
        if match.group("stop"):
            if not _ABBREVIATED.search(before):
                return before
        elif match.group().startswith("<") or re.search(
            r"[\d\\]|^\W*(?:yes|no)\W*$", before, re.IGNORECASE
        ):
            return before
    # No answer is so long, and the cut-off text must not count as one.
    return tail if len(tail) <= _LONGEST_TAIL else ""


def _without_subject(clause: str) -> str:
    subject = _SUBJECT.match(clause)
    return clause[subject.end() :] if subject else clause


def clean(answer: str) -> str:
    """An answer without the $ of LaTeX, emphasis and full stop that a sentence puts around it."""
    text = answer.strip().strip('*_`"“”').strip().removesuffix(".").strip()
    text = text if starts_with_money(text) else text.strip("$ ")
    return text.removesuffix("\\").strip()


def gold_answer(text: str) -> str:
    r"""The right answer of a data file's line: after the last ``####``, else in a box, else all of it.

    Raises:
        ValueError: if there is none; the message says what is there instead.
    """
    _, hashes, after = text.rpartition("####")
    text = after.strip()
    if not text:
        raise ValueError("nothing after ####" if hashes else "empty")
    framed = boxed_answers(text)
    statements, unclosed = boxes(text)
    if unclosed:
        raise ValueError("a box whose braces do not close")
    if not framed and (statements or _BOX.search(text)):
        raise ValueError("an empty box")
    answer = framed[-1].answer if framed else text
    try:
        finite = abs(float(answer)) < float("inf")
    except (ValueError, OverflowError):
        return answer
    # "inf" and "nan" are refused, but not digits beyond the range of a float.
    if not finite and not any(map(str.isdigit, answer)):
        raise ValueError("not a finite number")
    return answer
