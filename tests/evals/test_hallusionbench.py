"""HallusionBench: every number of a small example computed by hand, and the published table of mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmfix_evals import files, stats
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.metrics import hallusionbench as hallusion
from mmfix_evals.metrics.hallusionbench_rows import (
    Row,
    correctness_prompts,
    mistake,
    parse_same,
    parse_verdict,
    same_prompts,
)


def row(name: str, gt: int, text: str, visual: int | None = None, **own: object) -> dict:
    """A record from "VD set figure question"; figure 0 of VS has no picture, figures above 1 are edited."""
    category, group, figure, question = name.split()
    shown = {"VD": {"0": 1}, "VS": {"0": 0, "1": 1}}[category].get(figure, 2)
    return {
        "category": category,
        "subcategory": "chart",
        "set_id": group,
        "figure_id": figure,
        "question_id": question,
        "visual_input": str(shown if visual is None else visual),
        "question": f"Is {name} so?",
        "gt_answer": str(gt),
        "gt_answer_details": f"{name} is {'' if gt else 'not '}so.",
        "model_prediction": text,
        **own,
    }


# Set 1 of VD: question 0 right on both figures; question 1 right on figure 0, wrong on figure 1.
# Set 1 of VS: figure 0 (no picture) unclear and wrong; figure 1 right twice; figure 2 (edited) right and unparsed.
EXAMPLE = [
    row("VD 1 0 0", 1, "Yes."),
    row("VD 1 0 1", 0, "No, it is not"),
    row("VD 1 1 0", 0, "no"),
    row("VD 1 1 1", 1, "No"),
    row("VS 1 0 0", 1, "I cannot tell"),
    row("VS 1 0 1", 0, "yes"),
    row("VS 1 1 0", 1, "yes"),
    row("VS 1 1 1", 0, "no"),
    row("VS 1 2 0", 0, "No"),
    row("VS 1 2 1", 1, ""),
]


def judged() -> list[dict]:
    verdicts = [1, 1, 1, 0, 2, 0, 1, 1, 1, 2]
    return [{**one, "verdict": verdict, "same": 1} for one, verdict in zip(EXAMPLE, verdicts, strict=True)]


def test_exact_by_hand() -> None:
    found = hallusion.score(EXAMPLE)
    assert found["aAcc"] == 6 / 10
    assert found["qAcc"] == 1 / 4  # only VD question 0
    assert found["fAcc"] == 2 / 4  # VD figure 0 and VS figure 1; VS figure 0 is left out
    assert found["easy_qAcc"] == 2 / 4  # VD: figure 0 both right; VS: figures 0 and 1 of a question never both
    assert found["hard_qAcc"] == 2 / 4
    assert (found["consistency_right"], found["consistency_some"], found["consistency_none"]) == (2 / 4, 2 / 4, 0.0)
    assert found["consistency_score"] == (1 + 0.5 + 1 + 0.5) / 4
    assert found["false_positive_share"] == 1 / 4
    # correct == gt: yes, no, no, no | no (wrong on 1), yes (wrong on 0), yes, no, no, no: 3 of 10 said yes, 5 are yes
    assert found["yes_difference"] == pytest.approx(3 / 10 - 5 / 10)
    assert (found["n"], found["n_unparsed"], found["variant"]) == (10, 2, "exact")
    assert found["error_analysis"] is None
    assert found["splits"]["VD"]["aAcc"] == 3 / 4
    assert found["splits"]["VS"]["qAcc"] == 0.0
    assert any("2 of 10 answers do not contain" in warning for warning in found["warnings"])
    assert any("10 of 1129" in warning for warning in found["warnings"])
    json.dumps(found, allow_nan=False)


def test_only_the_official_grouping_leaves_out_vs_figure_0() -> None:
    official, other = hallusion.score(EXAMPLE), hallusion.score(EXAMPLE, "vlmeval")
    assert (official["fAcc"], other["fAcc"]) == (2 / 4, 2 / 5)
    assert official["aAcc"] == other["aAcc"]
    assert hallusion.score(judged(), "judge")["fAcc"] == 2 / 4


def test_group_accuracies_are_not_called_aacc() -> None:
    found = hallusion.score(EXAMPLE)
    assert {name for name in found if "Acc" in name} == {"aAcc", "qAcc", "fAcc", "easy_qAcc", "hard_qAcc"}


def test_a_judge_excuses_unclear_without_picture() -> None:
    found = hallusion.score(judged(), "judge")
    assert found["aAcc"] == 7 / 10
    assert found["splits"]["VS"]["aAcc"] == 4 / 6
    assert found["error_analysis"] == {"LH": 0, "VI": 0, "Mix": 2, "LH_cg": 1, "VI_cg": 0, "Mix_cg": 2}


def test_causes_add_up_to_the_wrong_groups() -> None:
    found = hallusion.score(judged(), "judge")
    causes = found["error_analysis"]
    assert causes["LH"] + causes["VI"] + causes["Mix"] == found["counts"]["q_groups"] - found["counts"]["q_right"]


@pytest.mark.parametrize(
    ("category", "original", "verdict", "visual", "same", "expected"),
    [
        # rows of the published table: (own figure 0?) verdict → (LH, VI)
        ("VD", None, 1, 1, None, (0, 0)),
        ("VD", None, 0, 1, None, (0, 1)),
        ("VD", None, 2, 1, None, (0, 1)),
        ("VS", None, 0, 0, None, (1, 0)),
        ("VS", None, 2, 0, None, (0, 0)),
        ("VD", 1, 0, 2, True, (1, 1)),
        ("VD", 1, 0, 2, False, (0, 1)),
        ("VD", 1, 2, 2, True, (0, 1)),
        ("VD", 0, 0, 2, True, (0, 1)),
        ("VD", 2, 2, 2, True, (0, 1)),
        ("VD", 0, 1, 2, True, (0, 0)),
        ("VS", 0, 0, 1, True, (1, 0)),
        ("VS", 0, 0, 1, False, (1, 1)),
        ("VS", 0, 2, 2, True, (1, 1)),
        ("VS", 2, 0, 2, True, (0, 1)),
        ("VS", 2, 2, 1, False, (0, 1)),
        ("VS", 1, 2, 2, True, (0, 1)),
        ("VS", 1, 0, 1, True, (0, 1)),
        ("VS", 1, 0, 2, True, (1, 0)),
        ("VS", 1, 0, 2, False, (0, 1)),
        ("VS", 1, 1, 2, True, (0, 0)),
        # what cannot be decided
        ("VS", 1, 0, 2, None, None),
        ("VS", 0, 0, 2, None, None),
        ("VD", 1, 0, 2, None, None),
    ],
)
def test_causes(
    category: str, original: int | None, verdict: int, visual: int, same: bool | None, expected: tuple[int, int] | None
) -> None:
    one = Row(category, (), ("f",), (), original is None, visual, 1, verdict, verdict == 1, same)
    assert mistake(one, original) == expected


def test_a_wrong_answer_without_original_has_no_cause() -> None:
    given = [one for one in judged() if one["figure_id"] != "0"]
    found = hallusion.score(given, "judge")
    assert found["error_analysis"] is None
    assert any("no error analysis: 2 wrong answers lack" in warning for warning in found["warnings"])
    strange = Row("VS", (), ("f",), (), False, 0, 1, 0, False, True)
    with pytest.raises(DataError, match="visual_input is 0 for a figure that is not 0"):
        mistake(strange, 1)


def test_judge_replies() -> None:
    replies = ("Correct", "This is INCORRECT.", "not correct", "unclear", "")
    assert [parse_verdict(reply) for reply in replies] == [1, 0, 1, 2, 2]
    assert [parse_same(reply) for reply in ("Same.", "different", "the SAME", "")] == [True, False, True, False]


def test_prompts_hold_the_answers() -> None:
    first = correctness_prompts(EXAMPLE)[0]
    assert "Question: Is VD 1 0 0 so?\nReference answer: VD 1 0 0 is so.\nAnswer: Yes.\n" in first
    compared = same_prompts(EXAMPLE)
    assert "Answer 1: No\nAnswer 2: I cannot tell" in compared[8]
    with pytest.raises(DataError, match="question 1: gt_answer_details is missing"):
        correctness_prompts([{**EXAMPLE[0], "gt_answer_details": None}])
    with pytest.raises(DataError, match="question 1: no answer for figure 0"):
        same_prompts(EXAMPLE[2:3])
    braces = {**EXAMPLE[0], "question": "{model_prediction}?"}
    assert "Question: {model_prediction}?\n" in correctness_prompts([braces])[0]


def test_files_with_replies_of_a_judge(tmp_path: Path) -> None:
    ids = ("category", "subcategory", "set_id", "figure_id", "question_id")
    words = [
        "correct",
        "correct",
        "Correct.",
        "incorrect",
        "unclear",
        "incorrect",
        "correct",
        "correct",
        "correct",
        "?",
    ]

    def write(name: str, rows: list[dict]) -> Path:
        (tmp_path / name).write_text("".join(json.dumps(one) + "\n" for one in rows))
        return tmp_path / name

    about = [{key: one[key] for key in ids} for one in EXAMPLE]
    data = write("r.jsonl", EXAMPLE)
    pairs = list(zip(about, words, strict=True))
    verdicts = write("v.jsonl", [{**one, "reply": word, "judge": "j-1"} for one, word in reversed(pairs)])
    same = write("s.jsonl", [{**one, "reply": "same"} for one in about])
    found = hallusion.score_files(data, "judge", verdicts, same)
    expected = hallusion.score(judged(), "judge")
    assert {name: found[name] for name in expected} == expected
    assert (found["judges"], found["verdicts_sha256"]) == (["j-1"], files.sha256(verdicts))
    with pytest.raises(DataError, match=r"r\.jsonl, line 10: .*part\.jsonl holds no reply about VS_chart_1_2_1"):
        hallusion.score_files(data, "judge", write("part.jsonl", [{**one, "reply": "same"} for one in about[:-1]]))
    with pytest.raises(DataError, match=r"twice\.jsonl, line 2: a second reply"):
        hallusion.score_files(data, "judge", write("twice.jsonl", [{**about[0], "reply": "same"}] * 2))
    with pytest.raises(DataError, match=r"none\.jsonl, line 1: no text of the judge"):
        hallusion.score_files(data, "judge", write("none.jsonl", about))
    with pytest.raises(UsageError, match="takes no replies of a judge"):
        hallusion.score_files(data, "exact", verdicts)
    assert hallusion.score_files(data)["aAcc"] == 0.6
    with pytest.raises(DataError, match="contains no questions"):
        hallusion.score_files(write("empty.jsonl", []))


def test_the_published_key_of_verdicts_is_known() -> None:
    given = [{**one, "gpt4v_output_gpt_check": str(one.pop("verdict"))} for one in judged()]
    assert hallusion.score(given, "judge") == hallusion.score(judged(), "judge")


@pytest.mark.parametrize(
    ("change", "variant", "message"),
    [
        ({"gt_answer": "yes"}, "exact", "question 2: 'gt_answer' is 'yes'; it must be one of 0, 1"),
        ({"visual_input": 3}, "exact", "question 2: 'visual_input' is 3"),
        ({"category": "VX"}, "exact", "question 2: needs category"),
        ({"set_id": ""}, "exact", "question 2: needs category"),
        ({"model_prediction": None}, "exact", "question 2: 'model_prediction' is NoneType"),
        ({"question_id": "0"}, "exact", "question 2: question VD_chart_1_0_0 is also at question 1"),
        ({}, "judge", "question 1: 'verdict' is None"),
    ],
)
def test_bad_records_are_named(change: dict, variant: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        hallusion.score([EXAMPLE[0], {**EXAMPLE[1], **change}], variant)


def test_undefined_is_none() -> None:
    found = hallusion.score([row("VD 1 0 0", 1, "yes")])
    assert (found["hard_qAcc"], found["false_positive_share"], found["aAcc"]) == (None, None, 1.0)
    assert any("hard_qAcc is undefined: no question about an edited picture" in one for one in found["warnings"])
    with pytest.raises(UsageError, match="unknown HallusionBench variant"):
        hallusion.score([], "gpt")


def test_counts_per_set_give_intervals() -> None:
    many = [{**one, "set_id": str(i)} for i in range(20) for one in EXAMPLE]
    many[0]["model_prediction"] = "no"
    rows = hallusion.per_image(hallusion.judge_rows(many))
    assert len(rows) == 40
    _, matrix = stats.by_cluster(list(rows), [[one[key] for key in hallusion.COUNT_KEYS] for one in rows.values()])
    whole = hallusion.score(many)
    for name, metric in hallusion.METRICS.items():
        assert stats.bootstrap(matrix, metric, resamples=50).value == pytest.approx(whole[name])
