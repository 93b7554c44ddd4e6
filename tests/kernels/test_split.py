"""A softmax per part of the keys, against the equation row by row, for every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.calls import BACKENDS, causal, random_call

from mmfix_kernels import Group, HeadScale, Label, Rows, ScoreEdit, SplitSoftmax, grouped_attention, triton

IMAGE = (int(Label.IMAGE), int(Label.IMAGE_SINK))


def by_hand(call: Any, edit: SplitSoftmax, bias: float = 0.0) -> tuple[torch.Tensor, int]:
    """Output [B, H, L, D] in float64 with `bias` added to image scores, and the rows that were split."""
    batch, heads, length, width = call.query.shape
    out = torch.zeros(call.query.shape, dtype=torch.float64)
    split = 0
    for b in range(batch):
        image = torch.tensor([int(n) in IMAGE for n in call.groups.labels[b]])
        for h in range(heads):
            group = h * call.key.shape[1] // heads
            keys, values = call.key[b, group].double(), call.value[b, group].double()
            for q in range(length):
                seen = call.mask.expand(batch, 1, length, call.keys)[b, 0, q]
                scores = keys @ call.query[b, h, q].double() * width**-0.5 + bias * image
                rows = call.groups.rows[edit.rows]
                touched = rows is None or bool(rows[b, q])
                touched = touched and (edit.heads is None or h in edit.heads)
                touched = touched and (edit.batch is None or bool(edit.batch[b]))
                parts = [p for p in (seen & image, seen & ~image) if bool(p.any())]
                if not touched or len(parts) == 1:
                    parts = [seen] if bool(seen.any()) else []
                split += len(parts) == 2
                for part in parts:
                    weights = scores.masked_fill(~part, -torch.inf).softmax(-1)
                    out[b, h, q] += weights @ values / (len(parts) if edit.mass == "mean" else 1)
    return out, split


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "edit",
    [
        SplitSoftmax(group=Group.IMAGE),
        SplitSoftmax(group=Group.IMAGE, mass="mean", rows=Rows.AFTER_IMAGE),
        SplitSoftmax(group=Group.IMAGE, heads=(1, 2), batch=torch.tensor([False, True])),
    ],
)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_it_is_the_equation(backend: str, edit: SplitSoftmax, kv_heads: int) -> None:
    call = random_call(12, 12, kv_heads=kv_heads, edits=[edit], mask=causal(12, 12, 2, pad=3))
    call.groups.labels[0, :5] = int(Label.TEXT)  # rows that see one part only
    got = grouped_attention(call, backend)
    want, split = by_hand(call, edit)
    torch.testing.assert_close(got.output.double(), want, atol=1e-5, rtol=0)
    assert int(got.fired[0, 0]) == split > 0
    assert int(got.fired[0, 1]) >= split


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_far_below_the_other_keeps_its_weights(backend: str) -> None:
    """Scores of the image 200 nats below: their weights in one softmax are zero in float32."""
    edits = [ScoreEdit(group=Group.IMAGE, bias=-200.0), SplitSoftmax(group=Group.IMAGE)]
    call = random_call(6, 12, edits=edits)
    want, _ = by_hand(call, edits[1], bias=-200.0)
    torch.testing.assert_close(grouped_attention(call, backend).output.double(), want, atol=1e-4, rtol=0)


def test_masses_and_head_scales_come_after() -> None:
    edits = [SplitSoftmax(group=Group.IMAGE), HeadScale(scale=torch.tensor([1.0, 0.0, 2.0, 1.0]))]
    call = random_call(1, 20, edits=edits, masses="last")
    for name in BACKENDS:
        got = grouped_attention(call, name)
        assert got.masses is not None
        torch.testing.assert_close(got.masses.sum(-1), torch.full((2, 4, 1), 2.0), atol=1e-5, rtol=0)
        assert float(got.output[:, 1].abs().max()) == 0


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in ({"mass": "half"}, {"heads": ()}):
        with pytest.raises(ValueError, match=r"SplitSoftmax|heads"):
            SplitSoftmax(group=Group.IMAGE, **bad)
    monkeypatch.setattr(triton, "unusable", lambda: "")
    monkeypatch.setattr(triton, "interpreted", lambda: True)
    assert "softmax per part" in triton.why_not(random_call(edits=[SplitSoftmax(group=Group.IMAGE)]))
