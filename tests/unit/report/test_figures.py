"""Drawings are well-formed, labelled, inside their frame, and colors can be told apart."""

import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest

from earthshine.report.figures import (
    HEAT_BINS,
    NUM_COLORS,
    Chart,
    Interval,
    Multiple,
    Series,
    draw_chart,
    draw_heat,
    draw_intervals,
    draw_multiples,
    group_columns,
    heat_bin,
)
from earthshine.report.style import DARK, LIGHT

SVG = "{http://www.w3.org/2000/svg}"


def parse(svg: str) -> ET.Element:
    root = ET.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
    labels = root.get("aria-labelledby").split()
    assert [root.find(f"{SVG}title").get("id"), root.find(f"{SVG}desc").get("id")] == labels
    assert root.find(f"{SVG}title").text and root.find(f"{SVG}desc").text
    return root


def check_inside(root: ET.Element) -> None:
    """Every mark, line point and number is within the view box; text is given 7 pixels a letter."""
    _, _, width, height = map(float, root.get("viewBox").split())
    for text in root.iter(f"{SVG}text"):
        x, room = float(text.get("x")), 7.0 * len(text.text)
        left = {"end": x - room, "middle": x - room / 2}.get(text.get("text-anchor"), x)
        assert left >= -1 and left + room <= width + 3, text.text
        assert 0 <= float(text.get("y")) <= height
    for circle in root.iter(f"{SVG}circle"):
        assert 0 <= float(circle.get("cx")) <= width and 0 <= float(circle.get("cy")) <= height
    for path in root.iter(f"{SVG}path"):
        for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path.get("d")):
            assert 0 <= float(x) <= width and 0 <= float(y) <= height, path.get("d")


def chart(*series: Series, **options) -> Chart:
    return Chart("Title", "Description", "step", "nats", series, **options)


@pytest.mark.parametrize("num_points", [1, 2, 6, 300])
@pytest.mark.parametrize("width", [320, 994])
def test_charts_of_any_length(num_points, width):
    x = list(range(1, num_points + 1))
    lines = [Series(f"run {i}", x, [3 + i - 0.001 * v for v in x], i) for i in range(8)]
    root = parse(draw_chart(chart(*lines), width, 300, "a"))
    check_inside(root)
    assert len(root.findall(f"{SVG}g")) == 8


def test_not_finite_breaks_the_line_and_is_not_marked():
    svg = draw_chart(chart(Series("r", [1, 2, 3, 4], [1.0, math.nan, 2.0, 3.0])), 400, 300, "a")
    root = parse(svg)
    stroke = next(p.get("d") for p in root.iter(f"{SVG}path") if p.get("class") == "stroke")
    assert stroke.count("M") == 2
    assert len(list(root.iter(f"{SVG}circle"))) == 3
    assert "nan" not in svg


def test_marks_say_their_value():
    root = parse(draw_chart(chart(Series("run <a>", [1, 2], [4.25, 4.0])), 400, 300, "a"))
    assert [t.text for g in root.iter(f"{SVG}g") for t in g.findall(f"{SVG}title")] == [
        "run <a>, 1: 4.25",
        "run <a>, 2: 4",
    ]


def test_a_line_over_its_like_is_dashed():
    same = [Series(str(i), [1, 2, 3], [1.0, 2.0, 3.0], i) for i in range(2)]
    classes = [g.get("class") for g in parse(draw_chart(chart(*same), 400, 300, "a")).findall(f"{SVG}g")]
    assert classes == ["c0 line", "c1 line over"]
    near = Series("2", [1, 2, 3], [1.0, 2.01, 3.0], 2)  # two pixels are the width of a line
    far = Series("3", [1, 2, 3], [1.2, 2.2, 3.0], 3)
    classes = [g.get("class") for g in parse(draw_chart(chart(same[0], near, far), 400, 300, "a")).findall(f"{SVG}g")]
    assert classes == ["c0 line", "c2 line over", "c3 line"]


def test_log_axis_only_for_positive_values():
    x, values = [1, 2, 3], [1000.0, 1.0, 0.01]
    assert ">1,000<" in draw_chart(chart(Series("r", x, values), log_y=True), 400, 300, "a")
    check_inside(parse(draw_chart(chart(Series("r", x, [0.0, *values[1:]]), log_y=True), 400, 300, "a")))


@pytest.mark.parametrize("width", [330, 994])
def test_intervals(width):
    long = "a name that is much too long to be drawn in the room there is for it, whatever the width"
    rows = [
        Interval("a run: after", -0.05, 0.003, "\u22120.0500 \u00b1 0.0015", 0),
        Interval(long, 0.0, math.nan, "0", 1),
    ]
    root = parse(draw_intervals("Differences", "Words", "nats", rows, width, "i"))
    check_inside(root)
    assert any(text.text.endswith("\u2026") for text in root.iter(f"{SVG}text"))
    assert sum(p.get("class") == "wide-bar" for p in root.iter(f"{SVG}path")) == 1


@pytest.mark.parametrize("count", [1, 3, 24])
@pytest.mark.parametrize("width", [330, 994])
def test_multiples_share_one_scale(count, width):
    rows = [Multiple(f"layer {i}", [1, 2, 3], [0.1, 0.2 + 0.1 * i, 0.3], i % 2) for i in range(count)]
    root = parse(draw_multiples("MaxVio", "Words", rows, width, "m"))
    check_inside(root)
    lines = [p.get("d") for p in root.iter(f"{SVG}path") if p.get("class") == "stroke"]
    assert len(lines) == count
    starts = [float(line.split("h0")[0].split(" ")[1]) for line in lines]
    tops = {round(start - starts[0], 2) % 90 for start in starts}  # a row of charts is 90 lower than the one before
    assert tops == {0.0}
    assert [t.text for t in root.iter(f"{SVG}text")].count("0.30") == count


def test_heat_bins_are_symmetric_around_the_fair_share():
    assert heat_bin(1.0) == HEAT_BINS // 2
    assert [heat_bin(v) for v in (0.25, 0.5, 2.0, 4.0)] == [0, 2, 6, 8]
    assert [heat_bin(v) for v in (0.01, 100.0, 0.0)] == [0, 8, -1]


def test_heat_map_has_every_cell_and_its_number():
    rows = {2: [1.0, 2.0, 0.0, 1.0], 7: [0.5, 1.5, 1.0, 1.0]}
    root = parse(draw_heat("Load", "Words", rows, 486, "h"))
    check_inside(root)
    cells = "".join(p.get("d") for p in root.iter(f"{SVG}path"))
    assert cells.count("M") == 8
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert {"layer", "expert", "2", "7", "2.00", "0.50", "0.00"} <= set(texts)


def test_many_experts_are_grouped_by_their_extremes():
    assert group_columns([1.0, 1.1, 0.2, 3.0, 0.0], 2) == [1.1, 0.2, 0.0]
    root = parse(draw_heat("Load", "Words", {i: [1.0] * 384 for i in range(61)}, 486, "h"))
    check_inside(root)
    assert sum(p.get("d").count("M") for p in root.iter(f"{SVG}path")) == 61 * 64


def luminance(color: str) -> float:
    """Relative luminance of WCAG 2.1."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast(theme):
    """WCAG 2.1 AA: 4.5 for text, 3 for lines and marks."""
    for ground in ("card", "ground"):
        assert all(contrast(theme[name], theme[ground]) >= 4.5 for name in ("ink", "muted", "link"))
    assert all(contrast(theme[f"c{i}"], theme["card"]) >= 3 for i in range(NUM_COLORS))
    assert all(contrast(theme[tone], theme[f"{tone}-soft"]) >= 4.5 for tone in ("good", "bad"))
    assert all(contrast(theme[f"t{i}"], theme[f"h{i}"]) >= 4.5 for i in range(HEAT_BINS))


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
BLINDNESS = {
    "none": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def lab(color: str, blindness: str) -> tuple[float, float, float]:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    seen = [min(1.0, max(0.0, sum(m * c for m, c in zip(row, linear, strict=True)))) for row in BLINDNESS[blindness]]
    r, g, b = seen
    xyz = (
        0.4124 * r + 0.3576 * g + 0.1805 * b,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        0.0193 * r + 0.1192 * g + 0.9505 * b,
    )
    f = [v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (xyz[0] / 0.9505, xyz[1], xyz[2] / 1.089)]
    return 116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])


@pytest.mark.parametrize("blindness", BLINDNESS)
@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_series_colors_can_be_told_apart(theme, blindness):
    """A distance of 2.3 in Lab is just noticeable; five times that between any two of the six."""
    colors = [lab(theme[f"c{i}"], blindness) for i in range(NUM_COLORS)]
    assert all(math.dist(a, b) > 11.5 for a, b in itertools.combinations(colors, 2))
    assert math.dist(colors[0], colors[1]) > 40  # the two of most reports
