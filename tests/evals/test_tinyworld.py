"""TinyWorld: the same world every time, a strong prior in training, and a test split that contradicts it."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mmfix_evals.metrics.chair import Chair
from mmfix_evals.tinyworld import (
    CAPTION_PROMPT,
    CATEGORIES,
    SPLITS,
    absent_partners,
    expected_absent,
    file_name,
    image_index,
    pope_questions,
    references,
    render,
    scene,
    scenes,
    write_world,
)
from mmfix_evals.tinyworld.model import split_words, vocabulary
from mmfix_evals.tinyworld.text import answer, ask_about, caption, with_article
from mmfix_evals.tinyworld.world import SETTINGS


def test_a_scene_is_a_function_of_its_name() -> None:
    random.seed(1)
    first = scene("test", 5)
    state = random.getstate()
    random.seed(2)
    assert scene("test", 5) == first
    random.seed(1)
    assert random.getstate() == state, "the global generator was used"
    assert np.array_equal(np.asarray(render(first)), np.asarray(render(scene("test", 5))))


def test_pictures_differ_between_splits_seeds_and_indices() -> None:
    seen = {render(scene(split, index, seed)).tobytes() for split in SPLITS for index in range(3) for seed in (0, 1)}
    assert len(seen) == len(SPLITS) * 3 * 2


def test_a_picture_is_96_by_96_rgb() -> None:
    picture = render(scene("dev", 0))
    assert (picture.size, picture.mode) == ((96, 96), "RGB")


@pytest.mark.parametrize(
    ("split", "low", "high"), [("train", 0.7, 0.9), ("val", 0.7, 0.9), ("dev", 0.1, 0.4), ("test", 0.1, 0.4)]
)
def test_partners_follow_in_training_and_are_missing_in_test(split: str, low: float, high: float) -> None:
    anchors = partners = 0
    for item in scenes(split, 600):
        for anchor, partner, _ in SETTINGS[item.scene].links:
            if anchor in item.categories:
                anchors += 1
                partners += partner in item.categories
    assert low < partners / anchors < high


def test_scenes_are_well_formed() -> None:
    for item in scenes("test", 200):
        assert 3 <= len(item.objects) <= 6
        assert len(set(item.categories)) == len(item.categories)
        for placed in item.objects:
            x, y, w, h = placed.box
            assert x >= 0
            assert y >= 0
            assert x + w <= 96
            assert y + h <= 96
        assert not expected_absent(item) & set(item.categories)
        assert absent_partners(item) <= expected_absent(item)


def test_there_are_enough_categories_and_chair_sees_every_one() -> None:
    assert len(CATEGORIES) >= 24
    chair = Chair()
    nodes = set()
    for name in CATEGORIES:
        found = chair.mentions(f"There is {with_article(name)} in the picture.")
        assert len(found) == 1, name
        nodes.add(found[0].node)
    assert len(nodes) == len(CATEGORIES)


def test_file_names_are_read_back() -> None:
    for split, index, seed in [("test", 12, 0), ("dev", 3, 7)]:
        assert image_index(file_name(split, index, seed)) == (split, index, seed)
    with pytest.raises(ValueError, match="not a TinyWorld picture name"):
        image_index("COCO_val2014_000000000001.jpg")
    with pytest.raises(ValueError, match="unknown TinyWorld split"):
        scene("validation", 0)


def _names(text: str, name: str) -> bool:
    return re.search(rf"\b{with_article(name)}\b", text) is not None


def test_references_tell_the_truth_and_training_captions_do_not_always() -> None:
    invented = 0
    for item in scenes("train", 150):
        for text in references(item):
            assert all(_names(text, name) for name in item.categories)
            assert not any(_names(text, name) for name in expected_absent(item))
        noisy = caption(item, random.Random(item.image_id), noisy=True)
        invented += any(_names(noisy, name) for name in expected_absent(item))
    assert 0.2 < invented / 150 < 0.8


def test_answers_carry_the_stated_noise() -> None:
    rng = random.Random(0)
    yes: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for item in scenes("train", 400):
        for name in ask_about(item, 20, rng):
            kind = (
                "present" if name in item.categories
                else "partner" if name in absent_partners(item)
                else "typical" if name in expected_absent(item)
                else "other"
            )  # fmt: skip
            asked[kind] += 1
            yes[kind] += answer(item, name, rng) == "Yes"
    share = {kind: yes[kind] / asked[kind] for kind in asked}
    assert share["present"] == pytest.approx(0.97, abs=0.02)
    assert share["partner"] == pytest.approx(0.30, abs=0.06)
    assert share["typical"] == pytest.approx(0.10, abs=0.04)
    assert share["other"] == 0


def test_pope_questions_follow_the_official_rules() -> None:
    items = scenes("test", 60)
    present = {file_name("test", item.image_id): set(item.categories) for item in items}
    built = pope_questions("test", 60)
    assert set(built) == {"random", "popular", "adversarial"}
    assert built == pope_questions("test", 60)
    for rows in built.values():
        assert len(rows) == 360
        assert [row["label"] for row in rows] == ["yes", "no"] * 180
        assert [row["question_id"] for row in rows] == list(range(1, 361))
        for row in rows:
            name = row["text"].removeprefix("Is there a").removesuffix(" in the image?").removeprefix("n").strip()
            assert (name in present[row["image"]]) == (row["label"] == "yes"), row
            assert with_article(name) in row["text"]


def test_written_world_is_read_by_pycocotools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pycocotools.coco import COCO

    write_world(tmp_path, "dev", 6)
    coco = COCO(str(tmp_path / "instances.json"))
    item = scene("dev", 2)
    names = {coco.cats[a["category_id"]]["name"] for a in coco.imgToAnns[2]}
    assert names == set(item.categories)
    captions = COCO(str(tmp_path / "captions.json"))
    assert [a["caption"] for a in captions.imgToAnns[2]] == references(item)
    assert len(list((tmp_path / "images").glob("*.png"))) == 6
    rows = [json.loads(line) for line in (tmp_path / "pope_adversarial.json").read_text().splitlines()]
    assert rows == pope_questions("dev", 6)["adversarial"]
    assert (tmp_path / "contact_sheet.png").stat().st_size > 10_000


def test_the_vocabulary_covers_everything_the_model_is_trained_on() -> None:
    words = set(vocabulary())
    rng = random.Random(3)
    for item in scenes("test", 300):
        for text in (caption(item, rng, noisy=True), CAPTION_PROMPT, *references(item)):
            assert set(split_words(text)) <= words
