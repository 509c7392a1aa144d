"""Numbers with units: the exact value of a text, and its unit."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

#: A decimal with at least ``ROUNDED_DIGITS`` digits after the point stands for a value this near,
#: absolute and relative to the right one. 1.414 is not the root of 2, 1.4142135624 is.
TOLERANCE = Fraction(1, 10**8)
ROUNDED_DIGITS = 9
_LONGEST_NUMBER = 100


class Quantity(NamedTuple):
    """A number and its unit.

    Args:
        value: the number, exact.
        unit: "%", or the one name of a unit of measure or money; "" for none, or for another noun.
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
    rf"|(?P<mixed>{_WHOLE})(?:\s+(?:and\s+)?(?P<a>\d+)\s*/\s*(?P<b>\d+)"
    r"|\s*(?:\+\s*)?\\frac\s*\{\s*(?P<c>\d+)\s*\}\s*\{\s*(?P<d>\d+)\s*\}|\s+and (?P<half>a half))"
    rf"|\\frac\s*\{{\s*(?P<e>-?{_DECIMAL})\s*\}}\s*\{{\s*(?P<f>-?{_DECIMAL})\s*\}}"
    rf"|(?P<g>{_DECIMAL})(?:\s*/\s*|\s+out of\s+)(?P<h>{_DECIMAL})"
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
    **{"seventh": Fraction(1, 7), "ninth": Fraction(1, 9), "twelfth": Fraction(1, 12)},
    **{"sixteenth": Fraction(1, 16), "twentieth": Fraction(1, 20)},
    **{"halve": Fraction(1, 2), "eighth": Fraction(1, 8), "thousandth": Fraction(1, 1000)},
}
_SCALE = re.compile(
    rf"\s*-?({'|'.join(sorted(_SCALES, key=len, reverse=True))})s?(?![a-zA-Z])", re.I
)
# Units apart by commas, the names of a unit by spaces; its first name is the one that is used.
_UNIT_NAMES = (
    "m meter metre,cm centimeter centimetre,mm millimeter millimetre,km kilometer kilometre",
    "in inch inche,ft foot feet,yd yard,mi mile,g gram gm,kg kilogram kilo,mg milligram",
    "lb,oz ounce,t ton tonne,l liter litre,ml milliliter millilitre,gal gallon",
    "s second sec,min minute,h hour hr,day,week wk,month mo,year yr,ms millisecond",
    "dollar usd ¤ us¤ buck,euro eur €,pound gbp £,cent ¢ penny pence,yen jpy ¥,rupee inr ₹ rs",
    "ruble rouble ₽,won ₩,lira ₺,yuan rmb cny,peso,franc chf",
    "° degree deg,°c celsius,°f fahrenheit,rad radian,% percent pct percentage",
    "newton,joule,watt,volt,hz hertz,acre,hectare ha,mi/h mph,km/h kph kmh kmph,cal calorie",
)
_UNITS = {
    name: unit.split()[0]
    for line in _UNIT_NAMES
    for unit in line.split(",")
    for name in unit.split()
}
# Units of one kind, each with the number of those before it that it holds; so 1.5 h are 90 min.
_KINDS = (
    "ms s:1000 min:60 h:60 day:24 week:7,month year:12,mm cm:10 m:100 km:1000,in ft:12 yd:3 mi:1760,"
    "mg g:1000 kg:1000 t:1000,oz lb:16,ml l:1000"
)
_SIZES: dict[str, tuple[str, int]] = {}
for _kind in _KINDS.split(","):
    _size, _smallest = 1, _kind.split()[0]
    for _entry in _kind.split():
        _name, _, _holds = _entry.partition(":")
        _size *= int(_holds or 1)
        _SIZES[_name] = _smallest, _size
# "1 hour, 30 minutes and 5 seconds"
_SEVERAL = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\.?(?:,?\s*(?:and\s+)?(?=\d)|$)")
# Words that change the value of the number before them, or join another number to it.
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
    """A normalised text (``plain``) as a number with a unit; None for anything else."""
    text = _CENTS.sub(lambda m: f"{m.group(1)}.{int(m.group(2)):02} dollars", _in_digits(text))
    text = _summed(text)
    match = _NUMBER.fullmatch(text)
    if match is None or sum(map(str.isdigit, text)) > _LONGEST_NUMBER:
        return None
    groups = match.groupdict()
    if groups["sign"] and groups["inner"]:
        return None
    try:
        value = _value(groups)
    except ZeroDivisionError:
        return None
    rest = groups["rest"]
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
    if groups["money"]:
        money = _UNITS.get(groups["money"].lower().rstrip("."), "")
        unit = f"{money}{unit}" if unit.startswith("/") else money
    negative = "".join(filter(None, (groups["sign"], groups["inner"]))).strip() not in ("", "+")
    decimal = (groups["decimal"] or "").partition(".")[2]
    return Quantity(-value if negative else value, unit, len(decimal))


def in_smallest(given: Quantity) -> Quantity:
    """A quantity in the smallest unit of its kind: 2 km/h in mm/s."""
    value, names = given.value, []
    for i, part in enumerate(given.unit.split("/")):
        name, _, power = part.partition("^")
        smallest, size = _SIZES.get(name, (name, 1))
        factor = Fraction(size ** int(power or 1))
        value = value / factor if i else value * factor
        names.append(f"{smallest}^{power}" if power else smallest)
    return given._replace(value=value, unit="/".join(names))


def _summed(text: str) -> str:
    """Numbers with units of one kind, from the largest to the smallest, as one in the last of them."""
    pairs = [(m.group(1), m.group(2).lower()) for m in _SEVERAL.finditer(text)]
    if len(pairs) < 2 or _SEVERAL.sub("", text).strip():
        return text
    names = [_UNITS.get(word) or _UNITS.get(word.rstrip("s"), "") for _, word in pairs]
    # "2h 30m"
    names = ["min" if n == "m" and names[0] == "h" else n for n in names]
    sizes = [_SIZES.get(name, ("", 0)) for name in names]
    kinds, sizes_of = {kind for kind, _ in sizes}, [size for _, size in sizes]
    if len(kinds) > 1 or "" in kinds or sizes_of != sorted(set(sizes_of), reverse=True):
        return text
    # "2 m, 50 cm" may be two answers, "1 hour, 30 minutes" is one.
    if kinds != {_SIZES["s"][0]} and re.search(r",(?!\s*and\b)", text):
        return text
    each = (Fraction(x) * size for (x, _), size in zip(pairs, sizes_of, strict=True))
    total = sum(each, Fraction(0)) / sizes_of[-1]
    return f"{total.numerator}/{total.denominator} {names[-1]}"


def _value(groups: dict[str, str | None]) -> Fraction:
    def number(name: str) -> Fraction:
        return Fraction((groups[name] or "0").replace(",", "").replace(" ", "").rstrip("."))

    if groups["repeated"]:
        whole, _, start = groups["repeated"].partition(".")
        period = groups["period"] or "0"
        tail = Fraction(int(period), 10 ** len(start) * (10 ** len(period) - 1))
        return Fraction(f"{whole or 0}.{start or 0}") + tail
    if groups["mixed"]:
        part = Fraction(1, 2) if groups["half"] else Fraction(0)
        if groups["a"]:
            part = number("a") / number("b")
        elif groups["c"]:
            part = number("c") / number("d")
        return number("mixed") + part
    for above, below in (("e", "f"), ("g", "h")):
        if groups[above]:
            return number(above) / number(below)
    power = re.search(r"[+-]?\d{1,3}(?=\W*$)", groups["power"] or "0")
    return number("decimal") * Fraction(10) ** int(power.group() if power else 0)


def _unit(rest: str) -> str | None:
    """The unit in the text behind a number; "" for another noun, None if the text is neither."""
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
    # Another noun, which the question names and answers may leave out.
    return ""


def _measure(words: str) -> str | None:
    """Units of measure by their first names, as "km/h" or "cm^2"; None for other words."""
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
    text = re.sub(r"^(?:an? )?half an? ", "1/2 ", text, flags=re.IGNORECASE)
    text = re.sub(r"^(?:an? (?=third|quarter|fifth)|an? (?=half)|(?=half))(\w+)$", r"1 \1", text)
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
            if text[length:].lower().startswith(" a half"):
                break
            return text
        else:
            break
        used, end, last, joined = used + 1, length, word, False
    return f"{total + part}{text[end:]}" if used else text


def near(right: Fraction, given: Fraction, digits: int) -> bool:
    """Whether two values are equal; within ``TOLERANCE`` if one is a decimal of that many digits."""
    if digits < ROUNDED_DIGITS or right.denominator == given.denominator == 1:
        return right == given
    return abs(right - given) <= min(TOLERANCE, TOLERANCE * abs(right))


def without_unit(text: str) -> tuple[str, str]:
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
