"""Plots of a report as inline SVG. Matplotlib draws; no display, no global state, no address in the output."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mmfix_evals import tasks
from mmfix_evals.errors import MissingDependency
from mmfix_evals.report import measures
from mmfix_evals.report.source import Reported
from mmfix_evals.scoring import MACRO

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


@dataclass(frozen=True)
class Plot:
    """One picture with its heading and what must be known to read it."""

    title: str
    note: str
    svg: str = ""
    wide: bool = False


def all_plots(runs: Sequence[Reported]) -> list[Plot]:
    """Every plot for which the runs hold the numbers."""
    makers: tuple[Callable[[Sequence[Reported]], Iterable[Plot]], ...] = (
        quality_and_speed,
        yes_ratio,
        chair_tradeoffs,
        hallucinated_categories,
        reliability,
        clarity,
    )
    return [plot for make in makers for plot in make(runs)]


def series(runs: Sequence[Reported]) -> dict[tuple[str, str], tuple[str, str]]:
    """(run, method) → its name in legends and its colour; the same method has one colour in every plot."""
    pairs = [(run.label, method) for run in runs for method in run.methods]
    several = len(runs) > 1
    return {
        pair: (f"{pair[1]} ({pair[0]})" if several else pair[1], COLOURS[n % len(COLOURS)])
        for n, pair in enumerate(pairs)
    }


def quality_and_speed(runs: Sequence[Reported]) -> Iterable[Plot]:
    """One panel per task: its first main metric against tokens per second."""
    for name in _tasks(runs):
        task = tasks.get(name)
        metric = next(metric for metric in task.metrics if metric.headline)
        points = []
        for run, method, (label, colour) in _each(runs):
            split = measures.main_split(run, name, metric.name, method)
            entry = run.entry(name, split, metric.name, method) if split else None
            speed = measures.tokens_per_second(run, name, method)
            if entry and entry["value"] is not None and speed:
                points.append((label, colour, speed, entry))
        if points:
            figure, axes = _figure(1)
            for label, colour, speed, entry in points:
                _point(axes[0], colour, label, (speed, None, None), _scaled(metric, entry))
            axes[0].set_xlabel("tokens per second")
            axes[0].set_ylabel(_axis(metric))
            axes[0].set_xlim(left=0)
            split = points[0][3]["split"]
            what = "mean of the splits" if split == MACRO else f"split {split}"
            yield Plot(
                f"{name}: {metric.name} against speed",
                f"{what.capitalize()}; bars: 95 % intervals. {_direction(metric)} Speeds are of one machine and batch "
                "size; methods of one run took turns batch by batch.",
                _svg(figure),
            )


def yes_ratio(runs: Sequence[Reported]) -> Iterable[Plot]:
    """Share of "yes" answers by split; half of the questions are right to be answered so."""
    for name in _tasks(runs):
        if not any(metric.name == "yes_ratio" for metric in tasks.get(name).metrics):
            continue
        splits = [
            s for s in tasks.get(name).splits if any(run.entry(name, s, "yes_ratio", m) for run, m, _ in _each(runs))
        ]
        many = len(series(runs)) > len(COLOURS)
        figure, (axis,) = _figure(1, height=1.1 + 0.18 * len(series(runs)) if many else 3.1)
        if many:  # bars of one method each would be lines
            _dots(axis, runs, name, "yes_ratio", splits)
            axis.axvline(50, color="#444444", linewidth=1, linestyle="--")
            axis.set_xlabel("answers counted as yes, %")
            axis.set_xlim(0, 100)
        else:
            _bars(axis, runs, name, "yes_ratio", splits)
            axis.axhline(50, color="#444444", linewidth=1, linestyle="--")
            axis.set_ylabel("answers counted as yes, %")
            axis.set_ylim(0, 100)
        yield Plot(
            f"{name}: share of yes answers",
            "Dashed: the share of questions whose right answer is yes. Above it a model says yes too often, below it "
            "too rarely. Bars: 95 % intervals.",
            _svg(figure),
        )


def chair_tradeoffs(runs: Sequence[Reported]) -> Iterable[Plot]:
    """CHAIR_i beside what it can be bought with: fewer objects named, shorter captions."""
    for name in _tasks(runs):
        known = {metric.name: metric for metric in tasks.get(name).metrics}
        if not {"chair_i", "recall", "length"} <= set(known):
            continue
        figure, axes = _figure(2)
        for axis, other, label in zip(axes, ("recall", "length"), ("recall, %", "tokens per caption"), strict=True):
            for run, method, (legend, colour) in _each(runs):
                split = measures.main_split(run, name, "chair_i", method)
                x = run.entry(name, split, other, method) if split else None
                y = run.entry(name, split, "chair_i", method) if split else None
                if x and y and x["value"] is not None and y["value"] is not None:
                    _point(axis, colour, legend, _scaled(known[other], x), _scaled(known["chair_i"], y))
            axis.set_xlabel(label)
            axis.set_ylabel("CHAIR_i, % (lower is better)")
        yield Plot(
            f"{name}: hallucination against recall and length",
            "A method that only says less moves left and down. Bars: 95 % intervals.",
            _svg(figure),
            wide=True,
        )


def hallucinated_categories(runs: Sequence[Reported], shown: int = 12) -> Iterable[Plot]:
    """Which objects are invented, by method."""
    for name in _tasks(runs):
        counted = {
            (run.label, method): measures.hallucinated_by_category(run, name, method) for run, method, _ in _each(runs)
        }
        total: dict[str, float] = {}
        for found in counted.values():
            for category, share in found.items():
                total[category] = total.get(category, 0.0) + share
        top = sorted(total, key=lambda category: (-total[category], category))[:shown]
        if not top:
            continue
        figure, (axis,) = _figure(1, height=0.9 + 0.3 * len(top))
        methods = [(pair, look) for pair, look in series(runs).items() if counted.get(pair)]
        height = 0.8 / max(1, len(methods))
        for n, (pair, (label, colour)) in enumerate(methods):
            places = [row + (n - (len(methods) - 1) / 2) * height for row in range(len(top))]
            axis.barh(places, [100 * counted[pair].get(c, 0.0) for c in top], height * 0.9, color=colour, label=label)
        axis.set_yticks(range(len(top)), top)
        axis.invert_yaxis()
        axis.set_xlabel("%")
        yield Plot(
            f"{name}: what is hallucinated",
            f"{measures.hallucination_unit(name)} The {len(top)} most frequent of {len(total)} categories.",
            _svg(figure),
        )


def reliability(runs: Sequence[Reported]) -> Iterable[Plot]:
    """How often an answer is right, by how sure the model was of its first word."""
    for name in _tasks(runs):
        figure, (axis,) = _figure(1)
        errors = []
        for run, method, (label, colour) in _each(runs):
            bins = measures.reliability(run, name, method)
            if bins:
                x, y = [100 * one.confidence for one in bins], [100 * one.accuracy for one in bins]
                axis.plot(x, y, "o-", color=colour, label=label, markersize=4)
                errors.append(f"{label} {100 * measures.calibration_error(bins):.1f}")
        if errors:
            axis.plot([0, 100], [0, 100], color="#444444", linewidth=1, linestyle="--")
            axis.set_xlim(0, 100)
            axis.set_ylim(0, 100)
            axis.set_xlabel("probability of the answer's first word, %")
            axis.set_ylabel("right answers, %")
            yield Plot(
                f"{name}: reliability of answers",
                "Ten bins of equal width, all splits together; on the dashed line confidence is deserved. Expected "
                f"calibration error x 100: {'; '.join(errors)}.",
                _svg(figure),
            )


def clarity(runs: Sequence[Reported]) -> Iterable[Plot]:
    """What became of the answers: how many a parser had to guess, how many were cut off or failed."""
    for name in _tasks(runs):
        rows = [
            (label, measures.answer_states(run, name, method))
            for run, method, (label, _) in _each(runs)
            if run.answers.get(name) and method in run.answers[name].by_method
        ]
        if not rows:
            continue
        states = [state for state in measures.STATES if any(found.get(state) for _, found in rows)]
        if states == ["clear"]:
            read = " Every published parser reads them alike." if "correct" in tasks.get(name).columns else ""
            yield Plot(f"{name}: what became of the answers", f"None is empty, cut off or failed.{read}")
            continue
        figure, (axis,) = _figure(1, height=1.1 + 0.32 * len(rows))
        left = [0.0] * len(rows)
        for state in states:
            widths = [100 * found.get(state, 0.0) for _, found in rows]
            axis.barh(range(len(rows)), widths, 0.7, left=left, color=measures.STATES[state], label=state)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.set_yticks(range(len(rows)), [label for label, _ in rows])
        axis.invert_yaxis()
        axis.set_xlim(0, 100)
        axis.set_xlabel("answers, %")
        yield Plot(f"{name}: what became of the answers", measures.STATES_NOTE, _svg(figure))


# -- drawing -----------------------------------------------------------------------------------------------------------


def _tasks(runs: Sequence[Reported]) -> list[str]:
    return list(dict.fromkeys(entry["task"] for run in runs for entry in run.results["metrics"]))


def _each(runs: Sequence[Reported]) -> Iterable[tuple[Reported, str, tuple[str, str]]]:
    looks = series(runs)
    for run in runs:
        for method in run.methods:
            yield run, method, looks[run.label, method]


def _scaled(metric: Any, entry: dict[str, Any]) -> tuple[float, float | None, float | None]:
    factor = 100 if metric.percent else 1
    low, high = entry["ci_low"], entry["ci_high"]
    return factor * entry["value"], None if low is None else factor * low, None if high is None else factor * high


def _axis(metric: Any) -> str:
    return f"{metric.name}{', %' if metric.percent else ''}"


def _direction(metric: Any) -> str:
    return {"higher": "Higher is better.", "lower": "Lower is better."}.get(metric.better or "", "")


Spread = tuple[float, float | None, float | None]


def _point(axis: Any, colour: str, label: str, x: Spread, y: Spread) -> None:
    """A dot with its intervals as whiskers."""
    marker = MARKERS[len(axis.containers) // len(COLOURS) % len(MARKERS)]
    axis.errorbar(
        [x[0]], [y[0]], xerr=_whisker(x), yerr=_whisker(y), fmt=marker, color=colour, label=label, capsize=2,
        linewidth=1,
    )  # fmt: skip


def _whisker(spread: Spread) -> list[list[float]] | None:
    value, low, high = spread
    if low is None or high is None:
        return None
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def _bars(axis: Any, runs: Sequence[Reported], task: str, metric: str, splits: Sequence[str]) -> None:
    looks = series(runs)
    width = 0.8 / max(1, len(looks))
    known = tasks.get(task).metric(metric)
    for n, (run, method, (label, colour)) in enumerate(_each(runs)):
        found = [(row, run.entry(task, split, metric, method)) for row, split in enumerate(splits)]
        spreads = [(row, _scaled(known, entry)) for row, entry in found if entry and entry["value"] is not None]
        if not spreads:
            continue
        places = [row + (n - (len(looks) - 1) / 2) * width for row, _ in spreads]
        axis.bar(places, [s[0] for _, s in spreads], width * 0.9, color=colour, label=label)
        for place, (_, spread) in zip(places, spreads, strict=True):
            axis.errorbar(
                [place], [spread[0]], yerr=_whisker(spread), fmt="none", ecolor="#222222", capsize=2, linewidth=1
            )
    axis.set_xticks(range(len(splits)), splits)


def _dots(axis: Any, runs: Sequence[Reported], task: str, metric: str, splits: Sequence[str]) -> None:
    """A row per method, in it a dot with its interval per split."""
    known, names = tasks.get(task).metric(metric), [_short(label) for _, _, (label, _) in _each(runs)]
    for n, split in enumerate(splits):
        found = [(row, run.entry(task, split, metric, method)) for row, (run, method, _) in enumerate(_each(runs))]
        spreads = [(row, _scaled(known, entry)) for row, entry in found if entry and entry["value"] is not None]
        for row, spread in spreads:
            label, place = split if row == spreads[0][0] else None, row + 0.2 * (n - (len(splits) - 1) / 2)
            axis.errorbar(
                [spread[0]], [place], xerr=_whisker(spread), fmt=MARKERS[n % len(MARKERS)], label=label,
                color=COLOURS[n % len(COLOURS)], markersize=3, linewidth=0.8,
            )  # fmt: skip
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_ylim(len(names) - 0.4, -0.6)


def _short(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"


def _figure(panels: int, height: float = 3.1) -> tuple[Any, Any]:
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


def _svg(figure: Any) -> str:
    """The figure, with one legend below it, as an SVG element: no prologue, no metadata, no name spaces.

    HTML does without these, and the page then holds no address at all.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if handles:
            shown = [_short(one) for one in labels]
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
