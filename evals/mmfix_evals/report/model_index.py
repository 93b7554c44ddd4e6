"""The ``model-index`` part of a Hugging Face model card, with the interval beside every value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mmfix_evals import tasks
from mmfix_evals.report.source import Reported


def entries(run: Reported) -> list[dict[str, Any]]:
    """One model entry per method; a metric that is undefined is left out."""
    return [{"name": _name(run, method), "results": _results(run, method)} for method in run.methods]


def _name(run: Reported, method: str) -> str:
    model = str(run.results["config"]["model"])
    return model if method == "greedy" else f"{model} with mmfix {method}"


def _results(run: Reported, method: str) -> list[dict[str, Any]]:
    found = [e for e in run.results["metrics"] if e["method"] == method and e["value"] is not None]
    listed = []
    for task, split in dict.fromkeys((e["task"], e["split"]) for e in found):
        known, entry = tasks.get(task), run.results["tasks"][task]
        kind = "image-to-text" if "mentions" in known.columns else "visual-question-answering"
        metrics = []
        for e in found:
            if (e["task"], e["split"]) != (task, split):
                continue
            metric = known.metric(e["metric"])
            if metric.headline:
                spread = {"ci_low": e["ci_low"], "ci_high": e["ci_high"], "n": e["n"], "n_images": e["n_images"]}
                metrics.append(
                    {"type": metric.name, "name": f"{metric.name} ({split})", "value": e["value"], "args": spread}
                )
        if metrics:
            dataset = {
                "type": task,
                "name": known.title,
                "split": split,
                "revision": entry["data"]["documents_sha256"],
                "args": {known.flavour_field: entry.get(known.flavour_field), "images": entry["n_images"]},
            }
            listed.append({"task": {"type": kind, "name": known.title}, "dataset": dataset, "metrics": metrics})
    return listed


def model_index(runs: Sequence[Reported]) -> str:
    """YAML for the head of a model card."""
    lines = ["model-index:"]
    for run in runs:
        for entry in entries(run):
            lines += _yaml([entry], 0)
    return "\n".join(lines) + "\n"


def _yaml(value: Any, depth: int) -> list[str]:
    """Block YAML with JSON scalars, which are YAML too: nothing has to be guessed about quoting."""
    pad = "  " * depth
    lines: list[str] = []
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, (dict, list)) and item:
                lines += [f"{pad}{key}:", *_yaml(item, depth + (0 if isinstance(item, list) else 1))]
            else:
                lines.append(f"{pad}{key}: {json.dumps(item, ensure_ascii=False)}")
    else:
        for item in value:
            inner = _yaml(item, depth + 1)
            lines += [f"{pad}- {inner[0].strip()}", *inner[1:]]
    return lines
