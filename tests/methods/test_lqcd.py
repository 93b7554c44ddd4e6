"""LQCD against two separate runs combined by hand, token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import plain_pass, vlm

import mmfix
from mmfix.errors import MethodError
from mmfix.methods.lqcd import LQCD, question

STEPS = 3
NEUTRAL = [vlm.tokens(3, "image", 9, seed=1), vlm.tokens(2, "image", 4, seed=2)]
LEADING = {"shorter": (41, 42), "longer": tuple(range(41, 54))}


def led(row: list[int], leading: tuple[int, ...]) -> list[int]:
    return row[: len(row) - row[::-1].index(vlm.IMAGE_ID)] + list(leading)


def grown(rows: list[list[int]], tokens: torch.Tensor) -> dict[str, Any]:
    return vlm.batch([row + new for row, new in zip(rows, tokens.tolist(), strict=True)], vlm.picture(0, len(rows)))


@pytest.mark.parametrize("leading", LEADING.values(), ids=list(LEADING))
def test_it_is_two_runs_combined_by_hand(grouped: Any, leading: tuple[int, ...]) -> None:
    alpha, beta = 0.7, 0.05
    inputs = vlm.batch(NEUTRAL, vlm.picture(0, 2))
    with mmfix.mitigate(grouped, LQCD(leading=leading, alpha=alpha, beta=beta)):
        got = vlm.greedy(grouped, inputs, STEPS)
    tokens = got.sequences[:, -STEPS:]
    cut = 0
    for step in range(STEPS):
        runs = []
        for rows in (NEUTRAL, [led(row, leading) for row in NEUTRAL]):
            given = grown(rows, tokens[:, :step])
            allowed = plain_pass.causal(given)
            weights = lambda scores, layer, allowed=allowed: plain_pass.softmax(scores, allowed)  # noqa: E731
            runs.append(plain_pass.logits(grouped, given, weights)[:, -1])
        neutral, lead = runs
        want = (1 + alpha) * neutral - alpha * lead
        kept = neutral >= math.log(beta) + neutral.amax(-1, keepdim=True)
        assert torch.equal(kept, got.logits[step].isfinite())
        torch.testing.assert_close(got.logits[step][kept], want[kept], atol=1e-4, rtol=0)
        cut += int((~kept).sum())
        assert torch.equal(tokens[:, step], want.masked_fill(~kept, -torch.inf).argmax(-1))
    assert cut > 0
    assert (want - neutral).abs().max() > 1e-2


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_equal_questions_give_the_clean_logits(llava: Any, alpha: float) -> None:
    row = NEUTRAL[0]
    inputs = vlm.batch([row], vlm.picture())
    plain = vlm.greedy(llava, inputs, STEPS)
    same = question(row, vlm.IMAGE_ID)
    with mmfix.mitigate(llava, LQCD(leading=same, alpha=alpha, beta=1e-9)):
        got = vlm.greedy(llava, inputs, STEPS)
    assert torch.equal(got.sequences, plain.sequences)
    for a, b in zip(got.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_without_strength_it_is_the_cut_alone(llava: Any) -> None:
    inputs = vlm.one()
    found = {}
    for name, params in (("lqcd", {"alpha": 0.0, "beta": 0.3}), ("plausibility", {"beta": 0.3})):
        with mmfix.mitigate(llava, name, **params) as fix:
            found[name] = vlm.logits(llava, inputs)
            assert fix.rows_per_prompt == 1
    assert torch.equal(found["lqcd"], found["plausibility"])


def test_the_question_is_what_follows_the_last_image() -> None:
    assert question(torch.tensor([1, 99, 99, 5, 99, 6, 7]).tolist(), 99) == (6, 7)
    for bad in ([1, 2, 3], [1, 99], []):
        with pytest.raises(MethodError, match="needs the image token 99"):
            question(bad, 99)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "no leading question"),
        ({"leading": ()}, "no leading question"),
        ({"leading": (5, vlm.IMAGE_ID)}, "holds the image token 99"),
        ({"leading": (5,), "alpha": -1.0}, r"lqcd\.alpha=-1\.0"),
        ({"leading": (5,), "beta": 0.0}, r"lqcd\.beta=0\.0"),
    ],
)
def test_refusals(llava: Any, params: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message), mmfix.mitigate(llava, "lqcd", **params):
        pass
