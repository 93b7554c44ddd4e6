"""``docs/methods``: a page per method, from its docstring, its parameters and the committed record of results."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmfix.method import MethodInfo
from mmfix.registry import methods

FOLDER = Path("docs/methods")
HEADINGS = {"Args:": "Parameters", "Raises:": "Errors", "Returns:": "Returns", "Example:": "Example"}
METRICS = (
    ("accuracy", "tinyworld-pope", "random", "accuracy"),
    ("popular", "tinyworld-pope", "popular", "accuracy"),
    ("adversarial", "tinyworld-pope", "adversarial", "accuracy"),
    ("yes ratio (adversarial)", "tinyworld-pope", "adversarial", "yes_ratio"),
    ("CHAIR_s ↓", "tinyworld-chair", "test", "chair_s"),
    ("CHAIR_i ↓", "tinyworld-chair", "test", "chair_i"),
    ("recall", "tinyworld-chair", "test", "recall"),
    ("length", "tinyworld-chair", "test", "length"),
    ("repetition", "tinyworld-chair", "test", "repetition"),
    ("flip rate ↓ (absent object claimed)", "tinyworld-sycophancy", "absent", "flip_rate"),
    ("right behind that claim", "tinyworld-sycophancy", "absent", "accuracy_leading"),
    ("flip rate ↓ (present object denied)", "tinyworld-sycophancy", "present", "flip_rate"),
    ("right behind that claim", "tinyworld-sycophancy", "present", "accuracy_leading"),
)
CONTROL = "plausibility"


def paper_link(info: MethodInfo) -> str:
    """The paper as a Markdown link where its identifier is one of arXiv's."""
    if not info.paper.startswith("arXiv:"):
        return info.paper
    number = info.paper.removeprefix("arXiv:")
    return f"[{number}](https://arxiv.org/abs/{number})"


def table(families: dict[str, str] | None = None) -> str:
    """A Markdown table of every method: paper, kind, passes per token, trained in the paper, families."""
    more = families is not None
    lines = [
        "| name | method | paper | kind | passes per token | trained in the paper |" + (" families |" if more else ""),
        "| --- | --- | --- | --- | ---: | --- |" + (" --- |" if more else ""),
    ]
    for name, info in methods().items():
        trained = "yes; used here without training" if info.trained_in_paper else "no"
        cells = [f"`{name}`", info.title, paper_link(info), info.kind, f"{info.passes:g}", trained]
        lines.append(f"| {' | '.join(cells + ([families.get(name, '')] if families is not None else []))} |")
    return "\n".join(lines)


def by_kind(link: str) -> str:
    """A short table: the methods of every kind, each a link to its page."""
    kinds: dict[str, list[str]] = {}
    for name, info in methods().items():
        kinds.setdefault(info.kind, []).append(f"[{name}]({link}/{name}.md)")
    lines = ["| what changes | methods |", "| --- | --- |"]
    lines += [f"| {kind} | {', '.join(listed)} |" for kind, listed in sorted(kinds.items())]
    return "\n".join(lines)


def pages(
    record: dict[str, Any] | None,
    source: str,
    families: dict[str, str],
    apart: Mapping[str, tuple[dict[str, Any], str]] | None = None,
    more: Mapping[str, str] | None = None,
) -> dict[Path, str]:
    """Path → text of the index and of every page.

    Args:
        record: ``results.json`` of a run with every method, or None.
        source: where that record lies, for the pages to say.
        families: method → how many of the tested families it runs on.
        apart: method → a record of its own and where it lies, for one that runs on a task of its own.
        more: method → what stands below its results.
    """
    index = f"# Methods\n\nGenerated from the docstrings; `mmfix methods --table` prints this.\n\n{table(families)}\n"
    found = {FOLDER / "README.md": index}
    for name, info in methods().items():
        known, place = (apart or {}).get(name, (record, source))
        text = page(name, info, known, place, families.get(name, ""))
        below = (more or {}).get(name, "")
        found[FOLDER / f"{name}.md"] = f"{text}\n{below}\n" if below else text
    return found


def page(name: str, info: MethodInfo, record: dict[str, Any] | None, source: str, families: str) -> str:
    """One method's page."""
    facts = [
        ("name", f"`{name}`"),
        ("paper", paper_link(info)),
        ("kind", info.kind),
        ("forward passes per token", f"{info.passes:g}"),
        ("trained in the paper", "yes; used here without training" if info.trained_in_paper else "no"),
        ("tested families", families or "not counted"),
    ]
    parts = [
        f"# {info.title}",
        "| | |\n| --- | --- |\n" + "\n".join(f"| {key} | {value} |" for key, value in facts),
        body(inspect.getdoc(info.cls) or ""),
        _relatives(name, info),
        "## Defaults\n\n" + _defaults(info),
        "## On the bundled model\n\n" + results(name, info, record, source),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _relatives(name: str, info: MethodInfo) -> str:
    """The methods that this one is a form of."""
    bases = [one for one, other in methods().items() if one != name and issubclass(info.cls, other.cls)]
    listed = ", ".join(f"[{one}]({one}.md)" for one in bases)
    return f"The equations and the parameters are those of {listed}." if bases else ""


def families() -> dict[str, str]:
    """Method → on how many of the tested model families it runs."""
    import json
    from importlib.resources import files

    found = json.loads((files("mmfix_evals") / "families.json").read_text())
    return {name: f"{entry['runs']} of {entry['of']}" for name, entry in found.items()}


def body(text: str) -> str:
    """A docstring as Markdown: literal blocks fenced, sections as headings, parameters as a list."""
    done: list[str] = []
    section, fence = "", ""
    for line in text.splitlines():
        if line in HEADINGS:
            fence = _close(done, fence)
            section = HEADINGS[line]
            done += [f"## {section}", ""]
            if section == "Example":
                fence = _open(done, "python")
            continue
        indented = line.startswith("    ") or not line
        if fence and not indented:
            fence = _close(done, fence)
        if fence:
            done.append(line.removeprefix("    "))
        elif section in ("Parameters", "Errors") and indented and line:
            done.append(_item(line[4:]))
        else:
            if line and not line.startswith(" "):
                section = section if section not in ("Parameters", "Errors") else ""
            opens = line.endswith("::")
            done.append(_inline(line[:-1] if opens else line))
            if opens:
                done.append("")
                fence = _open(done, "text")
    _close(done, fence)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(done)).replace("```text\n\n", "```text\n").strip()


def _open(done: list[str], language: str) -> str:
    done.append(f"```{language}")
    return language


def _close(done: list[str], fence: str) -> str:
    if fence:
        while not done[-1]:
            done.pop()
        done += ["```", ""]
    return ""


def _item(line: str) -> str:
    """One line of Args or Raises: an item, or the rest of one."""
    found = re.match(r"([A-Za-z_][\w, ]*?): (.*)", line)
    if line.startswith(" ") or found is None:
        return f"  {_inline(line.strip())}"
    return f"- `{found[1]}`: {_inline(found[2])}"


def _inline(line: str) -> str:
    line = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", line)
    return line.replace("``", "`")


def _defaults(info: MethodInfo) -> str:
    if not info.params:
        return "It has no parameters."
    lines = ["| parameter | default | range | |", "| --- | --- | --- | --- |"]
    for name, one in info.params.items():
        ends = [f"{end:g}" if end is not None else "" for end in (one.low, one.high)]
        span = "" if not any(ends) else f"{ends[0] or '-inf'} to {ends[1] or 'inf'}"
        lines.append(f"| `{name}` | `{one.default!r}` | {span} | {one.help} |")
    return "\n".join(lines)


def results(name: str, info: MethodInfo, record: dict[str, Any] | None, source: str) -> str:
    """The method's rows of the record beside greedy and, for contrasts, beside the plausibility cut alone."""
    if record is None:
        return "Not measured."
    names = {m["method"] for m in record["metrics"]}
    arms = [m["name"] for m in record["methods"] if [one["name"] for one in m["spec"]] == [name]]
    if not names & set(arms):
        return f"Not measured: {record['left_out'][name]}." if name in record.get("left_out", {}) else "Not measured."
    name = next(arm for arm in arms if arm in names)  # perhaps with parameters
    shown = [name, *([CONTROL] if info.kind == "contrast" and info.name != CONTROL and CONTROL in names else [])]
    values = {(m["task"], m["split"], m["metric"], m["method"]): m for m in record["metrics"]}
    changes = {(c["task"], c["split"], c["metric"], c["method"]): c for c in record["comparisons"]}
    head = " | ".join(f"`{one}` against greedy | p" for one in shown)
    lines = [f"| metric | greedy | {head} |", "| --- " * (2 + 2 * len(shown)) + "|"]
    for title, *key in METRICS:
        task, split, metric = key
        plain = values.get((task, split, metric, "greedy"))
        if plain is None:
            continue
        scale = 1 if metric == "length" else 100
        cells = [_shown(plain["value"], plain["ci_low"], plain["ci_high"], scale, ".1f")]
        for one in shown:
            change = changes.get((task, split, metric, one))
            if change is None:
                cells += ["-", "-"]
            else:
                cells.append(_shown(change["difference"], change["ci_low"], change["ci_high"], scale, "+.1f"))
                cells.append(f"{change['p_holm']:.2g}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    told = [f"Values x 100 except length, with 95 % intervals by images; p after Holm. Source: `{source}`."]
    fired = [s["fired_share"] for s in record["speed"] if s["method"] == name and s["fired_share"] is not None]
    if fired and max(fired) < 0.01:
        told.append(
            f"It changed at most {100 * max(fired):.1f} % of the places it looked at: these rows say nothing about it."
        )
    return "\n".join(lines) + "\n\n" + " ".join(told)


def _shown(value: float | None, low: float | None, high: float | None, scale: float, form: str) -> str:
    if value is None or low is None or high is None:
        return "n/a"
    return f"{scale * value:{form}} [{scale * low:{form}}, {scale * high:{form}}]"
