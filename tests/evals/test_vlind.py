"""VLind-Bench: equal to the published scorer on every style, and conditional scores that stay conditional."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmfix_evals import files, stats
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.metrics import vlind
from mmfix_evals.metrics.vlind_prompts import good_images

PRINTED = {
    "s_ck": "S_CK(a_pass_ratio)",
    "s_vp": "S_VP(b_pass_ratio)",
    "s_cb": "S_CB(c_pass_ratio)",
    "s_lp": "S_LP(d_pass_ratio_macro)",
    "acc_cb": "acc_CB(c)",
    "acc_lp": "acc_LP(d_macro)",
}


def instance(number: int, good: str = "0 5", concept: str = "size", **own: object) -> dict:
    """An instance whose pictures in `good` have two votes."""
    return {
        "global_id": number,
        "concept": concept,
        "context_id": number // 2,
        "context": "A mouse is larger than a house.",
        "factual_context": "A mouse is smaller than a house.",
        "true_statement": "The house is smaller.",
        "false_statement": "The mouse is smaller.",
        "existent_noun": "a mouse",
        "non-existent_noun": "a whale",
        "best_img_id": 5,
        "aggregated_human_label_good_images": {str(i): 2 if str(i) in good.split() else 1 for i in range(12)},
        **own,
    }


def answered(a: bool = True, b: bool = True, c: bool = True, good: str = "0 5", d: str = "0 5") -> dict[str, str]:
    """Answers that pass the stages asked for, and stage d on the pictures `d`."""
    found = {}
    for stage, passed in zip("abc", (a, b, c), strict=True):
        found |= {f"{stage}1": "True", f"{stage}2": "False" if passed else "NA"}
    for image in good.split():
        found |= {f"d1/{image}": "True", f"d2/{image}": "False" if image in d.split() else "True"}
    return found


@pytest.mark.parametrize("style", vlind.STYLES)
def test_equals_the_published_scorer(shared: Path, tmp_path: Path, style: str) -> None:
    oracle = files.read_json(shared / "evaldata/oracle/vlind/vlind_oracle.json")
    path = tmp_path / "m.json"
    path.write_text(json.dumps(oracle["input"]))
    found = vlind.score_files(path, style=style)
    assert {PRINTED[name]: value for name, value in found["official"].items()} == {
        name: str(value) for name, value in oracle["official"][style].items()
    }
    assert found["n"] + found["n_skipped"] == 80


@pytest.mark.parametrize("style", vlind.STYLES)
def test_raw_answers_give_the_same_as_the_published_file(shared: Path, tmp_path: Path, style: str) -> None:
    instances = files.read_json(shared / "evaldata/oracle/vlind/vlind_oracle.json")["input"]
    given = vlind.from_official(instances)
    raw = {"True": "True.", "False": "It is\nfalse, I think", "NA": "Truely"}
    lines = [
        {"global_id": one["global_id"], "question": name, "answer": raw[answer]}
        for one, found in zip(instances, given, strict=True)
        for name, answer in found.items()
    ]
    assert vlind.score(instances, vlind.from_answers(instances, lines), style) == vlind.score(instances, given, style)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("True", "True"),
        ("false.", "False"),
        ("The statement is\ntrue, not false", "True"),
        ("F.a.l.s.e", "False"),
        ("True!", "NA"),
        ("untrue", "NA"),
        ("yes", "NA"),
        ("\ttrue", "NA"),
        ("", "NA"),
    ],
)
def test_parser(text: str, answer: str) -> None:
    assert vlind.parse(text) == answer


def test_scores_by_hand_are_conditional() -> None:
    instances = [instance(i) for i in range(4)] + [instance(4, good="")]
    given = [
        answered(d="0"),
        answered(b=False),
        answered(a=False),
        answered(c=False, d=""),
        {},
    ]
    found = vlind.score(instances, given)
    assert (found["n"], found["n_skipped"], found["n_images"]) == (4, 1, 8)
    assert (found["s_ck"], found["s_vp"], found["acc_cb"]) == (0.75, 0.75, 0.75)
    assert found["s_cb"] == 2 / 3  # of the three that pass a, two pass c; the item accuracy is 3/4
    assert found["s_lp"] == 0.5  # of the one that passes a, b and c, one of two pictures; the item accuracy is 5/8
    assert found["acc_lp"] == 0.625
    assert found["official"] == {
        "s_ck": "75.0",
        "s_vp": "75.0",
        "s_cb": "66.7",
        "s_lp": "50.0",
        "acc_cb": "75.0",
        "acc_lp": "62.5",
    }
    assert found["n_unparsed"] == 3
    assert any("3 of 40 answers are neither" in warning for warning in found["warnings"])


def test_a_macro_mean_weighs_instances_not_pictures() -> None:
    instances = [instance(0, good="0"), instance(1, good="0 1 2 3")]
    given = [answered(good="0", d="0"), answered(good="0 1 2 3", d="")]
    assert vlind.score(instances, given)["s_lp"] == 0.5


def test_a_model_that_always_says_true_is_undefined_not_zero() -> None:
    instances = [instance(0)]
    always = [dict.fromkeys(answered(), "True")]
    found = vlind.score(instances, always)
    assert (found["s_ck"], found["s_cb"], found["s_lp"], found["true_ratio"]) == (0.0, None, None, 1.0)
    assert found["official"]["s_lp"] == "0.0"
    assert [w.split(":")[0] for w in found["warnings"]] == ["s_cb is undefined", "s_lp is undefined"]


def test_no_good_picture_leaves_everything_undefined() -> None:
    found = vlind.score([instance(0, good="0")], [{}], style="cartoon")
    assert (found["n"], found["s_ck"], found["official"]["s_ck"]) == (0, None, None)


def test_votes_and_style_choose_the_pictures() -> None:
    one = instance(0, aggregated_human_label_good_images={"0": 3, "3": 2, "4": 1, "11": 3})
    assert good_images(one) == ["0", "3", "11"]
    assert good_images(one, votes=3) == ["0", "11"]
    assert good_images(one, "photorealistic") == ["0", "3"]
    assert good_images(one, "illustration") == []
    with pytest.raises(UsageError, match="unknown VLind style"):
        good_images(one, "photo")


def test_questions_in_both_wordings() -> None:
    asked = {q.id: q for q in vlind.questions(instance(3), "gpt4o")}
    assert list(asked) == ["a1", "a2", "b1", "b2", "c1", "c2", "d1/0", "d2/0", "d1/5", "d2/5"]
    assert asked["a1"].text == (
        "Statement: The mouse is smaller.\nBased on the common sense, is the given statement true or false? "
        "Only respond in True or False."
    )
    assert asked["b2"].text.startswith("Statement: There is a whale in the given image.\nBased on the image, is")
    assert "Forget real-world common sense and just follow the information provided in the image." in asked["d1/0"].text
    assert asked["c1"].text.startswith("Context: A mouse is larger than a house.\nStatement: The house is smaller.\n")
    assert asked["a1"].image == "images/factual/size/1_A mouse is smaller than a house./0.jpg"
    assert (
        asked["b1"].image == asked["c2"].image == "images/counterfactual/size/1_A mouse is larger than a house./5.jpg"
    )
    assert asked["d2/0"].image.endswith("/0.jpg")
    assert {q.expected for q in asked.values() if q.id[1] == "1"} == {"True"}
    other = {q.id: q.text for q in vlind.questions(instance(3), "instructblip")}
    assert other["a1"] == (
        "Only respond in True or False.\nStatement: The mouse is smaller.\n"
        "Based on common sense, is the given statement true or false?"
    )
    assert not any("Forget" in text for text in other.values())
    assert vlind.questions(instance(3, good="")) == []
    with pytest.raises(UsageError, match="unknown VLind prompts"):
        vlind.questions(instance(3), "own")
    with pytest.raises(DataError, match="'context' is missing"):
        vlind.questions(instance(3, context=None))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"data\.json, item 1: no answer to a1, a2, b1, b2, c1"),
        ([{"global_id": 9, "question": "a1", "answer": "True"}], r"line 1: global_id 9 is not in the data"),
        ([{"global_id": 0, "question": "a1"}], r"line 1: needs question and answer"),
        ([{"global_id": 0, "question": "a1", "answer": "True"}] * 2, r"line 2: instance 0, question a1 is answered tw"),
    ],
)
def test_incomplete_answers_are_refused(tmp_path: Path, lines: list[dict], message: str) -> None:
    (tmp_path / "data.json").write_text(json.dumps([instance(0)]))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=message):
        vlind.score_files(tmp_path / "data.json", tmp_path / "a.jsonl")


def test_score_files_names_what_was_scored(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([instance(0)]))
    lines = [{"global_id": "0", "question": name, "answer": text} for name, text in answered().items()]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = vlind.score_files(tmp_path / "data.json", tmp_path / "a.jsonl", prompts="instructblip")
    assert (found["s_lp"], found["prompts"], found["style"], found["vote_threshold"]) == (1.0, "instructblip", "all", 2)
    assert found["answers_sha256"] == files.sha256(tmp_path / "a.jsonl")
    assert found["warnings"] == []
    json.dumps(found, allow_nan=False)
    with pytest.raises(UsageError, match="unknown VLind prompts"):
        vlind.score_files(tmp_path / "data.json", prompts="own")
    with pytest.raises(UsageError, match="hold no model's answers"):
        vlind.score_files(tmp_path / "data.json")
    assert "not stated" in vlind.score_files(tmp_path / "data.json", tmp_path / "a.jsonl")["warnings"][0]


def test_bad_data_is_refused(tmp_path: Path) -> None:
    broken = instance(0, aggregated_human_label_good_images={"0": "many"})
    with pytest.raises(DataError, match=r"instance 1: 'aggregated_human_label_good_images' must be"):
        vlind.score([broken], [answered()])
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(DataError, match="contains no instances"):
        vlind.score_files(tmp_path / "empty.json")
    with pytest.raises(DataError, match="global_id is missing or occurs twice"):
        vlind.from_answers([instance(0), instance(0)], [])


def test_counts_per_context_give_intervals() -> None:
    instances = [instance(i) for i in range(40)]
    given = [answered(d="0" if i % 3 else "0 5", b=i % 5 > 0) for i in range(40)]
    rows = vlind.per_image(instances, given)
    assert len(rows) == 20  # two instances share the pictures of a context
    _, matrix = stats.by_cluster(list(rows), [[row[key] for key in vlind.COUNT_KEYS] for row in rows.values()])
    whole = vlind.score(instances, given)
    for name, metric in vlind.METRICS.items():
        interval = stats.bootstrap(matrix, metric, resamples=100)
        assert interval.value == pytest.approx(whole[name], abs=1e-12)
        assert interval.low is not None
