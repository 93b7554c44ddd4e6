"""Plots of a report as inline SVG. Matplotlib draws; no display, no global state, no address in the output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mmfix_evals import tasks
from mmfix_evals.report import measures
from mmfix_evals.report.drawing import (
    COLOURS,
    axis_label,
    bars,
    direction,
    dots,
    each,
    panels_of,
    point,
    scaled,
    series,
    svg_of,
    tasks_of,
)
from mmfix_evals.report.source import Reported
from mmfix_evals.scoring import MACRO


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


def quality_and_speed(runs: Sequence[Reported]) -> Iterable[Plot]:
    """One panel per task: its first main metric against tokens per second."""
    for name in tasks_of(runs):
        task = tasks.get(name)
        metric = next(metric for metric in task.metrics if metric.headline)
        points = []
        for run, method, (label, colour) in each(runs):
            split = measures.main_split(run, name, metric.name, method)
            entry = run.entry(name, split, metric.name, method) if split else None
            speed = measures.tokens_per_second(run, name, method)
            if entry and entry["value"] is not None and speed:
                points.append((label, colour, speed, entry))
        if points:
            figure, axes = panels_of(1)
            for label, colour, speed, entry in points:
                point(axes[0], colour, label, (speed, None, None), scaled(metric, entry))
            axes[0].set_xlabel("tokens per second")
            axes[0].set_ylabel(axis_label(metric))
            axes[0].set_xlim(left=0)
            split = points[0][3]["split"]
            what = "mean of the splits" if split == MACRO else f"split {split}"
            yield Plot(
                f"{name}: {metric.name} against speed",
                f"{what.capitalize()}; bars: 95 % intervals. {direction(metric)} Speeds are of one machine and batch "
                "size; methods of one run took turns batch by batch.",
                svg_of(figure),
            )


def yes_ratio(runs: Sequence[Reported]) -> Iterable[Plot]:
    """Share of "yes" answers by split; half of the questions are right to be answered so."""
    for name in tasks_of(runs):
        if not any(metric.name == "yes_ratio" for metric in tasks.get(name).metrics):
            continue
        splits = [
            s for s in tasks.get(name).splits if any(run.entry(name, s, "yes_ratio", m) for run, m, _ in each(runs))
        ]
        many = len(series(runs)) > len(COLOURS)
        figure, (axis,) = panels_of(1, height=1.1 + 0.18 * len(series(runs)) if many else 3.1)
        if many:  # bars of one method each would be lines
            dots(axis, runs, name, "yes_ratio", splits)
            axis.axvline(50, color="#444444", linewidth=1, linestyle="--")
            axis.set_xlabel("answers counted as yes, %")
            axis.set_xlim(0, 100)
        else:
            bars(axis, runs, name, "yes_ratio", splits)
            axis.axhline(50, color="#444444", linewidth=1, linestyle="--")
            axis.set_ylabel("answers counted as yes, %")
            axis.set_ylim(0, 100)
        yield Plot(
            f"{name}: share of yes answers",
            "Dashed: the share of questions whose right answer is yes. Above it a model says yes too often, below it "
            "too rarely. Bars: 95 % intervals.",
            svg_of(figure),
        )


def chair_tradeoffs(runs: Sequence[Reported]) -> Iterable[Plot]:
    """CHAIR_i beside what it can be bought with: fewer objects named, shorter captions."""
    for name in tasks_of(runs):
        known = {metric.name: metric for metric in tasks.get(name).metrics}
        if not {"chair_i", "recall", "length"} <= set(known):
            continue
        figure, axes = panels_of(2)
        for axis, other, label in zip(axes, ("recall", "length"), ("recall, %", "tokens per caption"), strict=True):
            for run, method, (legend, colour) in each(runs):
                split = measures.main_split(run, name, "chair_i", method)
                x = run.entry(name, split, other, method) if split else None
                y = run.entry(name, split, "chair_i", method) if split else None
                if x and y and x["value"] is not None and y["value"] is not None:
                    point(axis, colour, legend, scaled(known[other], x), scaled(known["chair_i"], y))
            axis.set_xlabel(label)
            axis.set_ylabel("CHAIR_i, % (lower is better)")
        yield Plot(
            f"{name}: hallucination against recall and length",
            "A method that only says less moves left and down. Bars: 95 % intervals.",
            svg_of(figure),
            wide=True,
        )


def hallucinated_categories(runs: Sequence[Reported], shown: int = 12) -> Iterable[Plot]:
    """Which objects are invented, by method."""
    for name in tasks_of(runs):
        counted = {
            (run.label, method): measures.hallucinated_by_category(run, name, method) for run, method, _ in each(runs)
        }
        total: dict[str, float] = {}
        for found in counted.values():
            for category, share in found.items():
                total[category] = total.get(category, 0.0) + share
        top = sorted(total, key=lambda category: (-total[category], category))[:shown]
        if not top:
            continue
        figure, (axis,) = panels_of(1, height=0.9 + 0.3 * len(top))
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
            svg_of(figure),
        )


def reliability(runs: Sequence[Reported]) -> Iterable[Plot]:
    """How often an answer is right, by how sure the model was of its first word."""
    for name in tasks_of(runs):
        figure, (axis,) = panels_of(1)
        errors = []
        for run, method, (label, colour) in each(runs):
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
                svg_of(figure),
            )


def clarity(runs: Sequence[Reported]) -> Iterable[Plot]:
    """What became of the answers: how many a parser had to guess, how many were cut off or failed."""
    for name in tasks_of(runs):
        rows = [
            (label, measures.answer_states(run, name, method))
            for run, method, (label, _) in each(runs)
            if run.answers.get(name) and method in run.answers[name].by_method
        ]
        if not rows:
            continue
        states = [state for state in measures.STATES if any(found.get(state) for _, found in rows)]
        if states == ["clear"]:
            read = " Every published parser reads them alike." if "correct" in tasks.get(name).columns else ""
            yield Plot(f"{name}: what became of the answers", f"None is empty, cut off or failed.{read}")
            continue
        figure, (axis,) = panels_of(1, height=1.1 + 0.32 * len(rows))
        left = [0.0] * len(rows)
        for state in states:
            widths = [100 * found.get(state, 0.0) for _, found in rows]
            axis.barh(range(len(rows)), widths, 0.7, left=left, color=measures.STATES[state], label=state)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.set_yticks(range(len(rows)), [label for label, _ in rows])
        axis.invert_yaxis()
        axis.set_xlim(0, 100)
        axis.set_xlabel("answers, %")
        yield Plot(f"{name}: what became of the answers", measures.STATES_NOTE, svg_of(figure))
