"""MME: equal to the evaluation kit and to lmms-eval, and pairs of lines that belong together."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmfix_evals import files, stats
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.metrics import mme


def pair(image: str, first: str, second: str) -> list[dict]:
    """Two questions, the right answers being yes and no."""
    return [
        {"image": image, "question": "Is it 0?", "gt": "Yes", "pred": first},
        {"image": image, "question": "Is it 1?", "gt": "No", "pred": second},
    ]


def everything(**own: list[dict]) -> dict[str, list[dict]]:
    """All tasks, with one picture answered rightly where nothing else is said."""
    return {task: own.get(task, pair("a.jpg", "yes", "no")) for task in mme.TASKS}


def test_official_equals_the_evaluation_kit(shared: Path) -> None:
    folder = shared / "evaldata/oracle/mme"
    expected = files.read_json(folder / "mme_oracle.json")["official_calculation"]
    found = mme.score_files(folder / "results_dir")
    for group, tasks in (("Perception", mme.GROUPS["perception"]), ("Cognition", mme.GROUPS["cognition"])):
        assert found[group.lower()] == expected[group]["total"]
        assert {task: found["splits"][task]["score"] for task in tasks} == {t: expected[group][t] for t in tasks}
    assert found["hallucination"] == sum(expected["Perception"][t] for t in ("existence", "count", "position", "color"))


def test_lmms_equals_lmms_eval(shared: Path) -> None:
    folder = shared / "evaldata/oracle/mme"
    expected = files.read_json(folder / "mme_oracle.json")["lmms_eval"]
    found = mme.score_files(folder / "results_dir", "lmms")
    assert found["perception"] == expected["mme_perception_score"]
    assert found["cognition"] == expected["mme_cognition_score"]


def test_records_and_files_give_the_same(shared: Path) -> None:
    folder = shared / "evaldata/oracle/mme"
    rows = files.read_json(folder / "mme_oracle.json")["data"]
    data = {
        task: [dict(zip(("image", "question", "gt", "pred"), row, strict=True)) for row in part]
        for task, part in rows.items()
    }
    for variant in mme.VARIANTS:
        from_files = mme.score_files(folder / "results_dir", variant)
        del from_files["sha256"]
        assert mme.score(data, variant) == from_files


@pytest.mark.parametrize(
    ("text", "official", "clean", "lmms", "vlmeval"),
    [
        ("Yes", "yes", "yes", "yes", "yes"),
        ("No.", "no", "no", "no", "no"),
        (" yes", "yes", "yes", "yes", "yes"),
        ("  yes", "unparsed", "yes", "yes", "yes"),
        ("\tno", "no", "no", "no", "no"),
        ("not ", "no", "no", "no", "unparsed"),
        ("Noisy", "no", "no", "no", "unparsed"),
        ("I know", "unparsed", "unparsed", "unparsed", "unparsed"),
        ("eyes", "yes", "yes", "yes", "unparsed"),
        ("a: yes", "unparsed", "unparsed", "unparsed", "yes"),
        ("Y", "unparsed", "unparsed", "yes", "unparsed"),
        ("n.", "unparsed", "unparsed", "no", "unparsed"),
        ("1. Yes", "unparsed", "unparsed", "unparsed", "yes"),
        ("", "unparsed", "unparsed", "unparsed", "unparsed"),
    ],
)
def test_parsers(text: str, official: str, clean: str, lmms: str, vlmeval: str) -> None:
    found = [mme.parse(text, variant) for variant in ("official", "clean", "lmms", "vlmeval")]
    assert found == [official, clean, lmms, vlmeval]


def test_the_line_break_reaches_only_the_official_rule(tmp_path: Path) -> None:
    for task in mme.TASKS:
        (tmp_path / f"{task}.txt").write_text("a.jpg\tq\tYes\tYes\r\na.jpg\tq\tNo\tno\tit is\n\n")
    data, _ = mme.read_folder(tmp_path, tuple(mme.TASKS))
    assert [row["pred"] for row in data["existence"]] == ["Yes", "no\tit is"]
    assert mme.score_files(tmp_path)["perception"] == 2000.0


def test_scores_by_hand() -> None:
    existence = [*pair("a.jpg", "yes", "no"), *pair("b.jpg", "yes", "yes"), *pair("c.jpg", "hm", "no")]
    found = mme.score(everything(existence=existence))
    part = found["splits"]["existence"]
    assert part["accuracy"] == 4 / 6
    assert part["accuracy_plus"] == 1 / 3
    assert part["score"] == 4 / 6 * 100 + 1 / 3 * 100
    assert (part["tp"], part["fp"], part["tn"], part["fn"], part["unparsed"]) == (2, 1, 2, 0, 1)
    assert (part["precision"], part["recall"]) == (2 / 3, 1.0)
    assert found["hallucination"] == part["score"] + 600
    assert (found["hallucination_object"], found["hallucination_attribute"]) == (part["score"] + 200, 400.0)
    assert found["cognition"] == 800.0
    assert (found["n"], found["n_images"], found["n_unparsed"]) == (32, 16, 1)
    assert any("1 of 32 answers" in warning for warning in found["warnings"])
    assert any("existence 6 of 60" in warning for warning in found["warnings"])
    json.dumps(found, allow_nan=False)


def test_missing_tasks_leave_totals_undefined() -> None:
    found = mme.score({"existence": pair("a.jpg", "yes", "no"), "count": pair("a.jpg", "no", "no")})
    assert found["perception"] is found["cognition"] is found["hallucination"] is None
    assert found["hallucination_object"] == 250.0
    assert found["splits"]["count"]["precision"] is None
    assert any(w.startswith("cognition is undefined: no questions of commonsense_reasoning") for w in found["warnings"])
    assert any("precision of count is undefined" in warning for warning in found["warnings"])


def test_lines_of_different_pictures_are_never_paired() -> None:
    mixed = [*pair("a.jpg", "yes", "no"), *pair("b.jpg", "yes", "no")]
    mixed[1], mixed[2] = mixed[2], mixed[1]
    with pytest.raises(DataError, match=r"record 1 and record 3: the two lines about a\.jpg do not form a pair"):
        mme.score({"existence": mixed})
    assert mme.score({"existence": mixed}, "clean")["splits"]["existence"]["score"] == 200.0


@pytest.mark.parametrize("variant", mme.VARIANTS)
@pytest.mark.parametrize("extra", [pair("a.jpg", "yes", "no"), pair("b.jpg", "yes", "no")[:1]])
def test_every_picture_has_two_lines(variant: str, extra: list[dict]) -> None:
    with pytest.raises(DataError, match=r"questions instead of two"):
        mme.score({"existence": [*pair("a.jpg", "yes", "no"), *extra]}, variant)


def test_a_shifted_file_is_refused_with_its_line(tmp_path: Path) -> None:
    lines = ["x.jpg\tq\tYes\tYes", "a.jpg\tq\tYes\tYes", "a.jpg\tq\tNo\tNo", "x.jpg\tq\tNo\tNo"]
    (tmp_path / "OCR.txt").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"OCR\.txt, line 1 and .*OCR\.txt, line 4"):
        mme.score_files(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.jpg\tq\tYes", r"OCR\.txt, line 3: 3 fields instead of"),
        ("b.jpg\tq\tperhaps\tYes\nb.jpg\tq\tNo\tNo", r"OCR\.txt, line 3: 'gt' is 'perhaps'"),
        ("\tq\tYes\tYes\n\tq\tNo\tNo", r"OCR\.txt, line 3: 'image' is missing"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "OCR.txt").write_text(f"a.jpg\tq\tYes\tYes\na.jpg\tq\tNo\tNo\n{line}\n")
    with pytest.raises(DataError, match=message):
        mme.score_files(tmp_path)


def test_wrong_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown MME variant"):
        mme.score({}, "best")
    with pytest.raises(DataError, match="unknown MME task 'colour'"):
        mme.score({"colour": pair("a.jpg", "yes", "no")})
    with pytest.raises(DataError, match="holds none of the files"):
        mme.score_files(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        mme.score_files(tmp_path / "absent")


def test_counts_per_picture_give_intervals() -> None:
    pictures = [row for i in range(40) for row in pair(f"{i}.jpg", "yes", "no" if i % 4 else "yes")]
    data = everything(existence=pictures)
    rows = mme.per_image(data)
    _, matrix = stats.by_cluster(list(rows), [[row[key] for key in mme.COUNT_KEYS] for row in rows.values()])
    total = mme.score(data)
    for name in ("hallucination", "perception", "existence"):
        value = total[name] if name in total else total["splits"][name]["score"]
        assert stats.value(mme.METRICS[name], matrix.sum(axis=0)) == value
    interval = stats.bootstrap(matrix, mme.METRICS["existence"], resamples=200)
    assert interval.low is not None
    assert interval.low < 100 * (0.875 + 0.75) < interval.high
    assert np.isnan(mme.METRICS["perception"](np.zeros(len(mme.COUNT_KEYS))))
