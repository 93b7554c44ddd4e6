"""The question builder: the official output byte for byte, and none of its faults unless asked."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfix_evals import files, pope_build
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.pope_build import SPLITS, Scene

WORDS = ["apple", "bench", "cat", "dog", "elephant", "fork", "glove", "hat", "ice", "jar"]
SCENES = [Scene(f"{i}.jpg", tuple(WORDS[(i + k * (i % 3 + 1)) % 10] for k in range(3))) for i in range(20)]


@pytest.fixture(scope="module")
def official(shared: Path) -> tuple[Path, pope_build.Questions]:
    """The procedure of the reference data: one stream, and the image with nearly all objects replaces the last one."""
    folder = shared / "evaldata/oracle/pope_build"
    scenes, rng = pope_build.read_scenes(folder / "segmentation.jsonl"), random.Random(0)
    selected = pope_build.sample_scenes(scenes, 30, 3, rng)
    full = next(scene for scene in scenes if "9999" in scene.image)
    if full not in selected:
        selected[-1] = full
    return folder / "out_seed0", pope_build.questions_about(selected, 3, rng, compat_imange=True)


def test_same_images_counts_and_co_occurrence(official: tuple[Path, pope_build.Questions]) -> None:
    folder, built = official
    selected = [{"image": scene.image, "objects": list(scene.objects)} for scene in built.selected]
    partners = {name: list(others) for name, others in built.co_occurrence.items()}
    assert json.dumps(selected) == json.dumps(files.read_json(folder / "selected.json"))
    assert json.dumps(built.counts) == json.dumps(files.read_json(folder / "syn_ground_truth_objects.json"))
    assert json.dumps(partners) == json.dumps(files.read_json(folder / "syn_co_occur.json"))


@pytest.mark.parametrize("split", SPLITS)
def test_same_bytes_as_the_official_builder(official: tuple[Path, pope_build.Questions], split: str) -> None:
    folder, built = official
    written = pope_build.to_json_lines(built.splits[split])
    assert written.encode() == (folder / f"syn_pope_{split}.json").read_bytes()
    assert "imange" in written


def test_correct_articles_by_default() -> None:
    assert pope_build.question("orange") == "Is there an orange in the image?"
    assert pope_build.question("dog") == "Is there a dog in the image?"
    assert pope_build.question("orange", compat_imange=True) == "Is there an orange in the imange?"
    text = pope_build.to_json_lines(row for rows in pope_build.build(SCENES, 10).splits.values() for row in rows)
    assert "imange" not in text
    assert "an elephant" in text


def test_global_random_state_is_neither_used_nor_changed() -> None:
    random.seed(1)
    before = random.getstate()
    first = pope_build.build(SCENES, 10, seed=5)
    assert random.getstate() == before
    random.seed(2)
    assert pope_build.build(SCENES, 10, seed=5) == first
    assert pope_build.build(SCENES, 10, seed=6) != first


def test_popular_and_adversarial_choices() -> None:
    scenes = [
        Scene("a", ("x", "y")),
        Scene("b", ("x", "z")),
        Scene("c", ("x", "z")),
        Scene("d", ("y", "p")),
        Scene("e", ("q", "y")),
    ]
    built = pope_build.questions_about(scenes, 1, random.Random(0))
    absent = {split: [row["text"].split()[3] for row in rows[1::2]] for split, rows in built.splits.items()}
    assert absent["popular"] == ["z", "y", "y", "x", "x"]
    assert absent["adversarial"][:4] == ["z", "y", "y", "x"]
    assert absent["adversarial"][4] in {"x", "z", "p"}  # q occurs with y only, which the image has: drawn at random
    labels = [(row["question_id"], row["label"]) for row in built.splits["random"]]
    assert labels == [(i, "yes" if i % 2 else "no") for i in range(1, 11)]


@given(st.integers(0, 10_000), st.integers(12, 20), st.integers(1, 3))
def test_no_question_is_wrong_or_repeated(seed: int, images: int, pairs: int) -> None:
    built = pope_build.build(SCENES, images, pairs, seed)
    objects = {scene.image: scene.objects for scene in SCENES}
    for rows in built.splits.values():
        assert len(rows) == 2 * pairs * images
        assert len({(row["image"], row["text"]) for row in rows}) == len(rows)
        for row in rows:
            name = row["text"].split()[3]
            assert (name in objects[row["image"]]) == (row["label"] == "yes")


@pytest.mark.parametrize("split", SPLITS)
def test_an_image_with_every_object_is_an_error_not_an_endless_loop(split: str) -> None:
    scenes = [Scene("some.jpg", ("cat", "dog", "hat")), Scene("full.jpg", ("cat", "dog", "hat", "jar"))]
    with pytest.raises(DataError, match=r"full\.jpg: no object is left to ask about in split " + split):
        pope_build.questions_about(scenes, 1, random.Random(0), [split])


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(DataError, match="only 20 images have at least 3 objects"):
        pope_build.build(SCENES, 21)
    with pytest.raises(UsageError, match="at least 1"):
        pope_build.build(SCENES, 0)
    with pytest.raises(UsageError, match="unknown split 'hard'"):
        pope_build.build(SCENES, 2, splits=["hard"])
    with pytest.raises(UsageError, match="exactly one"):
        pope_build.build(SCENES, 2, template="Is there a dog?")


def test_reading_scenes_names_the_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "objects.jsonl"
    path.write_text('{"image": "a", "objects": ["cat", "dog", "cat"]}\n\n{"image": "b"}\n')
    with pytest.raises(DataError, match=r"objects\.jsonl, line 3: expected"):
        pope_build.read_scenes(path)
    path.write_text('{"image": "a", "objects": ["cat", "dog", "cat"]}\n')
    assert pope_build.read_scenes(path) == [Scene("a", ("cat", "dog"))]
