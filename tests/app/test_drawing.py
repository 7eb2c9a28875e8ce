"""Pictures: well-formed, a curve a layer, and nothing in a name becomes markup."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

from app.drawing import COLOURS, OTHERS, sensitivity

SVG = "{http://www.w3.org/2000/svg}"
LEVELS = (0.3, 0.5, 0.9)


def drawn(curves: dict[str, list[tuple[float, float]]]) -> ElementTree.Element:
    return ElementTree.fromstring(sensitivity(curves))


def points(line: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())]


def test_a_curve_a_layer_that_rises_with_the_divergence() -> None:
    root = drawn({"a": [(x, x / 10) for x in LEVELS], "b": [(x, x) for x in LEVELS]})
    lines = {line.attrib["stroke"]: points(line) for line in root.iter(f"{SVG}polyline")}
    assert len(lines) == 2
    flat, steep = lines[COLOURS[1]], lines[COLOURS[0]]  # the steepest has the first colour
    assert all(low[1] > high[1] for low, high in zip(flat, steep, strict=True))  # y runs down
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(steep))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert all(0 < x < width and 0 < y < height for line in lines.values() for x, y in line)


def test_many_layers_and_none_of_any_effect() -> None:
    root = drawn({f"layer.{n}": [(x, 0.0) for x in LEVELS] for n in range(30)})
    strokes = [line.attrib["stroke"] for line in root.iter(f"{SVG}polyline")]
    assert strokes.count(OTHERS) == 30 - len(COLOURS)
    assert "and 22 flatter" in [text.text for text in root.iter(f"{SVG}text")]


def test_names_are_text() -> None:
    root = drawn({"<script>alert(1)</script>": [(0.5, 1.0)], 'a"&b': [(0.5, 1.0)]})
    assert not list(root.iter(f"{SVG}script"))
    assert 'a"&b' in [text.text for text in root.iter(f"{SVG}text")]
