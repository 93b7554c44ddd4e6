"""What an author can write with the vocabulary: branches of every kind, positions, guidance; each against plain passes.

No oracle here knows the engine: a branch's logits are those of the plain model given what the branch sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import vlm
from torch import Tensor

import mmfix
from mmfix import Method
from mmfix.branches import Branch
from mmfix.errors import ConflictError, MethodError, MmfixError
from mmfix.methods import Plausibility
from mmfix.mixing import Mix, contrast, guidance
from mmfix.pictures import Blank, DiffusionNoise
from mmfix.prompts import PromptEdit
from mmfix_kernels import Group, HeadScale, ScoreEdit

STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Custom(Method):
    """A method made of one branch, whose logits alone are returned (or mixed, as `combine` says)."""

    branch: Any = None
    combine: Any = None

    def branches(self, family: Any) -> Sequence[Branch]:
        return [self.branch]

    def mix(self) -> Mix:
        return self.combine or Mix(weights=(0.0, 1.0))


Custom.info = Plausibility.info  # type: ignore[misc]


def only(branch: Branch) -> Custom:
    return Custom(branch=branch)


ROWS = [vlm.tokens(3, "image", 9, seed=1), vlm.tokens(2, "image", 4, seed=2)]


def batch(rows: list[list[int]] = ROWS, pictures: Tensor | None = None) -> dict[str, Any]:
    return vlm.batch(rows, vlm.picture(1, len(rows)) if pictures is None else pictures)


def edited(row: list[int], tokens: tuple[int, ...], at: str) -> list[int]:
    first = row.index(vlm.IMAGE_ID)
    after = len(row) - row[::-1].index(vlm.IMAGE_ID)
    return {
        "before_image": row[:first] + list(tokens) + row[first:],
        "after_image": row[:after] + list(tokens) + row[after:],
        "question": row[:after] + list(tokens),
    }[at]


def same_generation(got: Any, want: Any) -> None:
    new = got.sequences[:, -STEPS:]
    assert torch.equal(new, want.sequences[:, -STEPS:])
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


OTHER = (41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52)
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "uncached": {"use_cache": False},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", ["before_image", "after_image", "question"])
@pytest.mark.parametrize("tokens", [(41,), OTHER], ids=["short", "long"])
def test_another_prompt(model: Any, at: Any, tokens: tuple[int, ...], mode: str) -> None:
    """A prompt of another length, shorter or longer than the factual one, in every decoding mode."""
    rows = ROWS[:1] if mode == "lookup" else ROWS
    want = vlm.greedy(model, batch([edited(row, tokens, at) for row in rows]), STEPS, **MODES[mode])
    with mmfix.mitigate(model, only(Branch(prompt=PromptEdit(tokens=tokens, at=at)))):
        got = vlm.greedy(model, batch(rows), STEPS, **MODES[mode])
    same_generation(got, want)


def test_a_longer_prompt_does_not_fit_a_cache_of_fixed_size(llava: Any) -> None:
    with (
        mmfix.mitigate(llava, only(Branch(prompt=PromptEdit(tokens=OTHER)))),
        pytest.raises(MmfixError, match="fixed-size cache"),
    ):
        vlm.greedy(llava, batch(), STEPS, cache_implementation="static", disable_compile=True)


@pytest.mark.parametrize("change", [DiffusionNoise(step=500, seed=3), Blank()], ids=["noise", "blank"])
def test_another_picture(model: Any, change: Callable[[Tensor], Tensor]) -> None:
    pictures = vlm.picture(1, 2)
    want = vlm.greedy(model, batch(pictures=change(pictures)), STEPS)
    with mmfix.mitigate(model, only(Branch(pixels=change))):
        got = vlm.greedy(model, batch(), STEPS)
        alone = vlm.greedy(model, batch(ROWS[:1], pictures[:1]), STEPS)
    same_generation(got, want)
    torch.testing.assert_close(alone.logits[0][0], got.logits[0][0], atol=1e-4, rtol=0)


def test_the_noise_schedule_has_its_published_values() -> None:
    """Cumulative products of the schedule at six steps, and noise that is a function of the seed alone."""
    want = {100: 0.99659, 250: 0.97839, 500: 0.74480, 700: 0.35127, 900: 0.13314, 999: 0.08125}
    for step, value in want.items():
        assert math.isclose(DiffusionNoise(step=step).signal, value, abs_tol=6e-6)
    pixels = torch.ones(2, 3, 8, 8)
    noise = DiffusionNoise(step=999, seed=1)
    assert torch.equal(noise(pixels)[0], noise(pixels)[1])
    assert not torch.equal(noise(pixels), DiffusionNoise(step=999, seed=2)(pixels))
    with pytest.raises(MethodError, match="0 to 999"):
        DiffusionNoise(step=1000)


def test_a_black_picture_is_a_picture_and_a_tile_that_fills_up_is_none() -> None:
    """Zero all over: in a batch of pictures one that is so; where prompts have several, what pads their number."""
    noise = DiffusionNoise(step=999)
    pictures = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    assert (noise(pictures) != pictures).flatten(1).float().mean(1).min() > 0.9
    assert torch.equal(Blank(value=2.0)(pictures), torch.full_like(pictures, 2.0))
    tiles = pictures[None]
    assert torch.equal(noise(tiles)[0, 0], tiles[0, 0])
    assert not torch.equal(noise(tiles)[0, 1], tiles[0, 1])


def test_edits_of_one_branch_alone(model: Any) -> None:
    """The branch is the model with the edit; the factual row is the model without."""

    @dataclass(frozen=True, kw_only=True)
    class Edited(Method):
        def edits(self, site: Any) -> Any:
            return [ScoreEdit(group=Group.IMAGE, bias=-2.0)] if site.layer in (1, 3) else []

    Edited.info = Plausibility.info  # type: ignore[misc]
    inputs = batch()
    plain = vlm.logits(model, inputs)
    with mmfix.mitigate(model, Edited()):
        changed = vlm.logits(model, inputs)
    branch = Branch(edits=(ScoreEdit(group=Group.IMAGE, bias=-2.0),), layers=(1, 3))
    real = inputs["attention_mask"].bool()
    for mix, want in ((Mix(weights=(0.0, 1.0)), changed), (Mix(weights=(1.0, 0.0)), plain)):
        with mmfix.mitigate(model, Custom(branch=branch, combine=mix)):
            torch.testing.assert_close(vlm.logits(model, inputs)[real], want[real], atol=1e-4, rtol=0)
    with mmfix.mitigate(model, Custom(branch=branch, combine=contrast(0.5))):
        torch.testing.assert_close(
            vlm.logits(model, inputs)[real], (1.5 * plain - 0.5 * changed)[real], atol=1e-4, rtol=0
        )
    with mmfix.mitigate(model, Custom(branch=branch, combine=guidance(1.5))):
        want = 1.5 * plain.log_softmax(-1) - 0.5 * changed.log_softmax(-1)
        torch.testing.assert_close(vlm.logits(model, inputs)[real], want[real], atol=1e-4, rtol=0)


def test_head_factors_of_one_branch(llava: Any) -> None:
    inputs = batch()
    scale = torch.ones(vlm.HEADS)
    scale[2] = 0.0
    plain = vlm.logits(llava, inputs)
    branch = Branch(edits=(HeadScale(scale=scale),), layers=(2,))
    with mmfix.mitigate(llava, Custom(branch=branch, combine=Mix(weights=(1.0, 0.0)))):
        torch.testing.assert_close(vlm.logits(llava, inputs), plain, atol=1e-4, rtol=0)
    with mmfix.mitigate(llava, only(branch)):
        assert (vlm.logits(llava, inputs) - plain).abs().max() > 1e-2


def test_branches_without_the_image_from_embeddings(model: Any) -> None:
    """Embeddings with an image mask: the branch is the text alone, as from ids."""
    inputs = batch()
    short = vlm.batch([[t for t in row if t != vlm.IMAGE_ID] for row in ROWS])
    want = vlm.greedy(model, short, STEPS)
    with torch.no_grad():
        image = inputs["input_ids"] == vlm.IMAGE_ID
        embeds = model.get_input_embeddings()(inputs["input_ids"].masked_fill(image, 0))
        found = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        embeds[image] = torch.cat(list(found)).to(embeds.dtype)
    with mmfix.mitigate(model, only(Branch(image=False))) as fix:
        fix.image_mask = image
        given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
        got = vlm.greedy(model, given, STEPS)
    same_generation(got, want)


@dataclass(frozen=True, kw_only=True)
class Reversed(Method):
    """Image tokens in reversed order of position."""

    def positions(self, spans: Any) -> Tensor:
        place = (spans.valid.long().cumsum(-1) - 1).clamp(min=0)
        first = torch.where(spans.image, place, 1 << 20).amin(-1, keepdim=True)
        last = torch.where(spans.image, place, -1).amax(-1, keepdim=True)
        flipped: Tensor = torch.where(spans.image, first + last - place, place)
        return flipped


Reversed.info = Plausibility.info  # type: ignore[misc]


@pytest.mark.parametrize("cached", [True, False])
def test_rewritten_positions(model: Any, cached: bool) -> None:
    """Against the plain model given the same positions by hand, token by token without a cache."""
    inputs = batch()
    with mmfix.mitigate(model, Reversed()):
        got = vlm.greedy(model, inputs, STEPS, use_cache=cached)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for step in range(STEPS):
        place = (mask.cumsum(-1) - 1).clamp(min=0)
        image = ids == vlm.IMAGE_ID
        for row in range(2):
            where = image[row].nonzero()[:, 0][: vlm.IMAGE_TOKENS]
            place[row, where] = place[row, where].flip(0)
        given = {**inputs, "input_ids": ids, "attention_mask": mask, "position_ids": place}
        want = vlm.logits(model, given)[:, -1]
        torch.testing.assert_close(got.logits[step], want, atol=1e-4, rtol=0)
        token = want.argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    plain = vlm.greedy(model, inputs, 1).logits[0]
    assert (plain - got.logits[0]).abs().max() > 1e-3


def test_two_methods_that_rewrite_positions_conflict(llava: Any) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Again(Reversed):
        pass

    Again.info = mmfix.methods()["mma"]  # type: ignore[misc]
    with (
        pytest.raises(ConflictError, match="both rewrite positions"),
        mmfix.mitigate(llava, [Reversed(), Again()]),
    ):
        pass
