"""Pictures of what a report holds, as SVG: no script, no font, nothing that a browser has to fetch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 220, 28, 48
# Of Okabe & Ito 2008: told apart by those who see fewer colours too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933")
OTHERS = "#c8c8c8"
LEAST = 1e-6  # what is drawn of a divergence that is smaller, or none: the axis is logarithmic

Points = Sequence[tuple[float, float]]


def sensitivity(curves: Mapping[str, Points]) -> str:
    """The divergence of the outputs over the sparsity of one layer, a curve a layer; the steepest have a colour."""
    steepest = sorted(curves, key=lambda name: -max(y for _, y in curves[name]))
    named = steepest[: len(COLOURS)]
    values = [max(y, LEAST) for points in curves.values() for _, y in points]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        share = (math.log10(max(y, LEAST)) - low) / (high - low)
        return LEFT + x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [_grid(at, low, high)]
    for name in reversed(steepest):  # those with a colour on top
        colour = COLOURS[named.index(name)] if name in named else OTHERS
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in curves[name]))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for row, name in enumerate(named):
        x, y = WIDTH - RIGHT + 16, TOP + 12 + 20 * row
        parts.append(f'<line x1="{x}" y1="{y}" x2="{x + 18}" y2="{y}" stroke="{COLOURS[row]}" stroke-width="3"/>')
        parts.append(_text(x + 26, y + 4, name if len(name) < 28 else f"…{name[-26:]}"))
    if len(steepest) > len(named):
        parts.append(_text(WIDTH - RIGHT + 16, TOP + 16 + 20 * len(named), f"and {len(steepest) - len(named)} flatter"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>{"".join(parts)}</svg>'
    )


def _grid(at: Callable[[float, float], tuple[float, float]], low: int, high: int) -> str:
    parts = []
    for tenth in range(0, 11, 2):
        (x, bottom), (_, top) = at(tenth / 10, 10.0**low), at(tenth / 10, 10.0**high)
        parts.append(f'<line x1="{x:.1f}" y1="{bottom:.1f}" x2="{x:.1f}" y2="{top:.1f}" stroke="#eeeeee"/>')
        parts.append(_text(x, bottom + 18, f"{tenth * 10} %", "middle"))
    for power in range(low, high + 1):
        (left, y), (right, _) = at(0, 10.0**power), at(1, 10.0**power)
        parts.append(f'<line x1="{left:.1f}" y1="{y:.1f}" x2="{right:.1f}" y2="{y:.1f}" stroke="#eeeeee"/>')
        parts.append(_text(left - 8, y + 4, f"1e{power}", "end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "sparsity of the layer alone", "middle"))
    parts.append(_text(LEFT, 16, "divergence of the outputs"))
    return "".join(parts)


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#333333">{escape(words)}</text>'
