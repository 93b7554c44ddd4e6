"""VAF against dense attention whose scores are scaled by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import plain, vlm
from torch import Tensor

import mmfix
from mmfix.errors import MethodError
from mmfix.method import in_proportion
from mmfix.methods import VAF
from mmfix_kernels import AttentionCall, Group, KeyGroups, grouped_attention

STEPS = 3
LAYERS = (1, 3)


def oracle(model: Any, image_gain: float, system_gain: float, form: str) -> Tensor:
    def newest(inputs: dict[str, Any], _: int) -> Tensor:
        image, valid = plain.image(inputs), inputs["attention_mask"].bool()
        place = torch.arange(image.shape[1])
        first = torch.where(image, place, 10**6).amin(-1, keepdim=True)
        after = torch.where(image, place, -1).amax(-1, keepdim=True) < place
        system = (place < first) & valid

        def scores(found: Tensor, allowed: Tensor, layer: int) -> Tensor:
            if layer not in LAYERS:
                return found
            for keys, gain in ((image, image_gain), (system, system_gain)):
                new = gain * found if form == "signed" else found + (gain - 1) * found.abs()
                found = torch.where(keys[:, None, None, :] & after[:, None, :, None], new, found)
            return found

        return plain.dense(model, inputs, scores)[:, -1]

    return plain.decoded(plain.ragged(), newest, STEPS)


@pytest.mark.parametrize("form", ["signed", "magnitude"])
def test_decoding_equals_dense_attention(model: Any, form: Any) -> None:
    """Both columns, signed scores as released and by magnitude; spans from the prompts, which differ in length
    (requirements 1 and 2)."""
    with mmfix.mitigate(model, VAF(image_gain=1.6, system_gain=0.5, layers=LAYERS, form=form)):
        out = vlm.greedy(model, plain.ragged(), STEPS)
    plain.agrees(out, oracle(model, 1.6, 0.5, form))


def test_the_two_forms_differ_on_negative_scores_only() -> None:
    """A gain above 1 takes attention from an image key with a negative score in one form and gives it in the other."""
    key = torch.tensor([-2.0, 0.5])[None, None, :, None]
    groups = KeyGroups.plain(torch.tensor([[1, 0]], dtype=torch.int8))
    found = {}
    for form in ("signed", "magnitude"):
        edits = [VAF(form=form)._edit(Group.IMAGE, 1.5)]  # type: ignore[arg-type]
        call = AttentionCall(
            query=torch.ones(1, 1, 1, 1), key=key, value=torch.eye(2)[None, None], scale=1.0, groups=groups, edits=edits
        )
        found[form] = float(grouped_attention(call).output[0, 0, 0, 0])
    plain_weight = float(torch.tensor([-2.0, 0.5]).softmax(-1)[0])
    assert found["signed"] == pytest.approx(float(torch.tensor([-3.0, 0.5]).softmax(-1)[0]), abs=1e-6)
    assert found["magnitude"] == pytest.approx(float(torch.tensor([-1.0, 0.5]).softmax(-1)[0]), abs=1e-6)
    assert found["signed"] < plain_weight < found["magnitude"]


def test_rows_before_the_end_of_the_image_are_untouched(llava: Any) -> None:
    inputs = vlm.one()
    before = 4 + vlm.IMAGE_TOKENS
    want = vlm.logits(llava, inputs)
    with mmfix.mitigate(llava, VAF(image_gain=2.0, layers=(0,))):
        got = vlm.logits(llava, inputs)
    torch.testing.assert_close(got[:, :before], want[:, :before], atol=1e-5, rtol=0)
    assert (got[:, before:] - want[:, before:]).abs().amax(-1).min() > 1e-3


def test_padding_stays_hidden(llava: Any) -> None:
    """Requirement 3: a prompt's logits do not depend on how much padding stands before it."""
    row = plain.ROWS[1]
    found = []
    for width in (len(row), len(row) + 7):
        with mmfix.mitigate(llava, VAF(image_gain=0.2, system_gain=3.0, layers=(0, 1, 2, 3, 4))):
            found.append(vlm.logits(llava, vlm.batch([row], vlm.picture(1), width=width))[:, -1])
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)


def test_layers_in_proportion(llava: Any) -> None:
    assert list(in_proportion(9, 15, 32)) == [9, 10, 11, 12, 13, 14]
    assert list(in_proportion(9, 15, 5)) == [1]
    assert list(in_proportion(5, 18, 1)) == [0]
    with mmfix.mitigate(llava, "vaf") as fix:
        assert fix.methods[0].layers == (1,)  # type: ignore[attr-defined]


def test_gains_of_one_change_nothing(llava: Any) -> None:
    inputs = plain.ragged()
    want = vlm.logits(llava, inputs)
    with mmfix.mitigate(llava, VAF(image_gain=1.0, system_gain=1.0)):
        assert torch.equal(vlm.logits(llava, inputs), want)


@pytest.mark.parametrize("wrong", [{"image_gain": -1.0}, {"system_gain": 11.0}, {"form": "squared"}])
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=f"vaf.{next(iter(wrong))}"):
        VAF(**wrong)
