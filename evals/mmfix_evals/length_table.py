"""CHAIR at equal length as a table, from the entries that stand in ``results.json`` as ``length_matched``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mmfix_evals import tables, tasks
from mmfix_evals.compare_table import pair, title

COLUMNS = ("metric", "method", "base", "value", "diff", "95% CI", "p", "p (Holm)", "diff uncut")
Entry = dict[str, Any]


def sections(entries: Sequence[Entry]) -> list[tables.Section]:
    """One section per (run, task, split), one row per (metric, method); empty for results without captions."""
    found: dict[tuple[str, str, str, str], list[Entry]] = {}
    for entry in entries:
        key = (entry.get("baseline_run", ""), entry.get("run", ""), entry["task"], entry["split"])
        found.setdefault(key, []).append(entry)
    return [
        tables.Section(f"{title(*key)}, captions of equal length", [_row(entry) for entry in _by_metric(listed)])
        for key, listed in found.items()
    ]


def _by_metric(entries: Sequence[Entry]) -> Iterable[Entry]:
    order = list(dict.fromkeys(entry["metric"] for entry in entries))
    return sorted(entries, key=lambda entry: order.index(entry["metric"]))


def _row(entry: Entry) -> tables.Row:
    metric = tasks.get(entry["task"]).metric(entry["metric"])
    show, signed = tables.formatter(metric), tables.formatter(metric, signed=True)
    tested = [tables.NONE] * 4
    if entry["metric"] != "length":  # equal by construction
        difference, spread, holm = tables.difference_cells(metric, entry)
        tested = [difference, spread, tables.p_value(entry["p"]), holm]
    cells = (entry["metric"], pair(entry), show(entry["baseline_value"]), show(entry["value"]), *tested)
    return tables.Row((*cells, signed(entry["uncut_difference"])), tables.gain(metric, entry))


def footnotes(entries: Sequence[Entry]) -> list[str]:
    """What was cut, and what the columns mean; nothing for results without captions."""
    if not entries:
        return []
    baselines = " / ".join(dict.fromkeys(entry["baseline"] for entry in entries))
    counted = {f"{pair(entry)} {entry['n_cut']} (its baseline {entry['baseline_n_cut']})": None for entry in entries}
    return [
        "Captions of equal length: of a method's caption and the baseline's about the same picture, the longer is cut "
        "to as many tokens as the shorter has (CHAIR's tokens, a double word being one), and both are scored again. "
        f"base: {baselines}, value: the method, both cut; diff uncut: the difference of the whole captions. CI and p: "
        "paired bootstrap of images; Holm over splits, methods and runs of each task and metric.",
        f"Cut, of {' / '.join(sorted({str(entry['n']) for entry in entries}))} captions: {', '.join(counted)}.",
    ]


def markdown(results: dict[str, Any]) -> str:
    """The table for a README, from the results of a run; empty where it holds no captions of two methods."""
    entries = results.get("length_matched") or []
    return tables.markdown_sections(sections(entries), COLUMNS, footnotes(entries)) if entries else ""
