"""What the table says and how it looks outside a terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import fake_eval
import pytest

from mmfix_evals import tables
from mmfix_evals.plan import RunConfig
from mmfix_evals.progress import Reporter
from mmfix_evals.run import run
from mmfix_evals.tasks import base

pytestmark = pytest.mark.usefixtures("fake_tasks")


def make(tmp_path: Path, fires: bool = True, methods: tuple[str, ...] = ("greedy", "var+vhr", "vhr")) -> dict[str, Any]:
    config = RunConfig("fake", ("fake-pope", "fake-chair"), methods, tmp_path / "run", limit=8, resamples=40)
    return run(config, ["mmfix"], Reporter(quiet=True), lambda _: fake_eval.FakeDecoder(fires=fires))


def text(results: dict[str, Any], **options: Any) -> str:
    file = io.StringIO()
    tables.print_results(results, file, **options)
    return file.getvalue()


def test_the_table_is_ascii_aligned_and_complete_outside_a_terminal(tmp_path: Path) -> None:
    results = make(tmp_path)
    printed = text(results)
    assert printed.isascii()
    assert "\x1b" not in printed
    lines = printed.splitlines()
    assert lines[0].split() == ["metric", "method", "value", "95%", "CI", "diff", "95%", "CI", "p", "speed", "fired"]
    titles = [line for line in lines if line.startswith("fake-")]
    assert titles[0] == "fake-pope / random (16 questions, 8 images)"
    assert titles[3] == "fake-pope / mean of the splits (48 questions, 8 images)"
    entry = next(e for e in results["metrics"] if (e["split"], e["method"]) == ("random", "vhr"))
    row = next(line for line in lines if line.split()[:1] == ["vhr"])
    assert row.split()[1] == f"{100 * entry['value']:.1f}"
    assert row.endswith("75.0%")
    composed = next(line for line in lines if line.split()[:1] == ["var+vhr"])
    assert composed.endswith("75.0% + 75.0%")
    assert "8 images, 48 questions, parser official" in printed
    assert "40 bootstrap resamples of images, seed 0" in printed


def test_a_difference_has_its_own_interval(tmp_path: Path) -> None:
    results = make(tmp_path)
    section = tables.sections(results)[0]
    row = next(row.cells for row in section.rows if row.cells[:2] == ("accuracy", "vhr"))
    wanted = next(
        e
        for e in results["comparisons"]
        if (e["split"], e["metric"], e["method"]) == ("random", "accuracy", "vhr") and e["task"] == "fake-pope"
    )

    def signed(value: float) -> str:
        return f"{100 * value:+.1f}".replace("+0.0", "0.0").replace("-0.0", "0.0")

    assert row[4] == signed(wanted["difference"])
    assert row[5] == f"[{signed(wanted['ci_low'])}, {signed(wanted['ci_high'])}]"
    greedy = next(row.cells for row in section.rows if row.cells[:2] == ("accuracy", "greedy"))
    assert greedy[4:7] == ("-", "-", "-")


def test_a_method_that_never_fired_is_flagged(tmp_path: Path) -> None:
    printed = text(make(tmp_path, fires=False))
    assert "NEVER FIRED: vhr (fake-pope): identical to greedy by construction." in printed
    assert "NEVER FIRED: var in var+vhr (fake-chair): it changed nothing there." in printed
    assert "never + never" in printed
    assert "NEVER" not in text(make(tmp_path / "other"))


def test_every_metric_on_request(tmp_path: Path) -> None:
    results = make(tmp_path)
    assert "prior_share" not in text(results)
    shown = text(results, every_metric=True)
    assert all(name in shown for name in ("precision", "repetition", "prior_share"))


def test_numbers_are_percent_except_lengths_and_counts() -> None:
    pope, chair = base.get("fake-pope"), base.get("fake-chair")
    assert tables.formatter(pope.metric("accuracy"))(0.8666) == "86.7"
    assert tables.formatter(pope.metric("accuracy"), signed=True)(0.012) == "+1.2"
    assert tables.formatter(pope.metric("accuracy"), signed=True)(-0.0001) == "0.0"
    assert tables.formatter(pope.metric("n_unparsed"))(3) == "3"
    assert tables.formatter(chair.metric("length"))(23.44) == "23.4"
    assert tables.formatter(chair.metric("chair_i"))(None) == "n/a"
    assert tables.p_value(0.0004) == "<0.001"


def test_gains_follow_the_direction_of_the_metric() -> None:
    pope, chair = base.get("fake-pope"), base.get("fake-chair")
    up = {"difference": 0.1, "p_holm": 0.01}
    assert tables.gain(pope.metric("accuracy"), up) == 1
    assert tables.gain(chair.metric("chair_i"), up) == -1
    assert tables.gain(pope.metric("yes_ratio"), up) == 0
    assert tables.gain(pope.metric("accuracy"), {**up, "p_holm": 0.2}) == 0


def test_markdown_has_the_same_cells(tmp_path: Path) -> None:
    results = make(tmp_path)
    markdown = tables.markdown(results)
    for section in tables.sections(results):
        assert f"**{section.title}**" in markdown
        for row in section.rows:
            assert f"| {' | '.join(row.cells)} |" in markdown


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    results = {**make(tmp_path), "status": "interrupted", "errors": [{"error": "x"}]}
    printed = text(results)
    assert "This run is interrupted" in printed
    assert "1 answers failed and are not scored" in printed


def test_methods_that_were_trained_in_their_paper_are_named_under_every_table(tmp_path: Path) -> None:
    results = make(tmp_path)
    assert not any("Trained in the paper" in note for note in tables.footnotes(results))
    results["methods"][1]["trained"] = True
    name = results["methods"][1]["name"]
    assert f"Trained in the paper; used here without training: {name}." in tables.footnotes(results)


def test_calibrated_values_are_named_under_every_table(tmp_path: Path) -> None:
    results = make(tmp_path)
    assert not any("Calibrated" in note for note in tables.footnotes(results))
    arm = results["methods"][1]
    used = {"values": {"tau": 2.5, "sink_dims": [3]}, "data": "own pictures"}
    arm["calibrated"] = {arm["name"]: used, "act": {"values": {"heads": []}}}
    said = f"Calibrated for this model beforehand: {arm['name']} (tau, sink_dims; own pictures); act in {arm['name']}"
    assert f"{said} (heads)." in tables.footnotes(results)
    used["data"] = f"TinyWorld {results['config']['split']}"
    assert any("on the very split that is measured here" in note for note in tables.footnotes(results))


def test_a_run_that_sampled_says_what_greedy_is(tmp_path: Path) -> None:
    results = make(tmp_path)
    assert not any("drawn" in note for note in tables.footnotes(results))
    task = next(iter(results["tasks"]))
    results["tasks"][task]["generation"] = {"do_sample": True}
    assert any("greedy is the plain model, sampled" in note for note in tables.footnotes(results))
