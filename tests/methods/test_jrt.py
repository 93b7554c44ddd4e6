"""JRT against the plain model given the longer prompt."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support import vlm

import mmfix
from mmfix.errors import ConflictError, MethodError, MmfixError
from mmfix.methods import JRT

STEPS = 4
ANSWER = [92, 93]
QUESTIONS = [[11, 12, 13], [21, 22, 23, 24, 25]]
I = [vlm.IMAGE_ID] * vlm.IMAGE_TOKENS  # noqa: E741
GIVEN = [[1, 7, 8, *I, *QUESTIONS[0], *ANSWER], [1, *I, 9, *I, *QUESTIONS[1], *ANSWER], [1, 5, 6, 7]]
WANTED = [
    [1, 7, 8, *QUESTIONS[0] * 2, *I, *QUESTIONS[0], *ANSWER],
    [1, *QUESTIONS[1] * 2, *I, 9, *I, *QUESTIONS[1], *ANSWER],
    [1, 5, 6, 7],
]


def same(got: Any, want: Any) -> None:
    assert torch.equal(got.sequences[:, -STEPS:], want.sequences[:, -STEPS:])
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
def test_it_is_the_plain_model_with_the_longer_prompt(grouped: Any, options: dict[str, Any]) -> None:
    """One picture, two and none in a padded batch; questions of different length."""
    pictures = vlm.picture(0, 3)
    want = vlm.greedy(grouped, vlm.batch(WANTED, pictures), STEPS, **options)
    inputs = vlm.batch(GIVEN, pictures)
    with mmfix.mitigate(grouped, JRT(times=3, marker=tuple(ANSWER))) as fix:
        got = vlm.greedy(grouped, inputs, STEPS, **options)
        assert fix.rows_per_prompt == 1
        assert fix.report().passes_per_token == 1 == mmfix.methods()["jrt"].passes
    same(got, want)
    assert torch.equal(got.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"]), "the prompt as given"


def test_tokens_of_the_template_are_not_read_twice(llava: Any) -> None:
    """What opens and closes the picture stays around it, and what closes the turn is no part of the question."""
    row = [1, 7, 70, *I, 71, *QUESTIONS[1], 2, 13, *ANSWER]
    longer = [1, 7, *QUESTIONS[1], 70, *I, 71, *QUESTIONS[1], 2, 13, *ANSWER]
    want = vlm.greedy(llava, vlm.batch([longer], vlm.picture()), STEPS)
    method = JRT(marker=tuple(ANSWER), around=(70, 71), special=(2,))
    with mmfix.mitigate(llava, method):
        same(vlm.greedy(llava, vlm.batch([row], vlm.picture()), STEPS), want)
    family = dataclasses.replace(mmfix.describe(llava), around_image=(70, 71), special=(2, 70, vlm.IMAGE_ID))
    assert JRT(marker=tuple(ANSWER)).prepare(family) == method


def test_logits_of_every_token_that_was_asked_for(llava: Any) -> None:
    inputs = vlm.batch(GIVEN[:1], vlm.picture())
    with mmfix.mitigate(llava, JRT(until="prompt")):
        got = vlm.logits(llava, inputs)
    asked = [*QUESTIONS[0], *ANSWER]
    want = vlm.logits(llava, vlm.batch([[1, 7, 8, *asked, *I, *asked]], vlm.picture()))
    torch.testing.assert_close(got, want[:, -got.shape[1] :], atol=1e-4, rtol=0)
    assert got.shape[1] == inputs["input_ids"].shape[1]


def test_a_cache_and_a_method_that_edits_go_on(llava: Any) -> None:
    """Edits find the picture where it lies in the longer prompt."""
    inputs, longer = vlm.batch(GIVEN[:1], vlm.picture()), vlm.batch(WANTED[:1], vlm.picture())
    vaf = mmfix.method("vaf", image_gain=2.0)
    with mmfix.mitigate(llava, vaf):
        want = vlm.greedy(llava, longer, STEPS)
    with mmfix.mitigate(llava, [vaf, JRT(times=3, marker=tuple(ANSWER))]):
        same(vlm.greedy(llava, inputs, STEPS), want)


def test_what_is_refused(llava: Any) -> None:
    inputs = vlm.batch(GIVEN[:1], vlm.picture())
    with pytest.raises(MethodError, match="processor="), mmfix.mitigate(llava, "jrt"):
        pass
    with (
        pytest.raises(ConflictError, match="'jrt' and 'vcd'"),
        mmfix.mitigate(llava, [JRT(until="prompt"), mmfix.method("vcd")]),
    ):
        pass
    with mmfix.mitigate(llava, JRT(until="prompt")), pytest.raises(MmfixError, match="fixed-size cache"):
        vlm.greedy(llava, inputs, STEPS, cache_implementation="static")
    for prompt, words in (([1, 5, *I], "no question"), ([*GIVEN[0], 8, *ANSWER], "2 answers begin")):
        rule = JRT(until="prompt") if words == "no question" else JRT(marker=tuple(ANSWER))
        with mmfix.mitigate(llava, rule), pytest.raises(MmfixError, match=words):
            vlm.greedy(llava, vlm.batch([prompt], vlm.picture()), STEPS)
    for params in ({"times": 0}, {"times": 9}, {"times": 1.5}, {"until": "turn"}):
        with pytest.raises(MethodError, match="jrt"):
            mmfix.method("jrt", **params)
