"""MMHal-Bench: ratings out of a judge's words, means by hand, and what the judge is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmfix_evals import files, stats
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.metrics import mmhal


def record(index: int, **own: object) -> dict:
    return {
        "question_type": mmhal.TYPES[index % 8],
        "image_id": f"{index // 2:04}",
        "image_content": ["Dog", "Tree"],
        "question": f"What is {index}?",
        "gt_answer": "A dog.",
        "model_answer": "A {cat}.",
        **own,
    }


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Explanation.\nRating: 6, very informative", 6),
        ("rating: 0", 0),
        ("RATING: 3", 3),
        ("Rating: 2 or Rating: 2", 2),
        ("Rating: 2 or Rating: 4", None),
        ("Rating: 7", None),
        ("Rating:5", None),
        ("**Rating**: 5", None),
        ("Score: 5", None),
        ("Rating: 10", 1),  # as published: only the first digit is looked at
        ("", None),
    ],
)
def test_ratings(reply: str, rating: int | None) -> None:
    assert mmhal.parse_rating(reply) == rating


def test_scores_by_hand() -> None:
    replies = [f"Rating: {rating}" for rating in (6, 0, 3, 2)] + ["no idea"]
    records = [record(i) for i in (0, 1, 2, 3, 8)]
    found = mmhal.score(records, replies)
    assert (found["score"], found["hallucination_rate"]) == (11 / 5, 3 / 5)
    assert found["splits"]["attribute"].items() >= {"score": 3.0, "hallucination_rate": 0.5, "n": 2}.items()
    assert (found["n"], found["n_unparsed"], found["rule"]) == (5, 1, "official")
    assert any("1 of 5 replies hold no rating or several; they count as 0" in one for one in found["warnings"])
    strict = mmhal.score(records, replies, "strict")
    assert (strict["score"], strict["hallucination_rate"]) == (11 / 4, 2 / 4)
    assert any("are left out" in warning for warning in strict["warnings"])
    json.dumps(found, allow_nan=False)


def test_without_ratings_everything_is_undefined() -> None:
    found = mmhal.score([record(0)], ["?"], "strict")
    assert (found["score"], found["hallucination_rate"]) == (None, None)
    assert any("score is undefined" in warning for warning in found["warnings"])
    with pytest.raises(UsageError, match="unknown rule"):
        mmhal.score([record(0)], ["?"], "lenient")
    with pytest.raises(DataError, match="0 replies of the judge for 1 questions"):
        mmhal.score([record(0)], [])


def test_types_by_order_are_said_to_be_unconfirmed() -> None:
    records = [record(i, question_type=None) for i in range(96)]
    found = mmhal.score(records, ["Rating: 4"] * 96)
    assert set(found["splits"]) == set(mmhal.TYPES)
    assert all(part["n"] == 12 for part in found["splits"].values())
    assert found["warnings"] == ["types of questions are taken from their order, which no source confirms"]


def test_prompts_hold_the_record() -> None:
    prompt = mmhal.judge_prompts([record(0)])[0]
    assert "Shown in the picture: Dog, Tree\nQuestion: What is 0?\nCorrect answer: A dog.\n" in prompt
    assert "Answer to be judged: A {cat}.\n" in prompt
    published = "### {}\n### {}\n### {}\n### {} end"
    assert mmhal.judge_prompts([record(0)], published) == [
        "### Dog, Tree\n### What is 0?\n### A dog.\n### A {cat}. end"
    ]
    with pytest.raises(UsageError, match=r"lacks the placeholders \{gt_answer\}, \{model_answer\}"):
        mmhal.judge_prompts([record(0)], "{image_content} {question}")
    with pytest.raises(DataError, match="question 1: 'model_answer' is missing"):
        mmhal.judge_prompts([record(0, model_answer=None)])


def test_files(tmp_path: Path) -> None:
    responses, replies = tmp_path / "r.json", tmp_path / "j.json"
    records = [record(i) for i in range(3)]
    responses.write_text(json.dumps(records))
    completions = [{"model": "gpt-4-0314", "choices": [{"message": {"content": f"Rating: {i}"}}]} for i in (5, 1, 6)]
    replies.write_text(json.dumps(completions))
    found = mmhal.score_files(responses, replies)
    assert (found["score"], found["judges"]) == (4.0, ["gpt-4-0314"])
    assert found["replies_sha256"] == files.sha256(replies)
    responses.write_text(json.dumps([{**one, "reply": "Rating: 2"} for one in records]))
    alone = mmhal.score_files(responses)
    assert (alone["score"], alone["hallucination_rate"], alone["judges"]) == (2.0, 1.0, [])
    assert any("do not say which judge" in warning for warning in alone["warnings"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"reply": "Rating: 1"}], "1 replies for 2 questions"),
        ([{"reply": "Rating: 1"}, {"reply": None}], r"j\.json, item 2: no text of the judge"),
        ([{"reply": "Rating: 1"}, {"choices": []}], r"j\.json, item 2: no text of the judge"),
        (
            [{"reply": "Rating: 1", "question": "What?"}, {"reply": ""}],
            r"item 1: question differs from that of .*item 1",
        ),
    ],
)
def test_replies_that_do_not_belong_are_refused(tmp_path: Path, rows: list[dict], message: str) -> None:
    (tmp_path / "r.json").write_text(json.dumps([record(0), record(1)]))
    (tmp_path / "j.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=message):
        mmhal.score_files(tmp_path / "r.json", tmp_path / "j.json")
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(DataError, match="contains no questions"):
        mmhal.score_files(tmp_path / "empty.json")


def test_counts_per_picture_give_intervals() -> None:
    records, replies = [record(i) for i in range(40)], [f"Rating: {i % 7}" for i in range(40)]
    rows = mmhal.per_image(records, replies)
    assert len(rows) == 20
    _, matrix = stats.by_cluster(list(rows), [[one[key] for key in mmhal.COUNT_KEYS] for one in rows.values()])
    whole = mmhal.score(records, replies)
    for name, metric in mmhal.METRICS.items():
        found = stats.bootstrap(matrix, metric, resamples=50)
        assert found.value == pytest.approx(whole[name])
        assert found.low is not None
