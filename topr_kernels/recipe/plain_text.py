"""Normalises how an answer is written: digits, signs, and LaTeX that changes only its looks."""

from __future__ import annotations

import re
import unicodedata

# Levels of nested words, as in \text{\textbf{...}}.
_DEEPEST = 5


#: Longer answers are compared as texts alone.
LONGEST_ANSWER = 400
_SYMBOLS = {
    **dict.fromkeys("−‒–—﹣－", "-"),
    **dict.fromkeys("“”„«»″`", ""),
    **dict.fromkeys("’‘′", "'"),
    **{"⁄": "/", "÷": "/", "∕": "/", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot "},
    **{"π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm "},
    **{"∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ", "≈": r"\approx "},
    **{"ℝ": r"\mathbb{R}", "θ": r"\theta ", "º": "°", "∓": r"\mp "},
}
# Signs of units, which Unicode counts among pictures.
_SIGNS = "°℃℉"
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
    (re.compile(r"\\(?:[dtcs]|nice)frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}"), r"\\frac{\1}{\2}"),
    (re.compile(r"\^\s*\{?\s*(?:\\circ|\\degree)\s*\}?|\\degree(?![a-zA-Z])|\\textdegree"), "°"),
    (re.compile(r"\\(?:frac)\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\s*\{[^{}]*\})\s*(\d)"), r"\1{\2}"),
    (re.compile(r"\\sqrt\s*(\d|[a-z](?![a-z]))"), r"\\sqrt{\1}"),
    (re.compile(r"\\leq?(?:slant)?(?![a-zA-Z])"), r"\\le "),
    (re.compile(r"\\geq?(?:slant)?(?![a-zA-Z])"), r"\\ge "),
    (re.compile(r"\\neq?(?![a-zA-Z])|\\not\s*="), r"\\ne "),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
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
    r"boxed|fbox|framebox|emph|underline|bm|boldsymbol)\s*\{([^{}]*)\}"
)
_HEDGES = re.compile(
    r"(?:(?:[→⇒➜]|an?(?=\s+[¤\d])|it|answer|"
    r"approximately|approx\.?|about|around|roughly|nearly|exactly|simply|just|only|equal to|"
    r"equals|a total of|found to be|given by|probably|likely|still|the|number|therefore|thus|hence|so|"
    r"indeed|actually|then|clearly|now|\\approx|\\boldsymbol|=|is|i\.e\.)(?![a-zA-Z])[\s,:]*)+",
    re.IGNORECASE,
)


def plain(text: str) -> str:
    """A text in one line, with ASCII digits and signs, without LaTeX that changes only its looks."""
    if len(text) > 5 * LONGEST_ANSWER:
        return " ".join(text.split())
    text = _VULGAR.sub(lambda m: f" {unicodedata.normalize('NFKC', m.group())}", text)
    text = _SUPERSCRIPT.sub(lambda m: f"^{{{unicodedata.normalize('NFKC', m.group())}}}", text)
    text = _SUBSCRIPT.sub(lambda m: f"_{{{unicodedata.normalize('NFKC', m.group())}}}", text)
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m.group(1) or m.group(2)}}}", text)
    # Dollars that are money, so that those left are LaTeX's.
    text = re.sub(r"\b(?:US|CA|AU|NZ|HK)\s?\\?\$|\\\$", "¤", text).replace(r"\%", "%")
    text = text.replace("$", "¤", 1) if starts_with_money(text) else text
    text = "".join(_SYMBOLS.get(c, c) for c in text)
    text = unicodedata.normalize("NFKC", text)
    text = "".join(_digit(_SYMBOLS.get(c, c)) for c in text if not _is_picture(c))
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
    return without_outer_braces(text)


def starts_with_money(text: str) -> bool:
    """Whether the first ``$`` of a text is a dollar: it has no partner and a number follows."""
    return text.count("$") % 2 == 1 and bool(re.match(r"[^\w$]*\$\s?\.?\d", text))


def _is_picture(char: str) -> bool:
    """Whether a character is an emoji, a check mark and the like."""
    return (char not in _SIGNS and unicodedata.category(char) == "So") or char in "\ufe0f\u200d"


def _digit(char: str) -> str:
    return str(unicodedata.decimal(char)) if len(char) == 1 and char.isdecimal() else char


def without_outer_braces(text: str) -> str:
    """A text without the braces around all of it."""
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
