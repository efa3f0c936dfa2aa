r"""Mathematics: one final answer, compared part by part: exactly where both sides are numbers, else by math-verify.

verify(r"so it is \boxed{0.5}", r"\frac{1}{2}") -> Verdict(1.0, "ok", extracted="0.5")

Lists and sets are compared as such, tuples and intervals with their order and brackets, and only single expressions
reach math-verify, by way of its LaTeX grammar alone: its plain-expression extraction hands text to sympy's parser,
which evaluates Python. An answer that leaves work to the verifier (an integral, a sum, an inequality to solve, a tower
of powers) is not one.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import verify as equivalent

from megatron_rlvr.verdict import Verdict
from megatron_rlvr.verifiers import answer_forms as forms
from megatron_rlvr.verifiers.answer_text import final_answer, read_gold

ISOLATED = True  # sympy may take forever on a short expression
read_answer = read_gold

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are off; the pool has one

_GRAMMAR = ConversionConfig(lowercase_symbols=False)  # m and M are two things
_LONGEST = 1000  # characters; the gold answers of the common benchmarks stay under 210
_DEEPEST = 12  # braces within braces
_PARTS = 64  # of a list
_NAME = re.compile(
    r"\\frac\{d ?[A-Za-z]\}\{d ?[a-z]\}|\\?[A-Za-z]+'?(?:_(?:\w|\{[^{}]*\}))?(?:\([a-zA-Z](?:, ?[a-zA-Z])*\))?"
    r"|\\angle [A-Z _0-9]+"
)
_MEMBER = re.compile(r"^\(?[a-zA-Z]\)? *\\in(?![a-zA-Z]) *")
_REALS = re.compile(r"^(?:\\mathbb *(?:R|\{ *R *\})|ℝ)$")  # where they are the whole answer
_RELATIONS = re.compile(r"[<>]|\\(?:leq?|geq?|lt|gt)(?![a-zA-Z])")
_NEVER = re.compile(
    r"\\(?:neq|to|approx|sim|rightarrow|Rightarrow|implies|mapsto|longrightarrow|neg|lnot|land|iff|boxed)(?![a-zA-Z])"
)
_WORK = re.compile(
    r"\\(?:i*int|oint|sum|prod|lim|gcd|lcm|det|max|min|b?mod|pmod|deg)(?![a-zA-Z])|\\text\{(?:lcm|gcd|mod)\}|%"
    r"|\\(?:lfloor|lceil|binom|dbinom|tbinom)(?![a-zA-Z])|[vV]matrix|\\frac ?\{d\} ?\{ ?d ?[a-z]"
)
_TWO_NUMBERS = re.compile(r"(?<![_^])(?<!frac |inom )[0-9] +[0-9]")
# What takes sympy minutes: powers of powers, high powers of sums, factorials and binomials of large numbers.
_TOWER = re.compile(
    r"\^ *\{?[^{}^a-z,;]*[0-9)] *\^|\^ *\{[^{}]*\^ *\{[^{}]*\^|\^ *\{? *[0-9]{5,}|(?:[a-z)}]) *\^ *\{? *[0-9]{3,}"
    r"|[0-9]{5,} *!|! *\)* *!|\^[^a-z]*\) *!|\\binom *\{[^{}]*[0-9]{4,}"
)
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[a-z]*matrix\}|\\[a-zA-Z]+")
_DECIMAL = re.compile(r"([0-9]+)\.([0-9]+)")
_DEGREES = re.compile(r"([0-9]+(?:\.[0-9]+)?) *\^\\circ(?![a-zA-Z])")
_PROSE = re.compile(r"[A-Za-z]{4,}")


def verify(response: str, answer: str) -> Verdict:
    """Reward 1 where the final answer equals the gold one, else 0; unparseable where there is no readable answer."""
    text = final_answer(response)
    if not text:
        return Verdict(0.0, "unparseable", message=r"no closed \boxed{} and no 'Answer:' line after the thinking")
    if text == answer:
        return Verdict(1.0, "ok", extracted=text[:_LONGEST])
    given, gold = forms.canonical(text[: _LONGEST + 1]), forms.canonical(answer)
    if problem := _refusal(text, given, gold):
        return Verdict(0.0, "unparseable", extracted=text[:_LONGEST], message=problem)
    if _equal(gold, given):
        return Verdict(1.0, "ok", extracted=text)
    if not all(_is_readable(part) for part in forms.parts(given)):
        return Verdict(0.0, "unparseable", extracted=text, message="not a mathematical expression")
    return Verdict(0.0, "ok", extracted=text)


def _is_readable(text: str) -> bool:
    return any(
        forms.number(side) is not None or _words(side) or _parse(side) is not None
        for side in (text, forms.split_unit(text)[0], forms.cut(text, "=")[-1])
    )


def _refusal(text: str, given: str, gold: str) -> str:
    """Why a final answer is not compared at all, or ""."""
    if len(text) > _LONGEST:
        return f"an answer of {len(text)} characters, more than {_LONGEST}"
    if not given:
        return "empty"
    if not forms.is_balanced(given):
        return "braces that do not match"  # they could close the box that _parse puts around the text
    if forms.squeeze(given) == forms.squeeze(gold):
        return ""
    if _depth(given) > _DEEPEST or _TOWER.search(given) or len(forms.parts(given)) > _PARTS:
        return "too deep, too many parts, or a power or factorial too large to work out"
    if forms.number(given) is None and _TWO_NUMBERS.search(given):
        return "two numbers side by side"  # math-verify reads 35 34 as a sum
    return ""


def _depth(text: str) -> int:
    depth = deepest = 0
    for char in text:
        depth += (char in "{([") - (char in "})]")
        deepest = max(deepest, depth)
    return deepest


def _equal(gold: str, given: str) -> bool:
    """Whether two canonical texts are the same answer: list by list, bracket by bracket, then as expressions."""
    if forms.squeeze(gold) == forms.squeeze(given):
        return True
    if _NEVER.search(forms.squeeze(given)) and not _NEVER.search(forms.squeeze(gold)):
        return False
    gold = _REALS.sub(r"(-\\infty, \\infty)", _MEMBER.sub("", gold))
    given = _unnamed(gold, _REALS.sub(r"(-\\infty, \\infty)", _MEMBER.sub("", given)))
    golds = [gold] if forms.is_number(gold) else forms.parts(gold)  # 1,027 is one number
    if len(golds) == 1 and forms.is_number(given):
        return _one_equal(gold, given)  # and so is 12,345
    said = forms.parts(given)
    joined = [set(re.findall(r"\b(?:and|or)\b", text)) for text in (gold, given)]
    if _are_ranges(golds) and _are_ranges(said) and all(joined) and joined[0] != joined[1]:
        return False
    if len(golds) == 1 and _are_ranges(said) and "and" not in joined[1]:
        golds = _pieces(gold)  # of a union, which ranges joined by "or" are too
    elif len(said) == 1 and _are_ranges(golds) and "and" not in joined[0]:
        said = _pieces(given)
    return _unordered(_spread(golds), _spread(said))


def _are_ranges(texts: list[str]) -> bool:
    """Whether the texts bound one name: x < 2 and x > 3, which with "or" is a union."""
    names = {_bounded(text) for text in texts}
    return len(names) == 1 and "" not in names


def _pieces(text: str) -> list[str]:
    return [piece.strip() for piece in re.split(r"\\cup(?![a-zA-Z])", text)]


def _unnamed(gold: str, given: str) -> str:
    """What stands behind a name and its "=", where the gold answer is no equation."""
    if "=" in gold or "=" not in given:
        return given
    name, *links = forms.cut(given, "=")
    return "=".join(links) if links and forms.is_name(name) else given


def _spread(items: list[str]) -> list[str]:
    r"""The parts of a list, a set without its braces, and both values of one that holds \pm."""
    if len(items) == 1 and items[0].startswith(r"\{") and items[0].endswith(r"\}"):
        items = forms.parts(items[0][2:-2])
    both = []
    for item in items:
        both += [item.replace(r"\pm", sign) for sign in "+-"] if item.count(r"\pm") == 1 else [item]
    return both


def _unordered(golds: list[str], given: list[str]) -> bool:
    """Whether each gold part has its own equal among the given ones, and none is left over."""
    if len(golds) != len(given):
        return False
    left = list(given)
    for gold in golds:
        match = next((item for item in left if _one_equal(gold, item)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _one_equal(gold: str, given: str) -> bool:
    """Two single answers: unions, tuples and intervals piece by piece, equations side by side, values with units."""
    given = _unnamed(gold, given)
    if forms.squeeze(gold) == forms.squeeze(given):
        return True
    if r"\cup" in gold or r"\cup" in given:
        return len(_pieces(gold)) > 1 and _unordered(_pieces(gold), _pieces(given))
    inside = [_inside(text) for text in (gold, given)]
    if inside[0] and inside[1]:
        same = len(inside[0][1]) == len(inside[1][1]) and inside[0][0] == inside[1][0]
        return same and all(_one_equal(a, b) for a, b in zip(inside[0][1], inside[1][1], strict=True))
    if (inside[0] and _bounded(given)) or (inside[1] and _RELATIONS.search(gold)):
        return _symbolic(gold, given)  # x > 2 for (2, \infty)
    if inside[0] or inside[1] or (given.startswith("[") and not gold.startswith("[")):
        return False
    if _RELATIONS.search(gold) or _RELATIONS.search(given):
        return bool(_RELATIONS.search(gold)) and _symbolic(gold, given)
    return _equations(gold, given)


def _bounded(text: str) -> str:
    r"""The name that the text puts between bounds: x in x > 2 or 1 < x \leq 3; "" for x^2 < 4, left to solve."""
    pieces = [piece.strip() for piece in _RELATIONS.split(text)]
    names = [piece for piece in pieces if _NAME.fullmatch(piece)]
    in_place = len(pieces) == 2 or (len(pieces) == 3 and bool(_NAME.fullmatch(pieces[1])))
    alone = len(names) == 1 and in_place and not any(names[0] in piece for piece in pieces if piece != names[0])
    return names[0] if alone else ""


def _inside(text: str) -> tuple[str, list[str]] | None:
    """(brackets, parts) of a tuple or an interval, which has two parts at least; None for anything else."""
    if len(text) < 2 or text[0] not in "([" or text[-1] not in ")]":
        return None
    items = forms.cut(text[1:-1], ",;")
    closes_early = any(len(forms.cut(item, "")) != 1 or _closes(item) for item in items)
    return (text[0] + text[-1], items) if len(items) > 1 and not closes_early else None


def _closes(text: str) -> bool:
    """Whether the text closes a bracket that it did not open, as in the middle of (1,2)(3,4)."""
    depth = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return True
    return False


def _equations(gold: str, given: str) -> bool:
    """x = 5 is 5, and a chain is right where each of its links is; other equations are compared as a whole."""
    golds, links = forms.cut(gold, "="), forms.cut(given, "=")
    if len(golds) == 2 and not _NAME.fullmatch(golds[0]):
        return len(links) == 2 and _same_equation(golds, links)
    if len(golds) > 2:
        return False  # _one_equal has compared them as text
    named = len(links) > 1 and forms.is_name(links[0])
    if named and len(golds) == 2 and forms.squeeze(golds[0]) != forms.squeeze(links[0]):
        return False
    if not named and len(links) == 2 and len(golds) == 2:
        return _same_equation(golds, links)
    return all(_value_equal(golds[-1], link) for link in links[named:])


def _same_equation(golds: list[str], links: list[str]) -> bool:
    """Whether two equations differ by a constant factor alone."""
    if any(r"\text" in link for link in links):
        return False
    sides = [_parse(side) for side in (*golds, *links)]
    return all(isinstance(side, sympy.Expr) for side in sides) and _by_sympy(_proportional, sides[:2], sides[2:])


def _proportional(gold: list[sympy.Expr], said: list[sympy.Expr]) -> bool:
    difference, other = gold[0] - gold[1], said[0] - said[1]
    ratio = sympy.simplify(other / difference) if difference != 0 else sympy.nan
    return bool(ratio.is_number and ratio.is_finite and ratio != 0)


def _value_equal(gold: str, given: str) -> bool:
    (value, unit), (wanted, wanted_unit) = forms.split_unit(given), forms.split_unit(gold)
    if unit and wanted_unit and unit != wanted_unit:
        return False
    exact, target = forms.number(value), forms.number(wanted)
    if exact is not None and target is not None:
        as_share = {("", "%"): Fraction(100), ("%", ""): Fraction(1, 100)}.get(
            (unit, wanted_unit), Fraction(1)
        )  # 0.625 is 62.5%
        return exact == target or exact * as_share == target
    if forms.squeeze(value) == forms.squeeze(wanted) or _words(value) == _words(wanted) != "":
        return True
    if ":" in value and ":" not in wanted:
        return False  # a ratio, which the grammar reads as a fraction
    if re.search("[0-9]_", value) or re.search("[0-9]_", wanted):
        return False  # numbers to a base are compared as text
    if r"\text" in value and r"\text" not in wanted:
        return False
    if _PROSE.search(_ENVIRONMENT.sub("", value)) or (_WORK.search(value) and not _WORK.search(wanted)):
        return False
    return _symbolic(wanted, value)


def _words(text: str) -> str:
    r"""The letters of an answer in words, \text{(C)} or east; "" where it holds anything else."""
    bare = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip().strip("()").strip()
    return bare.casefold() if re.fullmatch(r"[A-Z]|[A-Za-z][a-z]+(?: [A-Za-z][a-z]+)*", bare) else ""


def _symbolic(gold: str, given: str) -> bool:
    """Two texts as expressions, sets or relations: what only one of them is, the other is not."""
    expected, said = _parse(gold), _parse(given)
    if expected is None or said is None or isinstance(expected, sympy.Expr) != isinstance(said, sympy.Expr):
        return False
    return _by_sympy(_same_value, expected, said)


def _same_value(expected: Any, said: Any) -> bool:
    """By math-verify; two constants by their values before, because it rounds: 10^{-20} and 10^{-21} are one to it.

    An i that is the only symbol is the imaginary unit.
    """
    if isinstance(expected, sympy.Expr) and {str(name) for name in expected.free_symbols | said.free_symbols} == {"i"}:
        expected, said = (side.subs(sympy.Symbol("i"), sympy.I) for side in (expected, said))
    if isinstance(expected, sympy.Expr) and not (expected.free_symbols | said.free_symbols):
        value, difference = abs(sympy.N(expected, 30)), abs(sympy.N(expected - said, 30))
        if value.is_finite and difference.is_finite and difference > 1e-15 * value:
            return False
    return equivalent(expected, said, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True)


def _by_sympy(compare: Callable[[Any, Any], bool], gold: Any, said: Any) -> bool:
    r"""``compare(gold, said)``; False where sympy can make nothing of what the response says: (-3)!, \cot 0.

    Raises where it is the gold answer that sympy fails on.
    """
    try:
        return compare(gold, said)
    except (ArithmeticError, AttributeError, NotImplementedError, TypeError, ValueError):
        compare(gold, gold)
        return False


@functools.lru_cache(maxsize=1024)  # the G responses to a prompt share its gold answer, and often their own
def _parse(text: str) -> Any:
    """A sympy object by math-verify's LaTeX grammar; None where the grammar cannot read the whole text.

    math-verify's own ``parse`` goes on to the last piece that it can read, which makes a right answer of a wrong one.
    """
    exact = forms.number(text)
    if exact is not None:
        return sympy.Rational(exact.numerator, exact.denominator)
    if forms.TRIGONOMETRIC.search(text):
        text = _DEGREES.sub(r"(\\frac{\1 \\pi}{180})", text)
    latex = _DECIMAL.sub(lambda match: rf"\frac{{{match[1]}{match[2]}}}{{1{'0' * len(match[2])}}}", text)
    try:
        return latex2sympy(latex, normalization_config=None, conversion_config=_GRAMMAR)
    except Exception:  # the grammar raises bare Exceptions, and sympy its own, for text that is no mathematics
        return None
