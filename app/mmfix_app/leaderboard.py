"""Runs of ``mmfix eval run`` as a table to sort, and quality against speed with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mmfix_evals
from mmfix_app import charts
from mmfix_app.markup import esc
from mmfix_evals import machine, results, tasks
from mmfix_evals.errors import EvalError
from mmfix_evals.tables import drawn_note, fired, formatter, interval, p_value

_PACKAGE = Path(mmfix_evals.__file__).parent
RECORDS = (_PACKAGE / "records", _PACKAGE.parent / "records")
"""Where the committed records are: inside an installed package, or beside it in a checkout."""
_PARTS = ("metrics", "speed", "config", "tasks", "machine", "bootstrap")


def runs(folders: list[Path]) -> dict[str, Path]:
    """Name → folder of every run: the committed records, then those in the given folders."""
    found: dict[str, Path] = {}
    for place in (*RECORDS, *folders):
        for path in [place, *sorted(place.glob("*"))] if place.is_dir() else []:
            if (path / results.NAME).is_file():
                found.setdefault(path.name, path)
    return found


def metrics(run: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, key) of everything that was measured; headline metrics first."""
    found: dict[tuple[bool, str, str, str], None] = {}
    for entry in run["metrics"]:
        if entry["task"] not in tasks.names() or entry["metric"] not in {
            m.name for m in tasks.get(entry["task"]).metrics
        }:
            continue  # of another version
        known = tasks.get(entry["task"]).metric(entry["metric"])
        found[not known.headline, entry["task"], entry["metric"], entry["split"]] = None
    order = sorted(found, key=lambda key: key[0])
    return [(f"{task} · {split} · {metric}", f"{task}/{split}/{metric}") for _, task, metric, split in order]


def load(path: Path) -> dict[str, Any]:
    """One run's results.

    Raises:
        EvalError: unreadable, of another schema, or the record of something else than a run.
    """
    try:
        found = results.read(path)
    except OSError as error:
        raise EvalError(f"{path.name}: {error.strerror}") from error
    missing = [part for part in _PARTS if not found.get(part)]
    if missing or not metrics(found):
        raise EvalError(f"{path.name}: no {', '.join(missing) or 'known metric'}; it is not a run of `mmfix eval run`")
    return found


def readable(folders: list[Path]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Name → results of every run that can be shown, and why the visitor's other folders cannot."""
    found, refused = {}, []
    for name, path in runs(folders).items():
        try:
            found[name] = load(path)
        except EvalError as error:
            if not any(place in path.parents for place in RECORDS):  # records of other measurements lie there too
                refused.append(str(error))
    return found, refused


def render(run: dict[str, Any], key: str) -> str:
    """Table and plot of one metric."""
    task, split, name = key.split("/")
    metric = tasks.get(task).metric(name)
    show, signed = formatter(metric), formatter(metric, signed=True)
    changes = {
        c["method"]: c for c in run["comparisons"] if (c["task"], c["split"], c["metric"]) == (task, split, name)
    }
    speeds = {s["method"]: s for s in run["speed"] if s["task"] == task and s["split"] in (split, "all")}
    if not speeds:  # a mean over splits: the mean of their speeds
        speeds = _mean_speeds([s for s in run["speed"] if s["task"] == task])
    entries = [e for e in run["metrics"] if (e["task"], e["split"], e["metric"]) == (task, split, name)]
    rows, points = [], []
    for entry in entries:
        method, change = entry["method"], changes.get(entry["method"])
        speed = speeds.get(method, {})
        relative = speed.get("relative_speed")
        rows.append(
            "".join(
                _cell(text, value)
                for text, value in (
                    (method, method),
                    (f"{show(entry['value'])} {interval(show, entry['ci_low'], entry['ci_high'])}", entry["value"]),
                    (signed(change["difference"]) if change else "", change["difference"] if change else None),
                    (p_value(change["p_holm"]) if change else "", change["p_holm"] if change else None),
                    (f"{relative:.2f}×" if relative else "", relative),
                    (fired(speed["fired"]) if speed.get("fired") else "", speed.get("fired_share")),
                    (str(entry["n"]), entry["n"]),
                )
            )
        )
        if relative and entry["value"] is not None:
            scale = 100 if metric.percent else 1
            low, high = (None if v is None else scale * v for v in (entry["ci_low"], entry["ci_high"]))
            points.append(charts.Point(method, relative, scale * entry["value"], low, high, method == "greedy"))
    better = {"higher": " (higher is better)", "lower": " (lower is better)"}.get(metric.better or "", "")
    heads = ("method", f"{name}, 95 % interval", "difference", "p (Holm)", "speed", "fired", "n")
    head = "".join(f'<th scope="col"><button type="button">{esc(h)}</button></th>' for h in heads)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    plot = charts.scatter(f"{name}{better}", points, "speed relative to greedy", name) if points else ""
    return (
        f'<div class="board"><p class="caption" id="board-caption">{esc(task)}, {esc(split)}: {esc(name)}{better}. '
        "A column's title sorts.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-labelledby="board-caption">'
        f'<table aria-labelledby="board-caption"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"{plot}"
        f'<p class="source">{_source(run, task)}</p></div>'
    )


def _mean_speeds(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        found.setdefault(entry["method"], []).append(entry)
    return {
        method: {"relative_speed": sum(e["relative_speed"] or 0.0 for e in group) / len(group), "fired": {}}
        for method, group in found.items()
    }


def _cell(text: str, value: Any) -> str:
    return f'<td data-v="{esc("" if value is None else value)}">{esc(text)}</td>'


def _source(run: dict[str, Any], task: str) -> str:
    config, asked = run["config"], run["tasks"][task]
    world = f", world seed {config['world_seed']}" if config.get("world_seed") else ""
    return esc(
        f"Model {config['model']}, split {config['split']}{world}, {asked['n_images']} images. Intervals: "
        f"{run['bootstrap']['resamples']} bootstrap resamples of images. Speed: tokens per second in this run, batch "
        f"{config['batch_size']}; {machine.describe(run['machine'])}. "
        + "".join(f"{note} " for note in drawn_note(run))
        + "Toy results: they show that the instruments work."
    )
