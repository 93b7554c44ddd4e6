"""The contrast step and the places of keys by their kernels; run like device_cases.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from device_cases import DEVICE, make, moved, relabelled, serve

from mmfix_kernels import grouped_attention
from mmfix_kernels.contrast import mix, mix_reference
from mmfix_kernels.maps import places
from mmfix_kernels.triton import tensors, vocabulary

INF = float("inf")


@pytest.mark.parametrize(("weights", "beta"), [((1.0,), 0.1), ((2.0, -1.0), 0.1), ((2.0, -0.5, -0.5), 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [7, 129])
def test_contrast(
    weights: tuple[float, ...], beta: float, dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "BLOCK", 64)
    logits = (3 * torch.randn(3, len(weights), size)).to(dtype)
    logits[0, 0, 2] = logits[1, -1, 3] = -INF
    logits[2] = 1.0  # all equal: the first token wins
    want = mix_reference(logits, weights, beta)
    for want_logits in (True, False):
        got = mix(logits.to(DEVICE), weights, beta, want_logits)
        assert torch.equal(got.best.cpu(), want.best)
        if want_logits:
            assert got.logits is not None
            torch.testing.assert_close(got.logits.cpu(), want.logits, atol=1e-5, rtol=1e-5)
    assert got.logits is None


def test_places_of_keys() -> None:
    """Counted over more keys than one block holds, in each prompt anew."""
    labels = torch.randint(0, 8, (2, 1060), dtype=torch.int8)
    call = moved(relabelled(make(1, 1060, 16, batch=2), labels))
    assert torch.equal(tensors.places_of(call).cpu().long(), places(labels).long())


@pytest.mark.parametrize("rows", [1, 7])
def test_labels_per_head(rows: int) -> None:
    """Heads become batch items here as in the reference, which is held to single heads elsewhere."""
    shared = make(rows, 40, 32, "all", batch=2, mask=torch.ones(1, 1, rows, 40).bool())
    assert shared.groups is not None
    labels = torch.randint(0, 5, (2, 2, 40), dtype=torch.int8)
    call = replace(shared, groups=replace(shared.groups, labels=labels))
    got, want = serve(call), grouped_attention(call, "reference")
    torch.testing.assert_close(got.output, want.output, atol=1e-5, rtol=1e-5)
    assert torch.equal(got.fired, want.fired)
