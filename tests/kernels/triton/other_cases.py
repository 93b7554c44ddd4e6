"""Map replacement and the contrast step by their kernels; run like device_cases.py."""

from __future__ import annotations

from dataclasses import replace as changed

import pytest
import torch
from device_cases import DEVICE, make, moved, padded

from mmfix_kernels.closed_forms import MapKind, replace, replace_reference
from mmfix_kernels.contrast import mix, mix_reference
from mmfix_kernels.triton import launch, vocabulary

INF = float("inf")


@pytest.mark.parametrize(
    "new",
    [MapKind("uniform"), MapKind("reversed"), MapKind("reversed", normalise=False), MapKind("random", seed=5)],
    ids=str,
)
@pytest.mark.parametrize("shape", ["causal", "decode", "padded"])
def test_replaced_maps(new: MapKind, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MIN_CHUNK", 32)
    call = make(1, 70, 32, heads=4, kv_heads=2) if shape == "decode" else make(20, 20, 32, heads=2)
    if shape == "padded":
        call = make(20, 20, 32, batch=2, mask=padded(20, 20, 5))
    call = changed(call, groups=None)
    got = replace(moved(call), new).cpu()
    torch.testing.assert_close(got, replace_reference(call, new), atol=3e-5, rtol=3e-5)


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
