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
    body, taken = "", []
    for p in sorted(points, key=lambda p: p.y):
        kind = "dot first" if p.baseline else "dot"
        if p.low is not None and p.high is not None:
            body += f'<line class="ci" x1="{x(p.x):.1f}" x2="{x(p.x):.1f}" y1="{y(p.low):.1f}" y2="{y(p.high):.1f}"/>'
        at = y(p.y) + 4
        while any(abs(at - other) < 12 and abs(x(p.x) - place) < 90 for place, other in taken):
            at -= 12  # names of points that lie together stand above one another
        taken.append((x(p.x), at))
        body += (
            f'<circle class="{kind}" cx="{x(p.x):.1f}" cy="{y(p.y):.1f}" r="4.5"><title>{esc(p.name)}</title></circle>'
            f'<text class="name" x="{x(p.x) + 8:.1f}" y="{at:.1f}">{esc(p.name)}</text>'
        )
    said = f"{title}: " + "; ".join(f"{p.name} {number(round(p.y, 2))} at {number(round(p.x, 2))}" for p in points)
    return frame(title, x, y, x_label, y_label, body, said)
