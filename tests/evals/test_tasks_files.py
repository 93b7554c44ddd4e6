"""Tasks whose data the user brings: what is read, what is asked, and what is said where files are missing."""

from __future__ import annotations

import hashlib
import io
import json
import urllib.error
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from mmfix_evals import files, tasks
from mmfix_evals.cli.app import app
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.metrics import pope
from mmfix_evals.tasks import data
from mmfix_evals.tasks.mucr import chosen_letter


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(data.ENVIRONMENT, str(tmp_path / "data"))
    return tmp_path / "data"


def put(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content)
    return path


def picture(path: Path, colour: str = "red", size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def name(number: int) -> str:
    return f"COCO_val2014_{number:012d}.jpg"


def question(number: int, image: str, label: str = "yes") -> dict:
    return {"question_id": number, "image": image, "text": f"Is there a cat in the image? ({number})", "label": label}


# -- where files lie ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["pope-coco", "pope-aokvqa", "pope-gqa", "pope-coco-chat", "mucr-cue", "chair-coco"])
def test_missing_files_are_named_with_their_origin(root: Path, task: str) -> None:
    with pytest.raises(DataError) as problem:
        tasks.get(task).documents("test", 2, 0)
    text = str(problem.value)
    assert str(root) in text
    assert "https://" in text
    wanted = getattr(tasks.get(task), "questions", {})
    for source in wanted.values():
        assert source.path in text
        assert source.url in text
    if wanted:
        assert f"mmfix eval fetch {task}" in text
        assert data.ENVIRONMENT in text


def test_addresses_are_pinned_to_a_revision() -> None:
    for task in tasks.tasks():
        for source in getattr(task, "questions", {}).values():
            revision = source.url.split("/")[5]
            assert source.url.startswith("https://")
            assert len(revision) == 40
            assert set(revision) <= set("0123456789abcdef")


def test_the_pinned_hashes_are_those_of_the_published_files(shared: Path) -> None:
    for split, source in tasks.get("pope-coco").questions.items():
        assert source.sha256 == files.sha256(shared / f"evaldata/pope/aoidragon_HEAD/coco_pope_{split}.json")


def test_fetching_checks_content_and_keeps_nothing_wrong(root: Path) -> None:
    content = b'{"question_id": 1}\n'
    digest = hashlib.sha256(content).hexdigest()
    asked = []

    def opener(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        return io.BytesIO(content)

    good = data.Source("pope/x.json", "https://example.org/x.json", digest)
    assert data.fetch([good], opener) == [(good, digest, True)]
    assert (root / "pope/x.json").read_bytes() == content
    assert data.fetch([good], opener) == [(good, digest, False)]
    assert asked == [good.url]
    other = data.Source("pope/y.json", "https://example.org/y.json", "0" * 64)
    with pytest.raises(DataError, match=f"sha256 {digest}, expected 0000"):
        data.fetch([other], opener)

    def offline(url: str, timeout: float) -> None:
        raise urllib.error.URLError("no route")

    with pytest.raises(DataError, match=r"cannot be downloaded \(.*no route.*put the file into"):
        data.fetch([other], offline)
    assert not (root / "pope/y.json").exists()


def test_fetch_says_what_it_would_do(root: Path) -> None:
    done = CliRunner().invoke(app, ["eval", "fetch", "pope-gqa", "--dry-run"], catch_exceptions=False)
    assert str(root / "pope/gqa/gqa_pope_random.json") in done.stdout
    assert "gqa_pope_seem_random.json" in done.stdout
    assert not root.exists()
    with pytest.raises(UsageError, match="no question files"):
        CliRunner().invoke(app, ["eval", "fetch", "tinyworld-pope"], catch_exceptions=False)


def test_a_broken_picture_is_named(root: Path) -> None:
    path = put(root / "x.jpg", "not a picture")
    with pytest.raises(DataError, match=r"x\.jpg: not a readable picture"):
        data.open_picture(path)


# -- options in a task's name ------------------------------------------------------------------------------------------


def test_options_are_part_of_the_name() -> None:
    task = tasks.get("pope-coco:prompt=vcd")
    assert (task.name, task.option("prompt")) == ("pope-coco:prompt=vcd", "vcd")
    assert tasks.get("pope-coco").option("prompt") == "plain"  # the task itself is untouched
    with pytest.raises(UsageError, match="did you mean llava"):
        tasks.get("pope-coco:prompt=lava")
    with pytest.raises(UsageError, match="'suffix=x' is no option=value; options: prompt"):
        tasks.get("pope-coco:suffix=x")
    with pytest.raises(UsageError, match="options: none"):
        tasks.get("tinyworld-pope:prompt=vcd")
    with pytest.raises(UsageError, match="did you mean pope-coco"):
        tasks.get("pope-cocoo:prompt=vcd")


# -- POPE --------------------------------------------------------------------------------------------------------------


def test_pope_asks_about_the_first_pictures_in_every_split(root: Path) -> None:
    for split in pope_splits():
        rows = [question(n, name(i), "no" if n % 2 else "yes") for n, i in enumerate((5, 5, 3, 3, 9, 9), 1)]
        put(root / f"pope/coco/coco_pope_{split}.json", rows)
    for number in (5, 3):
        picture(root / "coco/val2014" / name(number))
    task = tasks.get("pope-coco:prompt=llava")
    found = task.documents("test", 2, 0)
    assert [d.doc_id for d in found] == [f"{s}/{n}" for s in pope_splits() for n in (1, 2, 3, 4)]
    assert found[0].image == name(5)
    assert found[0].prompt == "Is there a cat in the image? (1)\nAnswer the question using a single word or phrase."
    assert [d.target["label"] for d in found[:4]] == ["no", "yes", "no", "yes"]
    assert task.image(name(5)).size == (40, 30)
    path = root / "pope/coco/coco_pope_random.json"
    assert task.sources("test")[path.name] == files.sha256(path)
    with pytest.raises(DataError, match=rf"1 of 3 pictures .*{name(9)}.*val2014.zip"):
        task.documents("test", 3, 0)


def pope_splits() -> tuple[str, ...]:
    return ("random", "popular", "adversarial")


def test_built_questions_can_be_asked(root: Path) -> None:
    lines = [{"image": name(n), "objects": ["cat", "dog", f"cup{n % 3}", f"bowl{n % 5}"]} for n in range(12)]
    source = put(root / "segmentation.jsonl", lines)
    words = ["eval", "build", "pope", "--segmentation", str(source), "--images", "6", "--out", str(root / "pope/coco")]
    CliRunner().invoke(app, words, catch_exceptions=False)
    for n in range(12):
        picture(root / "coco/val2014" / name(n))
    found = tasks.get("pope-coco").documents("test", 6, 0)
    assert len(found) == 3 * 6 * 6


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "a.jpg", "text": "?", "label": "maybe"}, "label 'maybe'"),
        ({"image": 7, "text": "?", "label": "yes"}, "no image or text"),
    ],
)
def test_a_bad_question_is_named_with_its_line(root: Path, row: dict, message: str) -> None:
    for split in pope_splits():
        put(root / f"pope/gqa/gqa_pope_{split}.json", [question(1, "a.jpg"), row])
    with pytest.raises(DataError, match=rf"gqa_pope_random.json, line 2: {message}"):
        tasks.get("pope-gqa").documents("test", 1, 0)


def test_a_conversation_scores_every_reply(root: Path) -> None:
    rows = [{"chat_id": 4, "image": name(1), "text": ["Is there a cat?", "Is there a dog?", "A cup?"],
             "label": ["yes", "no", 0]}]  # fmt: skip
    for split in pope_splits():
        put(root / f"pope/coco/coco_pope_chat_{split}.json", rows)
    picture(root / "coco/val2014" / name(1))
    task = tasks.get("pope-coco-chat")
    document = task.documents("test", 1, 0)[0]
    assert document.target["labels"] == ["yes", "no", "no"]
    response = json.dumps(["Yes.", "yes", "I don't know"])
    counts = task.counts({**document.target, "response": response}, "official")
    separate = [pope.counts(x, t, "official") for x, t in zip(["yes", "no", "no"], json.loads(response), strict=True)]
    assert counts == {key: sum(row[key] for row in separate) for key in pope.COUNT_KEYS}
    assert (counts["n"], counts["tp"], counts["fp"]) == (3, 1, 2)
    assert [v["strict3way"] for v in task.verdicts(document, response)["verdicts"]] == ["yes", "yes", "unparsed"]
    put(root / "pope/coco/coco_pope_chat_random.json", [{**rows[0], "label": ["yes"]}])
    with pytest.raises(DataError, match="line 1: 3 questions and 1 labels"):
        task.documents("test", 1, 0)


# -- CHAIR on COCO -----------------------------------------------------------------------------------------------------


@pytest.fixture
def coco(root: Path) -> Path:
    images = [{"id": n, "file_name": name(n), "width": 40, "height": 30} for n in (3, 5, 9)]
    square = [[0, 0, 20, 0, 20, 15, 0, 15]]
    annotations = [
        {"id": 1, "image_id": 3, "category_id": 1, "segmentation": square, "iscrowd": 0, "area": 300},
        {"id": 2, "image_id": 5, "category_id": 2, "segmentation": [[20, 15, 40, 15, 40, 30, 20, 30]], "iscrowd": 0},
        {"id": 3, "image_id": 5, "category_id": 2, "segmentation": square, "iscrowd": 0, "area": 300},
    ]
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cup"}]
    put(
        root / "coco/annotations/instances_val2014.json",
        json.dumps({"images": images, "annotations": annotations, "categories": categories}),
    )
    captions = [{"id": 1, "image_id": 3, "caption": "A woman."}]
    put(root / "coco/annotations/captions_val2014.json", json.dumps({"images": images, "annotations": captions}))
    for number in (3, 5, 9):
        picture(root / "coco/val2014" / name(number))
    return root


def test_chair_coco_takes_pictures_in_a_fixed_order_or_by_list(coco: Path) -> None:
    task = tasks.get("chair-coco:prompt=pai")
    found = {d.image: d for d in task.documents("test", 3, 0)}
    assert list(found) == [d.image for d in task.documents("test", 3, 7)] != sorted(found)
    assert found[name(3)].target["ground_truth"] == ["dog", "person"]
    assert found[name(9)].target["ground_truth"] == []
    assert found[name(3)].prompt == "Please help me describe the image in detail."
    ids = put(coco / "ids.txt", "9\n5\n")
    listed = tasks.get(f"chair-coco:ids={ids}")
    assert [d.image for d in listed.documents("test", 2, 0)] == [name(9), name(5)]
    assert listed.sources("test")["ids.txt"] == files.sha256(ids)
    for text, message in (
        ("9\n9\n", "listed twice"),
        ("cat\n", "'cat' is not an id"),
        ("77", "not in the annotations"),
    ):
        ids.write_text(text)
        with pytest.raises(DataError, match=message):
            listed.documents("test", 2, 0)


def test_chair_coco_can_cut_after_the_last_period(coco: Path) -> None:
    sample = {"ground_truth": ["dog"], "response": "A dog. A dog beside a c"}
    cut = tasks.get("chair-coco:truncate=last-period").counts(sample, "pattern")
    assert (cut["mentions"], tasks.get("chair-coco").counts(sample, "pattern")["mentions"]) == (1, 2)
    with pytest.raises(DataError, match="no ground truth of flavour wordnet"):
        tasks.get("chair-coco").counts(sample, "wordnet")


def test_masks_are_unions_of_cocos_segmentations(coco: Path) -> None:
    task = tasks.get("grounding-coco")
    documents = {d.image: d for d in task.documents("test", 3, 0)}
    masks = task.masks(documents[name(5)])
    assert list(masks) == ["cup"]
    assert masks["cup"].shape == (30, 40)
    assert masks["cup"].sum() == 600
    assert masks["cup"][:15, :20].all()
    assert not masks["cup"][:15, 20:].any()
    assert task.masks(documents[name(9)]) == {}


# -- MuCR --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mucr(root: Path) -> list[dict]:
    rows = [
        {"id": n, "cue": f"cue {n}", "false_cue": [f"wrong {n}{k}" for k in "abc"], "image_0": f"c{n}.png",
         "image_1": f"e{n}.png"}
        for n in range(6)
    ]  # fmt: skip
    put(root / "mucr/mucr.jsonl", rows)
    for n in range(6):
        picture(root / f"mucr/c{n}.png", "red")
        picture(root / f"mucr/e{n}.png", "blue", (n + 1, 3))
    return rows


def test_mucr_cues_are_shuffled_and_scored_by_letter(mucr: list[dict]) -> None:
    task = tasks.get("mucr-cue")
    found = task.documents("test", 6, 0)
    assert len({d.target["label"] for d in found}) > 1
    for row, document in zip(mucr, found, strict=True):
        assert f"{document.target['label']}. {row['cue']}\n" in document.prompt + "\n"
        assert all(wrong in document.prompt for wrong in row["false_cue"])
        assert [p.size for p in task.show(document)] == [(40, 30), (row["id"] + 1, 3)]
        right = task.counts({**document.target, "response": f"{document.target['label']}."}, "letter")
        assert right == {"n": 1, "correct": 1, "n_unparsed": 0}
        assert task.counts({**document.target, "response": "hm"}, "letter") == {"n": 1, "correct": 0, "n_unparsed": 1}
    assert task.image_sha256(found[0].image) != task.image_sha256(found[1].image)
    assert found == task.documents("test", 6, 0)


def test_mucr_effects_hold_the_right_picture_once(mucr: list[dict]) -> None:
    task = tasks.get("mucr-effect")
    for row, document in zip(mucr, task.documents("test", 6, 0), strict=True):
        cause, *choices = document.image.split("|")
        assert cause == row["image_0"]
        assert len(set(choices)) == 4
        assert choices["ABCD".index(document.target["label"])] == row["image_1"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(c)", "C"), ("Answer: D", "D"), ("A. A dog ran", "A"), ("The answer is C.", "C"),
        ("Image B shows it", "B"), ("", None), ("a dog", None), ("B or C", "B"), ("It is B or C", None), ("E", None),
        ("Dogs", None), ("none", None), ("A dog", None), ("Answer A because", "A"), ("A", "A"),
    ],
)  # fmt: skip
def test_letters(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter


def test_mucr_rows_are_checked(root: Path, mucr: list[dict]) -> None:
    put(root / "mucr/mucr.jsonl", [mucr[0], {**mucr[1], "false_cue": ["one"]}])
    with pytest.raises(DataError, match=r"mucr.jsonl, line 2: false_cue must be a list of three"):
        tasks.get("mucr-cue").documents("test", 2, 0)
    put(root / "mucr/mucr.jsonl", mucr[:3])
    with pytest.raises(DataError, match="four rows with different effects"):
        tasks.get("mucr-effect").documents("test", 2, 0)
