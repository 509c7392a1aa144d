r"""Whether two answers have the same value: numbers, units and lists here, algebra by math-verify.

math-verify reads LaTeX well, but takes ``3\frac{1}{2}`` for a product, ``1,2,3`` for 123, words for
products of letters, and numbers below its precision for zero; so these are decided here.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

#: Longer answers are compared as texts alone.
LONGEST_ANSWER = 400
#: A decimal with at least ``_ROUNDED_DIGITS`` digits after the point stands for a value this near,
#: absolute and relative to the right one. 1.414 is not the root of 2, 1.4142135624 is.
TOLERANCE = Fraction(1, 10**8)
_ROUNDED_DIGITS = 9
_LONGEST_NUMBER = 100
_DEEPEST = 5
# Of longer lists and matrices the elements are compared as numbers and texts.
_LONGEST_LIST = 9

# --- one way to write a text -----------------------------------------------------------------

_SYMBOLS = {
    **dict.fromkeys("−‒–—﹣－", "-"),
    **dict.fromkeys("“”„«»″`", ""),
    **dict.fromkeys("’‘′", "'"),
    **{"⁄": "/", "÷": "/", "∕": "/", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot "},
    **{"π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm "},
    **{"∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "≈": r"\approx "},
    **{"ℝ": r"\mathbb{R}", "θ": r"\theta ", "º": "°", "∓": r"\mp "},
}
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_SUBSCRIPT = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+|[a-z]))")
_MACROS = [
    (re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?"), ""),
    (re.compile(r"\\(?:displaystyle|textstyle|limits|rm|bf|it|large|Large)(?![a-zA-Z])"), ""),
    (re.compile(r"(?<!\\)\\!|\{\}"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:quad|qquad|enspace|thinspace)(?![a-zA-Z])|(?<!\\)\\[,;:> ]|~"), " "),
    (re.compile(r"(?<!\\)\\[()\[\]]|\$"), ""),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\^\s*\{?\s*(?:\\circ|\\degree)\s*\}?|\\degree(?![a-zA-Z])|\\textdegree"), "°"),
    (re.compile(r"\\(?:frac)\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\s*\{[^{}]*\})\s*(\d)"), r"\1{\2}"),
    (re.compile(r"\\sqrt\s*(\d|[a-z](?![a-z]))"), r"\\sqrt{\1}"),
    (re.compile(r"\\leq?(?:slant)?(?![a-zA-Z])"), r"\\le "),
    (re.compile(r"\\geq?(?:slant)?(?![a-zA-Z])"), r"\\ge "),
    (re.compile(r"\\(?:varnothing|O)(?![a-zA-Z])"), r"\\emptyset"),
    (re.compile(r"\\lbrace(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\\(?:text)?color\s*\{[^{}]*\}"), ""),
    (re.compile(r"\\log\s*_\s*(\w)"), r"\\log_{\1}"),
    (re.compile(r"\\langle(?![a-zA-Z])"), "("),
    (re.compile(r"\\rangle(?![a-zA-Z])"), ")"),
    (re.compile(r"\\(?:pounds|textsterling)(?![a-zA-Z])"), "£"),
    (re.compile(r"\\(?:euro|texteuro)(?![a-zA-Z])"), "€"),
]
_WORDS_IN = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf|normal)?|mathrm|mathbf|mathit|mathsf|mbox|hbox|operatorname\*?|"
    r"boxed|fbox|emph|underline|mathbf)\s*\{([^{}]*)\}"
)
_HEDGES = re.compile(
    r"(?:(?:approximately|approx\.?|about|around|roughly|nearly|exactly|simply|just|only|equal to|"
    r"equals|a total of|found to be|given by|probably|likely|still|the|number|therefore|thus|hence|so|"
    r"indeed|actually|then|clearly|now|\\approx|\\boldsymbol|=|is|i\.e\.)(?![a-zA-Z])[\s,:]*)+",
    re.IGNORECASE,
)


def plain(text: str) -> str:
    """A text in one line, with ASCII digits and signs, and without the LaTeX that only sets it."""
    if len(text) > 5 * LONGEST_ANSWER:
        return " ".join(text.split())
    text = _VULGAR.sub(lambda m: f" {unicodedata.normalize('NFKC', m.group())}", text)
    text = _SUPERSCRIPT.sub(lambda m: f"^{{{unicodedata.normalize('NFKC', m.group())}}}", text)
    text = _SUBSCRIPT.sub(lambda m: f"_{{{unicodedata.normalize('NFKC', m.group())}}}", text)
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m.group(1) or m.group(2)}}}", text)
    # A dollar that is money; the others are LaTeX's.
    text = re.sub(r"\b(?:US|CA|AU|NZ|HK)\s?\\?\$|\\\$", "¤", text).replace(r"\%", "%")
    text = "".join(_SYMBOLS.get(c, c) for c in text)
    text = unicodedata.normalize("NFKC", text)
    text = "".join(_digit(_SYMBOLS.get(c, c)) for c in text)
    for pattern, new in _MACROS:
        text = pattern.sub(new, text)
    for _ in range(_DEEPEST):
        text, count = _WORDS_IN.subn(r" \1 ", text)
        if not count:
            break
    text = re.sub(r"(?<![\w)\]}])\*\*|\*\*(?![\w(\[{-])", "", text)
    text = " ".join(text.split()).strip(" *\"'")
    text = _HEDGES.sub("", text, count=1) if _HEDGES.match(text) else text
    text = text.strip(" *\"'").removesuffix(".").rstrip(" ,;:")
    return _without_outer_braces(text)


def _digit(char: str) -> str:
    return str(unicodedata.decimal(char)) if len(char) == 1 and char.isdecimal() else char


def _without_outer_braces(text: str) -> str:
    while len(text) > 1 and text[0] == "{" and _closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
        if len(text) > LONGEST_ANSWER:
            break
    return text


def _closing(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if not depth:
            return match.start()
    return -1


# --- numbers with units ----------------------------------------------------------------------


class Quantity(NamedTuple):
    """A number and its unit.

    Args:
        value: the number, exact.
        unit: "%", or a unit of measure or money by its one name; "" for none, or a mere noun.
        digits: digits after the point of a decimal.
    """

    value: Fraction
    unit: str
    digits: int


# 1234, 1,234, 1,00,000 (of India) and 1 234.
_WHOLE = (
    r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d{1,2}(?:,\d{2})+,\d{3}(?![\d,])"
    r"|\d{1,3}(?: \d{3})+(?!\d)|\d+)"
)
_DECIMAL = rf"(?:{_WHOLE}(?:\.\d*)?|\.\d+)"
_POWER = (
    r"(?:\s*(?:\\times|\\cdot|\*|x|X)\s*10\s*(?:\^|\*\*)\s*(?:\{\s*-?\d{1,3}\s*\}|\(?-?\d{1,3}\)?)"
    r"|[eE][+-]?\d{1,3})"
)
_NUMBER = re.compile(
    r"(?P<sign>(?:[+-]|minus |negative )?)\s*(?P<money>[¤£€¥₹₽₩₺]|(?:US|A|C)?¤|Rs\.?|USD|EUR|GBP)?\s*"
    r"(?P<inner>[+-]?)\s*(?:"
    rf"(?P<repeated>\d*\.\d*)\\overline\s*\{{(?P<period>\d+)\}}"
    rf"|(?P<mixed>{_WHOLE})(?:\s+(?P<a>\d+)\s*/\s*(?P<b>\d+)"
    r"|\s*(?:\+\s*)?\\frac\s*\{\s*(?P<c>\d+)\s*\}\s*\{\s*(?P<d>\d+)\s*\}|\s+and (?P<half>a half))"
    rf"|\\frac\s*\{{\s*(?P<e>-?{_DECIMAL})\s*\}}\s*\{{\s*(?P<f>-?{_DECIMAL})\s*\}}"
    rf"|(?P<g>{_DECIMAL})\s*/\s*(?P<h>{_DECIMAL})"
    rf"|(?P<decimal>{_DECIMAL})(?P<power>{_POWER})?"
    r")(?P<rest>.*)",
    re.DOTALL,
)
_SCALES: dict[str, int | Fraction] = {
    **{"hundred": 10**2, "thousand": 10**3, "k": 10**3, "million": 10**6, "mn": 10**6},
    **{"billion": 10**9, "bn": 10**9, "trillion": 10**12, "dozen": 12, "lakh": 10**5},
    **{"crore": 10**7, "hundredth": Fraction(1, 100), "tenth": Fraction(1, 10)},
    **{"half": Fraction(1, 2), "third": Fraction(1, 3), "quarter": Fraction(1, 4)},
    **{"fourth": Fraction(1, 4), "fifth": Fraction(1, 5), "sixth": Fraction(1, 6)},
    **{"halve": Fraction(1, 2), "eighth": Fraction(1, 8), "thousandth": Fraction(1, 1000)},
}
_SCALE = re.compile(
    rf"\s*-?({'|'.join(sorted(_SCALES, key=len, reverse=True))})s?(?![a-zA-Z])", re.I
)
# Each line has the names of some units, each unit's one name first.
_UNIT_NAMES = (
    "m meter metre,cm centimeter centimetre,mm millimeter millimetre,km kilometer kilometre",
    "in inch inche,ft foot feet,yd yard,mi mile,g gram gm,kg kilogram kilo,mg milligram",
    "lb,oz ounce,t ton tonne,l liter litre,ml milliliter millilitre,gal gallon",
    "s second sec,min minute,h hour hr,day,week wk,month mo,year yr,ms millisecond",
    "dollar usd ¤ us¤ buck,euro eur €,pound gbp £,cent ¢ penny pence,yen jpy ¥,rupee inr ₹ rs",
    "ruble rouble ₽,won ₩,lira ₺,yuan rmb cny,peso,franc chf",
    "° degree deg,°c celsius,°f fahrenheit,rad radian,% percent pct percentage",
    "newton,joule,watt,volt,hz hertz,acre,hectare ha,mph,kph kmh kmph,cal calorie",
)
_UNITS = {
    name: unit.split()[0]
    for line in _UNIT_NAMES
    for unit in line.split(",")
    for name in unit.split()
}
# Words that make another value of the number before them, or another number beside it.
_NO_UNIT = re.compile(
    r"\b(?:or|and|to|than|pi|factorial|squared|cubed|sqrt|root|base|mod|below|above|plus|minus|not|but|"
    r"times(?=\s+\w)|divided|multiplied|over(?=\s+\w)|sin|cos|tan|log|ln|exp|infinity|i|e|maybe|possibly|perhaps|bc|january|february|march|april|may|june|july|august|september|october|"
    r"november|december)\b",
    re.IGNORECASE,
)
_SHORTEST_NOUN = 3
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMERALS = {word: i for i, word in enumerate(_ONES.split())} | {
    word: 10 * i for i, word in enumerate(_TENS.split(), 2)
}
_CENTS = re.compile(r"(\d+) dollars?,? (?:and )?(\d{1,2}) cents?$")


def quantity(text: str) -> Quantity | None:
    """A plain text as a number with a unit; None for anything else."""
    text = _CENTS.sub(lambda m: f"{m.group(1)}.{int(m.group(2)):02} dollars", _in_digits(text))
    match = _NUMBER.fullmatch(text)
    if match is None or sum(map(str.isdigit, text)) > _LONGEST_NUMBER:
        return None
    found = match.groupdict()
    if found["sign"] and found["inner"]:
        return None
    try:
        value = _value(found)
    except ZeroDivisionError:
        return None
    rest = found["rest"]
    if rest[:1] and rest[:1] in ",.;:" and rest.strip(" .,;:"):
        return None
    scale = _SCALE.match(rest)
    if scale:
        value *= _SCALES[scale.group(1).lower()]
        rest = re.sub(r"^ of(?= an? )", "", rest[scale.end() :])
    elif re.match(r"[MB](?![a-zA-Z])", rest):
        value, rest = value * 10 ** {"M": 6, "B": 9}[rest[0]], rest[1:]
    unit = _unit(rest)
    if unit is None:
        return None
    if found["money"]:
        money = _UNITS.get(found["money"].lower().rstrip("."), "")
        unit = f"{money}{unit}" if unit.startswith("/") else money
    negative = "".join(filter(None, (found["sign"], found["inner"]))).strip() not in ("", "+")
    decimal = (found["decimal"] or "").partition(".")[2]
    return Quantity(-value if negative else value, unit, len(decimal))


def _value(found: dict[str, str | None]) -> Fraction:
    def number(name: str) -> Fraction:
        return Fraction((found[name] or "0").replace(",", "").replace(" ", "").rstrip("."))

    if found["repeated"]:
        whole, _, start = found["repeated"].partition(".")
        period = found["period"] or "0"
        tail = Fraction(int(period), 10 ** len(start) * (10 ** len(period) - 1))
        return Fraction(f"{whole or 0}.{start or 0}") + tail
    if found["mixed"]:
        part = Fraction(1, 2) if found["half"] else Fraction(0)
        if found["a"]:
            part = number("a") / number("b")
        elif found["c"]:
            part = number("c") / number("d")
        return number("mixed") + part
    for above, below in (("e", "f"), ("g", "h")):
        if found[above]:
            return number(above) / number(below)
    power = re.search(r"[+-]?\d{1,3}(?=\W*$)", found["power"] or "0")
    return number("decimal") * Fraction(10) ** int(power.group() if power else 0)


def _unit(rest: str) -> str | None:
    """The unit that follows a number; "" for a noun, None if what follows is no unit."""
    apart = rest[:1].isspace() or rest[:1] == "-"
    rest = rest.strip(" .,;:").removeprefix("-")
    if not rest:
        return ""
    if re.fullmatch(r"\^?\s*\{?\s*(?:st|nd|rd|th)\s*\}?( place| term| grade| floor| day)?", rest):
        return ""
    words = re.sub(r"\((?:[a-zA-Z -]*)\)", "", rest).strip()
    if not words:
        return ""
    if _NO_UNIT.search(words) or not re.fullmatch(
        r"(?:[^\W\d_]|[ '/%°¤£€¥₹₽₩₺¢.-])+(?:\^\{?[23]\}?|(?<=[a-zA-Z])[23])?(?:[^\W\d_]|[ '/%°.-])*",
        words,
    ):
        return None
    first = re.split(r"[^a-zA-Z]", words)[0]
    # "24g" is a mass, "24n" a multiple of n.
    if len(first) == 1 and not apart and first.lower() not in "mghsl":
        return None
    name = _measure(words)
    if name is not None:
        return name
    if not apart or len(first) < _SHORTEST_NOUN:
        return None
    # A noun: the question has it, and not every answer.
    return ""


def _measure(words: str) -> str | None:
    """Units of measure by one name, as "km/h" or "cm^2"; None for other words."""
    words = re.sub(r"(?<=[a-z])\.", "", words.lower())
    parts = re.split(r"\s*/\s*|\s+per\s+|\s+an?\s+", words)
    if parts[0].startswith("per "):
        parts = ["", *re.split("^per ", parts[0])[1:], *parts[1:]]
    names = []
    for part in parts:
        power = re.search(r"\^?\{?([23])\}?$", part)
        tokens = part[: power.start() if power else None].split()
        exponent = int(power.group(1)) if power else 1
        if len(tokens) > 1 and tokens[0] in _POWERS:
            exponent, tokens = _POWERS[tokens[0]], tokens[1:]
        if tokens[:2] == ["°", "c"] or tokens[:2] == ["°", "f"]:
            tokens = ["".join(tokens[:2]), *tokens[2:]]
        elif len(tokens) > 1 and tokens[0] == "degrees" and tokens[1] in ("celsius", "fahrenheit"):
            tokens = tokens[1:]
        word = tokens[0] if tokens else ""
        name = _UNITS.get(word) or _UNITS.get(word.rstrip("s")) or ("" if not word else None)
        if name is None:
            return None
        names.append(name if exponent == 1 else f"{name}^{exponent}")
    return "/".join(names)


def _in_digits(text: str) -> str:
    """A text whose first words are a number in English, with that number in digits."""
    words = re.findall(r"[a-z]+|[^a-z]+", text[:200].lower())
    total = part = used = 0
    end = length = 0
    # The word before, and whether the next one must be a numeral.
    last, joined = "", False
    for word in words:
        length += len(word)
        if word in _NUMERALS:
            # "four and five" and "one two" are two numbers.
            unit = _NUMERALS[word] < 10 and last in _TENS.split()
            if last and not unit and last not in ("hundred", "thousand"):
                return text
            part += _NUMERALS[word]
        elif word == "hundred" and used and not joined:
            part *= 100
        elif word == "thousand" and used and not joined:
            total, part = total + 1000 * part, 0
        elif word == "and" and last in ("hundred", "thousand"):
            joined = True
            continue
        elif used and not word.strip(" -"):
            continue
        elif word == "and" and used:
            return text
        else:
            break
        used, end, last, joined = used + 1, length, word, False
    return f"{total + part}{text[end:]}" if used else text


# --- the parts of an answer ------------------------------------------------------------------

_OPENING, _CLOSES = ("(", "[", r"\{"), (")", "]", r"\}")
_TOKEN = re.compile(r"\\[{}]|[(){}\[\]]|[,;]?\s+(?:and|or)\s+|[,;]", re.IGNORECASE)
_LABEL = re.compile(
    r"\s*((?:\([A-Za-z](?:,\s*[A-Za-z])+\)|\\?[A-Za-z][A-Za-z0-9_{}\\()' ,|]*|\|[A-Za-z]+\|))\s*"
    r"(?:=(?!=)|\\in(?![a-z]))\s*"
)
_TIME = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?\s*(?:([ap])\.?\s*m\.?)?", re.IGNORECASE)
_HOUR = re.compile(r"(\d{1,2})()()\s*([ap])\.?\s*m\.?", re.IGNORECASE)
_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s+)?(?:\(\s*([A-Za-z])\s*\)|([A-Z])(?=$|[.):]))[.):]?(?:\s+(\S.*))?",
    re.DOTALL,
)
_MATRIX = re.compile(
    r"\\begin\s*\{([bpBvV]?matrix|array)\}(?:\s*\{[clr|]*\})?(.*)\\end\s*\{\1\}", re.DOTALL
)
_NAMES = {
    **dict.fromkeys((r"\emptyset", r"\{\}", r"\{ \}", "empty set", "the empty set"), r"\emptyset"),
    **dict.fromkeys(
        (r"\mathbb{R}", r"\mathbf{R}", "all real numbers", "all reals", r"(-\infty,\infty)",
         r"(-\infty,+\infty)", "real numbers", r"\R"), r"\mathbb{R}"),
    **dict.fromkeys(("no solution", "no solutions", "none", "no real solutions"), "none"),
    **dict.fromkeys(("undefined", "does not exist", "dne"), "undefined"),
    **dict.fromkeys(("infinity", r"\infty", r"+\infty"), r"\infty"),
}  # fmt: skip


class Parts(NamedTuple):
    """Elements of a list, a set, a tuple or an interval, and its brackets ("" for a bare list)."""

    elements: list[str]
    opening: str
    closing: str


def split_top(text: str) -> list[str]:
    """Splits a plain text at commas, semicolons, "and" and "or" outside of brackets."""
    found, depth, start = [], 0, 0
    for match in _TOKEN.finditer(text):
        token = match.group().strip().lower()
        if token in _OPENING or token == "{":
            depth += 1
        elif token in _CLOSES or token == "}":
            depth -= 1
        elif not depth and token.strip(" ,;") in ("and", "or", ""):
            found.append(text[start : match.start()].strip())
            start = match.end()
    return [*found, text[start:].strip()]


def _in_group(text: str, comma: int) -> bool:
    return bool(
        re.match(r",\d{3}(?!\d)", text[comma : comma + 5]) and text[comma - 1 : comma].isdigit()
    )


def parts(text: str) -> Parts | None:
    """The elements of a plain text that has several, or is in brackets of a set; None for others."""
    opening, closing, inner = _brackets(text)
    if opening:
        elements = split_top(inner)
        if len(elements) > 1 or opening == r"\{":
            return Parts(_spread(elements), opening, closing)
        return None
    elements = _spread([e for e in split_top(text) if e])
    if len(elements) < 2:
        return None
    label, rest = _labelled(elements[0])
    # "n = 2, 3, 4"
    if label and not any(_labelled(e)[0] for e in elements[1:]):
        elements[0] = rest
    return Parts(elements, "", "")


def _spread(elements: Sequence[str]) -> list[str]:
    r"""Elements with ``\pm`` twice, once for each sign."""
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


def _labelled(text: str) -> tuple[str, str]:
    r"""What stands before "=" or "\in" where it is a name, and what is behind; "" for no name."""
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


# --- equality --------------------------------------------------------------------------------


def canonical(answer: str) -> str:
    """A form of an answer; answers of one form have the same value."""
    return _form(plain(answer))


def same_answer(gold: str, answer: str) -> bool:
    """Whether an answer has the value of the right one.

    A unit that one of them leaves out is no difference, another unit is. 50% is both 50 and 0.5.
    Lists and sets have no order, tuples and intervals do. Decimals are exact but for ``TOLERANCE``.
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
    labels, (gold, answer) = zip(*(_labelled(t) for t in (gold, answer)), strict=True)
    if all(labels) and labels[0] != labels[1]:
        return False
    gold, answer = (_without_outer_braces(t) for t in (gold, answer))
    if _form(gold) == _form(answer):
        return True
    for judge in (_same_parts, _same_quantity, _same_time, _same_choice, _same_matrix):
        verdict = judge(gold, answer, depth)
        if verdict is not None:
            return verdict
    (gold, unit), (answer, other) = _without_unit(gold), _without_unit(answer)
    if unit and other and unit != other:
        return False
    if _form(gold) == _form(answer):
        return True
    if _wordy(gold) or _wordy(answer) or ("=" in gold) != ("=" in answer):
        return False
    return _same_algebra(gold, answer)


def _same_quantity(gold: str, answer: str, depth: int) -> bool | None:
    right, given = quantity(gold), quantity(answer)
    if right is None or given is None:
        return None
    if "%" in (right.unit, given.unit) and right.unit != given.unit:
        if right.unit and given.unit:
            return False
        shares = {right.value, right.value / 100} if right.unit else {right.value}
        return bool(shares & ({given.value, given.value / 100} if given.unit else {given.value}))
    if right.unit != given.unit and right.unit and given.unit:
        return False
    return _near(right.value, given.value, max(right.digits, given.digits))


def _near(right: Fraction, given: Fraction, digits: int) -> bool:
    if digits < _ROUNDED_DIGITS or right.denominator == given.denominator == 1:
        return right == given
    return abs(right - given) <= min(TOLERANCE, TOLERANCE * abs(right))


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
        if all(_in_group(answer, i) for i, c in enumerate(answer) if c == ","):
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
        # An interval against an inequality.
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
        return _match(right.elements, given.elements, depth)
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
        found = next((x for x in left if _same(element, x, depth + 1)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _same_time(gold: str, answer: str, depth: int) -> bool | None:
    times = [_TIME.fullmatch(t) or _HOUR.fullmatch(t) for t in (gold, answer)]
    if times[0] and times[1]:
        return _same_hours(*(t.groups() for t in times if t))
    if ":" not in gold + answer:
        return None
    ratios = [re.split(r"\s*:\s*", t) for t in (gold, answer)]
    numbers = [[quantity(x) for x in ratio] for ratio in ratios]
    if len(numbers[0]) != len(numbers[1]) or any(n is None for row in numbers for n in row):
        return False
    right, given = ([n.value for n in row if n] for row in numbers)
    return bool(any(right)) and all(
        a * d == b * c
        for (a, c), (b, d) in itertools.combinations(zip(right, given, strict=True), 2)
    )


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
    if right is None or given is None:
        return None
    letters, texts = zip(right, given, strict=True)
    # One letter alone is settled by the letter; two labelled texts say the same only if both do.
    return letters[0] == letters[1] and (not all(texts) or _same(*texts, depth + 1))


def _choice(text: str) -> tuple[str, str] | None:
    """Letter and text of a choice, the text empty if the letter stands alone."""
    match = _CHOICE.fullmatch(text)
    return ((match[1] or match[2]).upper(), match[3] or "") if match else None


def _same_matrix(gold: str, answer: str, depth: int) -> bool | None:
    right, given = _MATRIX.fullmatch(gold), _MATRIX.fullmatch(answer)
    if right is None or given is None:
        return False if (right or given) else None
    if ("v" in right.group(1).lower()) != ("v" in given.group(1).lower()):
        return False
    rows = [[r.split("&") for r in m.group(2).split(r"\\") if r.strip()] for m in (right, given)]
    if [len(r) for r in rows[0]] != [len(r) for r in rows[1]]:
        return False
    cells = [[plain(c) for row in matrix for c in row] for matrix in rows]
    if len(cells[0]) > _LONGEST_LIST:
        return [_form(c) for c in cells[0]] == [_form(c) for c in cells[1]]
    return all(_same(a, b, depth + 1) for a, b in zip(*cells, strict=True))


# --- algebra, by math-verify -----------------------------------------------------------------

# Macros whose value is quick to find. Sums, limits and integrals are no final answers.
_MACROS_READ = (
    "frac sqrt pi infty cdot times div pm le ge lt gt ne in cup cap setminus mathbb binom overline bar",
    "sin cos tan cot sec csc arcsin arccos arctan log ln exp lfloor rfloor lceil rceil vert lvert rvert",
    "alpha beta gamma delta epsilon theta lambda mu phi rho sigma tau omega angle mid land wedge vec",
)
_KNOWN = frozenset(" ".join(_MACROS_READ).split())
# Bounds of what math-verify is asked: parts of an expression, decimal digits of a number, and the
# degree of a polynomial, roughly doubled.
_NODES = 240
_DIGITS = 10_000
_DEGREE = 50


def _wordy(text: str) -> bool:
    """Whether a text holds words, which math-verify takes for products of letters."""
    return bool(re.search(r"(?<![\\a-zA-Z])(?:[^\W\d_]{3,}|(?:no|yes)$)", text, re.IGNORECASE))


def _same_algebra(gold: str, answer: str) -> bool:
    # A base, x2 and a ratio are compared as texts alone.
    if any(not _readable(t) or re.search(r"\d_|[A-Za-z]\d|\d\s+\d|:", t) for t in (gold, answer)):
        return False
    a, b = _parsed(gold), _parsed(answer)
    if a is None or b is None or _heavy(a) or _heavy(b):
        return False
    numbers = _constant(a), _constant(b)
    if any(numbers):
        return all(numbers) and _same_constant(a, b)
    from math_verify import verify

    # Its timeouts are signals, which only a main thread can have.
    return bool(verify(a, b, timeout_seconds=None, allow_set_relation_comp=True))


def _without_unit(text: str) -> tuple[str, str]:
    """An expression without the words behind it, and its unit of measure."""
    match = re.fullmatch(
        r"(.*?[\d})!a-zA-Z])(?<![a-zA-Z\\](?=\S))"
        r"(\s*(?:[a-zA-Z]{2,}|°|%|[mgls]\b)[a-zA-Z /]*(?:\^\{?[23]\}?)?)",
        text,
    )
    if match is None or not re.search(r"[\d\\]", match.group(1)):
        return text, ""
    unit = _unit(match.group(2))
    return (text, "") if unit is None else (match.group(1).strip(), unit)


def _readable(text: str) -> bool:
    macros = re.findall(r"\\([a-zA-Z]+|.)", text)
    if any(m not in _KNOWN and m not in "{}|" for m in macros) or "**" in text:
        return False
    if "binom" in macros and re.search(r"\d{4}", text):
        return False
    if re.search(r"\d{40}", text) or text.count("^") > 12 or text.count("!") > 2:
        return False
    depth = deepest = 0
    for char in text:
        depth += {"{": 1, "(": 1, "[": 1, "}": -1, ")": -1, "]": -1}.get(char, 0)
        deepest = max(deepest, depth)
    return deepest <= 12


def _parsed(text: str) -> Any:
    """A text as sympy's expression, unevaluated; None if it cannot be read."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # It warns once of timeouts that are off; here sizes are bounded instead.
    logging.getLogger("math_verify.parser").setLevel(logging.ERROR)
    logging.getLogger("math_verify.grader").setLevel(logging.ERROR)
    # Its own units are "c", "ab" and the like.
    reading = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    found = parse(
        f"${text}$",
        [LatexExtractionConfig(normalization_config=reading)],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return found[0] if found else None


def _heavy(expression: Any) -> bool:
    """Whether an expression may take long to evaluate: many operations, large powers, factorials."""
    import sympy

    if not isinstance(expression, sympy.Basic):
        return False
    nodes = itertools.islice(sympy.preorder_traversal(expression), _NODES + 1)
    if sum(1 for _ in nodes) > _NODES:
        return True
    return _digits_of(expression) > (_DEGREE if expression.free_symbols else _DIGITS)


def _digits_of(expression: Any) -> float:
    """A bound on the decimal logarithm of a value, on whose size the time to find it depends."""
    import sympy

    if isinstance(expression, sympy.Rational):
        return math.log10(max(abs(expression.p), expression.q))
    if not expression.args:
        return 0.5
    sizes = [_digits_of(x) for x in expression.args]
    largest = max(sizes)
    if isinstance(expression, sympy.Pow):
        base, exponent = sizes
        return max(base, 0.3) * 10**exponent if exponent < 5 else math.inf
    if isinstance(expression, (sympy.factorial, sympy.binomial)):
        return 10**largest * max(largest, 1) if largest < 5 else math.inf
    return sum(sizes) if isinstance(expression, sympy.Mul) else largest + math.log10(len(sizes))


def _constant(expression: Any) -> bool:
    import sympy

    return isinstance(expression, sympy.Expr) and not expression.free_symbols


def _same_constant(right: Any, given: Any) -> bool:
    """Two numbers, to 30 digits; where one is a decimal, as ``TOLERANCE`` says."""
    import sympy

    try:
        a, b = (sympy.N(x.doit(), 50, maxn=200) for x in (right, given))
        if not (a.is_finite and b.is_finite):
            return bool(a == b and a in (sympy.oo, -sympy.oo))
        floats = right.atoms(sympy.Float) | given.atoms(sympy.Float)
        digits = max((len(str(f).partition(".")[2]) for f in floats), default=_ROUNDED_DIGITS)
        near = 1e-8 if floats and digits >= _ROUNDED_DIGITS else 1e-13 if floats else 1e-30
        return bool(
            abs(a - b) <= near * min(abs(a), 1) if near == 1e-8 else abs(a - b) <= near * abs(a)
        )
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        return False
