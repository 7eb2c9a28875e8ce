"""Symbolic sizes: arithmetic passes, whatever else is Python does not, and nothing is evaluated."""

from __future__ import annotations

import pytest
import sympy
from sympy.printing.repr import srepr

from worker.vetting.expressions import MAX_LENGTH, Expression, parse_expression

S0 = sympy.Symbol("s0", positive=True, integer=True)
S1 = sympy.Symbol("s1", positive=True, integer=True)


@pytest.mark.parametrize(
    "expression",
    [
        *(S0, 2 * S0 - 1, S0 * S1 + 3, S0**2, S0 / 2, sympy.Max(1, S0), sympy.Mod(S0, 8), sympy.floor(S0 / 3), -S0),
        *(sympy.Eq(S0, S1), sympy.Ge(S0, 2), sympy.And(S0 > 1, S1 > 2), sympy.Float(0.5) * S0, sympy.oo),
    ],
    ids=str,
)
def test_what_sympy_prints_passes(expression: sympy.Basic) -> None:
    parse_expression(srepr(expression))


@pytest.mark.parametrize("text", ["s0", "2*s0 - 1", "(s0 + 1)//2 % 3", "s0**2", "FloorDiv(s0, 2)", " s0 "])
def test_what_older_versions_print_passes(text: str) -> None:
    parse_expression(text)


def test_a_symbol_and_a_number_are_told() -> None:
    assert parse_expression(srepr(S0)) == Expression(symbol="s0")
    assert parse_expression("s77") == Expression(symbol="s77")
    assert parse_expression("Integer(-5)") == Expression(number=-5)
    assert parse_expression("Add(Symbol('s0'), Integer(1))") == Expression()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s0 s1",
        "s0 +",
        "()",
        "'s0'",
        "__import__('os').system('true')",
        "os.system",
        "exec('1')",
        "Symbol('__class__')",
        "Symbol('a', commutative=open)",
        "Symbol('a')(1)",
        "Symbol('a\\x41')",
        "Integer('1' + '1')",
        "Integer(1, evaluate=exec)",
        "Function('f')(s0)",
        "Lambda(s0, s0)",
        "lambda: 1",
        "s0.__class__",
        "s0 if s1 else 2",
        "[s0]",
        "{s0}",
        "s0; s1",
        "s0\ns1",
        "s0 := 1",
        "f'{s0}'",
        "9**9**9**9",
        "s0**9",
        "s0**s1",
        "Pow(Integer(9), Integer(99))",
        "PowByNatural(s0, Integer(9))",
        "1" * 30,
        "0x10",
        "1_000",
        "\u0661",
        "s\u0660",
        "(" * 100 + "s0" + ")" * 100,
        "Add(" * 100 + "s0" + ")" * 100,
        "-" * 200 + "s0",
        "s0+" * MAX_LENGTH + "s0",
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"symbol|size"):
        parse_expression(text)
