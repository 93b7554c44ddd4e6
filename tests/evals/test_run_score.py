"""Scores are functions of the samples: they equal the metrics' own scorers, and a re-scored run its results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_eval
import numpy as np
import pytest

from mmfix_evals import stats
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.metrics import chair, pope
from mmfix_evals.plan import RunConfig
from mmfix_evals.progress import Reporter
from mmfix_evals.rescore import rescore
from mmfix_evals.run import run
from mmfix_evals.scoring import Answers
from mmfix_evals.speed import speed_entries
from mmfix_evals.tasks import base
from mmfix_evals.tasks.chair import repeated_fourgrams


@pytest.fixture(scope="module", autouse=True)
def _tasks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        fake_eval.register(patch, fake_eval.FakePope(), fake_eval.FakeChair())
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    config = RunConfig("fake", ("fake-pope", "fake-chair"), ("greedy", "var", "vhr"), out, limit=12, resamples=60)
    run(config, ["mmfix"], Reporter(quiet=True), lambda _: fake_eval.FakeDecoder())
    return out


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "results.json").read_text()))


@pytest.fixture(scope="module")
def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def value(entries: list[dict[str, Any]], **wanted: Any) -> Any:
    found = [e for e in entries if all(e[name] == given for name, given in wanted.items())]
    assert len(found) == 1, wanted
    return found[0]


def test_pope_values_equal_the_scorer(results: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    for split in ("random", "adversarial"):
        chosen = [s for s in samples if (s["split"], s["method"]) == (split, "var")]
        expected = pope.score(chosen, [{"answer": s["response"]} for s in chosen])
        for metric in ("accuracy", "precision", "recall", "f1", "yes_ratio", "n_unparsed"):
            found = value(results["metrics"], task="fake-pope", split=split, method="var", metric=metric)
            assert found["value"] == getattr(expected, metric)


def test_chair_values_equal_the_scorer(results: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    chosen = [s for s in samples if (s["task"], s["method"]) == ("fake-chair", "greedy")]
    truth = {s["image"]: set(s["ground_truth"]) for s in chosen}
    expected = chair.Chair().score([{"image_id": s["image"], "caption": s["response"]} for s in chosen], truth)
    for metric in ("chair_s", "chair_i", "recall", "precision", "f1", "length"):
        found = value(results["metrics"], task="fake-chair", method="greedy", metric=metric)
        assert found["value"] == getattr(expected, metric)
    hallucinated = [{m["node"] for m in s["mentions"] if m["hallucinated"]} for s in chosen]
    share = sum("car" in nodes for nodes in hallucinated) / sum(map(len, hallucinated))
    assert value(results["metrics"], task="fake-chair", method="greedy", metric="prior_share")["value"] == share


def test_intervals_draw_pictures_not_questions(results: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    chosen = [s for s in samples if (s["split"], s["method"]) == ("popular", "vhr")]
    rows = [list(pope.counts(s["label"], s["response"]).values()) for s in chosen]
    names, counts = stats.by_cluster([s["image"] for s in chosen], rows)
    expected = stats.bootstrap(counts, pope.METRICS["f1"], resamples=60, seed=0)
    found = value(results["metrics"], task="fake-pope", split="popular", method="vhr", metric="f1")
    assert (found["ci_low"], found["ci_high"], found["n_images"]) == (expected.low, expected.high, len(names))


def test_the_macro_mean_is_the_mean_of_the_splits(results: dict[str, Any]) -> None:
    for metric in ("accuracy", "f1"):
        splits = [
            value(results["metrics"], task="fake-pope", split=split, method="var", metric=metric)["value"]
            for split in ("random", "popular", "adversarial")
        ]
        macro = value(results["metrics"], task="fake-pope", split="macro", method="var", metric=metric)
        assert macro["value"] == pytest.approx(np.mean(splits), abs=1e-12)
        assert macro["n"] == 72


def test_differences_are_paired_and_tested(results: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    wanted = {"task": "fake-pope", "split": "random", "metric": "accuracy"}
    entry = value(results["comparisons"], method="var", **wanted)
    before, after = (value(results["metrics"], method=method, **wanted)["value"] for method in ("greedy", "var"))
    assert entry["difference"] == pytest.approx(after - before, abs=1e-12)
    right = {
        method: {
            s["doc_id"]: s["verdicts"]["official"] == s["label"]
            for s in samples
            if (s["task"], s["method"]) == ("fake-pope", method)
        }
        for method in ("greedy", "var")
    }
    docs = [s["doc_id"] for s in samples if (s["split"], s["method"]) == ("random", "greedy")]
    b = sum(right["greedy"][doc] and not right["var"][doc] for doc in docs)
    c = sum(right["var"][doc] and not right["greedy"][doc] for doc in docs)
    assert entry["mcnemar"] == {"outcome": "correct", "b": b, "c": c, "p": stats.mcnemar(b, c)}
    family = [
        e for e in results["comparisons"] if (e["task"], e["metric"]) == ("fake-pope", "f1") and e["split"] != "macro"
    ]
    assert len(family) == 6
    assert [e["p_holm"] for e in family] == stats.holm([e["p"] for e in family])


def test_speed_is_relative_to_the_baseline_on_common_documents() -> None:
    def sample(method: str, doc: str, seconds: float, tokens: int) -> dict[str, Any]:
        fired = {"var": [1.5, 4.0]} if method == "var" else {}
        same = {"split": "test", "data_split": "test", "error": None, "passes_per_token": 1.0}
        return {
            "method": method,
            "doc_id": doc,
            "image": doc,
            "seconds": seconds,
            "tokens": tokens,
            "fired": fired,
            **same,
        }

    listed = [sample("greedy", "a", 1.0, 10), sample("greedy", "b", 1.0, 10), sample("greedy", "c", 8.0, 10)]
    listed += [sample("var", "a", 2.0, 10), sample("var", "b", 2.0, 10)]
    answers = Answers.collect(base.get("fake-chair"), "pattern", listed, ["greedy", "var"])
    greedy, var = speed_entries(answers, "greedy")
    assert (greedy["tokens_per_second"], greedy["relative_speed"]) == (3.0, 1.0)
    assert (var["tokens_per_second"], var["relative_speed"]) == (5.0, 0.5)
    # Both documents took twice as long, so every resample says one half; the three of greedy differ among themselves.
    assert (var["relative_speed_low"], var["relative_speed_high"]) == (0.5, 0.5)
    assert greedy["tokens_per_second_low"] == pytest.approx(1.25)
    assert greedy["tokens_per_second_high"] == 10.0
    assert var["fired"] == {"var": {"fired": 3.0, "considered": 8.0, "share": 0.375}}
    assert (greedy["fired"], greedy["fired_share"], var["fired_share"]) == ({}, None, 0.375)


def test_a_rescored_run_has_the_same_digits(folder: Path, results: dict[str, Any]) -> None:
    again = rescore(folder)
    for name in ("metrics", "comparisons", "speed"):
        assert again[name] == results[name]


def test_rescoring_needs_samples_only(folder: Path, results: dict[str, Any], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "samples.jsonl").write_bytes((folder / "samples.jsonl").read_bytes())
    again = rescore(copy)
    values = {(e["task"], e["split"], e["method"], e["metric"]): e["value"] for e in again["metrics"]}
    assert values == {(e["task"], e["split"], e["method"], e["metric"]): e["value"] for e in results["metrics"]}


def test_rescoring_with_another_parser(folder: Path, samples: list[dict[str, Any]]) -> None:
    found = rescore(folder, "strict3way")
    chosen = [s for s in samples if (s["split"], s["method"]) == ("random", "greedy")]
    expected = pope.score(chosen, [{"answer": s["response"]} for s in chosen], "strict3way")
    entry = value(found["metrics"], task="fake-pope", split="random", method="greedy", metric="accuracy")
    assert entry["value"] == expected.accuracy
    assert found["scored_with"] == {"fake-pope": {"parser": "strict3way"}, "fake-chair": {"flavour": "pattern"}}
    with pytest.raises(UsageError, match="unknown parser 'strict'"):
        rescore(folder, "strict")


def test_samples_of_another_configuration_stay_out(folder: Path, results: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "mixed"
    config = RunConfig("fake", ("fake-pope",), ("greedy", "var"), out, limit=4, resamples=20)
    reporter = Reporter(quiet=True)
    run(replace(config, seed=9, methods=("greedy", "vhr")), ["mmfix"], reporter, lambda _: fake_eval.FakeDecoder())
    written = run(config, ["mmfix"], reporter, lambda _: fake_eval.FakeDecoder())
    assert rescore(out)["metrics"] == written["metrics"]


def test_a_folder_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run folder"):
        rescore(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"samples.jsonl: missing"):
        rescore(tmp_path)


def test_repeated_fourgrams() -> None:
    assert repeated_fourgrams("") == (0, 0)
    assert repeated_fourgrams("A cat sits on a mat.") == (0, 3)
    assert repeated_fourgrams("a b c d. A b, c d a b c d") == (5, 9)
