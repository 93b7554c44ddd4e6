"""The trainer: resumable, and its packed attention is the model's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmfix_evals.tinyworld.model import build_model, build_tokenizer, vocabulary
from mmfix_evals.tinyworld.pictures import patch_labels, training_pictures
from mmfix_evals.tinyworld.recipe import RECIPES
from mmfix_evals.tinyworld.stages import Lessons
from mmfix_evals.tinyworld.train import train
from mmfix_evals.tinyworld.world import CATEGORIES, scene

QUICK = RECIPES["quick"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    training_pictures(QUICK.pictures, folder, 1)
    return folder


def _fresh(work: Path, tmp_path: Path) -> Path:
    for path in work.glob("*.npy"):
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(work: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
        _fresh(work, folder)
    train(QUICK, whole / "model", whole)
    for _ in range(3):
        train(QUICK, parts / "model", parts, stop_after=4)
    train(QUICK, parts / "model", parts)
    expected, got = (load_file(f / "model" / "model.safetensors") for f in (whole, parts))
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def test_a_turn_sees_the_picture_and_itself_only(work: Path) -> None:
    words = vocabulary()
    torch.manual_seed(0)
    model = build_model(words, QUICK).eval()
    model.set_attn_implementation("eager")
    lessons = Lessons(QUICK, words, training_pictures(QUICK.pictures, work, 1), "cpu")
    items, pixels, rng = lessons.draw(QUICK.stages[2], 0)
    ids, labels, layout = lessons.turns(items[:2], rng, captions=False)
    with torch.no_grad(), layout.attention(model):
        positions = layout.positions(ids.device)
        packed = model(input_ids=ids, position_ids=positions, pixel_values=pixels[:2], use_cache=False).logits
    start, stop = layout.prefix + 3 * layout.length, layout.prefix + 4 * layout.length
    alone_ids = torch.cat([ids[:, : layout.prefix], ids[:, start:stop]], dim=1)
    with torch.no_grad():
        mask = torch.ones_like(alone_ids)
        alone = model(input_ids=alone_ids, attention_mask=mask, pixel_values=pixels[:2], use_cache=False).logits
    torch.testing.assert_close(packed[:, start:stop], alone[:, layout.prefix :], atol=1e-5, rtol=0)
    assert model.get_decoder().config._attn_implementation == "eager"
    assert int((labels != -100).sum()) == 2 * layout.turns * 2  # an answer and its end, per turn


def test_patch_labels_mark_where_objects_are() -> None:
    item = scene("train", 0)
    labels = patch_labels([item], 12).reshape(8, 8, len(CATEGORIES))
    for placed in item.objects:
        x, y, _, h = placed.box
        column = labels[..., CATEGORIES.index(placed.category)]
        assert column.any()
        rows, columns = column.nonzero()
        assert rows.min() * 12 < y + h
        assert (columns.max() + 1) * 12 > x
    assert not labels[..., [n for n, name in enumerate(CATEGORIES) if name not in item.categories]].any()


def test_text_survives_the_tokenizer() -> None:
    tokenizer = build_tokenizer(vocabulary())
    text = "there is an apple, a stop sign and a bowl. is there a traffic light in the image?"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer("Zyzzyva?")["input_ids"][1] == tokenizer.unk_token_id
    assert tokenizer.padding_side == "left"
