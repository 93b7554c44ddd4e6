"""What a contrast adds to the plausibility cut, which acts only where tokens are drawn: the record of a sampled run.

Under greedy decoding the cut keeps the best token and changes nothing. Papers sample, and compare a contrast together
with its cut to sampling without one; so the cut alone stands between the two, and the contrast is compared with it.
"""

from __future__ import annotations

from typing import Any

from mmfix.method import MethodInfo
from mmfix_evals.method_pages import CONTROL, METRICS

LEVEL = 0.05
Changes = dict[tuple[str, str, str, str], dict[str, Any]]


def section(record: dict[str, Any], against: dict[str, Any], source: str) -> str:
    """Markdown: the cut against plain sampling, and every contrast against the cut.

    Args:
        record: ``results.json`` of a run that sampled, with ``greedy`` (the plain model, sampled like the others) and
            ``plausibility`` among its methods.
        against: ``mmfix eval compare RUN --baseline plausibility --json`` of that run.
        source: where both lie.
    """
    shown = [one for one in METRICS if _values(record).get((*one[1:], "greedy"))]
    head = ["method", "compared with", *(title for title, *_ in shown)]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    plain = [_value(_values(record)[(*key, "greedy")], key[-1]) for _, *key in shown]
    lines.append(f"| sampling | | {' | '.join(plain)} |")
    arms = [m["name"] for m in record["methods"] if m["name"] not in ("greedy", CONTROL)]
    rows = [(CONTROL, "sampling", _changes(record)), *((arm, "the cut alone", _changes(against)) for arm in arms)]
    for arm, other, changes in rows:
        cells = [_change(changes.get((*key, arm)), key[-1]) for _, *key in shown]
        lines.append(f"| {arm} | {other} | {' | '.join(cells)} |")
    images = " and ".join(f"{entry['n_images']} images ({name})" for name, entry in record["tasks"].items())
    bootstrap = record["bootstrap"]
    told = (
        f"Generated from `{source}`: {_settings(record)}, {images}, bootstrap of {bootstrap['resamples']} resamples of "
        f"images, seed {bootstrap['seed']}; every method draws with the same seed. Values and differences x 100 except "
        "length; `*`: p < 0.05 after Holm's correction over splits and methods."
    )
    return f"{told}\n\n" + "\n".join(lines)


def paragraph(info: MethodInfo, record: dict[str, Any], against: dict[str, Any], source: str) -> str:
    """For a method's page: what the cut alone did, and what the method adds to it where it was sampled."""
    if info.kind != "contrast":
        return "No cut of implausible tokens is part of it; what such a cut does alone: [sampled](../all-methods.md)."
    arms = [m["name"] for m in record["methods"] if [one["name"] for one in m["spec"]] == [info.name]]
    compared = [(CONTROL, "it", _changes(record))]
    compared += [(arm, "the cut", _changes(against)) for arm in arms if info.name != CONTROL]
    head = ["metric", "sampling", *(cell for arm, other, _ in compared for cell in (f"`{arm}` against {other}", "p"))]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for title, *key in METRICS:
        plain = _values(record).get((*key, "greedy"))
        if plain is None:
            continue
        cells = [title, _value(plain, key[-1], True)]
        for arm, _, changes in compared:
            change = changes.get((*key, arm))
            cells += ["-", "-"] if change is None else [_change(change, key[-1], True), f"{change['p_holm']:.2g}"]
        lines.append(f"| {' | '.join(cells)} |")
    told = f"Values x 100 except length, with 95 % intervals by images; p after Holm. Source: `{source}`."
    title = f"With tokens drawn ({_settings(record)}), where the plausibility cut acts:"
    return "\n".join([title, "", *lines, "", told])


def _settings(record: dict[str, Any]) -> str:
    told = next(iter(record["tasks"].values()))["generation"]
    cut = f", top_k {told['top_k']}" if told.get("top_k") else ", no other cut"
    return f"temperature {told.get('temperature', 1.0):g}{cut}"


def _values(record: dict[str, Any]) -> Changes:
    return {(m["task"], m["split"], m["metric"], m["method"]): m for m in record["metrics"]}


def _changes(record: dict[str, Any]) -> Changes:
    return {(c["task"], c["split"], c["metric"], c["method"]): c for c in record["comparisons"]}


def _value(entry: dict[str, Any], metric: str, interval: bool = False) -> str:
    return _number(entry, "value", metric, ".1f", interval)


def _change(entry: dict[str, Any] | None, metric: str, interval: bool = False) -> str:
    if entry is None:
        return "-"
    sure = not interval and entry["p_holm"] is not None and entry["p_holm"] < LEVEL
    return _number(entry, "difference", metric, "+.1f", interval) + ("*" if sure else "")


def _number(entry: dict[str, Any], field: str, metric: str, form: str, interval: bool) -> str:
    scale = 1 if metric == "length" else 100
    numbers = [entry[name] for name in (field, "ci_low", "ci_high")]
    if any(number is None for number in numbers):
        return "n/a"
    middle, low, high = (f"{scale * number:{form}}" for number in numbers)
    return f"{middle} [{low}, {high}]" if interval else middle
