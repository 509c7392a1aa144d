r"""Whether two answers have the same value: numbers, units and lists here, algebra by math-verify.

math-verify reads LaTeX well, but it takes ``3\frac{1}{2}`` for a product, ``1,2,3`` for 123, words for
products of letters, and numbers below its precision for zero. So these are compared here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from topr_kernels.recipe.algebra import has_words, same_algebra
from topr_kernels.recipe.answer_parts import Parts, in_group, labelled, parts, split_top
from topr_kernels.recipe.plain_text import LONGEST_ANSWER, plain, without_outer_braces
from topr_kernels.recipe.quantities import in_smallest, near, quantity, without_unit

# Levels of nested lists that are compared.
_DEEPEST = 5
# Elements of longer lists and matrices are compared by their canonical forms alone.
_LONGEST_LIST = 9


_TIME = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?\s*(?:([ap])\.?\s*m\.?)?", re.IGNORECASE)
_HOUR = re.compile(r"(\d{1,2})()()\s*([ap])\.?\s*m\.?", re.IGNORECASE)
_NAMED_TIMES = {"noon": "12:00 pm", "midday": "12:00 pm", "midnight": "12:00 am"}
_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_DATE = re.compile(
    r"(?:(?P<day>\d{1,2})(?:st|nd|rd|th)?\s+(?:of\s+)?(?P<first>[A-Za-z]{3,9})\.?"
    r"|(?P<last>[A-Za-z]{3,9})\.?\s+(?P<after>\d{1,2})(?:st|nd|rd|th)?)(?:,?\s+(?P<year>\d{4}))?"
)
_CHOICE = re.compile(
    r"(?:(?i:option|choice|answer)\s+)?(?:\(\s*([A-Za-z])\s*\)|([A-Z])(?=$|[.):]))[.):]?(?:\s+(\S.*))?",
    re.DOTALL,
)
_MATRIX = re.compile(
    r"\\begin\s*\{([bpBvV]?matrix|array)\}(?:\s*\{[clr|]*\})?(.*)\\end\s*\{\1\}", re.DOTALL
)
_ARRAY = re.compile(r"[(\[]\s*(\\begin\s*\{array\}.*\\end\s*\{array\})\s*[)\]]", re.DOTALL)
_NAMES = {
    **dict.fromkeys((r"\emptyset", r"\{\}", r"\{ \}", "empty set", "the empty set"), r"\emptyset"),
    **dict.fromkeys(
        (r"\mathbb{R}", r"\mathbf{R}", "all real numbers", "all reals", r"(-\infty,\infty)",
         r"(-\infty,+\infty)", "real numbers", r"\R"), r"\mathbb{R}"),
    **dict.fromkeys(("no solution", "no solutions", "none", "no real solutions"), "none"),
    **dict.fromkeys(("undefined", "does not exist", "dne"), "undefined"),
    **dict.fromkeys(("infinity", r"\infty", r"+\infty"), r"\infty"),
}  # fmt: skip


def canonical(answer: str) -> str:
    """The canonical form of an answer; answers of equal form have the same value.

    A dollar sign in front is left out, as most answers leave it out: votes for 5 and for $5 are one.
    """
    return _form(plain(answer).removeprefix("¤"))


def same_answer(gold: str, answer: str) -> bool:
    """Whether an answer has the value of the right one.

    A missing unit makes no difference; a different one does. 50% equals both 50 and 0.5. Lists and sets
    have no order, tuples and intervals do. Decimals must be exact, but for ``TOLERANCE``.
    """
    right, given = plain(gold), plain(answer)
    if not right or not given:
        return False
    if _form(right) == _form(given):
        return True
    if max(len(right), len(given)) > LONGEST_ANSWER:
        return False
    return _same(right, given, 0)


def _form(text: str) -> str:
    if len(text) > LONGEST_ANSWER:
        return _tight(text)
    number = quantity(text)
    if number is not None:
        return f"{number.value} {number.unit}".strip()
    word = " ".join(text.lower().split())
    name = _NAMES.get(word) or _NAMES.get(_tight(text))
    if name:
        return name
    return word if _is_words(text) else re.sub(r"([_^])\{(\w)\}", r"\1\2", _tight(text))


def _tight(text: str) -> str:
    """A text without spaces, but for those between two numbers."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


def _is_words(text: str) -> bool:
    """Whether a text is words rather than a product of letters."""
    return bool(re.fullmatch(r"[^\W\d_]{2}[^\W\d_]+|yes|no", text, re.I)) or bool(
        re.fullmatch(r"(?:[^\W\d_]|[ ,.'-])*[^\W\d_]{3}(?:[^\W\d_]|[ ,.'-])*", text)
    )


def _same(gold: str, answer: str, depth: int) -> bool:
    gold, answer = gold.strip(), answer.strip()
    if not gold or not answer or depth > _DEEPEST:
        return False
    if _form(gold) == _form(answer):
        return True
    labels, (gold, answer) = zip(*(labelled(t) for t in (gold, answer)), strict=True)
    if all(labels) and labels[0] != labels[1]:
        return False
    gold, answer = (without_outer_braces(t) for t in (gold, answer))
    if _form(gold) == _form(answer):
        return True
    for judge in (_same_date, _same_parts, _same_quantity, _same_time, _same_choice, _same_matrix):
        verdict = judge(gold, answer, depth)
        if verdict is not None:
            return verdict
    (gold, unit), (answer, other) = without_unit(gold), without_unit(answer)
    if unit and other and unit != other:
        return False
    if _form(gold) == _form(answer):
        return True
    if _ascending(gold) == _ascending(answer):
        return True
    if has_words(gold) or has_words(answer) or ("=" in gold) != ("=" in answer):
        return False
    return same_algebra(gold, answer)


def _ascending(text: str) -> list[str]:
    """The parts of a chain of inequalities and the signs between them, the smallest part first."""
    chain = [_form(part) for part in re.split(r"(<|>|\\[lg]e(?![a-z]))", text)]
    if not set(chain[1::2]) <= {">", r"\ge"}:
        return chain
    return [{">": "<", r"\ge": r"\le"}.get(part, part) for part in reversed(chain)]


def _same_quantity(gold: str, answer: str, depth: int) -> bool | None:
    right, given = quantity(gold), quantity(answer)
    if right is None or given is None:
        return None
    if "%" in (right.unit, given.unit) and right.unit != given.unit:
        if right.unit and given.unit:
            return False
        shares = {right.value, right.value / 100} if right.unit else {right.value}
        return bool(shares & ({given.value, given.value / 100} if given.unit else {given.value}))
    if {right.unit, given.unit} in ({"dollar", "cent"}, {"euro", "cent"}):
        right, given = (
            q._replace(value=q.value / 100, unit="") if q.unit == "cent" else q._replace(unit="")
            for q in (right, given)
        )
    if right.unit != given.unit and right.unit and given.unit:
        right, given = in_smallest(right), in_smallest(given)
        if right.unit != given.unit:
            return False
    return near(right.value, given.value, max(right.digits, given.digits))


def _same_parts(gold: str, answer: str, depth: int) -> bool | None:
    unions = [re.split(r"\\cup(?![a-z])", t) for t in (gold, answer)]
    if max(map(len, unions)) > 1:
        # "x < 1 or x > 2"
        unions = [u if len(u) > 1 else split_top(u[0]) for u in unions]
        return _match(unions[0], unions[1], depth)
    right, given = parts(gold), parts(answer)
    if right is None and given is None:
        return None
    # "100,200" is a number, unless the other one is a list.
    if quantity(gold) is not None and given is not None and given.opening == "":
        if all(in_group(answer, i) for i, c in enumerate(answer) if c == ","):
            given = None
        elif not re.search(r",\d{3}(?!\d)", gold):
            right = None
    if right is not None and given is None and quantity(answer) is not None:
        given = _bare_list(answer)
    elif given is not None and right is None and quantity(gold) is not None:
        right = _bare_list(gold)
    if quantity(gold) is not None and quantity(answer) is not None and not (right and given):
        return None
    if (right is None or given is None) and re.search(r"\\[lg]e|[<>]", gold + answer):
        # Left to math-verify: an interval may equal an inequality.
        return None
    right = right or Parts([gold], r"\{", r"\}")
    given = given or Parts([answer], r"\{", r"\}")
    return _same_brackets(right, given, depth)


def _bare_list(text: str) -> Parts | None:
    elements = text.split(",")
    return Parts(elements, "", "") if len(elements) > 1 else None


def _same_brackets(right: Parts, given: Parts, depth: int) -> bool:
    ordered = (right.opening, right.closing), (given.opening, given.closing)
    if all(b in (("", ""), (r"\{", r"\}")) for b in ordered):
        names = [{labelled(e)[0] for e in p.elements} for p in (right, given)]
        # "1, 2" for "a = 1, b = 2": without the names it is the order that tells which is which.
        if {""} not in names or all(len(n - {""}) < 2 for n in names):
            return _match(right.elements, given.elements, depth)
        ordered = (("", ""), ("", ""))
    # A tuple may leave its parentheses out; a list is not a tuple.
    if ordered[0] != ordered[1] and not (ordered[0] == ("(", ")") and ordered[1] == ("", "")):
        return False
    pairs = zip(right.elements, given.elements, strict=False)
    return len(right.elements) == len(given.elements) and all(
        _same(a, b, depth + 1) for a, b in pairs
    )


def _match(right: Sequence[str], given: Sequence[str], depth: int) -> bool:
    """Whether two lists hold the same elements in any order."""
    if len(right) != len(given):
        return False
    if len(right) > _LONGEST_LIST:
        return sorted(map(_form, right)) == sorted(map(_form, given))
    left = list(given)
    for element in right:
        partner = next((x for x in left if _same(element, x, depth + 1)), None)
        if partner is None:
            return False
        left.remove(partner)
    return True


def _same_time(gold: str, answer: str, depth: int) -> bool | None:
    gold, answer = (_NAMED_TIMES.get(t.lower(), t) for t in (gold, answer))
    times = [_TIME.fullmatch(t) or _HOUR.fullmatch(t) for t in (gold, answer)]
    if not times[0] and times[1] and times[1][4] and re.fullmatch(r"\d{1,2}", gold):
        # 8 a.m. for 8, as with any unit.
        return int(gold) == int(times[1][1]) and not int(times[1][2] or 0)
    if times[0] and times[1]:
        return _same_hours(*(t.groups() for t in times if t))
    if ":" not in gold + answer:
        return None
    # 3:05 is a time, and 3:5 none.
    if re.search(r":\s*0\d", gold + answer):
        return False
    ratios = [re.split(r"\s*:\s*", t) for t in (gold, answer)]
    numbers = [[quantity(x) for x in ratio] for ratio in ratios]
    if len(numbers[0]) != len(numbers[1]) or any(n is None for row in numbers for n in row):
        return False
    right, given = ([n.value for n in row if n] for row in numbers)
    return bool(any(right)) and all(
        a * d == b * c
        for (a, c), (b, d) in itertools.combinations(zip(right, given, strict=True), 2)
    )


def _same_date(gold: str, answer: str, depth: int) -> bool | None:
    """Whether two days of the year are the same; the right answer may leave the year to the question."""
    dates = [_DATE.fullmatch(t) for t in (gold, answer)]
    known = []
    for date in dates:
        month = (date["first"] or date["last"])[:3].lower() if date else ""
        if not date or month not in _MONTHS:
            return None
        known.append((month, int(date["day"] or date["after"]), date["year"]))
    (month, day, year), given = known
    return ((month, day) == given[:2] and None in (year, given[2])) or (month, day, year) == given


def _same_hours(right: Sequence[Any], given: Sequence[Any]) -> bool:
    def hours(time: Sequence[Any], half: str) -> set[int]:
        hour = int(time[0])
        return {hour} if not half or hour > 12 else {hour % 12 + (12 if half.lower() == "p" else 0)}

    # The right answer may leave a.m. or p.m. to the question; so may the given one.
    half, other = right[3] or given[3] or "", given[3] or right[3] or ""
    same = hours(right, half) == hours(given, other)
    return same and [int(x or 0) for x in right[1:3]] == [int(x or 0) for x in given[1:3]]


def _same_choice(gold: str, answer: str, depth: int) -> bool | None:
    right, given = (_choice(t) for t in (gold, answer))
    if (right is None) != (given is None):
        # "(C) 12" for 12, and the other way round.
        one, other = (right, answer) if right else (given, gold)
        text = one[1] if one else ""
        readable = text and text[0] not in "+-*/=^<>" and not re.search(r"\([a-z]\)", gold + answer)
        return _same(text, other, depth + 1) if readable else None
    if right is None or given is None:
        return None
    letters, texts = zip(right, given, strict=True)
    # A letter alone decides. If both choices have texts, these must agree too.
    return letters[0] == letters[1] and (not all(texts) or _same(*texts, depth + 1))


def _choice(text: str) -> tuple[str, str] | None:
    """Letter and text of a choice, the text empty if the letter stands alone."""
    match = _CHOICE.fullmatch(text)
    return ((match[1] or match[2]).upper(), match[3] or "") if match else None


def _same_matrix(gold: str, answer: str, depth: int) -> bool | None:
    # Parentheses around an array are those of a pmatrix.
    right, given = (_MATRIX.fullmatch(_ARRAY.sub(r"\1", t)) for t in (gold, answer))
    if right is None or given is None:
        return False if (right or given) else None
    if ("v" in right.group(1).lower()) != ("v" in given.group(1).lower()):
        return False
    matrices = [
        [r.split("&") for r in m.group(2).split(r"\\") if r.strip()] for m in (right, given)
    ]
    if [len(r) for r in matrices[0]] != [len(r) for r in matrices[1]]:
        return False
    cells = [[plain(c) for row in matrix for c in row] for matrix in matrices]
    if len(cells[0]) > _LONGEST_LIST:
        return [_form(c) for c in cells[0]] == [_form(c) for c in cells[1]]
    return all(_same(a, b, depth + 1) for a, b in zip(*cells, strict=True))
