"""PAI against plain passes: dense attention with the newest row's scores raised, and the prompt without its image."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import plain, vlm
from torch import Tensor

import mmfix
from mmfix.errors import MethodError
from mmfix.methods import PAI
from mmfix_kernels import AttentionCall, Group, KeyGroups, Rows, ScoreEdit, grouped_attention

STEPS = 3


def raised(model: Any, inputs: dict[str, Any], alpha: float, layers: tuple[int, ...], prompt: int) -> Tensor:
    """Logits [B, V] with the image scores of the last prompt row and of every later row raised."""
    keys = plain.image(inputs)[:, None, None, :]
    rows = torch.arange(inputs["input_ids"].shape[1])[:, None] >= prompt - 1

    def scores(found: Tensor, allowed: Tensor, layer: int) -> Tensor:
        return torch.where(keys & rows, found + alpha * found.abs(), found) if layer in layers else found

    return plain.dense(model, inputs, scores)[:, -1]


def oracle(model: Any, alpha: float, gamma: float, beta: float, layers: tuple[int, ...]) -> Tensor:
    inputs = plain.ragged()
    prompt = inputs["input_ids"].shape[1]

    def newest(grown: dict[str, Any], _: int) -> Tensor:
        found = raised(model, grown, alpha, layers, prompt)
        if gamma == 1:
            return found
        c = found.log_softmax(-1)
        u = plain.newest(model, plain.text_only(grown)).log_softmax(-1)
        return plain.cut(gamma * (c - u) + u, found, beta)

    return plain.decoded(inputs, newest, STEPS)


@pytest.mark.parametrize("gamma", [1.3, 1.0])
def test_decoding_equals_plain_passes(model: Any, gamma: float) -> None:
    """Guidance on and off, grouped key heads, two prompts with different padding; the raise acts on the first token
    in both (requirements 1, 2, 5 and 6)."""
    with mmfix.mitigate(model, PAI(alpha=0.6, gamma=gamma, beta=0.05)) as fix:
        out = vlm.greedy(model, plain.ragged(), STEPS)
        assert fix.methods[0].layers == (2, 3, 4)  # type: ignore[attr-defined]
    want = oracle(model, 0.6, gamma, 0.05, (2, 3, 4))
    plain.agrees(out, want)
    unraised = oracle(model, 0.0, gamma, 0.05, ())[:, 0]
    kept = want[:, 0].isfinite() & unraised.isfinite()
    assert (want[:, 0] - unraised)[kept].abs().max() > 0.01, "the raise does nothing at the first token"


def test_last_row_scores_by_hand() -> None:
    """Positive, zero and negative scores: 2 -> 3, 0 -> 0, -2 -> -1 at alpha 0.5; the row before is plain."""
    query = torch.tensor([[[[1.0], [1.0]]]])
    key = torch.tensor([2.0, 0.0, -2.0, 1.0])[None, None, :, None]
    value = torch.eye(4)[None, None]
    labels = torch.tensor([[1, 1, 1, 0]], dtype=torch.int8)
    last = torch.tensor([[False, True]])
    groups = KeyGroups(
        labels=labels,
        rows={Rows.ALL: None, Rows.AFTER_IMAGE: None, Rows.LAST: last},
        first={Rows.ALL: 0, Rows.AFTER_IMAGE: 0, Rows.LAST: 1},
    )
    edit = ScoreEdit(group=Group.IMAGE, rows=Rows.LAST, abs_gain=0.5)
    mask = torch.ones(1, 1, 2, 4, dtype=torch.bool)
    for backend in ("reference", "sdpa"):
        call = AttentionCall(query=query, key=key, value=value, mask=mask, scale=1.0, groups=groups, edits=[edit])
        weights = grouped_attention(call, backend).output[0, 0]
        for row, scores in enumerate(([2.0, 0.0, -2.0, 1.0], [3.0, 0.0, -1.0, 1.0])):
            torch.testing.assert_close(weights[row], torch.tensor(scores).softmax(-1), atol=1e-6, rtol=0)


def test_the_branch_follows_beams(llava: Any) -> None:
    """Requirement 3: with its cache reordered, beams are those of a run without any cache."""
    inputs = plain.ragged()
    with mmfix.mitigate(llava, PAI(alpha=0.6, gamma=2.0)):
        cached = vlm.greedy(llava, inputs, 4, num_beams=3)
        scratch = vlm.greedy(llava, inputs, 4, num_beams=3, use_cache=False)
    assert torch.equal(cached.sequences, scratch.sequences)
    torch.testing.assert_close(cached.sequences_scores, scratch.sequences_scores, atol=1e-3, rtol=0)


def test_every_request_starts_afresh(llava: Any) -> None:
    """Requirement 4: the second generation of a block is the first one of a new block."""
    first, second = vlm.one(0), vlm.one(1, after=9)
    with mmfix.mitigate(llava, PAI(gamma=1.5)):
        vlm.greedy(llava, first, STEPS)
        later = vlm.greedy(llava, second, STEPS)
    with mmfix.mitigate(llava, PAI(gamma=1.5)):
        alone = vlm.greedy(llava, second, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(later.logits, alone.logits, strict=True))


def test_alpha_zero_without_guidance_changes_nothing(llava: Any) -> None:
    inputs = plain.ragged()
    want = vlm.logits(llava, inputs)
    with mmfix.mitigate(llava, PAI(alpha=0.0, gamma=1.0)) as fix:
        assert torch.equal(vlm.logits(llava, inputs), want)
        assert fix.rows_per_prompt == 1
    assert math.isclose(mmfix.methods()["pai"].params["gamma"].default, 1.1)


@pytest.mark.parametrize("wrong", [{"alpha": -0.1}, {"gamma": -1.0}, {"beta": 0.0}])
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=f"pai.{next(iter(wrong))}"):
        PAI(**wrong)


def test_layers_that_the_model_does_not_have(llava: Any) -> None:
    told = r"pai.layers=\(5,\): give layers from -5 to 4"
    with pytest.raises(MethodError, match=told), mmfix.mitigate(llava, PAI(layers=(5,))):
        pass
    with mmfix.mitigate(llava, PAI(layers=(-1, 0))) as fix:
        assert fix.methods[0].layers == (0, 4)  # type: ignore[attr-defined]
