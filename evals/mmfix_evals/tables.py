"""Results as a table: for a terminal, as plain ASCII text, as Markdown.

A number stands beside its interval, its difference to the baseline with the paired interval and p, its speed, and how
often the method acted. Below stands what it was measured on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any

from rich.console import Console
from rich.text import Text

from mmfix_evals import machine, stats, tasks
from mmfix_evals.results import Results
from mmfix_evals.scoring import MACRO
from mmfix_evals.tasks import Metric

COLUMNS = ("metric", "method", "value", "95% CI", "diff", "95% CI", "p", "speed", "fired")
NONE = "-"
SIGNIFICANT = 0.05
WIDE = 400


@dataclass(frozen=True)
class Row:
    """One cell per column, and whether the difference is a significant gain (1), loss (-1) or neither (0)."""

    cells: tuple[str, ...]
    gain: int = 0


@dataclass(frozen=True)
class Section:
    """The rows of one task and split."""

    title: str
    rows: list[Row]


def sections(results: Results, every_metric: bool = False) -> list[Section]:
    """The table's content: one section per (task, split), one row per (metric, method)."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in results["metrics"]:
        groups.setdefault((entry["task"], entry["split"]), []).append(entry)
    return [_section(results, task, split, entries, every_metric) for (task, split), entries in groups.items()]


def _section(results: Results, task: str, split: str, entries: list[dict[str, Any]], every_metric: bool) -> Section:
    known = tasks.get(task)
    differences = {
        (entry["metric"], entry["method"]): entry
        for entry in results["comparisons"]
        if (entry["task"], entry["split"]) == (task, split)
    }
    speeds = {e["method"]: e for e in results["speed"] if (e["task"], e["split"]) == (task, split)}
    shown = [metric for metric in known.metrics if metric.headline or every_metric or _unparsed(metric, entries)]
    rows = []
    for metric in shown:
        # Speed and fired shares belong to a method, not to a metric: they stand in the section's first block.
        first = metric is shown[0]
        for entry in entries:
            if entry["metric"] == metric.name:
                speed = speeds.get(entry["method"], {}) if first else {}
                rows.append(_row(metric, entry, differences.get((metric.name, entry["method"])), speed))
    images = max(entry["n_images"] for entry in entries)
    name = "mean of the splits" if split == MACRO else split
    return Section(f"{task} / {name} ({max(e['n'] for e in entries)} {known.unit}, {images} images)", rows)


def _unparsed(metric: Metric, entries: Sequence[dict[str, Any]]) -> bool:
    """A count is shown by default only where it is not zero."""
    return metric.integer and any(e["metric"] == metric.name and e["value"] for e in entries)


def _row(metric: Metric, entry: dict[str, Any], difference: dict[str, Any] | None, speed: dict[str, Any]) -> Row:
    show = formatter(metric)
    cells = [metric.name, entry["method"], show(entry["value"]), interval(show, entry["ci_low"], entry["ci_high"])]
    cells += difference_cells(metric, difference)
    return Row((*cells, *speed_cells(speed)), gain(metric, difference))


def difference_cells(metric: Metric, difference: dict[str, Any] | None) -> list[str]:
    """Difference, its interval and p; dashes for the baseline itself."""
    if difference is None:
        return [NONE, NONE, NONE]
    signed = formatter(metric, signed=True)
    spread = interval(signed, difference["ci_low"], difference["ci_high"])
    return [signed(difference["difference"]), spread, p_value(difference["p_holm"])]


def gain(metric: Metric, difference: dict[str, Any] | None) -> int:
    """1 for a significant improvement, -1 for a significant loss, 0 otherwise."""
    p = None if difference is None else difference["p_holm"]
    if difference is None or metric.better is None or p is None or p >= SIGNIFICANT or not difference["difference"]:
        return 0
    return 1 if (difference["difference"] > 0) == (metric.better == "higher") else -1


def speed_cells(speed: dict[str, Any]) -> tuple[str, str]:
    """Relative speed and fired share; empty where they are shown in another row."""
    if not speed:
        return "", ""
    relative, low, high = (speed.get(f"relative_speed{end}") for end in ("", "_low", "_high"))
    spread = "" if low is None or high is None or low == high else f" [{low:.2f}, {high:.2f}]"
    return (NONE if relative is None else f"{relative:.2f}x{spread}"), fired(speed["fired"])


def fired(counted: dict[str, dict[str, Any]]) -> str:
    """Share of the places looked at that a method changed; ``never`` where it changed none."""
    if not counted:
        return NONE
    return " + ".join(_share(found) for found in counted.values())


def _share(found: dict[str, Any]) -> str:
    if not found["fired"]:
        return "never"
    share = 100 * found["fired"] / found["considered"]
    return f"{share:.1f}%" if share >= 0.05 else "<0.1%"


def formatter(metric: Metric, signed: bool = False) -> Callable[[float | None], str]:
    """How values of a metric are printed: percent with one decimal, or the number itself."""

    def show(value: float | None) -> str:
        if value is None:
            return "n/a"
        sign = "+" if signed else ""
        if metric.integer:
            return f"{value:{sign}.0f}"
        number = 100 * value if metric.percent else value
        return f"{number + 0.0:{sign}.1f}" if abs(number) >= 0.05 else "0.0"

    return show


def interval(show: Callable[[float | None], str], low: float | None, high: float | None) -> str:
    return NONE if low is None or high is None else f"[{show(low)}, {show(high)}]"


def p_value(value: float | None) -> str:
    if value is None:
        return NONE
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def never_fired(results: Results) -> list[str]:
    """Methods that changed nothing in a whole task, with the task; of composed methods the one at fault."""
    found: dict[tuple[str, str], list[bool]] = {}
    for entry in results["speed"]:
        for name, counted in entry["fired"].items():
            label = entry["method"] if len(entry["fired"]) == 1 else f"{name} in {entry['method']}"
            found.setdefault((label, entry["task"]), []).append(bool(counted["fired"]))
    return [f"{label} ({task})" for (label, task), acted in found.items() if not any(acted)]


def footnotes(results: Results) -> list[str]:
    """What the numbers were measured on, and what must be known to read them."""
    config, bootstrap = results["config"], results["bootstrap"]
    world = f", world seed {config['world_seed']}" if config.get("world_seed") else ""
    asked = "; ".join(f"{name}: {e['n_images']} images, {e['n_documents']} {tasks.get(name).unit}, "
                      f"{_rule(name, e)}" for name, e in results["tasks"].items())  # fmt: skip
    notes = [
        f"Model {config['model']}; data split {config['split']}{world}; {asked}.",
        "Values x 100 except length and counts; n/a: undefined (nothing to divide by). Differences are to "
        f"{baseline(results)}, paired. Intervals: {bootstrap['resamples']} bootstrap resamples of images, seed "
        f"{bootstrap['seed']}; p from the same draws, Holm-corrected over splits and methods of each task and metric.",
        f"Speed: tokens/s relative to {baseline(results)} in this run, batch {_batch(results)}, "
        f"methods taking turns batch by batch; {machine.describe(results['machine'])}. "
        "Fired: share of the places a method looked at that it changed.",
    ]
    notes += drawn_note(results)
    notes += power_note(results["comparisons"])
    taught = [arm["name"] for arm in results["methods"] if arm.get("trained")]
    if taught:
        notes.append(f"Trained in the paper; used here without training: {', '.join(taught)}.")
    notes += calibrated_note(results)
    if results.get("left_out"):
        notes.append(f"Left out, because they cannot run on this model as it is: {', '.join(results['left_out'])}.")
    for name in never_fired(results):
        means = "it changed nothing there" if " in " in name else "identical to greedy by construction"
        notes.append(f"NEVER FIRED: {name}: {means}.")
    if results["errors"]:
        notes.append(f"{len(results['errors'])} answers failed and are not scored; see results.json.")
    if results["status"] != "complete":
        notes.append(f"This run is {results['status']}: the numbers cover the finished samples only.")
    return notes


def drawn_note(results: Results) -> list[str]:
    """That the run sampled, in which greedy is no longer what its name says."""
    drawn = any((entry.get("generation") or {}).get("do_sample") for entry in results["tasks"].values())
    return ["Tokens were drawn: greedy is the plain model, sampled with the same settings and seed."] if drawn else []


def calibrated_note(results: Results) -> list[str]:
    """The methods that ran with values found for this model beforehand, and on what data these were found."""
    listed, same = [], False
    for arm in results["methods"]:
        for name, used in (arm.get("calibrated") or {}).items():
            label = arm["name"] if name == arm["name"] else f"{name} in {arm['name']}"
            fields = ", ".join(used["values"])
            listed.append(f"{label} ({fields}{'; ' + used['data'] if used.get('data') else ''})")
            same |= used.get("data") == f"TinyWorld {results['config']['split']}"
    warning = " Some were calibrated on the very split that is measured here." if same else ""
    return [f"Calibrated for this model beforehand: {'; '.join(listed)}.{warning}"] if listed else []


def power_note(entries: Sequence[dict[str, Any]]) -> list[str]:
    """How many images a difference of one point takes, from the spread of the differences at hand."""
    found: dict[tuple[str, str], list[int]] = {}
    for entry in entries:
        metric = tasks.get(entry["task"]).metric(entry["metric"])
        needed = entry.get("images_for_1_point")
        if metric.headline and needed is not None:
            found.setdefault((entry["task"], entry["metric"]), []).append(needed)
    if not found:
        return []
    listed = "; ".join(f"{task} {metric} {_range(needed)}" for (task, metric), needed in found.items())
    return [
        f"To see a difference of 1 point (p < 0.05 in one test, {stats.POWER:.0%} power) one needs about so many "
        f"images, by method and split: {listed}."
    ]


def _range(values: Sequence[int]) -> str:
    """Two digits of them are all that an estimate is worth."""
    low, high = (round(value, 2 - len(str(value))) for value in (min(values), max(values)))
    return f"{low}" if low == high else f"{low} to {high}"


def _batch(results: Results) -> str:
    """The batch size, and those that were found or that memory forced."""
    timing = results.get("timing") or {}
    found = {**(timing.get("batch_sizes") or {}), **(timing.get("reduced_batch_sizes") or {})}
    listed = ", ".join(f"{name} {size}" for name, size in found.items())
    return f"{results['config']['batch_size']}{f' ({listed})' if listed else ''}"


def baseline(results: Results) -> str:
    found = {entry["baseline"] for entry in results["comparisons"]}
    return " / ".join(sorted(found)) or "greedy"


def _rule(name: str, entry: dict[str, Any]) -> str:
    field = tasks.get(name).flavour_field
    return f"{field} {entry[field]}"


def print_results(results: Results, file: IO[str] | None = None, every_metric: bool = False) -> None:
    """The table and its footnotes, in colour on a terminal and as plain ASCII elsewhere."""
    console = console_for(file or sys.stdout)
    print_sections(console, sections(results, every_metric))
    for note in footnotes(results):
        console.print(Text(note), soft_wrap=not console.is_terminal)


def print_sections(console: Console, found: Sequence[Section], columns: Sequence[str] = COLUMNS) -> None:
    """Aligned columns, one header, a title per section; a metric's name stands in its first row only."""
    rows = [columns, *(row.cells for section in found for row in section.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    console.print(Text(_line(columns, widths), style="dim"), soft_wrap=True)
    for section in found:
        if section.title:
            console.print(Text(section.title, style="bold"), soft_wrap=True)
        last = None
        for row in section.rows:
            cells = ("" if row.cells[0] == last else row.cells[0], *row.cells[1:])
            style = {1: "green", -1: "red", 0: ""}[row.gain]
            console.print(Text(_line(cells, widths), style=style), soft_wrap=True)
            last = row.cells[0]
        console.print()


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    pairs = list(zip(cells, widths, strict=True))
    left = [f"{cell:<{width}}" for cell, width in pairs[:2]]
    return " ".join([" ", *left, *(f"{cell:>{width}}" for cell, width in pairs[2:])]).rstrip()


def console_for(file: IO[str]) -> Console:
    """A console as wide as the text where nobody looks: nothing is cut when the output goes to a file."""
    if file.isatty():
        return Console(file=file, highlight=False)
    return Console(file=file, highlight=False, width=WIDE, color_system=None, force_terminal=False)


def markdown(results: Results, every_metric: bool = False) -> str:
    """The same table for a README."""
    return markdown_sections(sections(results, every_metric), COLUMNS, footnotes(results))


def markdown_sections(found: Sequence[Section], columns: Sequence[str], notes: Sequence[str]) -> str:
    """Any table in Markdown, with its footnotes."""
    lines = []
    for section in found:
        aligned = f"|{' --- |' * 2}{' ---: |' * (len(columns) - 2)}"
        lines += [f"**{section.title}**", "", f"| {' | '.join(columns)} |", aligned]
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row.cells)} |" for row in section.rows]
        lines.append("")
    return "\n".join([*lines, *(f"{note}  " for note in notes), ""])
