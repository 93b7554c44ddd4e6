"""``mmfix eval score … --json`` from end to end: the published numbers where the reference data are there, and a small
oracle of our own, worked out by hand, everywhere."""

from __future__ import annotations

import gzip
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mmfix_evals import files
from mmfix_evals.cli.app import app
from mmfix_evals.errors import DataError

ORACLE = json.loads((Path(__file__).parent / "oracle.json").read_text())
CASES = [
    pytest.param(name, case, id=f"{name}-{n}")
    for name, part in ORACLE.items()
    if name != "about"
    for n, case in enumerate(part["cases"])
]


def score(*words: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["eval", "score", *map(str, words), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


def put(folder: Path, contents: dict[str, Any]) -> None:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list) and content and isinstance(content[0], list):
            content = json.dumps(content[0])  # one JSON array
        elif isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        elif isinstance(content, dict):
            content = json.dumps(content)
        path.write_text(content)


def assert_holds(found: Any, expected: Any, where: str) -> None:
    """Fractions are compared as the floats they are; a number within an ulp or two, since sums have an order."""
    if isinstance(expected, dict):
        for name, part in expected.items():
            assert_holds(found[name], part, f"{where}.{name}")
    elif isinstance(expected, str) and expected[:1].isdigit():
        assert found == pytest.approx(float(Fraction(expected)), rel=1e-14, abs=0), where
    else:
        assert found == expected, where


@pytest.mark.parametrize(("name", "case"), CASES)
def test_our_own_oracle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, case: dict[str, Any]) -> None:
    put(tmp_path, ORACLE[name]["files"])
    monkeypatch.chdir(tmp_path)
    assert_holds(score(*case["command"]), case["expected"], name)


# -- the published numbers ---------------------------------------------------------------------------------------------


def test_pope_of_llava_13b(shared: Path, tmp_path: Path) -> None:
    """LLaVA's released answers: one file with three splits, labels from the official files."""
    base = shared / "evaldata/pope"
    questions = files.read_rows(base / "llava15_answers/llava_pope_test.jsonl.gz")
    labels = {
        (split, row["image"], row["text"]): row["label"]
        for split in ("random", "popular", "adversarial")
        for row in files.read_rows(base / f"aoidragon_HEAD/coco_pope_{split}.json")
    }
    for row in questions:
        text = row["text"].split("\n")[0].replace("imange", "image").replace(" an ", " a ")
        key = (row["category"], row["image"], text)
        row["label"] = labels.get(key) or labels[row["category"], row["image"], text.replace(" a ", " an ")]
    put(tmp_path, {"q.jsonl": list(questions)})
    found = score("pope", "--questions", tmp_path / "q.jsonl", "--answers",
                  base / "llava15_answers/llava-v1.5-13b.jsonl.gz")  # fmt: skip
    expected = files.read_json(base / "llava15_answers/scores.json")
    published = json.dumps(expected)
    for split in ("random", "popular", "adversarial"):
        assert f"{found['splits'][split]['f1']:.6f}"[:7] in published
    assert found["macro_f1"] == pytest.approx(0.859469, abs=5e-7)


@pytest.mark.parametrize("name", ["edge", "coco_random", "all_yes", "perfect"])
def test_pope_oracle(shared: Path, name: str) -> None:
    folder = shared / "evaldata/oracle/pope"
    found = score("pope", "--questions", folder / f"{name}.q.jsonl", "--answers", folder / f"{name}.a.jsonl")
    official = files.read_json(folder / "pope_oracle.json")["sets"][name]["scores"]["pope_official_evaluate.py"]
    upstream = {label: official[label] for label in found["upstream"]}
    assert found["upstream"] == upstream
    assert {k.upper(): found["counts"][k] for k in ("tp", "fp", "tn", "fn")} == {
        k: official[k] for k in ("TP", "FP", "TN", "FN")
    }


def test_chair_of_an_opera_log(shared: Path) -> None:
    base = shared / "evaldata/chair"
    expected = files.read_json(base / "opera_logs_scores.json")["llava-1.5.greedy.jsonl"]["chair_maxlinn"]
    found = score("chair", "--captions", base / "opera_logs/llava-1.5.greedy.jsonl", "--ground-truth",
                  base / "chair_gt_subset.json")  # fmt: skip
    assert {"CHAIRs": found["chair_s"], "CHAIRi": found["chair_i"], "Recall": found["recall"]} == expected


def test_mme_oracle(shared: Path) -> None:
    folder = shared / "evaldata/oracle/mme"
    expected = files.read_json(folder / "mme_oracle.json")["official_calculation"]
    found = score("mme", folder / "results_dir")
    assert found["perception"] == expected["Perception"]["total"]
    assert found["cognition"] == expected["Cognition"]["total"]


def test_amber_oracle(shared: Path, tmp_path: Path) -> None:
    oracle = files.read_json(shared / "evaldata/oracle/amber/amber_oracle.json")
    put(tmp_path, {"r.json": [oracle["inputs"]["d"]]})
    found = score("amber", "--responses", tmp_path / "r.json", "--data", shared / "evaldata/amber", "--type", "da")
    printed = {name.lower(): part for name, part in oracle["official"]["a"].items()}
    for block, part in found["splits"].items():
        if block in printed:
            assert part["official"] == printed[block]
    assert {"attribute", "state", "number", "action"} <= set(found["splits"])


def test_vlind_oracle(shared: Path, tmp_path: Path) -> None:
    oracle = files.read_json(shared / "evaldata/oracle/vlind/vlind_oracle.json")
    (tmp_path / "m.json.gz").write_bytes(gzip.compress(json.dumps(oracle["input"]).encode()))
    found = score("vlind", "--data", tmp_path / "m.json.gz")
    assert sorted(map(str, found["official"].values())) == sorted(map(str, oracle["official"]["all"].values()))


def test_conversations_are_scored_question_by_question(tmp_path: Path) -> None:
    """PAI's two files: six questions in one line, one answer per line without an id."""
    chats = [{"chat_id": n, "image": "a.jpg", "text": ["A?", "B?"], "label": ["yes", "no"]} for n in (1, 2)]
    given = [{"ans": text, "label": 1} for text in ("Yes", "No.", "no", "Yes")]
    put(tmp_path, {"q.jsonl": chats, "a.jsonl": given})
    found = score("pope", "--questions", tmp_path / "q.jsonl", "--answers", tmp_path / "a.jsonl", "--parser", "opera")
    assert found["counts"] == {"tp": 1, "fp": 1, "tn": 1, "fn": 1, "n": 4, "n_yes": 2, "n_unparsed": 0, "correct": 2}
    put(tmp_path, {"q.jsonl": [chats[0], {**chats[1], "label": ["yes"]}]})
    with pytest.raises(DataError, match=r"q.jsonl, line 2: a conversation needs"):
        score("pope", "--questions", tmp_path / "q.jsonl", "--answers", tmp_path / "a.jsonl")
