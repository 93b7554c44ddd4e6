"""POPE scores: equal to the published scripts, and honest where those are not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfix_evals import files, stats
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.metrics import pope

SETS = ["edge", "coco_random", "coco_popular", "coco_adversarial", "all_no", "all_yes", "perfect"]
SCRIPTS = {
    "official": "pope_official_evaluate.py",
    "opera": "opera_pai_recorder(pope_ans.py)",
    "vcd": "vcd_eval_pope.py",
    "lmms": "lmms_eval",
    "vlmeval": "vlmevalkit_exact_matching",
}


def questions(*labels: str) -> list[dict]:
    return [
        {"question_id": i, "image": f"{i}.jpg", "text": f"Is there a {i} in the image?", "label": label}
        for i, label in enumerate(labels, 1)
    ]


def answers(*texts: str) -> list[dict]:
    return [{"question_id": i, "answer": text} for i, text in enumerate(texts, 1)]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("parser", SCRIPTS)
@pytest.mark.parametrize("name", SETS)
def test_equals_the_published_script(shared: Path, name: str, parser: str) -> None:
    folder = shared / "evaldata/oracle/pope"
    expected = files.read_json(folder / "pope_oracle.json")["sets"][name]["scores"][SCRIPTS[parser]]
    asked, given = files.read_rows(folder / f"{name}.q.jsonl"), files.read_rows(folder / f"{name}.a.jsonl")
    score = pope.score(asked, given, parser)
    printed = dict(score.upstream)
    if parser == "lmms":
        printed["yes_ratio"] = printed.pop("yes_ratio_of_labels")
        assert score.yes_ratio == score.counts["n_yes"] / score.n
    if "error" in expected:
        assert "ZeroDivisionError" in expected["error"]
        assert score.precision is score.f1 is None
        assert any("precision is undefined" in warning for warning in score.warnings)
        expected = expected.get("partial", {})
    for key in ("TP", "FP", "TN", "FN"):
        printed[key] = score.counts[key.lower()]
    compared = {key: value for key, value in expected.items() if key != "split"}
    assert {key: printed[key] for key in compared} == compared


@pytest.mark.parametrize("key", ["answer", "text", "ans"])
def test_answers_may_stand_under_any_of_three_keys(key: str) -> None:
    given = [{"question_id": 1, key: "Yes"}, {"question_id": 2, key: "No"}]
    assert pope.score(questions("yes", "no"), given).accuracy == 1.0


def test_the_released_llava_answers_give_the_published_score(shared: Path) -> None:
    """The labels of the 2910-line split follow from the current questions, as the data's README describes."""
    data = shared / "evaldata/pope"
    labels = {}
    for split in ("random", "popular", "adversarial"):
        for row in files.read_rows(data / f"aoidragon_HEAD/coco_pope_{split}.json"):
            labels[split, row["image"], row["text"].replace(" an ", " a ")] = row["label"]
    asked = files.read_rows(data / "llava15_answers/llava_pope_test.jsonl.gz")
    for row in asked:
        text = row["text"].split("\n")[0].replace("imange", "image").replace(" an ", " a ")
        row["label"] = labels[row["category"], row["image"], text]
    given = files.read_rows(data / "llava15_answers/llava-v1.5-13b.jsonl.gz")
    expected = files.read_json(data / "llava15_answers/scores.json")["llava-v1.5-13b"]
    scores = {}
    for split in ("adversarial", "random", "popular"):
        part = [row for row in asked if row["category"] == split]
        ids = {row["question_id"] for row in part}
        scores[split] = pope.score(part, [row for row in given if row["question_id"] in ids])
        counts = {key: scores[split].counts[key.lower()] for key in ("TP", "FP", "TN", "FN")}
        assert counts | scores[split].upstream == expected[split]
        assert scores[split].n_unparsed == 0
    assert pope.macro_mean(scores) == pytest.approx(expected["mean_F1"], abs=1e-12)


def test_all_no_is_undefined_not_zero_and_not_an_exception() -> None:
    score = pope.score(questions("yes", "no"), answers("No", "No"))
    assert (score.accuracy, score.precision, score.recall, score.f1, score.yes_ratio) == (0.5, None, 0.0, None, 0.0)
    assert len(score.warnings) == 2


def test_no_questions_leave_everything_undefined() -> None:
    score = pope.score([], [])
    assert (score.n, score.accuracy, score.upstream["Accuracy"]) == (0, None, None)


def test_silent_yes_counting_is_reported() -> None:
    score = pope.score(questions("yes", "no", "no"), answers("", "否", "No"))
    assert (score.n_unparsed, score.yes_ratio) == (2, 2 / 3)
    assert score.warnings == (
        "2 of 3 answers do not contain exactly one of the words yes and no; parser official counts 2 of them as yes",
    )


def test_unparsed_answers_under_each_counting_rule() -> None:
    asked, given = questions("yes", "no", "yes"), answers("maybe", "maybe", "yes")
    strict, lmms = pope.score(asked, given, "strict3way"), pope.score(asked, given, "lmms")
    assert strict.counts == {"tp": 1, "fp": 0, "tn": 0, "fn": 1, "n": 3, "n_yes": 1, "n_unparsed": 2, "correct": 1}
    assert lmms.counts["fn"] == 0
    assert (strict.recall, lmms.recall) == (0.5, 1.0)
    assert strict.accuracy == lmms.accuracy == 1 / 3


def test_the_yes_ratio_is_of_the_answers() -> None:
    assert pope.score(questions("yes", "no", "no", "no"), answers("yes", "yes", "yes", "no"), "lmms").yes_ratio == 0.75


def test_matched_by_id_in_any_order_and_as_number_or_text() -> None:
    asked = questions("yes", "no", "no")
    given = [{"question_id": str(i), "answer": text} for i, text in ((3, "no"), (1, "yes"), (2, "yes"))]
    assert pope.score(asked, given).counts["correct"] == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (answers("yes"), r"1 of 2 questions have no answer \(question_id 2\)"),
        ([*answers("yes", "no"), {"question_id": 2, "answer": "no"}], r"answer 3: question_id 2 occurs twice"),
        (answers("yes", "no", "no"), r"answer 3: 1 answers belong to no question \(question_id 3\)"),
        ([{"answer": "yes"}], "1 answers without question_id for 2 questions"),
        ([{"answer": "yes"}] * 3, "3 answers without question_id for 2 questions"),
        ([{"question_id": 1, "answer": "yes"}, {"answer": "no"}], "answer 2: question_id is missing"),
        (
            [{"question_id": 1, "answer": "yes"}, {"question_id": 2, "response": "no"}],
            "answer 2: none of the keys answer, text, ans",
        ),
        ([{"question_id": 1, "answer": None}, {"question_id": 2, "answer": "no"}], "answer 1: 'answer' is NoneType"),
        ([{"image": "9.jpg", "answer": "no"}] * 2, "answer 1: is about 9.jpg, but its question about 1.jpg"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(given: list[dict], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pope.score(questions("yes", "no"), given)


def test_without_ids_the_order_counts_and_is_reported() -> None:
    score = pope.score(questions("yes", "no"), [{"answer": "yes"}, {"answer": "no"}])
    assert score.accuracy == 1.0
    assert "matched by order" in score.warnings[0]


def test_repeated_question_ids_are_refused() -> None:
    asked = questions("yes") * 2
    with pytest.raises(DataError, match="question 2: question_id 1 occurs twice"):
        pope.score(asked, answers("yes"))


@pytest.mark.parametrize(("label", "fine"), [("Yes", True), (1, True), (0, True), ("maybe", False), (None, False)])
def test_labels(label: object, fine: bool) -> None:
    asked = [{"question_id": 1, "label": label}]
    if fine:
        assert pope.score(asked, answers("yes")).n == 1
    else:
        with pytest.raises(DataError, match="question 1: label is"):
            pope.score(asked, answers("yes"))


def test_unknown_parser_is_refused_even_without_answers() -> None:
    with pytest.raises(UsageError, match="unknown parser"):
        pope.score([], [], "best")


def test_score_files_has_the_agreed_keys_and_names_the_data(tmp_path: Path) -> None:
    asked = write(tmp_path / "q.json", questions("yes", "no"))
    given = tmp_path / "a.jsonl.gz"
    given.write_bytes(gzip.compress(b'{"question_id": 2, "text": "No."}\n\n{"question_id": 1, "text": "Yes."}\n'))
    result = pope.score_files(asked, given, "strict3way")
    agreed = {key: result[key] for key in ("accuracy", "precision", "recall", "f1", "yes_ratio", "n", "n_unparsed")}
    assert agreed == {
        "accuracy": 1.0,
        "precision": 1.0,
        "recall": 1.0,
        "f1": 1.0,
        "yes_ratio": 0.5,
        "n": 2,
        "n_unparsed": 0,
    }
    assert result["parser"] == "strict3way"
    assert result["questions_sha256"] == files.sha256(asked)
    json.dumps(result, allow_nan=False)


def test_score_files_names_file_and_line(tmp_path: Path) -> None:
    asked = write(tmp_path / "q.json", [*questions("yes"), {"question_id": 2, "label": "perhaps"}])
    with pytest.raises(DataError, match=r"q\.json, line 2: label is 'perhaps'"):
        pope.score_files(asked, write(tmp_path / "a.jsonl", answers("yes", "no")))


def test_a_mixed_file_is_scored_split_by_split_too(tmp_path: Path) -> None:
    rows = questions("yes", "no", "yes", "no")
    for row, name in zip(rows, ("random", "random", "popular", "popular"), strict=True):
        row["category"] = name
    rows[0]["text"] = "Is there an orange in the imange?"
    given = write(tmp_path / "a.jsonl", answers("yes", "no", "yes", "yes"))
    result = pope.score_files(write(tmp_path / "q.json", rows), given)
    assert result["splits"]["random"]["f1"] == 1.0
    assert result["macro_f1"] == (1.0 + 2 / 3) / 2
    assert any("mixes the splits popular, random" in warning for warning in result["warnings"])
    assert any("imange" in warning for warning in result["warnings"])


def test_an_empty_question_file_is_refused(tmp_path: Path) -> None:
    empty = write(tmp_path / "q.json", [])
    with pytest.raises(DataError, match="contains no questions"):
        pope.score_files(empty, empty)


@given(st.lists(st.integers(0, 200), min_size=4, max_size=4), st.integers(2, 9))
def test_doubling_all_counts_keeps_every_metric(confusion: list[int], factor: int) -> None:
    tp, fp, tn, fn = confusion
    counts = np.array([tp, fp, tn, fn, sum(confusion), tp + fp, 0, tp + tn], dtype=float)
    for metric in pope.METRICS.values():
        assert stats.value(metric, counts) == stats.value(metric, factor * counts)
