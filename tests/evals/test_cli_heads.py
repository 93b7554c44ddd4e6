"""``mmfix heads``: maps of the bundled model from a few pictures, and of a user's own pictures and questions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import mmfix
from mmfix.heads import HeadMap
from mmfix.methods import VHR, VSEAM
from mmfix_decoding import Decoder
from mmfix_evals import headdata, headmaps
from mmfix_evals.errors import DataError, UsageError

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, Path]:
    """Two pictures and two questions about them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(2):
        Image.new("RGB", (96, 96), (60 * n, 200, 90)).save(folder / f"{n}.png")
    file = tmp_path / "questions.jsonl"
    rows = [
        {"image": f"{n}.png", "text": "Is there a dog in the image?", "label": word}
        for n, word in ((0, "no"), (1, "Yes"))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, file


def test_a_map_is_written_drawn_and_used(call: Call, tmp_path: Path) -> None:
    out, plot = tmp_path / "heads.json", tmp_path / "heads.svg"
    code, printed, errors = call("heads", "--limit", 2, "--out", out, "--plot", plot)
    assert (code, errors.count("\n")) == (0, 1)  # one line of progress
    assert f"vhr:heads={out}" in printed
    found = HeadMap.read(out)
    assert (found.score, found.model, found.shape, found.prompts) == ("vhd", "tiny", (6, 6), 2)
    assert found.revision is not None
    assert found.data_sha256 == headdata.digest(headdata.described(None, 2))
    svg = plot.read_text()
    assert svg.startswith("<?xml")
    assert "vhd: tiny, n = 2" in svg
    best = found.ranked()[0]
    assert VHR(heads=str(out), top=1).heads == (best,)
    code, again, _ = call("heads", "--limit", 2, "--json", "--quiet")
    assert json.loads(again)["values"] == [list(row) for row in found.values]


def test_scores_that_decode_and_that_ask(bundled: Decoder) -> None:
    told: list[int] = []
    wanted = headmaps.Wanted("retrieval", limit=3, steps=20)
    found = headmaps.measure(bundled, wanted, told.append)
    assert sum(told) == headmaps.total(wanted, bundled.model) == 3
    assert found.also["named"] > 0
    assert all(0.0 <= value <= 1.0 for row in found.values for value in row)
    assert max(value for row in found.values for value in row) > 0
    assert found.settings["needle"] == "object"
    seam = headmaps.measure(bundled, headmaps.Wanted("vseam", limit=4))
    assert 0 < seam.also["p_right"] <= 1
    assert any(value < 0 for row in seam.values for value in row) or any(
        value > 0 for row in seam.values for value in row
    )


def test_own_pictures_and_questions(bundled: Decoder, own: tuple[Path, Path]) -> None:
    folder, file = own
    found = headmaps.measure(bundled, headmaps.Wanted("vseam", folder, file))
    assert (found.prompts, found.settings["data"]) == (2, "own pictures")
    mass = headmaps.measure(bundled, headmaps.Wanted("image-mass", folder))
    assert all(0.0 <= value <= 1.0 + 1e-6 for row in mass.values for value in row)
    with pytest.raises(DataError, match="go together"):
        headmaps.measure(bundled, headmaps.Wanted("vseam", folder))
    with pytest.raises(UsageError, match="--needle object"):
        headmaps.measure(bundled, headmaps.Wanted("retrieval", folder, needle="object"))
    with pytest.raises(DataError, match="none of 2 answers repeats"):  # this model cannot copy, and that is said
        headmaps.measure(bundled, headmaps.Wanted("retrieval", folder, text="there is a dog and a kite", steps=8))


def test_vseam_tells_the_size_of_its_gain(call: Call, own: tuple[Path, Path], tmp_path: Path) -> None:
    """Printed and kept, and what the method makes of the same file: strength 1 may be nearly the plain model."""
    out = tmp_path / "heads.json"
    words = ("--score", "vseam", "--images", own[0], "--questions", own[1], "--out", out, "--quiet")
    code, printed, _ = call("heads", *words)
    kept = HeadMap.read(out)
    gain = kept.also["gain"]
    assert (code, gain["strength"]) == (0, 1.0)
    assert gain["largest"] == pytest.approx(max(abs(value) for row in kept.values for value in row), abs=1e-8)
    assert gain["largest"] == pytest.approx(VSEAM(heads=str(out)).largest, abs=1e-8)
    assert 0 < gain["largest"] < 1
    assert f"p(right answer) {kept.also['p_right']:.5g}; at strength 1 vseam scales" in printed
    assert f"1 ± {gain['largest']:.5g} at most" in printed


def test_where_objects_lie_in_the_prompt(bundled: Decoder) -> None:
    """A patch of 12 pixels of a picture of 96: its box touches the token of its row and column, and no other."""
    asked = headdata.Asked(Image.new("RGB", (96, 96)), "What is in the image?", "", {"dog": [(12, 36, 12, 12)]})
    inputs, _ = next(iter(headdata.batches(bundled, [asked], 1)))
    image = inputs["input_ids"][0] == mmfix.describe(bundled.model).image_token_id
    places = headmaps._patches(bundled, inputs, asked, image)["dog"]
    assert places.nonzero()[:, 0].tolist() == [int(image.nonzero()[0]) + 3 * 8 + 1]


def test_named_objects_begin_at_a_token() -> None:
    pieces = ["this", " is", " a", " fire", " hydr", "ant", " and", " two", " dogs", "."]
    assert headdata.named(pieces, ["fire hydrant", "dog", "kite", "ant"]) == [(3, "fire hydrant"), (8, "dog")]
    assert headdata.find([1, 2, 3, 2, 3, 4], [2, 3, 4]) == 3
    assert headdata.find([1, 2], [3]) is None


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{"image": "0.png", "text": "Is it?"}', "needs image, text and label"),
        ('{"image": "../0.png", "text": "Is it?", "label": "no"}', "lies outside"),
        ("", "holds no question"),
    ],
)
def test_questions_that_cannot_be_used(own: tuple[Path, Path], tmp_path: Path, row: str, told: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(row + "\n")
    with pytest.raises(DataError, match=told):
        headdata.questions(own[0], file, 4)


def test_wrong_words_are_one_line(call: Call, tmp_path: Path) -> None:
    for words in (("--score", "vdh"), ("--limit", 0), ("--images", tmp_path / "none")):
        code, printed, errors = call("heads", *words, "--quiet")
        assert code in (1, 2)
        assert (printed, errors.count("\n")) == ("", 1)
