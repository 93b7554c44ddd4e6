"""ICD against two plain passes per token: the prompt, and the prompt with the disturbance written into it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import plain, vlm
from torch import Tensor

import mmfix
from mmfix.engine import described
from mmfix.errors import MethodError
from mmfix.methods import ICD
from mmfix.prompts import PromptEdit

STEPS = 3
WORDS = (41, 42, 43)


class Tokenizer:
    """Splits on spaces; a word is its length plus forty."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [40 + len(word) for word in text.split()]}


def disturbed(row: list[int], at: str) -> list[int]:
    first = row.index(vlm.IMAGE_ID)
    after = first + vlm.IMAGE_TOKENS
    return {
        "before_image": [*row[:first], *WORDS, *row[first:]],
        "after_image": [*row[:after], *WORDS, *row[after:]],
        "question": [*row[:after], *WORDS],
    }[at]


def oracle(model: Any, alpha: float, beta: float, at: str) -> Tensor:
    inputs = plain.ragged()
    other = vlm.batch([disturbed(row, at) for row in plain.ROWS], inputs["pixel_values"])

    def newest(grown: dict[str, Any], step: int) -> Tensor:
        nonlocal other
        if step:  # the branch receives the same generated tokens
            other = plain.grown(other, grown["input_ids"][:, -1:])
        factual, changed = plain.newest(model, grown), plain.newest(model, other)
        return plain.cut((1 + alpha) * factual - alpha * changed, factual, beta)

    return plain.decoded(inputs, newest, STEPS)


@pytest.mark.parametrize("at", ["before_image", "after_image", "question"])
def test_decoding_equals_two_plain_passes_per_token(llava: Any, at: Any) -> None:
    with mmfix.mitigate(llava, ICD(tokens=WORDS, at=at, alpha=0.7, beta=0.05)):
        out = vlm.greedy(llava, plain.ragged(), STEPS)
    plain.agrees(out, oracle(llava, 0.7, 0.05, at))


def test_the_instruction_stands_outside_of_what_opens_and_closes_a_picture() -> None:
    """Models and processors name these tokens; a row of tokens between two pictures is not touched."""
    ids = torch.tensor([1, 70, 99, 99, 71, 5, 70, 99, 71, 71, 8])
    image = ids == 99
    for at, want in (("before_image", 1), ("after_image", 10)):
        got, marked = PromptEdit(tokens=(41,), at=at, around=(70, 71))(ids, image)  # type: ignore[arg-type]
        assert got.tolist() == [*ids[:want].tolist(), 41, *ids[want:].tolist()]
        assert marked.tolist() == (got == 99).tolist()
    model = vlm.build("llava")
    model.config.vision_start_token_id, model.config.eoi_token_index = 70, 71
    processor = SimpleNamespace(
        start_image_token_id=72, end_image_token_id=vlm.IMAGE_ID, all_special_ids=[2, 70, 1], bos_token_id=1
    )
    assert described(model).around_image == (70, 71)
    family = described(model, processor)
    assert (family.around_image, family.special) == ((70, 71, 72), (2, 70))
    assert ICD(tokens=(41,)).branches(family)[0].prompt.around == (70, 71, 72)  # type: ignore[union-attr]


def test_the_same_prompt_in_both_branches_gives_the_clean_logits(llava: Any) -> None:
    """The parity case of the specification: the question replaced by itself."""
    inputs = vlm.one()
    question = tuple(inputs["input_ids"][0, 4 + vlm.IMAGE_TOKENS :].tolist())
    want = vlm.greedy(llava, inputs, STEPS)
    with mmfix.mitigate(llava, ICD(tokens=question, at="question", alpha=2.0, beta=1e-9)):
        got = vlm.greedy(llava, inputs, STEPS)
    assert (got.sequences == want.sequences).all()
    assert max(float((a - b).abs().max()) for a, b in zip(got.logits, want.logits, strict=True)) < 1e-4


def test_the_instruction_is_an_input_and_is_recorded(llava: Any) -> None:
    """Requirement 1: text is tokenised by the processor, and the report holds the text and its ids."""
    with mmfix.mitigate(llava, "icd", processor=Tokenizer(), instruction="a bb ccc", alpha=0.7, beta=0.05) as fix:
        out = vlm.greedy(llava, plain.ragged(), STEPS)
        told = fix.report().to_dict()["methods"][0]["params"]
    assert (told["instruction"], told["tokens"]) == ("a bb ccc", list(WORDS))
    plain.agrees(out, oracle(llava, 0.7, 0.05, "after_image"))


def test_what_is_missing_is_said(llava: Any) -> None:
    for params, words in (({}, "has no default"), ({"instruction": "You are confused."}, "pass processor=")):
        with pytest.raises(MethodError, match=words), mmfix.mitigate(llava, ICD(**params)):
            pass
    with mmfix.mitigate(llava, ICD(alpha=0.0)) as fix:  # no contrast needs no disturbance
        assert fix.rows_per_prompt == 1


@pytest.mark.parametrize("wrong", [{"alpha": -2.0}, {"beta": 2.0}, {"at": "end"}, {"tokens": ()}, {"tokens": (-1,)}])
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=f"icd.{next(iter(wrong))}"):
        ICD(**wrong)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_a_direct_call_stay_where_their_tokens_are(llava: Any, side: str) -> None:
    """A longer prompt in the branch changes no shape, and padding on either side no alignment."""
    inputs = vlm.batch(plain.ROWS, plain.ragged()["pixel_values"], side=side)
    last = [len(row) - 1 if side == "right" else -1 for row in plain.ROWS]
    factual = vlm.logits(llava, inputs)
    other = [
        vlm.batch([disturbed(row, "after_image")], vlm.picture(1, 2)[n : n + 1]) for n, row in enumerate(plain.ROWS)
    ]
    with mmfix.mitigate(llava, ICD(tokens=WORDS, alpha=0.7, beta=1e-9)):
        got = vlm.logits(llava, inputs)
    assert got.shape == factual.shape
    for n, place in enumerate(last):
        want = 1.7 * factual[n, place] - 0.7 * plain.newest(llava, other[n])[0]
        assert (got[n, place] - want).abs().max() < 2e-4
