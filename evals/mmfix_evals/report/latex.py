"""Tables for a paper: one per task and split, methods in rows, main metrics in columns, intervals beside the values."""

from __future__ import annotations

from collections.abc import Sequence

from mmfix_evals import compare_table, length_table, tables, tasks
from mmfix_evals.compare import Comparison
from mmfix_evals.report.source import Reported
from mmfix_evals.scoring import MACRO

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def escape(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_SPECIAL.get(letter, letter) for letter in text)


def latex(runs: Sequence[Reported]) -> str:
    """``tabular`` environments with booktabs rules, each with a caption that says what was measured.

    After the values of a run stand its differences to the baseline and, for captions, those at equal length.
    """
    parts = ["% needs \\usepackage{booktabs}"]
    for run in runs:
        places = dict.fromkeys((entry["task"], entry["split"]) for entry in run.results["metrics"])
        parts += [_table(run, task, split) for task, split in places]
        compared = Comparison(run.results.get("comparisons") or [])
        matched = Comparison(run.results.get("length_matched") or [], matched=True)
        parts += [differences(found) for found in (compared, matched) if found.entries]
    return "\n\n".join(parts) + "\n"


def _table(run: Reported, task: str, split: str) -> str:
    known = tasks.get(task)
    found = [e for e in run.results["metrics"] if (e["task"], e["split"]) == (task, split)]
    shown = [m for m in known.metrics if m.headline and any(e["metric"] == m.name for e in found)]
    arrows = {"higher": r" $\uparrow$", "lower": r" $\downarrow$"}
    head = [f"{escape(m.name)}{arrows.get(m.better or '', '')}" for m in shown]
    rows = []
    for method in dict.fromkeys(e["method"] for e in found):
        cells = [escape(method)]
        for metric in shown:
            entry = run.entry(task, split, metric.name, method)
            show = tables.formatter(metric)
            cells.append("--" if entry is None or entry["value"] is None else _cell(show, entry))
        rows.append(" & ".join(cells) + r" \\")
    n, images = max(e["n"] for e in found), max(e["n_images"] for e in found)
    where = "mean of the splits" if split == MACRO else f"split {split}"
    rule = run.results["tasks"][task].get(known.flavour_field, "")
    caption = (
        f"{task}, {where}: {n} {known.unit} about {images} images, {known.flavour_field} {rule}, model "
        f"{run.results['config']['model']}. Values x 100 except lengths and counts; 95 % intervals over images."
    )
    return _environment(caption, "l" + "r" * len(shown), ["method", *head], rows)


def differences(found: Comparison, every_metric: bool = False) -> str:
    """The tables of `mmfix eval compare`: one per task and split, the notes in the caption of each."""
    if found.matched:
        sections, columns = length_table.sections(found.entries), length_table.COLUMNS
        notes = [*length_table.footnotes(found.entries), *found.notes]
    else:
        sections, columns = compare_table.sections(found, every_metric), compare_table.COLUMNS
        notes = compare_table.footnotes(found)
    parts = []
    for section in sections:
        rows = [" & ".join(map(_text, row.cells)) + r" \\" for row in section.rows]
        caption = " ".join([f"{section.title}.", *notes])
        parts.append(_environment(caption, "ll" + "r" * (len(columns) - 2), [escape(c) for c in columns], rows))
    return "\n\n".join(parts)


def _text(cell: str) -> str:
    return "--" if cell == tables.NONE else escape(cell)


def _environment(caption: str, columns: str, head: Sequence[str], rows: Sequence[str]) -> str:
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escape(caption)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(head) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _cell(show: object, entry: dict) -> str:
    assert callable(show)
    low, high = entry["ci_low"], entry["ci_high"]
    spread = "" if low is None or high is None else rf" {{\scriptsize [{show(low)}, {show(high)}]}}"
    return f"{show(entry['value'])}{spread}"
