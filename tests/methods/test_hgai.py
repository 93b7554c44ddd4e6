"""HGAI against dense attention with the heads' mean magnitude added by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import plain, vlm
from torch import Tensor

import mmfix
from mmfix.errors import MethodError
from mmfix.methods import HGAI
from mmfix_kernels import AttentionCall, Group, KeyGroups, ScoreEdit, grouped_attention

STEPS = 3


def oracle(model: Any, alpha: float, layers: tuple[int, ...]) -> Tensor:
    inputs = plain.ragged()
    prompt = inputs["input_ids"].shape[1]

    def newest(grown: dict[str, Any], _: int) -> Tensor:
        keys = plain.image(grown)[:, None, None, :]
        rows = torch.arange(grown["input_ids"].shape[1])[:, None] >= prompt - 1

        def scores(found: Tensor, allowed: Tensor, layer: int) -> Tensor:
            if layer not in layers:
                return found
            magnitude = sum(found[:, h].abs() for h in range(found.shape[1])) / found.shape[1]
            return torch.where(keys & rows, found + alpha * magnitude[:, None], found)

        return plain.dense(model, grown, scores)[:, -1]

    return plain.decoded(inputs, newest, STEPS)


def test_decoding_equals_dense_attention(model: Any) -> None:
    """Also with grouped key heads, where the mean is over query heads (requirement 1); other layers are plain."""
    with mmfix.mitigate(model, HGAI(alpha=0.8, layers=(1, 3))):
        out = vlm.greedy(model, plain.ragged(), STEPS)
    plain.agrees(out, oracle(model, 0.8, (1, 3)))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_one_row_by_hand(backend: str) -> None:
    """Two heads with scores (1, -1, 0.5) and (-3, 2, 0): means 2 and 1.5 on the image keys, added in both."""
    query = torch.eye(2)[None, :, None]  # [1, 2, 1, 2]
    key = torch.tensor([[1.0, -3.0], [-1.0, 2.0], [0.5, 0.0]])[None, None]  # one key head
    groups = KeyGroups.plain(torch.tensor([[1, 3, 0]], dtype=torch.int8))
    edit = ScoreEdit(group=Group.IMAGE, mean_abs_gain=0.5)
    call = AttentionCall(query=query, key=key, value=torch.eye(3)[None, None], scale=1.0, groups=groups, edits=[edit])
    got = grouped_attention(call, backend).output[0, :, 0]
    want = torch.tensor([[2.0, -0.25, 0.5], [-2.0, 2.75, 0.0]]).softmax(-1)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_layers_are_explicit_and_recorded(llava: Any) -> None:
    """Requirement 2: what stands in the report is the range in force, not a default that depends on the model."""
    with mmfix.mitigate(llava, "hgai") as fix:
        assert fix.report().to_dict()["methods"][0]["params"]["layers"] == [1, 2]
    with mmfix.mitigate(llava, "hgai", layers=(-1, 2)) as fix:
        assert fix.report().to_dict()["methods"][0]["params"]["layers"] == [2, 4]


def test_alpha_zero_is_the_identity(llava: Any) -> None:
    inputs = plain.ragged()
    want = vlm.logits(llava, inputs)
    with mmfix.mitigate(llava, HGAI(alpha=0.0)):
        assert torch.equal(vlm.logits(llava, inputs), want)


def test_values_out_of_range_are_refused(llava: Any) -> None:
    with pytest.raises(MethodError, match=r"hgai\.alpha"):
        HGAI(alpha=-1.0)
    with pytest.raises(MethodError, match=r"hgai\.layers"), mmfix.mitigate(llava, HGAI(layers=(7,))):
        pass
