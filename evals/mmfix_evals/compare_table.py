"""A comparison as a table."""

from __future__ import annotations

from typing import Any

from mmfix_evals import tables, tasks
from mmfix_evals.compare import Comparison
from mmfix_evals.scoring import MACRO

COLUMNS = ("metric", "method", "diff", "95% CI", "p", "p (Holm)", "only base", "only method", "McNemar p")


def sections(comparison: Comparison, every_metric: bool = False) -> list[tables.Section]:
    """One section per (run, task, split), one row per (metric, method)."""
    found: dict[tuple[str, str, str, str], list[tables.Row]] = {}
    for entry in sorted(comparison.entries, key=_rank):
        metric = tasks.get(entry["task"]).metric(entry["metric"])
        if metric.headline or every_metric:
            key = (entry.get("baseline_run", ""), entry.get("run", ""), entry["task"], entry["split"])
            found.setdefault(key, []).append(tables.Row(_cells(entry), tables.gain(metric, entry)))
    return [tables.Section(title(*key), rows) for key, rows in found.items()]


def _rank(entry: dict[str, Any]) -> int:
    """Place of a metric in its task; the sort is stable, so that runs, tasks and splits keep their order."""
    return [metric.name for metric in tasks.get(entry["task"]).metrics].index(entry["metric"])


def title(baseline_run: str, run: str, task: str, split: str) -> str:
    where = f"{run} - {baseline_run}: " if run else ""
    return f"{where}{task} / {'mean of the splits' if split == MACRO else split}"


def _cells(entry: dict[str, Any]) -> tuple[str, ...]:
    metric = tasks.get(entry["task"]).metric(entry["metric"])
    difference, spread, holm = tables.difference_cells(metric, entry)
    test = entry.get("mcnemar")
    pairs = (str(test["b"]), str(test["c"]), tables.p_value(test["p"])) if test else (tables.NONE,) * 3
    return (entry["metric"], pair(entry), difference, spread, tables.p_value(entry["p"]), holm, *pairs)


def pair(entry: dict[str, Any]) -> str:
    """What an entry is about: the method; across runs with the baseline, where that is another one."""
    same = entry["method"] == entry["baseline"] or "run" not in entry
    return str(entry["method"]) if same else f"{entry['method']} - {entry['baseline']}"


def footnotes(comparison: Comparison) -> list[str]:
    """How the numbers came about, and what was left out."""
    baselines = " / ".join(sorted({entry["baseline"] for entry in comparison.entries}))
    images = sorted({entry["n_images"] for entry in comparison.entries})
    return [
        f"Differences x 100 (length and counts: plain) to {baselines}, on the same documents of "
        f"{' / '.join(map(str, images))} images. CI and p: paired bootstrap of images; Holm over splits, methods and "
        "runs of each task and metric. McNemar (accuracy, chair_s): documents where only one side has the outcome, "
        "exact; it ignores that questions share an image.",
        *tables.power_note(comparison.entries),
        *comparison.notes,
    ]
