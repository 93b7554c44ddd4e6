"""CHAIR at equal length: the longer caption is cut, never inside an object, and both are scored again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fake_eval
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mmfix_evals import length_table, report, stats
from mmfix_evals.cli.app import app
from mmfix_evals.compare import compare
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.length_matched import METRICS, cut, matched_entries
from mmfix_evals.metrics.chair import Chair
from mmfix_evals.plan import RunConfig
from mmfix_evals.progress import Reporter
from mmfix_evals.rescore import rescore
from mmfix_evals.run import run
from mmfix_evals.scoring import Answers, Settings
from mmfix_evals.tasks import get
from mmfix_evals.tasks.chair import LIMIT

pytestmark = pytest.mark.usefixtures("fake_tasks")

WORDS = [
    "a",
    "hot",
    "dog",
    "cat",
    "toilet",
    "seat",
    "fire",
    "hydrant",
    "and",
    "on",
    "baby",
    "elephant",
    ".",
    ",",
    "st.",
]
LONG = ("There is a car. There is a hot dog and a bed.", "Two cats sit on a seat near the toilet.", "A dog.", "A cat")
SHORT = ("A cat and a book on it.", "A dog on a seat.", "A dog is here, and a bed.", "")


def answers(**captions: tuple[str, ...]) -> Answers:
    """The captions of methods about the same pictures, in each of which are a cat and a dog."""
    samples = [
        {"key": f"{method}{i}", "task": "fake-chair", "method": method, "split": "test", "data_split": "test",
         "doc_id": str(i), "image": f"{i}.png", "response": text, "ground_truth": ["cat", "dog"], "expected": ["car"]}
        for method, texts in captions.items() for i, text in enumerate(texts)
    ]  # fmt: skip
    return Answers.collect(get("fake-chair"), "pattern", samples, list(captions))


def make(out: Path, *methods: str, tasks: tuple[str, ...] = ("fake-chair", "fake-pope")) -> Path:
    config = RunConfig("fake", tasks, methods, out, limit=8, resamples=50)
    run(config, ["mmfix"], Reporter(quiet=True), lambda _: fake_eval.FakeDecoder())
    return out


def test_counted_by_hand() -> None:
    # Tokens: 13 and 8, 10 and 6, 3 and 9, 2 and 0. Scored: "There is a car . There is a" beside all eight of the other.
    both = answers(greedy=LONG, var=SHORT)
    found = {e["metric"]: e for e in matched_entries(both, both, [("greedy", "var")], Settings(50))}
    assert tuple(found) == METRICS
    # greedy names car | cat, chair | dog | nothing; var names cat, book | dog, chair | dog | nothing.
    assert found["chair_s"]["baseline_value"] == found["chair_s"]["value"] == 2 / 4
    assert (found["chair_i"]["baseline_value"], found["chair_i"]["value"]) == (2 / 4, 2 / 5)
    assert (found["recall"]["baseline_value"], found["recall"]["value"]) == (2 / 8, 3 / 8)
    assert found["length"]["baseline_value"] == found["length"]["value"] == (8 + 6 + 3 + 0) / 4
    assert {(e["n"], e["n_images"], e["n_cut"], e["baseline_n_cut"]) for e in found.values()} == {(4, 4, 1, 3)}
    assert found["chair_i"]["difference"] == pytest.approx(2 / 5 - 2 / 4)
    # Whole: greedy names car, hot dog, bed | cat (chair is silent beside toilet), toilet | dog | cat: 4 of 7 wrong.
    assert found["chair_i"]["uncut_difference"] == pytest.approx(3 / 6 - 4 / 7)
    assert found["chair_s"]["mcnemar"] == {"outcome": "hallucinated_caption", "b": 0, "c": 0, "p": 1.0}


def test_the_bootstrap_is_that_of_the_cut_captions() -> None:
    both = answers(greedy=LONG, var=SHORT)
    entry = next(
        e for e in matched_entries(both, both, [("greedy", "var")], Settings(50, 3)) if e["metric"] == "recall"
    )
    named = {"greedy": [0, 1, 1, 0], "var": [1, 1, 1, 0]}  # of cat and dog, in the first tokens
    counts = {method: np.array([[covered, 2] for covered in listed]) for method, listed in named.items()}
    recall = lambda c: stats.ratio(c[..., 0], c[..., 1])  # noqa: E731
    expected = stats.paired(counts["var"], counts["greedy"], recall, resamples=50, seed=3)
    assert (entry["difference"], entry["ci_low"], entry["ci_high"]) == (expected.value, expected.low, expected.high)
    own = stats.bootstrap(counts["var"], recall, resamples=50, seed=3)
    assert (entry["value_low"], entry["value_high"]) == (own.low, own.high)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=14), st.lists(st.sampled_from(WORDS), max_size=14))
def test_lengths_are_equal_and_no_object_is_cut(one: list[str], other: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fake_eval.register(patch, fake_eval.FakeChair())
        both = answers(greedy=(" ".join(one),), var=(" ".join(other),))
    left, right = (side.by_method[name]["test"]["0"] for side, name in zip(cut(both, both, "greedy", "var"), ("greedy", "var"), strict=True))  # fmt: skip # noqa: E501
    whole = [Chair().analyse(sample["response"]) for sample in (left, right)]
    assert left[LIMIT] == right[LIMIT] == min(len(analysis.tokens) for analysis in whole)
    for sample, (tokens, mentions) in zip((left, right), whole, strict=True):
        kept = Chair().analyse(sample["response"], sample[LIMIT])
        end = kept.tokens[-1].end if kept.tokens else 0
        assert kept.tokens == tokens[: sample[LIMIT]]
        assert not any(mention.start < end < mention.end for mention in mentions)
        assert [m for m in kept.mentions if m.word != "seat"] == [
            m for m in mentions if m.end <= end and m.word != "seat"
        ]


def test_a_run_holds_what_its_cut_texts_give_when_scored_by_themselves(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", "greedy", "var")
    listed = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    texts = {m: {s["image"]: s["response"] for s in listed if s["method"] == m and s["task"] == "fake-chair"}
             for m in ("greedy", "var")}  # fmt: skip
    records: dict[str, list[dict[str, Any]]] = {"greedy": [], "var": []}
    for image in texts["greedy"]:
        tokens = {method: Chair().analyse(texts[method][image]).tokens for method in texts}
        shorter = min(map(len, tokens.values()))
        for method, found in tokens.items():
            text = texts[method][image][: found[shorter - 1].end]
            records[method].append({"image_id": image, "caption": text})
    truth = {image: {"cat", "dog"} for image in texts["greedy"]}
    scores = {method: Chair().score(records[method], truth) for method in records}
    entries = json.loads((folder / "results.json").read_text())["length_matched"]
    assert [e["metric"] for e in entries] == list(METRICS)
    for entry in entries:
        assert entry["value"] == getattr(scores["var"], entry["metric"])
        assert entry["baseline_value"] == getattr(scores["greedy"], entry["metric"])
    assert rescore(folder)["length_matched"] == compare([folder], match_length=True).entries == entries


def test_across_runs_as_within_one(tmp_path: Path) -> None:
    inside = compare([make(tmp_path / "both", "greedy", "var")], match_length=True)
    across = compare([make(tmp_path / "a", "greedy"), make(tmp_path / "b", "var")], match_length=True)
    added = {"baseline_run": str(tmp_path / "a"), "run": str(tmp_path / "b")}
    assert across.entries == [{**entry, **added} for entry in inside.entries]
    same = compare([tmp_path / "a", make(tmp_path / "again", "greedy")], match_length=True).entries
    assert {(e["difference"], e["n_cut"], e["p"]) for e in same} == {(0.0, 0, 1.0)}
    assert "var - greedy" in {row.cells[1] for s in length_table.sections(across.entries) for row in s.rows}


def test_holm_counts_the_methods(tmp_path: Path) -> None:
    entries = compare([make(tmp_path / "a", "greedy", "var", "vhr")], match_length=True).entries
    family = [e for e in entries if e["metric"] == "recall"]
    assert [e["p_holm"] for e in family] == stats.holm([e["p"] for e in family])
    assert len(family) == 2


def test_the_command(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", "greedy", "var")
    called = CliRunner().invoke(app, ["eval", "compare", str(folder), "--match-length"])
    assert called.exit_code == 0
    assert "fake-chair / test, captions of equal length" in called.stdout
    assert "fake-pope" not in called.stdout
    assert "a double word being one" in called.stdout
    printed = CliRunner().invoke(app, ["eval", "compare", str(folder), "--match-length", "--json"])
    assert json.loads(printed.stdout)["length_matched"] == compare([folder], match_length=True).entries


def test_runs_without_captions_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", "greedy", "var", tasks=("fake-pope",))
    with pytest.raises(UsageError, match="no captions to match in length"):
        compare([folder], match_length=True)
    assert json.loads((folder / "results.json").read_text())["length_matched"] == []
    assert length_table.markdown(json.loads((folder / "results.json").read_text())) == ""
    asked = Answers(get("fake-pope"), "official", "test", {})
    with pytest.raises(UsageError, match="fake-pope has no captions"):
        matched_entries(asked, asked, [], Settings())


def test_a_damaged_caption_is_named(tmp_path: Path) -> None:
    both = answers(greedy=LONG, var=SHORT)
    both.by_method["var"]["test"]["1"]["response"] = None
    with pytest.raises(DataError, match=r"the sample of fake-chair 1 \(var\) cannot be scored"):
        matched_entries(both, both, [("greedy", "var")], Settings(50))


def test_tables_need_the_results_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.page, "all_plots", lambda runs: [])  # seconds of plots that nobody looks at here
    folder = make(tmp_path / "a", "greedy", "var")
    (folder / "samples.jsonl").unlink()
    results = json.loads((folder / "results.json").read_text())
    text = length_table.markdown(results)
    assert "| metric | method | base | value | diff | 95% CI | p | p (Holm) | diff uncut |" in text
    [section] = length_table.sections(results["length_matched"])
    assert [row.cells[0] for row in section.rows] == list(METRICS)
    length = section.rows[-1].cells
    assert length[2] == length[3]
    assert length[4:8] == ("-",) * 4
    page = report.html(report.read([folder]))
    assert "CHAIR of captions of equal length" in page
    assert ">diff uncut</button></th>" in page
    called = CliRunner().invoke(app, ["eval", "report", str(folder), "--format", "md"])
    assert "captions of equal length**" in called.stdout
    del results["length_matched"]  # of an older version
    (folder / "results.json").write_text(json.dumps(results))
    assert "captions of equal length" not in report.html(report.read([folder]))
