r"""The written forms of one answer: canonical text, exact numbers, units, the parts of a list, names.

canonical(r"\dfrac 12") -> r"\frac{1}{2}"     number("4.4e7") -> Fraction(44000000)
split_unit(r"5\text{ cm}") -> ("5", "cm")     parts("1, (2, 3)") -> ["1", "(2, 3)"]     is_name("P(X>2)") -> True
"""

from __future__ import annotations

import re
from fractions import Fraction

_LATEX = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ",
    "²": "^2", "³": "^3", "°": r"^\circ ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "→": r"\to ", "±": r"\pm ",
    "≈": r"\approx ", "∈": r"\in ", "½": r"\frac{1}{2}", "、": ",", "\u3000": " ", "\u00a0": " ",
    "\u200b": "", "\0": "",
}  # fmt: skip
# Full-width forms lie at a fixed distance from ASCII. NFKC would also turn x² into x2.
_CHARACTERS = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)} | {ord(c): t for c, t in _LATEX.items()}
# One argument of a TeX command: a group, a root, a symbol or a single character.
_GROUP = r"\{(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*\}"
_ARGUMENT = rf" *({_GROUP}|\\sqrt *{_GROUP}|\\(?!frac|sqrt|text)[a-zA-Z]+(?![a-zA-Z])|[0-9a-zA-Z])"
_FRACTION = re.compile(rf"\\frac(?![a-zA-Z]){_ARGUMENT}{_ARGUMENT}")
_TEXT = r"\\(?:mbox|mathrm|textbf|mathbf|textrm|textit|mathit|operatorname|mathsf|textsf|text) *\{"
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?", ""),
        (r"\\(?:display|text)style(?![a-zA-Z])", ""),
        (r"\\(?:bf|it|rm|sf)(?![a-zA-Z]) *", ""),
        (r"(?<![a-zA-Z.\\])np\.(?=[a-z])", r"\\"),  # numpy's functions, in Minerva's answers
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"√ *([0-9]+|[a-zA-Z])", r"\\sqrt{\1}"),
        (r"\\mathrm *\{ *([ie]) *\}", r"\1"),
        (r"\\(?:boldsymbol|bm) *\{([^{}]*)\}", r"\1"),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset"),
        (r"\\begin *\{array\} *\{[clr| ]*\}", r"\\begin{matrix}"),
        (r"\\end *\{array\}", r"\\end{matrix}"),
        (_TEXT, r"\\text{"),
        (r"\\(?:text|underline) *\{ *([-+0-9.,/]+) *\}", r"\1"),
        (r"\\text\{ *([-+]?[0-9.,/]+) +([A-Za-z]+(?: [A-Za-z]+){0,3}) *\}", r"\1\\text{ \2}"),
        (r"\\geqslant|\\ge(?![a-zA-Z])", r"\\geq"),
        (r"\\leqslant|\\le(?![a-zA-Z])", r"\\leq"),
        (r"\\not *=|\\ne(?![a-zA-Z])", r"\\neq"),
        (r"\^ *(?:\{ *\\circ *\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])", r"^\\circ "),
        (r"\*\*", "^"),
        (r"\{,\}|, *\\! *", ","),
        (r"\$ *, *\$", ", "),
        (r"(?<![\\])\$", ""),  # what $...$ sets off in the middle; \$ is a dollar
        (r"(?<=[0-9])(?:\\[,;:! ]|~| )(?=[0-9]{3}(?![0-9]))", ""),
        (r"(?<!\\)\\[,;:! ]|\\q?quad(?![a-zA-Z])|~", " "),
        (r"\\sqrt *((?:\[[^][]*\])?) *([0-9a-zA-Z]|\\[a-zA-Z]+(?![a-zA-Z]| *\{))", r"\\sqrt\1{\2}"),
        (r"([_^]) *\{ *([0-9a-zA-Z]) *\}", r"\1\2"),
        (r"\s+", " "),
    )
]
_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(rf"({_DECIMAL})(?:[eE]([-+]?[0-9]{{1,3}}))?")
_POWER_OF_TEN = re.compile(
    rf"(?:({_DECIMAL})(?:\\times|\\cdot|\*|x))?10\^(?:\{{([-+]?[0-9]{{1,3}})\}}|([-+]?[0-9]{{1,3}}))"
)
_RATIO = re.compile(rf"\\frac\{{(-?{_DECIMAL})\}}\{{(-?{_DECIMAL})\}}|({_DECIMAL})/({_DECIMAL})")
_MIXED = re.compile(r"([0-9]+)\\frac\{([0-9]+)\}\{([0-9]+)\}")
TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")  # of an angle that has a unit of its own
_WORDS = r"[A-Za-z]+(?:[ -][A-Za-z]+){0,3}"
_POWER = r"(?:\^\{?-?[0-9]\}?)?"
_TEXT_UNIT = re.compile(
    rf"(.+?)((?:(?:[ */]|\\cdot)*\\text\{{[ ]*[A-Za-z](?:[A-Za-z0-9 ./^-]|\{{-?[0-9]\}})*\}}{_POWER})+)\.?"
)
_PLAIN_UNIT = re.compile(
    rf"(-?[0-9.,/]*[0-9.](?:e[-+]?[0-9]+)?|.*(?:\}}|\\pi)(?= )) ?({_WORDS}{_POWER}(?:/{_WORDS}{_POWER})?)\.?"
)
# Written as plain letters, anything shorter than a word is a product of variables, unless it is one of these.
_SYMBOLS = {"m", "s", "g", "kg", "h", "cm", "km", "mol", "N", "J", "W", "V", "C", "K", "L"}  # of m/s^2 and its like
_SHORT_UNITS = {
    "cm", "mm", "km", "kg", "mg", "ml", "min", "sec", "deg", "ft", "in", "mph", "hr", "hrs", "rad", "mol", "day", "h",
    "s", "lb", "lbs", "oz", "ton", "per", "of", "old", "man", "men", "boy", "kid", "dog", "cat", "cow", "pig", "hen",
    "egg", "pie", "bag", "box", "jar", "cup", "pen", "toy", "hat", "car", "bus", "row", "way",
}  # fmt: skip
_UNITS = {
    "degree": "^\\circ", "degrees": "^\\circ", "deg": "^\\circ", "percent": "%", "dollar": "$", "dollars": "$",
    "usd": "$", "cent": "cent", "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "meter": "m", "metre": "m",
    "kilometer": "km", "kilometre": "km", "gram": "g", "kilogram": "kg", "second": "s", "sec": "s", "minute": "min",
    "hour": "h", "hr": "h", "inche": "inch", "in": "inch", "feet": "foot", "ft": "foot", "square": "", "sq": "",
    "unit": "", "cubic": "", "liter": "L", "litre": "L", "radian": "rad", "mile": "mi",
}  # fmt: skip
# Words that make of a number another one, or none: hedges, negations, multipliers, names of functions.
_NO_UNIT = {
    "or", "and", "not", "no", "nor", "isn", "never", "is", "are", "be", "if", "else", "but", "maybe", "perhaps",
    "about", "approximately", "roughly", "around", "over", "under", "more", "less", "than", "at", "least", "most",
    "up", "to", "plus", "minus", "times", "divided", "by", "half", "double", "twice", "thousand", "million",
    "billion", "trillion", "hundred", "dozen", "k", "pi", "sqrt", "log", "ln", "exp", "e", "i", "sin", "cos", "tan",
    "cot", "sec", "csc", "arcsin", "arccos", "arctan", "mod", "modulo", "base", "wrong", "incorrect", "false",
    "unless", "except", "instead", "alternatively", "possibly", "versus", "vs", "impossible", "rejected",
}  # fmt: skip

# What may stand in front of an answer: m + n = ..., \angle ABC = ..., \frac{BD}{DC} = ..., (x,y) = ..., and with what
# _SCRIPT takes away P(X>2) = ..., a^2 + b^2 = ... No number stands free in it: x + 1 = 7 is another answer than 7.
_SYMBOL = (
    r"\\(?:alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|varphi|chi"
    r"|psi|omega|Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega|ell|max|min|gcd|det|deg|dim)(?![a-zA-Z])"
    r"|(?<![\\a-zA-Z])[a-zA-Z]+"
)
_NAMING = re.compile(
    rf"[0-9]*(?:{_SYMBOL})[0-9]*|[-+*/|,(){{}}\[\] ]"
    r"|\\(?:frac|sqrt|text|mathbb|angle|triangle|overline|vec|cdot|times|mid|cap|cup|log|ln|sin|cos|tan|cot)(?![a-zA-Z])"
)
_SCRIPT = re.compile(r"'|[_^] ?(?:\\?[a-zA-Z]+|[0-9]|\{[^{}]*\})|(?<=[a-zA-Z}'])(?:\([^()]*\)|\[[^][]*\])")
# Words that make of a named quantity another one, or say what it is not; symbols and the names of functions are none.
_DENIED = re.compile(
    r"^-|\b(?:not?|nor|never|neither|cannot|without|isn|wrong|incorrect|false|if|unless|except|but|instead"
    r"|maybe|perhaps|approximately|roughly|than|at least|at most|plus|minus|half|double|twice)\b"
)


def canonical(text: str) -> str:
    """The text with one spelling for each form: ASCII, LaTeX's short and long commands, spacing."""
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _FRACTION.sub(_braced, text)
    return text.strip().removesuffix(".").rstrip()


def _braced(fraction: re.Match) -> str:
    r"""\frac with braces around both of its arguments, and around those of the fractions in them."""
    over, under = (_FRACTION.sub(_braced, text[1:-1] if text[0] == "{" else text) for text in fraction.groups())
    return rf"\frac{{{over}}}{{{under}}}"


def squeeze(text: str) -> str:
    """Without spaces, but for those between two digits: 3 4 is not 34."""
    return re.sub(r"(?<![0-9]) +| +(?![0-9])", "", text)


def comparable(text: str) -> str:
    r"""One text for the ways to write an answer, as far as no mathematics is needed: \dfrac12, 0.5 and x = .50 are 1/2.

    A unit goes, as the verifier lets it, but for %; so does the order of a list. A text of more than 1000 characters is
    a program or a ramble, and stays as it is.
    """
    if len(text) > 1000:
        return text
    name, *rest = cut(canonical(text), "=")
    text = rest[0] if len(rest) == 1 and is_name(name) else "=".join([name, *rest])
    bare, unit = split_unit(text)
    text = text if unit == "%" else bare
    if (value := number(text)) is not None:
        return str(value)
    items = parts(text)
    return squeeze(text) if len(items) < 2 else ",".join(sorted(map(comparable, items)))


def number(text: str) -> Fraction | None:
    r"""The exact value of 025, 70.0, 12,000, 4.4e7, 2\times 10^{-3}, 1/3, \frac{1}{3}, 1\frac{1}{3}; else None.

    81, 256 is None too: with a space it is a list.
    """
    if ", " in text:
        return None
    text = squeeze(text)
    while text.startswith("{") and text.endswith("}") and text.count("{") == 1:
        text = text[1:-1]
    sign = -1 if text.startswith("-") else 1
    text = text[1:] if text[:1] in ("-", "+") else text
    if match := _NUMBER.fullmatch(text):
        return sign * _decimal(match[1]) * Fraction(10) ** int(match[2] or 0)
    if match := _POWER_OF_TEN.fullmatch(text):
        return sign * _decimal(match[1] or "1") * Fraction(10) ** int(match[2] or match[3])
    if match := _RATIO.fullmatch(text):
        below = _decimal(match[2] or match[4])
        return sign * _decimal(match[1] or match[3]) / below if below else None
    if (match := _MIXED.fullmatch(text)) and int(match[3]):
        return sign * (int(match[1]) + Fraction(int(match[2]), int(match[3])))
    return None


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def split_unit(text: str) -> tuple[str, str]:
    r"""(value, unit) of canonical text: 5\text{ cm} -> 5, cm; 90^\circ; \$36; 8\%; 34 apples. No unit is ""."""
    text = text.strip()
    for sign in (r"\$", "€", "£"):
        if text.startswith(sign):
            return split_unit(text[len(sign) :])[0], sign[-1]  # of $15 per hour the amount
    for mark, unit in ((r"\%", "%"), ("%", "%"), (r"^\circ", "^\\circ"), (r"\$", "$")):
        if text.endswith(mark) and len(text) > len(mark) and not (mark == r"^\circ" and TRIGONOMETRIC.search(text)):
            return text[: -len(mark)].strip(), unit
    if match := _TEXT_UNIT.fullmatch(text) or _PLAIN_UNIT.fullmatch(text):
        words = re.findall(r"[A-Za-z]+", match[2].replace(r"\text", "").replace(r"\cdot", ""))
        is_word = r"\text" in match[2] or all(len(word) > 3 or word.lower() in _SHORT_UNITS for word in words)
        is_word |= "/" in match[2] and _SYMBOLS.issuperset(words)
        is_said = _NO_UNIT & {word if word == "K" else word.lower() for word in words} or re.search(" [0-9]", match[2])
        if is_word and len(words) <= 4 and not is_said and _is_value(match[1]):
            return match[1].strip(), _unit(match[2])
    return text, ""


def is_number(text: str) -> bool:
    """Whether the text is one number, with a unit or without: 1,027 is no list."""
    return number(split_unit(text)[0]) is not None


def is_name(text: str) -> bool:
    """Whether the text names a quantity: it holds a letter, and nothing that is an answer of its own."""
    bare = _SCRIPT.sub("", text)
    if _NAMING.sub("", bare) or _DENIED.search(bare) or "n't" in text or is_number(text):
        return False
    symbols = set(re.findall(_SYMBOL, bare))
    return bool(symbols - {"e", "i"}) or text in symbols  # e may be an eccentricity, but e^2 and 2i are numbers


def _is_value(text: str) -> bool:
    """Whether a unit may follow: a number, or an expression that does not end in the middle."""
    return number(text) is not None or bool(re.search(r"[0-9a-zA-Z})]$", text.strip()) and "\\text" not in text)


def _unit(text: str) -> str:
    """One spelling of a unit: singular, short, cm^2 for square centimetres."""
    power = re.search(r"\^\{?(-?[0-9])\}?", text)
    words = re.findall(r"[A-Za-z]+|/", re.sub(r"\\text|\\cdot|\^\{?-?[0-9]\}?", "", text))
    square = {"square": "2", "sq": "2", "cubic": "3"}
    exponent = power[1] if power else next((square[word] for word in words if word in square), "")
    if words == ["mph"]:
        words = ["mi", "/", "h"]
    names = [_UNITS.get(word, _UNITS.get(word.lower(), _singular(word))) for word in words]
    name = "".join(_UNITS.get(word, word) for word in names)
    return f"{name}^{exponent}" if exponent and name else name


def _singular(word: str) -> str:
    return word.lower().removesuffix("s") if len(word) > 3 else word


def parts(text: str) -> list[str]:
    """The text cut at its commas, semicolons, "and" and "or", outside of every bracket."""
    text = re.sub(r"\\text\{[ ,]*(?:and|or)[ ,]*\}|\\(?:lor|vee)(?![a-zA-Z])|\b(?:and|or)\b", ",", text)
    return [part for part in cut(text, ",;") if part]


def cut(text: str, separators: str) -> list[str]:
    """The text cut at each of the characters, where it stands outside of every bracket."""
    pieces, depth, start = [], 0, 0
    for index, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char in separators and depth <= 0:
            pieces.append(text[start:index].strip())
            start = index + 1
    return [*pieces, text[start:].strip()]


def is_balanced(text: str) -> bool:
    """Whether every brace of the text has its partner, so that the text can stand inside braces."""
    depth = 0
    for brace in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return False
    return depth == 0
