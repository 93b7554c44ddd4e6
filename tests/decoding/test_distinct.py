"""Equal pictures of a batch are encoded once, and nobody notices but the clock."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_llava import picture
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmfix.distinct import distinct, encoding_once, spread
from mmfix_decoding import Decoder

METHODS: dict[str, Any] = {
    "plain": None,
    "paint": "paint",  # reads the tower's maps
    "damro": "damro",  # marks patches
    "causalmm-vision": "causalmm-vision",  # edits the tower
    "vcd": "vcd",  # adds noise to pixels
    "memvr": "memvr",
}


@pytest.fixture
def seen(decoder: Decoder) -> Any:
    """How many pictures each pass of the tower had."""
    counts: list[int] = []
    tower = decoder.model.model.vision_tower
    handle = tower.register_forward_pre_hook(lambda module, args, kwargs: counts.append(len(args[0])), with_kwargs=True)
    yield counts
    handle.remove()


@pytest.mark.parametrize("method", METHODS)
def test_repeated_pictures_answer_as_each_alone(
    decoder: Decoder, method: str, questions: list[str], seen: list[int]
) -> None:
    one, other = picture(0), picture(1)
    images = [one, one, other, one, other]
    chosen = decoder.with_method(METHODS[method])
    together = chosen.generate(images, questions, max_new_tokens=6)
    assert seen[0] == 2, "five prompts, two pictures"
    alone = [chosen.generate(i, q, max_new_tokens=6) for i, q in zip(images, questions, strict=True)]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert len({tuple(a.token_ids) for a in together}) > 1
    assert "get_image_features" not in decoder.model.base_model.__dict__


def test_a_pair_sees_its_picture_once(decoder: Decoder, seen: list[int]) -> None:
    list(decoder.with_method("vhr").stream_pair(picture(0), "dog ?", max_new_tokens=2))
    assert seen == [1]


def test_a_difference_of_one_pixel_is_seen() -> None:
    pixels = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0)).repeat(4, 1, 1, 1)
    pixels[2, 1, 17, 3] += 1e-3
    assert distinct(pixels) == ([0, 2], [0, 0, 1, 0])
    pixels[0, 0, 0, 0] = float("nan")
    assert distinct(pixels)[1] == [0, 1, 2, 1]


class Encoder(torch.nn.Module):
    """Gives features in the layouts that models give them in."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout, self.calls = layout, 0

    @property
    def base_model(self) -> Encoder:
        return self

    def get_image_features(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> Any:
        self.calls += 1
        states = pixel_values.flatten(2).transpose(1, 2)  # [P, tokens, 3]
        self.seen = spread(states)
        pooled: Any = {"stacked": states, "list": list(states), "flat": states.flatten(0, 1)}.get(self.layout)
        if pooled is None:
            pooled = states.flatten(0, 1)[:-1]
        return BaseModelOutputWithPooling(pooler_output=pooled, hidden_states=(None, states, 2 * states))


@pytest.mark.parametrize("layout", ["stacked", "list", "flat", "odd"])
def test_every_layout_is_laid_out_again(layout: str) -> None:
    model = Encoder(layout)
    pixels = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(1))[[0, 1, 0, 0]]
    plain = model.get_image_features(pixels)
    with encoding_once(model):
        model.calls = 0
        for _ in range(2):
            found = model.get_image_features(pixel_values=pixels)
            assert found.hidden_states[0] is None
            for a, b in zip(found.hidden_states[1:], plain.hidden_states[1:], strict=True):
                assert torch.equal(a, b)
            assert len(found.pooler_output) == len(plain.pooler_output)
            assert all(torch.equal(a, b) for a, b in zip(found.pooler_output, plain.pooler_output, strict=True))
            assert torch.equal(model.seen, plain.hidden_states[1])
        assert model.calls == (3 if layout == "odd" else 2), "an unknown layout is tried once"
        sized = model.get_image_features(pixels, torch.ones(4, 2))
        assert torch.equal(sized.hidden_states[1], plain.hidden_states[1])
    assert "get_image_features" not in vars(model)


def test_pictures_in_one_prompt(decoder: Decoder, seen: list[int]) -> None:
    a, b = picture(0), picture(1)
    twice = decoder.generate([[a, b], [b, b]], ["describe the two picture", "dog ?"], max_new_tokens=6)
    assert seen == [2]
    alone = [decoder.generate([pair], q, max_new_tokens=6)[0] for pair, q in (([a, b], "describe the two picture"),)]
    assert twice[0].token_ids == alone[0].token_ids
