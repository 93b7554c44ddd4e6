"""Comparing runs: pairs, refusals that name the field, warnings, intersection."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_eval
import pytest

from mmfix_evals import compare_table, tables
from mmfix_evals.compare import ComparisonError, compare
from mmfix_evals.errors import UsageError
from mmfix_evals.plan import RunConfig
from mmfix_evals.progress import Reporter
from mmfix_evals.run import run
from mmfix_evals.tasks import Document

pytestmark = pytest.mark.usefixtures("fake_tasks")


def make(out: Path, **options: Any) -> Path:
    config = RunConfig("fake", ("fake-pope", "fake-chair"), ("greedy", "var"), out, limit=6, resamples=40)
    config = replace(config, **options)
    run(config, ["mmfix"], Reporter(quiet=True), lambda _: fake_eval.FakeDecoder(config.model))
    return out


def test_one_run_gives_its_own_comparisons(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    assert compare([folder]).entries == json.loads((folder / "results.json").read_text())["comparisons"]
    other = compare([folder], baseline="var")
    assert {(e["baseline"], e["method"]) for e in other.entries} == {("var", "greedy")}


def test_a_baseline_that_was_not_run(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    with pytest.raises(UsageError, match="unknown baseline method 'gredy': did you mean greedy"):
        compare([folder], baseline="gredy")
    single = make(tmp_path / "b", methods=("greedy",))
    with pytest.raises(UsageError, match="holds one method only"):
        compare([single])


def test_a_run_equals_itself_repeated(tmp_path: Path) -> None:
    found = compare([make(tmp_path / "a"), make(tmp_path / "b")])
    assert found.warnings == []
    assert {e["difference"] for e in found.entries} == {0.0}
    assert {e["p"] for e in found.entries} == {1.0}
    assert {(e["method"], e["baseline"]) for e in found.entries} == {("greedy", "greedy"), ("var", "var")}


def test_single_methods_of_two_runs_are_paired(tmp_path: Path) -> None:
    both = make(tmp_path / "both")
    found = compare([make(tmp_path / "a", methods=("greedy",)), make(tmp_path / "b", methods=("var",))])
    inside = compare([both])
    assert [e["difference"] for e in found.entries] == [e["difference"] for e in inside.entries]
    assert [e["p_holm"] for e in found.entries] == [e["p_holm"] for e in inside.entries]
    assert {(e["baseline"], e["method"]) for e in found.entries} == {("greedy", "var")}
    titles = [section.title for section in compare_table.sections(found)]
    assert len(titles) == 5
    assert all(str(tmp_path) in title for title in titles)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"world_seed": 1}, "fake-pope.data.documents_sha256"),
        ({"split": "dev"}, "fake-pope.data.documents_sha256"),
        ({"limit": 5}, "fake-pope.data.documents_sha256"),
        ({"tasks": ("fake-chair",), "limit": 5}, "fake-chair.data.documents_sha256"),
        ({"parser": "opera"}, "fake-pope.parser"),
        ({"methods": ("vhr", "var:move=0.3")}, "methods"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(tmp_path: Path, options: dict[str, Any], field: str) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b", **options)
    with pytest.raises(ComparisonError, match=f"differ in field '{field}'"):
        compare([a, b])


def test_tasks_without_overlap_are_refused(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", tasks=("fake-pope",)), make(tmp_path / "b", tasks=("fake-chair",))
    with pytest.raises(ComparisonError, match="differ in field 'tasks': fake-pope and fake-chair"):
        compare([a, b])


def test_missing_answers_are_refused_or_left_out(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b")
    path = b / "samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ComparisonError, match=r"differ in field 'fake-pope.doc_id': 1 documents"):
        compare([a, b])
    found = compare([a, b], intersect=True)
    assert "compared on the 35 common documents of 36" in found.notes[0]
    n = {(e["split"], e["metric"]): e["n"] for e in found.entries if e["method"] == "var"}
    assert (n["random", "f1"], n["popular", "f1"]) == (11, 12)


def test_a_changed_picture_is_refused_even_without_results(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b")
    for folder in (a, b):
        (folder / "results.json").unlink()
    path = b / "samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["image_sha256"] = "0" * 64
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ComparisonError, match=r"differ in field 'fake-pope.data' of document random/0"):
        compare([a, b])


def test_different_limits_compare_on_common_pictures(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a", tasks=("fake-chair",)), make(tmp_path / "b", tasks=("fake-chair",), limit=4)
    found = compare([a, b], intersect=True)
    assert {e["n"] for e in found.entries} == {4}
    assert {e["difference"] for e in found.entries} <= {0.0, None}
    assert found.notes == ["fake-chair: compared on the 4 common documents of 6"]


def test_another_parser_makes_runs_comparable(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b", parser="opera")
    assert compare([a, b], parser="strict3way").entries


def test_decoding_and_seed_are_warnings(tmp_path: Path) -> None:
    a = make(tmp_path / "a")
    b = make(tmp_path / "b", max_new_tokens=5, seed=3, model="other")
    found = compare([a, b])
    assert found.entries
    assert any("generation arguments differ" in warning for warning in found.warnings)
    assert any("seeds differ" in warning for warning in found.warnings)


class Reworded(fake_eval.FakeChair):
    """The same pictures and ground truth under another prompt."""

    def documents(self, data_split: str, limit: int, world_seed: int) -> list[Document]:
        documents = super().documents(data_split, limit, world_seed)
        return [replace(document, prompt="What is in the image?") for document in documents]


def test_other_prompts_are_refused_unless_they_are_what_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = make(tmp_path / "a", tasks=("fake-chair",))
    fake_eval.register(monkeypatch, Reworded())
    b = make(tmp_path / "b", tasks=("fake-chair",))
    words = r"differ in field 'fake-chair.prompt' of document test_0_0.png: 'Describe .*' and 'What .*--other-prompts"
    with pytest.raises(ComparisonError, match=words):
        compare([a, b])
    with pytest.raises(ComparisonError, match="no document of fake-chair in common"):
        compare([a, b], intersect=True)
    for options in ({}, {"intersect": True}):
        found = compare([a, b], other_prompts=True, **options)
        assert {e["n"] for e in found.entries} == {6}
        assert any("prompts differ" in warning for warning in found.warnings)
    (a / "results.json").unlink()
    (b / "results.json").unlink()
    with pytest.raises(ComparisonError, match=r"differ in field 'fake-chair\.prompt'"):
        compare([a, b])


def test_the_number_of_images_that_one_point_takes(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", limit=40)
    entries = compare([folder]).entries
    for entry in entries:
        needed, error = entry["images_for_1_point"], entry["standard_error"]
        if entry["metric"] in ("length", "n_unparsed") or not error:
            assert needed is None
        elif needed is not None:
            assert needed == max(2, math.ceil(40 * ((1.959964 + 0.841621) * error / 0.01) ** 2))
    shown = {(e["task"], e["metric"]) for e in entries if e["images_for_1_point"]}
    assert {("fake-pope", "f1"), ("fake-pope", "accuracy"), ("fake-chair", "chair_i")} <= shown
    results = json.loads((folder / "results.json").read_text())
    for notes in (compare_table.footnotes(compare([folder])), tables.footnotes(results)):
        note = next(text for text in notes if "To see a difference of 1 point" in text)
        assert "80% power" in note
        assert "fake-chair chair_i " in note
        assert "length" not in note
