"""One page for all methods of a run: what each changes beyond chance, at what cost, and which change nothing."""

from __future__ import annotations

from typing import Any

from mmfix.registry import methods

POPE = "tinyworld-pope"
CHAIR = "tinyworld-chair"
SPLITS = ("random", "popular", "adversarial")
LEVEL = 0.05

# Column title, task, splits, metric, factor, and whether more is better (None: neither).
COLUMNS: tuple[tuple[str, str, tuple[str, ...], str, float, bool | None], ...] = (
    ("accuracy r / p / a", POPE, SPLITS, "accuracy", 100, True),
    ("F1 r / p / a", POPE, SPLITS, "f1", 100, True),
    ("yes ratio r / p / a", POPE, SPLITS, "yes_ratio", 100, None),
    ("CHAIR_s", CHAIR, ("test",), "chair_s", 100, False),
    ("CHAIR_i", CHAIR, ("test",), "chair_i", 100, False),
    ("recall", CHAIR, ("test",), "recall", 100, True),
    ("length", CHAIR, ("test",), "length", 1, None),
    ("repetition", CHAIR, ("test",), "repetition", 100, False),
)
NOTE = (
    "Each cell is the difference to greedy (greedy's own row holds values); x 100 except length. r / p / a: random, "
    "popular, adversarial questions. `*`: p < 0.05 after Holm's correction over splits and methods, from a bootstrap "
    "of images. Speed: tokens/s relative to greedy in this run, methods taking turns. Intervals and exact p stand on "
    "the methods' pages and in the record."
)


def page(record: dict[str, Any], source: str, matched: str = "") -> str:
    """Markdown of the page.

    Args:
        record: ``results.json`` of a run with greedy among its methods.
        source: where it lies.
        matched: a table of CHAIR at equal length, if there is one.
    """
    values = {(m["task"], m["split"], m["metric"], m["method"]): m["value"] for m in record["metrics"]}
    changes = {(c["task"], c["split"], c["metric"], c["method"]): c for c in record["comparisons"]}
    speed = _speeds(record)
    head = [title for title, *_ in COLUMNS]
    lines = [
        f"| method | {' | '.join(head)} | passes | speed | beyond chance |",
        "| --- " * (len(head) + 4) + "|",
    ]
    for arm in [m["name"] for m in record["methods"]]:
        cells, better, worse = [], [], []
        for title, task, splits, metric, factor, more in COLUMNS:
            shown = []
            for split in splits:
                change = changes.get((task, split, metric, arm))
                if arm == "greedy" or change is None:
                    shown.append(_number(values.get((task, split, metric, arm)), factor, ".1f"))
                    continue
                sure = change["p_holm"] is not None and change["p_holm"] < LEVEL
                shown.append(_number(change["difference"], factor, "+.1f") + ("*" if sure else ""))
                if sure and more is not None:
                    (better if (change["difference"] > 0) == more else worse).append(_name(title, split, splits))
            cells.append(" / ".join(shown))
        lines.append(
            f"| {_link(arm)} | {' | '.join(cells)} | {_passes(record, arm)} | {speed.get(arm, '')} | "
            f"{_verdict(arm, better, worse, record)} |"
        )
    asked = record["tasks"]
    told = "; ".join(f"{name}: {e['n_images']} images, {e['n_documents']} answers" for name, e in asked.items())
    left = record.get("left_out", {})
    parts = [
        "# Every method on the bundled model",
        f"Generated from `{source}`. Model {record['config']['model']}, split {record['config']['split']}, {told}; "
        f"bootstrap of {record['bootstrap']['resamples']} resamples, seed {record['bootstrap']['seed']}.",
        "\n".join(lines),
        NOTE,
        "These are results on a toy whose pictures are drawn; they say nothing about a large model.",
    ]
    if left:
        parts.append("Left out:\n\n" + "\n".join(f"- `{name}`: {reason}." for name, reason in left.items()))
    if matched:
        parts.append("## CHAIR at equal length\n\n" + matched)
    return "\n\n".join(parts) + "\n"


def _number(value: float | None, factor: float, form: str) -> str:
    return "n/a" if value is None else f"{factor * value:{form}}"


def _name(title: str, split: str, splits: tuple[str, ...]) -> str:
    return title.split(" r / p")[0] + (f" ({split})" if len(splits) > 1 else "")


def _link(arm: str) -> str:
    name = arm.partition(":")[0]
    return f"[{name}](methods/{name}.md)" if name in methods() else arm


def _passes(record: dict[str, Any], arm: str) -> str:
    found = [s["passes_per_token"] for s in record["speed"] if s["method"] == arm and s["task"] == CHAIR]
    return f"{found[0]:.2g}" if found and found[0] is not None else ""


def _speeds(record: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in record["speed"]:
        if entry["task"] == CHAIR and entry["relative_speed"] is not None:
            found[entry["method"]] = f"{entry['relative_speed']:.2f}x"
    return found


def _verdict(arm: str, better: list[str], worse: list[str], record: dict[str, Any]) -> str:
    if arm == "greedy":
        return "baseline"
    fired = [s["fired_share"] for s in record["speed"] if s["method"] == arm and s["fired_share"] is not None]
    said = []
    if better:
        said.append("better: " + ", ".join(better))
    if worse:
        said.append("worse: " + ", ".join(worse))
    if not said:
        said.append("nothing")
    if fired and max(fired) == 0:
        said.append("(it never fired)")
    elif fired and max(fired) < 0.01:
        said.append("(it hardly fired)")
    return "; ".join(said).replace("; (", " (")
