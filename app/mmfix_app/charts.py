"""Small charts as SVG: they follow the page's colours, need no script, and say in words what they show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmfix_app.markup import esc

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 30, 42


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high` over `start`..`stop` in drawing units."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Round numbers inside the axis."""
        raw = (self.high - self.low) / about
        size = 10 ** math.floor(math.log10(raw))
        step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis(values: Sequence[float], start: float, stop: float, room: float = 0.08) -> Axis:
    """An axis around `values` with some room on both sides; never of length zero."""
    low, high = min(values), max(values)
    span = high - low or abs(high) * 0.1 or 1.0
    return Axis(low - room * span, high + room * span, start, stop)


def frame(title: str, x: Axis, y: Axis, x_label: str, y_label: str, body: str, said: str) -> str:
    """A chart with its axes; `said` is its text alternative."""
    grid = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text class="num" x="{LEFT - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{number(t)}</text>'
        for t in y.ticks()
    )
    grid += "".join(
        f'<text class="num" x="{x(t):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(t)}</text>'
        for t in x.ticks()
    )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{esc(said)}">'
        f'<text class="title" x="{LEFT}" y="16">{esc(title)}</text>{grid}'
        f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>{body}'
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{esc(x_label)}</text>"
        f'<text class="label" transform="translate(12 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" '
        f'text-anchor="middle">{esc(y_label)}</text></svg>'
    )


def number(value: float) -> str:
    return f"{value + 0.0:.6g}"


def line(
    title: str,
    xs: Sequence[float],
    ys: Sequence[float],
    x_label: str,
    y_label: str,
    plain: float,
    default: float | None,
) -> str:
    """A line with dots, the plain model as a dashed level, and the default parameter marked."""
    x = axis(xs, LEFT, WIDTH - RIGHT, 0.03)
    y = axis([*ys, plain], HEIGHT - BOTTOM, TOP)
    points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(xs, ys, strict=True))
    dots = "".join(
        f'<circle class="dot" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.2"><title>{number(a)}: {b:.4g}</title></circle>'
        for a, b in zip(xs, ys, strict=True)
    )
    mark = ""
    if default is not None and x.low <= default <= x.high:
        mark = (
            f'<line class="mark" x1="{x(default):.1f}" x2="{x(default):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text class="num" x="{x(default) + 4:.1f}" y="{TOP + 10}">default</text>'
        )
    level = (
        f'<line class="plain" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(plain):.1f}" y2="{y(plain):.1f}"/>'
        f'<text class="num" x="{WIDTH - RIGHT}" y="{y(plain) - 5:.1f}" text-anchor="end">plain model</text>'
    )
    said = f"{title}: from {ys[0]:.3g} at {number(xs[0])} to {ys[-1]:.3g} at {number(xs[-1])}; plain model {plain:.3g}"
    body = f'{mark}{level}<polyline class="line" points="{points}"/>{dots}'
    return frame(title, x, y, x_label, y_label, body, said)


LONGEST_NAME, LETTER = 24, 6.3
"""Letters of a name beside a dot, and about how wide one is."""


@dataclass(frozen=True)
class Point:
    """A named point with an interval in y."""

    name: str
    x: float
    y: float
    low: float | None
    high: float | None
    baseline: bool = False


def scatter(title: str, points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Points with vertical intervals and their names."""
    x = axis([p.x for p in points], LEFT, WIDTH - RIGHT - 40, 0.15)
    ends = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    y = axis(ends, HEIGHT - BOTTOM, TOP)
    dots = [(x(p.x), y(p.y)) for p in points]
    middle = sorted(p.y for p in points)[len(points) // 2]
    body, names, taken = "", "", list[tuple[float, float, float]]()
    # What stands apart is named first; a name that finds no room is left to the dot's tooltip.
    for p, (left, level) in sorted(zip(points, dots, strict=True), key=lambda one: _rank(one[0], middle)):
        kind = "dot first" if p.baseline else "dot"
        if p.low is not None and p.high is not None:
            body += f'<line class="ci" x1="{left:.1f}" x2="{left:.1f}" y1="{y(p.low):.1f}" y2="{y(p.high):.1f}"/>'
        body += f'<circle class="{kind}" cx="{left:.1f}" cy="{level:.1f}" r="4.5"><title>{esc(p.name)}</title></circle>'
        short = p.name if len(p.name) <= LONGEST_NAME else p.name[: LONGEST_NAME - 1] + "…"
        place = _free(left, level, len(short) * LETTER, taken, [d for d in dots if d != (left, level)])
        if p.baseline and place is None:
            width = len(short) * LETTER  # what all others are seen against has its name, whatever it covers
            place = (left + 8 if left + 8 + width < WIDTH else left - 8 - width, level + 4)
        if place is not None:
            taken.append((*place, len(short) * LETTER))
            names += f'<text class="name" x="{place[0]:.1f}" y="{place[1]:.1f}">{esc(short)}</text>'
    if len(taken) < len(points):
        told = f"{len(taken)} of {len(points)} named; point at a dot for its name"
        names += f'<text class="num" x="{WIDTH - RIGHT}" y="{TOP - 2}" text-anchor="end">{told}</text>'
    body += names
    said = f"{title}: " + "; ".join(f"{p.name} {number(round(p.y, 2))} at {number(round(p.x, 2))}" for p in points)
    return frame(title, x, y, x_label, y_label, body, said)


def _rank(point: Point, middle: float) -> tuple[bool, float]:
    return not point.baseline, -abs(point.y - middle)


def _free(
    left: float, level: float, width: float, names: Sequence[tuple[float, float, float]],
    dots: Sequence[tuple[float, float]],
) -> tuple[float, float] | None:  # fmt: skip
    """Where a name beside a dot covers no other name and no other dot, as the start of its base line; or None."""
    for start in (left + 8, left - 8 - width):
        for at in (level + 4, level - 6, level + 14):
            inside = start >= LEFT and start + width <= WIDTH - 4 and at - 8 >= TOP and at <= HEIGHT - BOTTOM
            apart = all(abs(at - b) >= 12 or start > a + w or a > start + width for a, b, w in names)
            if inside and apart and not any(start - 5 < a < start + width + 5 and -6 < at - b < 15 for a, b in dots):
                return start, at
    return None
