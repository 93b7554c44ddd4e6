"""AGLA against plain passes with a picture masked by hand, and the interface for a scorer of one's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import vlm
from torch import Tensor

import mmfix
from mmfix import scorers
from mmfix.errors import MethodError, MmfixError, UnsupportedModel
from mmfix.mixing import Mix
from mmfix.relevance import Asked, KeepRelevant
from mmfix.scorers import Question

FREE = {"scorer": "by-question", "beta": 1e-9}


def by_question(pixels: Tensor, question: Question) -> Tensor:
    """A relevance that depends on the picture and on the question."""
    generator = torch.Generator().manual_seed(sum(question.ids))
    return pixels.mean(0) + torch.randn(pixels.shape[-2:], generator=generator)


@pytest.fixture(autouse=True)
def _scorer() -> Iterator[None]:
    scorers.register("by-question", by_question)
    yield
    for name in ("by-question", "mine"):
        scorers.unregister(name)


def masked(inputs: dict[str, Any], keep: float) -> dict[str, Any]:
    """The same prompts, each picture masked for its own question."""
    pictures = []
    for ids, mask, pixels in zip(
        inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), inputs["pixel_values"], strict=True
    ):
        asked = tuple(t for t, m in zip(ids, mask, strict=True) if m and t != vlm.IMAGE_ID)
        found = by_question(pixels, Question(asked))
        order = found.flatten().argsort(descending=True)[: round(keep * found.numel())]
        stays = torch.zeros(found.numel(), dtype=torch.bool).index_fill(0, order, True).view_as(found)
        pictures.append(pixels * stays)
    return {**inputs, "pixel_values": torch.stack(pictures)}


def two() -> dict[str, Any]:
    rows = [vlm.tokens(3, "image", 6), vlm.tokens(2, "image", 3, seed=4)]
    return vlm.batch(rows, torch.cat([vlm.picture(0), vlm.picture(4)]))


@pytest.mark.parametrize(("alpha", "keep"), [(2.0, 0.5), (0.5, 0.1), (-0.5, 0.3)])
def test_logits_are_the_weighted_sum_of_both_pictures(model: Any, alpha: float, keep: float) -> None:
    inputs = two()
    valid = inputs["attention_mask"].bool()
    plain, other = vlm.logits(model, inputs), vlm.logits(model, masked(inputs, keep))
    assert (plain - other)[valid].abs().max() > 0.05
    with mmfix.mitigate(model, "agla", alpha=alpha, keep=keep, **FREE) as fix:
        mixed = vlm.logits(model, inputs)
    want = plain + alpha * other
    torch.testing.assert_close(mixed[valid], want[valid], atol=1e-4, rtol=1e-4)
    assert fix.report().fired["agla"].fired > 0
    assert fix.report().passes_per_token == 2


def test_generation_and_beams_follow_the_sum_and_the_cut(llava: Any) -> None:
    inputs = two()
    other = masked(inputs, 0.4)
    ids, steps = inputs["input_ids"], 5
    for _ in range(steps):
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        more["attention_mask"][:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
        whole, part = (vlm.logits(llava, {**given, **more})[:, -1] for given in (inputs, other))
        z = (whole + 2.0 * part).masked_fill(whole < whole.amax(-1, keepdim=True) + torch.tensor(0.5).log(), -torch.inf)
        ids = torch.cat([ids, z.argmax(-1, keepdim=True)], dim=1)
    with mmfix.mitigate(llava, "agla", scorer="by-question", keep=0.4):
        found = vlm.greedy(llava, inputs, steps)
        beams = llava.generate(**inputs, max_new_tokens=steps, num_beams=3)
        alone = [
            llava.generate(**vlm.batch([row[mask.bool()].tolist()], pixels[None]), max_new_tokens=steps, num_beams=3)
            for row, mask, pixels in zip(ids[:, :-steps], inputs["attention_mask"], inputs["pixel_values"], strict=True)
        ]
    assert found.sequences.tolist() == ids.tolist()
    assert [row[-steps:].tolist() for row in beams] == [one[0, -steps:].tolist() for one in alone]


def test_strength_zero_and_a_whole_picture(llava: Any) -> None:
    inputs = two()
    plain = vlm.logits(llava, inputs)
    with mmfix.mitigate(llava, "agla", scorer=None, alpha=0.0, beta=1e-9) as fix:
        assert torch.equal(vlm.logits(llava, inputs), plain)
        assert fix.rows_per_prompt == 1
    with mmfix.mitigate(llava, "agla", keep=1.0, alpha=1.0, **FREE) as fix:
        torch.testing.assert_close(vlm.logits(llava, inputs), 2 * plain, atol=1e-4, rtol=1e-4)
        assert fix.report().fired["agla"].fired == 0  # a scale is no contrast


def test_a_scorer_is_asked_with_the_text_of_its_own_prompt(llava: Any) -> None:
    class Words:
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [len(text)]}

        def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
            return " ".join(f"w{token}" for token in ids)

    seen: list[tuple[tuple[int, ...], Question]] = []

    @scorers.register("mine")
    def mine(pixels: Tensor, question: Question) -> Any:
        seen.append((tuple(pixels.shape), question))
        return pixels[0].tolist()  # a list of numbers will do

    inputs = two()
    with mmfix.mitigate(llava, "agla", scorer="mine", processor=Words()):
        vlm.greedy(llava, inputs, 2)
    assert len(seen) == 2  # once per picture, not once per token
    assert {shape for shape, _ in seen} == {(3, 24, 24)}
    for (_, question), row, mask in zip(seen, inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids = [t for t, m in zip(row.tolist(), mask.tolist(), strict=True) if m and t != vlm.IMAGE_ID]
        assert question == Question(tuple(ids), " ".join(f"w{t}" for t in ids))


def test_a_scorer_is_a_name_in_what_is_written_down(llava: Any) -> None:
    method = mmfix.parse("agla:scorer=by-question,alpha=1")
    written = json.dumps(mmfix.spec(method))
    assert mmfix.from_spec(json.loads(written)) == method
    with pytest.raises(MethodError, match=r"agla needs a model of your own.*scorers.register"):
        mmfix.mitigate(llava, "agla").__enter__()
    with pytest.raises(MethodError, match=r"'none-such' is not registered"):
        mmfix.mitigate(llava, "agla", scorer="none-such").__enter__()
    scorers.register("mine", lambda pixels, word: [], kind="boxes")
    with pytest.raises(MethodError, match="returns boxes, and agla needs map"):
        mmfix.mitigate(llava, "agla", scorer="mine").__enter__()
    assert "mine" not in scorers.names("map")
    for wrong in ({"name": "two words"}, {"name": "x", "kind": "sound"}, {"name": "x", "function": 3}):
        with pytest.raises(MethodError, match="scorer"):
            scorers.register(**{"function": by_question, **wrong})


def test_a_wrong_map_is_an_error_and_the_next_call_is_right(llava: Any) -> None:
    inputs = vlm.one()
    for wrong in (torch.zeros(3, 3), torch.full((24, 24), torch.nan)):
        scorers.register("mine", lambda pixels, question, wrong=wrong: wrong)
        with mmfix.mitigate(llava, "agla", scorer="mine"):
            with pytest.raises(MmfixError, match="scorer 'mine' returned"):
                vlm.greedy(llava, inputs, 2)
            scorers.register("mine", by_question)
            assert vlm.greedy(llava, inputs, 2).sequences.shape[1] == inputs["input_ids"].shape[1] + 2


def test_pictures_find_their_questions() -> None:
    image = 9
    ids = torch.tensor([[0, 9, 9, 9, 9, 1], [9, 9, 2, 3, 4, 5]])
    asked = Asked(ids, ids > 0, image)
    found = asked.questions(torch.zeros(3, 3, 4, 4), "model")
    assert [q.ids for q in found] == [(1,), (1,), (2, 3, 4, 5)]
    with pytest.raises(UnsupportedModel, match="which picture belongs"):
        asked.questions(torch.zeros(4, 3, 4, 4), "model")
    with pytest.raises(UnsupportedModel, match="packed or in tiles"):
        asked.questions(torch.zeros(30, 12), "model")
    for keep in (0.0, 1.5):
        with pytest.raises(MethodError, match="share of pixels"):
            KeepRelevant(scorer="by-question", keep=keep)
    with pytest.raises(MethodError, match="scale"):
        Mix(weights=(1.0,), scale=0.0)
