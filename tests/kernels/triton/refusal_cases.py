"""What the backend refuses, and how head scales compose; run like device_cases.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from device_cases import PAI, VAR, check, make, moved, serve

from mmfix_kernels import Group, HeadScale, MassMove, Rows, grouped_attention
from mmfix_kernels import triton as backend


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"softcap": 30.0}, "soft cap"),
        ({"edits": [PAI, PAI, PAI]}, "score edits"),
        ({"edits": [VAR, MassMove(source=Group.SYSTEM, target=Group.GENERATED, share=0.1)]}, "key classes"),
        ({"edits": [replace(PAI, rows=Rows.GENERATED)]}, "generated tokens alone"),
        ({"dtype": torch.float64}, "float64"),
        ({"width": 320}, "head width"),
        ({"grad": True}, "backward"),
    ],
)
def test_refusals_say_why(change: dict[str, Any], reason: str) -> None:
    options = {k: v for k, v in change.items() if k == "softcap"}
    call = make(5, 5, change.get("width", 32), dtype=change.get("dtype", torch.float32), **options)
    if "edits" in change:
        call = replace(call, edits=change["edits"])
    if "grad" in change:
        call = replace(call, query=call.query.requires_grad_())
    call = moved(call)
    assert reason in backend.why_not(call)
    with pytest.raises(ValueError, match=reason):
        grouped_attention(call, "triton")
    assert reason in grouped_attention(call).reason


def test_head_scales_compose_and_bad_ones_are_refused() -> None:
    call = make(5, 5, 32, heads=2, batch=2)
    per_row = HeadScale(scale=torch.tensor([[1.0, 2.0], [0.5, 1.0]]))
    check(replace(call, edits=[per_row, HeadScale(scale=torch.tensor([3.0, 1.0]))]))
    with pytest.raises(ValueError, match="query heads"):
        serve(replace(call, edits=[HeadScale(scale=torch.ones(3))]))
