"""Symbolic sizes in an exported program: held to a grammar of plain arithmetic, and never evaluated.

torch writes them as SymPy prints them, `Add(Mul(Integer(2), Symbol('s77', positive=True, integer=True)), Integer(-1))`,
and older versions as `2*s0 - 1`. torch's own reader hands the text to `sympify`, which is `eval`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MAX_LENGTH = 8192  # characters; those of published models have below 1000
MAX_DEPTH = 64
MAX_DIGITS = 20  # a 64-bit integer has 19
MAX_EXPONENT = 8  # sizes are squared, seldom more

_CALLS = frozenset(
    {"Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs", "floor", "ceiling", "And", "Or", "Not", "Xor"}
    | {"Integer", "Float", "Rational"}
    | {"Equality", "Unequality", "StrictLessThan", "LessThan", "GreaterThan", "StrictGreaterThan"}
    | {"Eq", "Ne", "Lt", "Le", "Gt", "Ge"}
    | {"FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv"}
    | {"LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv", "TruncToFloat", "TruncToInt"}
    | {"RoundToInt", "RoundDecimal", "ToFloat", "Identity", "IsNonOverlappingAndDenseIndicator"}
)
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow"})
_CONSTANTS = frozenset({"oo", "int_oo", "true", "false", "True", "False"})
_SYMBOL = re.compile(r"[A-Za-z][A-Za-z0-9]*(_[A-Za-z0-9]+)*")
_SHORT_SYMBOL = re.compile(r"[a-z]{1,3}\d{1,9}")  # s77, u0, zuf3
_ASSUMPTION = re.compile(r"[a-z_]{1,32}")
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d{1,3})?", re.ASCII)
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?(?:e[+-]?\d{1,3})?)|(?P<name>[A-Za-z_]\w*)"
    r"|'(?P<text>[^'\\\n]*)'|(?P<sign>\*\*|//|[-+*/%(),=]))",
    re.ASCII,
)


@dataclass(frozen=True)
class Expression:
    """A checked expression. `symbol` is its name where it is a bare symbol, `number` its value where it is one."""

    symbol: str | None = None
    number: int | None = None


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str


@functools.lru_cache(maxsize=4096)  # a program repeats a few expressions for each of its tensors
def parse_expression(text: str) -> Expression:
    """Raises ValueError, saying what does not belong there, unless the text is arithmetic on symbols and numbers."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"a symbolic size of {len(text)} characters; at most {MAX_LENGTH} are taken")
    parser = _Parser(text)
    found = parser.sum(0)
    parser.expect("end")
    return found


class _Parser:
    """Recursive descent with one token of lookahead; the depth is bounded."""

    def __init__(self, text: str) -> None:
        self._shown = text[:60]
        self._tokens = self._split(text)
        self._next = next(self._tokens)

    def sum(self, depth: int) -> Expression:
        return self._chain(depth, ("+", "-"), self._product)

    def _product(self, depth: int) -> Expression:
        return self._chain(depth, ("*", "/", "//", "%"), self._signed)

    def _chain(self, depth: int, signs: tuple[str, ...], part: Callable[[int], Expression]) -> Expression:
        found = part(depth)
        while self._next.kind == "sign" and self._next.text in signs:
            self._advance()
            part(depth)
            found = Expression()
        return found

    def _signed(self, depth: int) -> Expression:
        if depth > MAX_DEPTH:
            raise ValueError(f"a symbolic size nested more than {MAX_DEPTH} deep: {self._shown!r}")
        if self._take("-"):
            inner = self._signed(depth + 1)
            return Expression(number=None if inner.number is None else -inner.number)
        base = self._atom(depth)
        if self._take("**"):
            self._check_exponent(self._signed(depth + 1))
            return Expression()
        return base

    def _atom(self, depth: int) -> Expression:
        token = self._advance()
        if token.kind == "number":
            return _number(token.text)
        if token.kind == "sign" and token.text == "(":
            found = self.sum(depth + 1)
            self.expect("sign", ")")
            return found
        if token.kind == "name":
            return self._named(token.text, depth)
        raise self._refused(token)

    def _named(self, name: str, depth: int) -> Expression:
        if not self._take("("):
            if name in _CONSTANTS:
                return Expression()
            if _SHORT_SYMBOL.fullmatch(name):
                return Expression(symbol=name)
            raise ValueError(f"a symbolic size that names {name[:40]!r}: {self._shown!r}")
        if name == "Symbol":
            return self._symbol()
        if name not in _CALLS:
            raise ValueError(f"a symbolic size that calls {name[:40]!r}: {self._shown!r}")
        arguments = list(self._arguments(depth))
        if name in _POWERS and len(arguments) > 1:
            self._check_exponent(arguments[1])
        return arguments[0] if name == "Integer" and len(arguments) == 1 else Expression()

    def _arguments(self, depth: int) -> Iterator[Expression]:
        if self._take(")"):
            return
        while True:
            if self._next.kind == "text":  # Float('0.5', precision=53)
                _check_number(self._advance().text)
                yield Expression()
            else:
                found = self.sum(depth + 1)
                if self._take("="):
                    raise ValueError(f"a symbolic size with a keyword where none belongs: {self._shown!r}")
                yield found
            if self._take(")"):
                return
            self.expect("sign", ",")
            if self._next.kind == "name" and self._next.text == "precision":
                self._assumption()
                self.expect("sign", ")")
                return

    def _symbol(self) -> Expression:
        name = self.expect("text").text
        if len(name) > 64 or not _SYMBOL.fullmatch(name):
            raise ValueError(f"a symbol of the name {name[:40]!r}")
        while not self._take(")"):
            self.expect("sign", ",")
            self._assumption()
        return Expression(symbol=name)

    def _assumption(self) -> None:
        """positive=True"""
        name = self.expect("name").text
        self.expect("sign", "=")
        value = self._advance()
        fits = value.kind == "number" or value.text in ("True", "False", "None")
        if not _ASSUMPTION.fullmatch(name) or not fits:
            raise self._refused(value)

    def _check_exponent(self, exponent: Expression) -> None:
        if exponent.number is None or abs(exponent.number) > MAX_EXPONENT:
            raise ValueError(f"a symbolic size with a power beyond {MAX_EXPONENT}: {self._shown!r}")

    def _take(self, sign: str) -> bool:
        if self._next == _Token("sign", sign):
            self._advance()
            return True
        return False

    def expect(self, kind: str, text: str | None = None) -> _Token:
        token = self._advance()
        if token.kind != kind or (text is not None and token.text != text):
            raise self._refused(token)
        return token

    def _advance(self) -> _Token:
        token = self._next
        self._next = next(self._tokens, _Token("end", ""))
        return token

    def _split(self, text: str) -> Iterator[_Token]:
        position = 0
        text = text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None or match.lastgroup is None:
                raise ValueError(f"a symbolic size that is no arithmetic: {self._shown!r}")
            yield _Token(match.lastgroup, match[match.lastgroup])
            position = match.end()
        yield _Token("end", "")

    def _refused(self, token: _Token) -> ValueError:
        what = "ends too early" if token.kind == "end" else f"has {token.text[:20]!r} where it does not belong"
        return ValueError(f"a symbolic size that {what}: {self._shown!r}")


def _number(text: str) -> Expression:
    _check_number(text)
    return Expression(number=int(text)) if text.isdecimal() else Expression()


def _check_number(text: str) -> None:
    if len(text) > 2 * MAX_DIGITS or (text.isdecimal() and len(text) > MAX_DIGITS):
        raise ValueError(f"a symbolic size with a number of {len(text)} digits")
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"a symbolic size with {text[:20]!r} for a number")
