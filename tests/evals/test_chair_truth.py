"""Ground truth of CHAIR from COCO annotations, and its cache."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mmfix_evals import files
from mmfix_evals.errors import DataError, MissingDependency
from mmfix_evals.metrics import chair

CATEGORIES = [{"id": 3, "name": "dog"}, {"id": 9, "name": "sports ball"}]
IMAGES = [{"id": 1}, {"id": 2}]


def write(folder: Path, ending: str = "", *, objects: object = None, captions: object = None) -> Path:
    folder.mkdir(exist_ok=True)
    if objects is None:
        objects = [
            {"id": 1, "image_id": 1, "category_id": 3, "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 9, "iscrowd": 1},
        ]
    if captions is None:
        captions = [{"id": 1, "image_id": 1, "caption": "Puppies and a child."}]
    instances = {"images": IMAGES, "categories": CATEGORIES, "annotations": objects}
    (folder / f"instances{ending}.json").write_text(json.dumps(instances))
    (folder / f"captions{ending}.json").write_text(json.dumps({"images": IMAGES, "annotations": captions}))
    return folder


def cached() -> list[Path]:
    return list((files.cache_dir() / "chair").glob("*"))


def test_equals_the_published_script(shared: Path) -> None:
    folder = shared / "evaldata/oracle/chair"
    variants = files.read_json(folder / "chair_oracle.json")["variants"]
    expected = variants["maxlinn_pattern_singularize"]["imid_to_objects"]
    found = chair.ground_truth_from_coco(folder / "coco_annotations")
    assert {image: sorted(nodes) for image, nodes in found.items() if nodes} == expected
    assert {image for image, nodes in found.items() if not nodes} == {"17"}  # known, and nothing in it


def test_objects_crowds_and_captions_are_united(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = chair.read_ground_truth(write(tmp_path / "coco"))
    assert found == {"1": {"dog", "sports ball", "person"}, "2": set()}
    assert capsys.readouterr().out == ""


def test_2014_files_come_first(tmp_path: Path) -> None:
    folder = write(tmp_path / "coco", "_val2014")
    (folder / "instances_val2017.json").write_text("not read")
    assert chair.ground_truth_from_coco(folder)["2"] == set()


def test_the_second_time_it_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "coco")
    first = chair.ground_truth_from_coco(folder)
    (path,) = cached()
    assert json.loads(path.read_text())["ground_truth"]["1"] == ["dog", "person", "sports ball"]
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    assert chair.ground_truth_from_coco(folder) == first
    with pytest.raises(MissingDependency, match=r"pip install 'mmfix\[eval\]'"):
        chair.ground_truth_from_coco(write(tmp_path / "coco", captions=[]))


def test_changed_annotations_or_words_are_read_again(tmp_path: Path) -> None:
    folder = write(tmp_path / "coco")
    chair.ground_truth_from_coco(folder)
    assert chair.ground_truth_from_coco(write(folder, captions=[]))["1"] == {"dog", "sports ball"}
    own = chair.Chair({"dog": "dog", "sports ball": "toy"})
    assert chair.ground_truth_from_coco(folder, own)["1"] == {"dog", "toy"}
    assert len(cached()) == 3


OTHER = '{"key": "of another folder", "ground_truth": {"1": ["cat"]}}'
DAMAGED = ["", "{", "[]", "null", OTHER, '{"key": "KEY"}', '{"key": "KEY", "ground_truth": {"1": [2]}}']


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_cache_is_ignored_and_replaced(tmp_path: Path, content: str) -> None:
    folder = write(tmp_path / "coco")
    first = chair.ground_truth_from_coco(folder)
    (path,) = cached()
    good = path.read_text()
    path.write_text(content.replace("KEY", path.stem))
    assert chair.ground_truth_from_coco(folder) == first
    assert path.read_text() == good


def test_an_unwritable_cache_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert chair.ground_truth_from_coco(write(tmp_path / "coco"))["2"] == set()


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no instances\*\.json and captions\*\.json"):
        chair.ground_truth_from_coco(tmp_path)
    folder = write(tmp_path / "coco", "_train2014")
    (folder / "captions_train2014.json").unlink()
    with pytest.raises(DataError, match=r"captions_train2014\.json: no such file"):
        chair.ground_truth_from_coco(folder)


@pytest.mark.parametrize(
    ("objects", "captions", "message"),
    [
        ([{"id": 1, "image_id": 1, "category_id": 8}], None, r"instances\.json: annotation 1 has no known category"),
        ([{"id": 1, "category_id": 3}], None, r"instances\.json: not a COCO annotation file"),
        ([], [{"id": 4, "image_id": 1}], r"captions\.json: annotation 4 has no caption"),
        ("text", None, r"instances\.json: not a COCO annotation file"),
    ],
)
def test_malformed_annotations_are_named(tmp_path: Path, objects: object, captions: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        chair.ground_truth_from_coco(write(tmp_path / "coco", objects=objects, captions=captions))


def test_broken_json_and_unknown_categories(tmp_path: Path) -> None:
    folder = write(tmp_path / "coco")
    with pytest.raises(DataError, match=r"no words for the categories dog; give --synonyms FILE"):
        chair.ground_truth_from_coco(folder, chair.Chair({"sports ball": "sports ball"}))
    (folder / "instances.json").write_text('{\n"images": [\n')
    with pytest.raises(DataError, match=r"instances\.json, line 3: not valid JSON"):
        chair.ground_truth_from_coco(folder)
