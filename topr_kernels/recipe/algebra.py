"""Whether two expressions have the same value, by math-verify, within bounds of size and time."""

from __future__ import annotations

import itertools
import logging
import math
import re
from typing import Any

from topr_kernels.recipe.quantities import ROUNDED_DIGITS

# Macros that are quick to evaluate. Sums, limits and integrals are not final answers.
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


def has_words(text: str) -> bool:
    """Whether a text contains words, which math-verify would read as products of letters."""
    return bool(re.search(r"(?<![\\a-zA-Z])(?:[^\W\d_]{3,}|(?:no|yes)$)", text, re.IGNORECASE))


def same_algebra(gold: str, answer: str) -> bool:
    """Whether two expressions are equal; False where one cannot be read or would take long."""
    # A number with a base, "x2" and a ratio are not compared as algebra.
    if any(not _readable(t) or re.search(r"\d_|[A-Za-z]\d|\d\s+\d|:", t) for t in (gold, answer)):
        return False
    a, b = _parsed(gold), _parsed(answer)
    if a is None or b is None or _heavy(a) or _heavy(b):
        return False
    numbers = _constant(a), _constant(b)
    if any(numbers):
        return all(numbers) and _same_constant(a, b)
    from math_verify import verify

    # Without its timeouts: they are signals, which work only in the main thread.
    return bool(verify(a, b, timeout_seconds=None, allow_set_relation_comp=True))


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

    # Silences its warning that timeouts are off; sizes are bounded here instead.
    logging.getLogger("math_verify.parser").setLevel(logging.ERROR)
    logging.getLogger("math_verify.grader").setLevel(logging.ERROR)
    # Without its removal of units, which would remove letters such as "c" too.
    reading = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    expressions = parse(
        f"${text}$",
        [LatexExtractionConfig(normalization_config=reading)],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return expressions[0] if expressions else None


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
    """A bound on the number of decimal digits of a value, on which the time to compute it depends."""
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
        digits = max((len(str(f).partition(".")[2]) for f in floats), default=ROUNDED_DIGITS)
        near = 1e-8 if floats and digits >= ROUNDED_DIGITS else 1e-13 if floats else 1e-30
        return bool(
            abs(a - b) <= near * min(abs(a), 1) if near == 1e-8 else abs(a - b) <= near * abs(a)
        )
    except (TypeError, ValueError, ArithmeticError, AttributeError):
        return False
