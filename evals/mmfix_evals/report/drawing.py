"""What plots are drawn with: colours, dots with whiskers, bars, figures, and SVG without addresses."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from mmfix_evals import tasks
from mmfix_evals.errors import MissingDependency
from mmfix_evals.report.source import Reported

# Okabe and Ito's colours, which people with colour blindness can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P")  # the next one when the colours begin again
LONGEST_LABEL = 26
STYLE = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "mmfix",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def series(runs: Sequence[Reported]) -> dict[tuple[str, str], tuple[str, str]]:
    """(run, method) → its name in legends and its colour; the same method has one colour in every plot."""
    pairs = [(run.label, method) for run in runs for method in run.methods]
    several = len(runs) > 1
    return {
        pair: (f"{pair[1]} ({pair[0]})" if several else pair[1], COLOURS[n % len(COLOURS)])
        for n, pair in enumerate(pairs)
    }


def tasks_of(runs: Sequence[Reported]) -> list[str]:
    return list(dict.fromkeys(entry["task"] for run in runs for entry in run.results["metrics"]))


def each(runs: Sequence[Reported]) -> Iterable[tuple[Reported, str, tuple[str, str]]]:
    looks = series(runs)
    for run in runs:
        for method in run.methods:
            yield run, method, looks[run.label, method]


def scaled(metric: Any, entry: dict[str, Any]) -> tuple[float, float | None, float | None]:
    factor = 100 if metric.percent else 1
    low, high = entry["ci_low"], entry["ci_high"]
    return factor * entry["value"], None if low is None else factor * low, None if high is None else factor * high


def axis_label(metric: Any) -> str:
    return f"{metric.name}{', %' if metric.percent else ''}"


def direction(metric: Any) -> str:
    return {"higher": "Higher is better.", "lower": "Lower is better."}.get(metric.better or "", "")


Spread = tuple[float, float | None, float | None]


def point(axis: Any, colour: str, label: str, x: Spread, y: Spread) -> None:
    """A dot with its intervals as whiskers."""
    marker = MARKERS[len(axis.containers) // len(COLOURS) % len(MARKERS)]
    axis.errorbar(
        [x[0]], [y[0]], xerr=whisker(x), yerr=whisker(y), fmt=marker, color=colour, label=label, capsize=2,
        linewidth=1,
    )  # fmt: skip


def whisker(spread: Spread) -> list[list[float]] | None:
    value, low, high = spread
    if low is None or high is None:
        return None
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def bars(axis: Any, runs: Sequence[Reported], task: str, metric: str, splits: Sequence[str]) -> None:
    looks = series(runs)
    width = 0.8 / max(1, len(looks))
    known = tasks.get(task).metric(metric)
    for n, (run, method, (label, colour)) in enumerate(each(runs)):
        found = [(row, run.entry(task, split, metric, method)) for row, split in enumerate(splits)]
        spreads = [(row, scaled(known, entry)) for row, entry in found if entry and entry["value"] is not None]
        if not spreads:
            continue
        places = [row + (n - (len(looks) - 1) / 2) * width for row, _ in spreads]
        axis.bar(places, [s[0] for _, s in spreads], width * 0.9, color=colour, label=label)
        for place, (_, spread) in zip(places, spreads, strict=True):
            axis.errorbar(
                [place], [spread[0]], yerr=whisker(spread), fmt="none", ecolor="#222222", capsize=2, linewidth=1
            )
    axis.set_xticks(range(len(splits)), splits)


def dots(axis: Any, runs: Sequence[Reported], task: str, metric: str, splits: Sequence[str]) -> None:
    """A row per method, in it a dot with its interval per split."""
    known, names = tasks.get(task).metric(metric), [short(label) for _, _, (label, _) in each(runs)]
    for n, split in enumerate(splits):
        found = [(row, run.entry(task, split, metric, method)) for row, (run, method, _) in enumerate(each(runs))]
        spreads = [(row, scaled(known, entry)) for row, entry in found if entry and entry["value"] is not None]
        for row, spread in spreads:
            label, place = split if row == spreads[0][0] else None, row + 0.2 * (n - (len(splits) - 1) / 2)
            axis.errorbar(
                [spread[0]], [place], xerr=whisker(spread), fmt=MARKERS[n % len(MARKERS)], label=label,
                color=COLOURS[n % len(COLOURS)], markersize=3, linewidth=0.8,
            )  # fmt: skip
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_ylim(len(names) - 0.4, -0.6)


def short(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"


def panels_of(panels: int, height: float = 3.1) -> tuple[Any, Any]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise MissingDependency(
            f"reports are drawn with matplotlib, which cannot be imported ({problem}); run: pip install 'mmfix[eval]'"
        ) from None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6 * panels, height), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
    return figure, list(axes)


def svg_of(figure: Any) -> str:
    """The figure, with one legend below it, as an SVG element: no prologue, no metadata, no name spaces.

    HTML does without these, and the page then holds no address at all.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if handles:
            shown = [short(one) for one in labels]
            columns = min(4 if max(map(len, shown)) < 16 else 3, len(shown))
            width, height = figure.get_size_inches()
            # The legend takes its own room, not the plot's: 0.18 inches for every row after the second.
            figure.set_size_inches(width, height + 0.18 * max(0, math.ceil(len(shown) / columns) - 2))
            figure.legend(handles, shown, loc="outside lower center", ncol=columns)
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(?::\w+)?="[^"]*"', "", text)
    return text.replace("xlink:href=", "href=").strip()
