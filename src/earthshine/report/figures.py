"""Drawings as inline SVG. Colors are CSS classes (`c0`..`c5` for series, `h0`..`h8` for heat), so that one drawing
serves light and dark; every drawing has a title and a description for screen readers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from earthshine.report.scales import Axis, fixed, linear_axis, log_axis, short

NUM_COLORS = 6
WIDE, HALF, PANEL, NARROW = 994, 486, 317, 330  # widths in CSS pixels at which text has its natural size
MARKER_LIMIT = 60  # up to this many points, each has a marker and its value as a tooltip, if the markers have room
INSET = 9  # pixels between the frame and the first and last point
DIGIT, LETTER = 6.9, 6.4  # mean width of a character at the drawings' font size, rounded up


@dataclass(frozen=True)
class Series:
    """One line, its faint raw version, a dashed companion, separate points, or a gray reference. NaN breaks a line.

    low, high: edges of a shaded band around the line. shift: pixels to the right, for points that would coincide.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    kind: Literal["line", "faint", "dashed", "points", "reference"] = "line"
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    shift: float = 0.0


@dataclass(frozen=True)
class Mark:
    """A vertical line at `x`, where something changed for the series of that color; `label` says what."""

    x: float
    label: str
    color: int = 0


@dataclass(frozen=True)
class Chart:
    """Series over one pair of axes. `description` says the same in words."""

    title: str
    description: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    integer_x: bool = True
    integer_y: bool = False
    from_zero: bool = False
    log_y: bool = False
    marks: tuple[Mark, ...] = ()


def _n(value: float) -> str:
    """A coordinate with at most two decimals, in as few characters as possible."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value % 1 else f"{value:.0f}"


def svg(ident: str, width: float, height: float, title: str, description: str, body: str) -> str:
    """An SVG element that scales with its container, with its title and description."""
    return (
        f'<svg viewBox="0 0 {_n(width)} {_n(height)}" style="max-width:{_n(width)}px" role="img" '
        f'aria-labelledby="{ident}-t {ident}-d">'
        f'<title id="{ident}-t">{escape(title)}</title><desc id="{ident}-d">{escape(description)}</desc>{body}</svg>'
    )


def _text(x: float, y: float, text: str, classes: str = "", anchor: str = "start") -> str:
    kind = f' class="{classes}"' if classes else ""
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{_n(x)}" y="{_n(y)}"{kind}{where}>{escape(text)}</text>'


def _path(points: Sequence[tuple[float, float]]) -> str:
    """Path data through the points; NaN lifts the pen. A stretch of one point becomes a dot by its round cap."""
    out, pen = [], False
    for x, y in points:
        if not math.isfinite(y):
            pen = False
            continue
        out.append(f"{'L' if pen else 'M'}{_n(x)} {_n(y)}" + ("" if pen else "h0"))
        pen = True
    return "".join(out)


def marker(x: float, y: float, color: int, size: float = 3.6) -> str:
    """The shape that goes with a color, so that lines never differ by color alone."""
    s, k = size, (color + color // NUM_COLORS) % 3  # where colors repeat, the shape differs
    if k == 0:
        return f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(s)}"/>'
    if k == 1:
        return f'<rect x="{_n(x - s * 0.9)}" y="{_n(y - s * 0.9)}" width="{_n(1.8 * s)}" height="{_n(1.8 * s)}"/>'
    return f'<path d="M{_n(x)} {_n(y - 1.2 * s)}l{_n(1.15 * s)} {_n(2.1 * s)}h{_n(-2.3 * s)}z"/>'


def draw_chart(chart: Chart, width: float, height: float, ident: str) -> str:
    """Axes, grid, ticks and every series of `chart`."""
    xs = [x for s in chart.series for x in s.x]
    ys = [v for s in chart.series for v in (*s.y, *s.low, *s.high) if math.isfinite(v)]
    log = chart.log_y and bool(ys) and min(ys) > 0
    y_axis = (
        log_axis(ys, 5)
        if log
        else linear_axis(ys, max(3, round(height / 62)), integers=chart.integer_y, from_zero=chart.from_zero)
    )
    left = max(DIGIT * len(label) for label in y_axis.labels) + 14
    x_axis = linear_axis(xs, max(3, int((width - left) / 88)), integers=chart.integer_x, tight=True)
    right = max(12.0, DIGIT * len(x_axis.labels[-1]) / 2 if x_axis.labels else 12.0)
    frame = Frame(left, 30.0, width - right, height - 46.0, x_axis, y_axis)
    body = (
        frame.grid()
        + _text(0, 13, chart.y_label, "axis")
        + _text(frame.middle, height - 6, chart.x_label, "axis", "middle")
    )
    body += "".join(frame.mark(m) for m in chart.marks if xs and min(xs) <= m.x <= max(xs))
    order = {"faint": 0, "reference": 1, "dashed": 2, "line": 3, "points": 4}
    drawn: list[Series] = []
    for s in sorted(chart.series, key=lambda s: order[s.kind]):
        body += frame.draw(s, over=s.kind == "line" and any(frame.hides(s, other) for other in drawn))
        drawn.append(s)
    return svg(ident, width, height, chart.title, chart.description, body)


@dataclass(frozen=True)
class Frame:
    """The rectangle between the axes, in SVG units, and the map of values into it."""

    left: float
    top: float
    right: float
    bottom: float
    x_axis: Axis
    y_axis: Axis

    @property
    def middle(self) -> float:
        return (self.left + self.right) / 2

    def x(self, value: float) -> float:
        return self.left + INSET + self.x_axis.place(value) * (self.right - self.left - 2 * INSET)

    def y(self, value: float) -> float:
        return self.bottom - self.y_axis.place(value) * (self.bottom - self.top) if math.isfinite(value) else math.nan

    def hides(self, a: Series, b: Series) -> bool:
        """Whether line `a` would hide nearly all of line `b`: they are less than a line's width apart."""
        if len(a.x) != len(b.x) or a.kind != b.kind:
            return False
        gaps = [abs(self.y(p) - self.y(q)) for p, q in zip(a.y, b.y, strict=True)]
        near = sum(gap < 2 for gap in gaps if math.isfinite(gap))
        return near >= 0.9 * sum(map(math.isfinite, gaps)) > 0

    def grid(self) -> str:
        """Horizontal lines at the ticks, a base line, short ticks and both axes' numbers."""
        out = []
        for value, label in zip(self.y_axis.ticks, self.y_axis.labels, strict=True):
            y = self.y(value)
            out.append(f'<path class="grid" d="M{_n(self.left)} {_n(y)}H{_n(self.right)}"/>')
            out.append(_text(self.left - 8, y + 4, label, "tick", "end"))
        out.append(f'<path class="base" d="M{_n(self.left)} {_n(self.bottom)}H{_n(self.right)}"/>')
        for value, label in zip(self.x_axis.ticks, self.x_axis.labels, strict=True):
            x = self.x(value)
            out.append(f'<path class="base" d="M{_n(x)} {_n(self.bottom)}v5"/>')
            out.append(_text(x, self.bottom + 19, label, "tick", "middle"))
        return "".join(out)

    def mark(self, m: Mark) -> str:
        """A dotted line from top to bottom, with its label as a tooltip."""
        x = self.x(m.x)
        line = f'<path class="stroke" d="M{_n(x)} {_n(self.top)}V{_n(self.bottom)}"/>'
        return f'<g class="c{m.color % NUM_COLORS} mark">{line}<title>{escape(m.label)}</title></g>'

    def draw(self, s: Series, over: bool = False) -> str:
        """A series; `over` dashes it, so that the line it lies on is seen through the gaps."""
        color = "ref" if s.kind == "reference" else f"c{s.color % NUM_COLORS}"
        points = [(self.x(a) + s.shift, self.y(b)) for a, b in zip(s.x, s.y, strict=True)]
        out = [f'<g class="{color} {s.kind}{" over" if over or (s.kind == "line" and s.color >= NUM_COLORS) else ""}">']
        if s.low:
            above = [(self.x(a), self.y(b)) for a, b in zip(s.x, s.high, strict=True)]
            below = [(self.x(a), self.y(b)) for a, b in zip(s.x, s.low, strict=True)][::-1]
            out.append(f'<path class="spread" d="{_path(above)}L{_path(below)[1:]}z"/>')
        if s.kind != "points":
            out.append(f'<path class="stroke" d="{_path(points)}"/>')
        if s.kind == "points" or (s.kind == "line" and len(points) <= min(MARKER_LIMIT, (self.right - self.left) / 14)):
            for (x, y), a, b in zip(points, s.x, s.y, strict=True):
                if math.isfinite(y):
                    shape = marker(x, y, s.color, 4.6 if s.kind == "points" else 3.6)
                    out.append(f"<g>{shape}<title>{escape(s.label)}, {short(a)}: {short(b, 5)}</title></g>")
        return "".join(out) + "</g>"


@dataclass(frozen=True)
class Interval:
    """A difference with its error, for `draw_intervals`."""

    label: str
    value: float
    error: float  # half the length of the bar; NaN draws none
    text: str
    color: int


def draw_intervals(title: str, description: str, unit: str, rows: Sequence[Interval], width: float, ident: str) -> str:
    """Differences as points with bars around a line at zero, one row each.

    The number is right of the bar; the label is left of it on a wide drawing and above it on a narrow one.
    """
    columns = width > 2 * NARROW
    left = min(340.0, max(LETTER * 1.1 * len(r.label) for r in rows) + 20) if columns else 4.0
    right = width - max(LETTER * 1.18 * len(r.text) for r in rows) - 14
    room = (left - 20 if columns else width) / (LETTER * 1.08)
    row_height, base, text = (36.0, 20.0, 24.5) if columns else (54.0, 38.0, 19.0)
    ends = [v for r in rows for e in (r.error if math.isfinite(r.error) else 0.0,) for v in (r.value - e, r.value + e)]
    axis = linear_axis(ends, max(3, int((right - left) / 100)), from_zero=True)
    top, bottom = 4.0, 8.0 + row_height * len(rows)
    frame = Frame(left, top, right, bottom, axis, axis)
    out = []
    for value, label in zip(axis.ticks, axis.labels, strict=True):
        x, half = frame.x(value), DIGIT * len(label) / 2
        out.append(f'<path class="{"zero" if value == 0 else "grid"}" d="M{_n(x)} {_n(top)}V{_n(bottom)}"/>')
        if half <= x <= width - half:
            out.append(_text(x, bottom + 17, label, "tick", "middle"))
    for i, row in enumerate(rows):
        y = top + row_height * i
        label = row.label if len(row.label) <= room else row.label[: max(1, int(room) - 1)] + "\u2026"
        out.append(_text(0, y + text, label, "name halo") + _text(width, y + base + 4.5, row.text, "value halo", "end"))
        out.append(f'<g class="c{row.color % NUM_COLORS} points">')
        if math.isfinite(row.error):
            x0, x1 = frame.x(row.value - row.error), frame.x(row.value + row.error)
            out.append(f'<path class="wide-bar" d="M{_n(x0)} {_n(y + base)}H{_n(x1)}"/>')
        out.append(marker(frame.x(row.value), y + base, row.color, 5.5) + "</g>")
    out.append(_text(frame.middle, bottom + 37, unit, "axis", "middle"))
    return svg(ident, width, bottom + 44, title, description, "".join(out))


@dataclass(frozen=True)
class Multiple:
    """One of many small charts on the same scale."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int


MULTIPLE_WIDTH, MULTIPLE_HEIGHT, MULTIPLE_GAP = 108.0, 62.0, 14.0


def draw_multiples(title: str, description: str, rows: Sequence[Multiple], width: float, ident: str) -> str:
    """Small charts side by side, with one pair of axes for all from zero up: label, last value and line of each."""
    axis = linear_axis([v for row in rows for v in row.y], 2, from_zero=True, tight=True)
    x_axis = linear_axis([x for row in rows for x in row.x], 2, tight=True)
    left = max(DIGIT * len(label) for label in axis.labels) + 12
    columns = max(1, int((width - left + MULTIPLE_GAP) / (MULTIPLE_WIDTH + MULTIPLE_GAP)))
    columns = math.ceil(len(rows) / math.ceil(len(rows) / columns))  # rows of equal length
    cell = min(1.6 * MULTIPLE_WIDTH, (width - left + MULTIPLE_GAP) / columns - MULTIPLE_GAP)
    out = []
    for i, row in enumerate(rows):
        x, y = left + (i % columns) * (cell + MULTIPLE_GAP), (i // columns) * (MULTIPLE_HEIGHT + 2 * MULTIPLE_GAP)
        frame = Frame(x - INSET + 3, y + 20, x + cell + INSET - 3, y + 20 + MULTIPLE_HEIGHT - 8, x_axis, axis)
        for value, label in zip(axis.ticks, axis.labels, strict=True):
            kind = "base" if value == 0 else "grid"
            out.append(f'<path class="{kind}" d="M{_n(x)} {_n(frame.y(value))}h{_n(cell)}"/>')
            if i % columns == 0:
                out.append(_text(left - 7, frame.y(value) + 4, label, "tick", "end"))
        out.append(_text(x, y + 11, row.label) + _text(x + cell, y + 11, fixed(row.y[-1], 2), "last halo", "end"))
        line = _path([(frame.x(a), frame.y(b)) for a, b in zip(row.x, row.y, strict=True)])
        out.append(f'<g class="c{row.color % NUM_COLORS} line thin"><path class="stroke" d="{line}"/></g>')
    height = math.ceil(len(rows) / columns) * (MULTIPLE_HEIGHT + 2 * MULTIPLE_GAP) - 4
    return svg(ident, width, height, title, description, "".join(out))


HEAT_BINS = 9  # from a quarter of the fair share to four times it, in steps of sqrt(2)
MAX_HEAT_COLUMNS = 64


def heat_bin(value: float) -> int:
    """The color of a load: 4 is the fair share, 0 a quarter or less, 8 four times or more; -1 no token at all."""
    if value <= 0:
        return -1
    return min(HEAT_BINS - 1, max(0, round(2 * math.log2(value)) + 4))


def heat_class(kind: int) -> str:
    """The CSS class of a `heat_bin`."""
    return "hz" if kind < 0 else f"h{kind}"


def group_columns(row: Sequence[float], size: int) -> list[float]:
    """Neighboring experts as one column: the load of the group that is farthest from the fair share."""
    groups = [row[i : i + size] for i in range(0, len(row), size)]
    return [max(g, key=lambda v: abs(math.log2(v)) if v > 0 else math.inf) for g in groups]


def draw_heat(title: str, description: str, rows: dict[int, list[float]], width: float, ident: str) -> str:
    """Load as multiples of the fair share: one row per layer, one column per expert (or per few, of many)."""
    num_experts = max(len(row) for row in rows.values())
    size = math.ceil(num_experts / MAX_HEAT_COLUMNS)
    cells = {layer: group_columns(row, size) for layer, row in rows.items()}
    columns = max(len(row) for row in cells.values())
    left, top = 30.0, 18.0
    w = min(58.0, (width - left - 2) / columns)
    h = 24.0 if len(cells) <= 12 else 15.0 if len(cells) <= 40 else 8.0
    label_every = max(1, math.ceil(12 / h))
    column_every = max(1, math.ceil(DIGIT * (len(str(num_experts)) + 0.5) / w))
    out, numbers = [_text(0, 11, "layer", "axis")], []
    shapes: dict[str, str] = {}
    for r, (layer, row) in enumerate(cells.items()):
        y = top + r * h
        if r % label_every == 0:
            out.append(_text(left - 7, y + h / 2 + 4, str(layer), "tick", "end"))
        for c, value in enumerate(row):
            x, name = left + c * w, heat_class(heat_bin(value))
            shape = f"M{_n(x + 0.5)} {_n(y + 0.5)}h{_n(w - 1)}v{_n(h - 1)}h{_n(1 - w)}z"
            shapes[name] = shapes.get(name, "") + shape
            if w >= 27 and h >= 14:
                number = fixed(value, 2 if value < 9.95 else 1)
                numbers.append(_text(x + w / 2, y + h / 2 + 3.7, number, f"in {name}", "middle"))
    out += [f'<path class="{name}" d="{shape}"/>' for name, shape in shapes.items()] + numbers
    bottom = top + h * len(cells)
    for c in range(0, columns, column_every):
        out.append(_text(left + (c + 0.5) * w, bottom + 15, str(c * size), "tick", "middle"))
    out.append(_text(left + columns * w / 2, bottom + 33, "expert", "axis", "middle"))
    return svg(ident, width, bottom + 40, title, description, "".join(out))
