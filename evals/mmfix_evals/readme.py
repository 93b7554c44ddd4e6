"""Fill the generated parts of the README from the registry and from committed records.

``python -m mmfix_evals.readme`` rewrites them; ``--check`` says whether they are up to date; ``--example`` makes the
example anew (picture and answers of the bundled model) before it does.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from mmfix.registry import methods
from mmfix_evals import length_table, method_pages, sampled, summary, tables
from mmfix_evals.bench.table import speed_table
from mmfix_evals.tasks import leading

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path("evals/records/tinyworld")
EXAMPLE = Path("docs/example.json")
PICTURE = Path("docs/example.png")
METHODS_RECORD = "evals/records/tinyworld-methods"
ALL_RECORD = "evals/records/tinyworld-all"
SAMPLED_RECORD = "evals/records/tinyworld-sampled"
LEADING_RECORD = "evals/records/tinyworld-sycophancy"
SPEED = "kernels/benchmarks/results"
FULL_TABLE = Path("docs/results.md")
SUMMARY = Path("docs/all-methods.md")
DEMO, LATENCY = Path("docs/demo.md"), Path("docs/demo-latency.json")

LEADING_NOTE = (
    "`lqcd` is given the question without the claim, as its paper's rewriting would find it, and contrasts it with the "
    "question as asked; prompts are batched by question, so that it is slower than two rows per prompt. Whoever asks "
    "the plain question flips nothing: what the contrast does to it is accuracy_leading of `lqcd` against "
    "accuracy_plain of greedy."
)

SAMPLED_TITLE = "Sampled: what the plausibility cut does alone"
SAMPLED_NOTE = (
    "The cut keeps the best token, so that greedy decoding does not feel it. Papers draw tokens at temperature 1 and "
    "compare a contrast with its cut to drawing without one. Here the cut alone is compared with plain sampling, and "
    "every contrast with the cut alone."
)

COLUMNS = (
    ("POPE random", "tinyworld-pope", "random", "accuracy"),
    ("popular", "tinyworld-pope", "popular", "accuracy"),
    ("adversarial", "tinyworld-pope", "adversarial", "accuracy"),
    ("CHAIR_i ↓", "tinyworld-chair", "test", "chair_i"),
    ("recall", "tinyworld-chair", "test", "recall"),
)


def results_table(results: dict[str, Any]) -> str:
    """A compact table of a run: greedy with its interval, every method as its difference to greedy."""
    values = {(m["task"], m["split"], m["metric"], m["method"]): m for m in results["metrics"]}
    changes = {(c["task"], c["split"], c["metric"], c["method"]): c for c in results["comparisons"]}
    methods = list(dict.fromkeys(m["method"] for m in results["metrics"]))
    lines = [f"| method | {' | '.join(title for title, *_ in COLUMNS)} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name in methods:
        cells = []
        for _, task, split, metric in COLUMNS:
            change = changes.get((task, split, metric, name))
            entry = values[task, split, metric, name]
            if change is None:
                cells.append(_percent(entry["value"], entry["ci_low"], entry["ci_high"], ".1f"))
            else:
                shown = _percent(change["difference"], change["ci_low"], change["ci_high"], "+.1f")
                cells.append(f"{shown}, p = {change['p_holm']:.2g}")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def rarely_fired(results: dict[str, Any]) -> str:
    """A sentence on every method that changed less than one in a hundred of the places it looked at."""
    shares: dict[str, list[float]] = {}
    for entry in results["speed"]:
        if entry["fired_share"] is not None:
            shares.setdefault(entry["method"], []).append(entry["fired_share"])
    rare = {name: max(found) for name, found in shares.items() if max(found) < 0.01}
    return "".join(
        f"\n\n`{name}` hardly acts here: it changed at most {100 * share:.1f} % of the places it looked at, because "
        "this small model shows no massive activations. A difference of zero in its row says nothing about the method."
        for name, share in rare.items()
    )


def _percent(value: float, low: float, high: float, form: str) -> str:
    return f"{100 * value:{form}} [{100 * low:{form}}, {100 * high:{form}}]"


def example_block(example: dict[str, Any]) -> str:
    """The before/after at the top of the README."""
    return "\n".join(
        [
            f'<img src="{PICTURE}" width="144" align="left" alt="{example["alt"]}">',
            "",
            f"In the picture: {', '.join(example['present'])}.",
            "",
            f"**greedy**: {_marked(example['plain'], example['absent'])}",
            "",
            f"**{example['method']}**: {_marked(example['mitigated'], example['absent'])}",
            "",
            f'<br clear="left">Bundled model, {example["document"]}, chosen to show a change ({example["share"]}).',
        ]
    )


def latency_line(record: dict[str, Any]) -> str:
    """What visitors at once wait for the first token."""
    asked = f"{record['visitors']} visitors at once, {record['n']} answers"
    return (
        f"From pressing Compare to the first token, {asked}: median "
        f"{record['median_ms'] / 1000:.1f} s, p95 {record['p95_ms'] / 1000:.1f} s. A visitor waits for the comparisons "
        f"before; model {record['model']}, method {record['method']}, {record['machine']}, browsers included."
    )


def _marked(text: str, absent: list[str]) -> str:
    """Objects that are not in the picture in bold and struck out."""
    for name in sorted(absent, key=len, reverse=True):
        text = re.sub(rf"\b(an? {re.escape(name)})\b", r"~~\1~~", text)
    return text


def fill(text: str, name: str, content: str) -> str:
    """`text` with the region between ``<!-- name -->`` and ``<!-- /name -->`` replaced."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"there is no region {name!r} to fill")
    return pattern.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


def _tables(results: dict[str, Any]) -> str:
    """Every metric; then, where the record holds captions of two methods, CHAIR at equal length."""
    return "\n".join(filter(None, (tables.markdown(results, True), length_table.markdown(results))))


def generated() -> dict[Path, str]:
    """Every generated text file and its content."""
    results = json.loads((ROOT / RECORD / "results.json").read_text())
    example = json.loads((ROOT / EXAMPLE).read_text())
    readme = (ROOT / "README.md").read_text()
    readme = fill(readme, "methods", method_pages.by_kind(str(method_pages.FOLDER)))
    notes = " ".join(tables.footnotes(results))
    more = f"{notes} [All metrics]({FULL_TABLE}).{rarely_fired(results)}"
    readme = fill(readme, "results", f"{results_table(results)}\n\n{more}")
    readme = fill(readme, "example", example_block(example))
    speed = speed_table(ROOT / SPEED)
    readme = fill(
        readme, "speed", f"{speed.splitlines()[-1]} On a CPU, beside their peers: [docs/speed.md](docs/speed.md)."
    )
    full = f"# Results on TinyWorld\n\nGenerated from `{RECORD}/results.json`.\n\n{_tables(results)}\n"
    every = ROOT / METHODS_RECORD / "results.json"
    record = json.loads(every.read_text()) if every.is_file() else None
    if record is not None:
        full += f"\n# All core methods\n\nGenerated from `{METHODS_RECORD}/results.json`.\n\n"
        full += f"{_tables(record)}\n"
    led = ROOT / LEADING_RECORD / "results.json"
    apart = {}
    if led.is_file():
        found = json.loads(led.read_text())
        apart = {leading.METHOD: (found, f"{LEADING_RECORD}/results.json")}
        full += f"\n# Leading questions\n\nGenerated from `{LEADING_RECORD}/results.json`. {LEADING_NOTE}\n\n"
        full += f"{_tables(found)}\n"
    everything = ROOT / ALL_RECORD / "results.json"
    source, more = f"{METHODS_RECORD}/results.json", {}
    if everything.is_file():
        record, source = json.loads(everything.read_text()), f"{ALL_RECORD}/results.json"
        more[SUMMARY] = summary.page(record, source, length_table.markdown(record))
    below = {}
    drawn, beside = (ROOT / SAMPLED_RECORD / name for name in ("results.json", "against-cut.json"))
    if drawn.is_file() and SUMMARY in more:
        found, against = json.loads(drawn.read_text()), json.loads(beside.read_text())
        below = {name: sampled.paragraph(info, found, against, SAMPLED_RECORD) for name, info in methods().items()}
        more[SUMMARY] += (
            f"\n## {SAMPLED_TITLE}\n\n{SAMPLED_NOTE}\n\n{sampled.section(found, against, SAMPLED_RECORD)}\n"
        )
    if (ROOT / LATENCY).is_file():
        more[DEMO] = fill((ROOT / DEMO).read_text(), "latency", latency_line(json.loads((ROOT / LATENCY).read_text())))
    paced = f"# Speed\n\nGenerated from the records in `{SPEED}`.\n\n{speed}\n"
    pages = method_pages.pages(record, source, method_pages.families(), apart, below)
    return {Path("README.md"): readme, FULL_TABLE: full, Path("docs/speed.md"): paced, **pages, **more}


def make_example(method: str = "vhr", images: int = 100) -> None:
    """Describe dev pictures plainly and with `method`; keep the first where an invented object disappears."""
    from mmfix_decoding import Decoder
    from mmfix_evals.tinyworld import CAPTION_PROMPT, file_name, render, scenes
    from mmfix_evals.tinyworld.world import CATEGORIES

    decoder = Decoder.from_pretrained("tiny")
    items = scenes("dev", images)
    pictures = [render(item) for item in items]
    plain = [a.text for a in decoder.generate(pictures, CAPTION_PROMPT)]
    changed = [a.text for a in decoder.with_method(method).generate(pictures, CAPTION_PROMPT)]

    def invented(text: str, present: tuple[str, ...]) -> set[str]:
        return {n for n in CATEGORIES if n not in present and re.search(rf"\ban? {n}\b", text)}

    better = worse = 0
    shown: dict[str, Any] | None = None
    for item, picture, before, after in zip(items, pictures, plain, changed, strict=True):
        a, b = invented(before, item.categories), invented(after, item.categories)
        better, worse = better + (len(b) < len(a)), worse + (len(b) > len(a))
        kept = {n for n in item.categories if n in before} <= {n for n in item.categories if n in after}
        plainly = all(len(re.findall(rf"\ban? {n}\b", after)) == 1 for n in item.categories if n in after)
        if shown is None and b < a and kept and plainly and not b:
            picture.resize((288, 288), 0).save(ROOT / PICTURE)
            shown = {
                "method": method,
                "document": file_name("dev", item.image_id),
                "alt": f"TinyWorld picture of a {item.scene}",
                "present": list(item.categories),
                "plain": before,
                "mitigated": after,
                "absent": sorted(a | b),
            }
    if shown is None:
        raise SystemExit(f"{method} removed no invented object in {images} dev pictures; show another example")
    shown["share"] = f"of {images} dev pictures it named fewer absent objects in {better} and more in {worse}"
    (ROOT / EXAMPLE).write_text(json.dumps(shown, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Rewrite or check the generated parts."""
    parser = argparse.ArgumentParser(prog="python -m mmfix_evals.readme", description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--example", action="store_true")
    args = parser.parse_args(argv)
    if args.example:
        make_example()
    stale = [
        path for path, text in generated().items() if not (ROOT / path).is_file() or (ROOT / path).read_text() != text
    ]
    if args.check:
        for path in stale:
            print(f"{path} is not up to date; run `make readme`", file=sys.stderr)
        return 1 if stale else 0
    for path, text in generated().items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
