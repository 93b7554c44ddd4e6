"""Replaced maps: closed forms against maps written out in float64, degenerate rows, and the counter generator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmfix_kernels import AttentionCall
from mmfix_kernels.closed_forms import MapKind, counter_random, replace, replace_reference

KINDS = [
    MapKind("uniform"),
    MapKind("uniform", normalise=False),
    MapKind("reversed"),
    MapKind("reversed", normalise=False),
    MapKind("random", seed=3),
]


def padded(rows: int, keys: int, pad: int) -> torch.Tensor:
    mask = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows).repeat(2, 1, 1, 1)
    mask[1, :, :, :pad] = False
    return mask


def make(rows: int, keys: int, width: int = 16, heads: int = 4, kv_heads: int = 2, **options: Any) -> AttentionCall:
    random = torch.Generator().manual_seed(rows * 100 + keys)
    shapes = ((2, heads, rows, width), (2, kv_heads, keys, width), (2, kv_heads, keys, width))
    query, key, value = (torch.randn(shape, generator=random) for shape in shapes)
    return AttentionCall(query=query, key=key, value=value, **options)


CALLS = {
    "causal": make(9, 9, is_causal=True),
    "decode": make(1, 23),
    "full": make(5, 23),
    "padded": make(9, 9, mask=padded(9, 9, 3)),
    "padded row": make(3, 12, mask=padded(3, 12, 4)),
    "per head": make(5, 5, mask=torch.ones(5, 5).tril().bool() & (torch.arange(4) < 9)[None, :, None, None]),
}


def by_hand(call: AttentionCall, new: MapKind) -> torch.Tensor:
    """Row by row in float64."""
    b, h, rows, _ = call.query.shape
    keys = call.key.shape[2]
    out = torch.zeros(b, h, rows, call.value.shape[3], dtype=torch.float64)
    noise = counter_random(new.seed, h, rows, keys, torch.device("cpu")).double()
    repeats = h // call.key.shape[1]
    for n in range(b):
        for head in range(h):
            value = call.value[n, head // repeats].double()
            seen = [allowed_by_hand(call, n, head, i) for i in range(rows)]
            total = max(len(at) for at in seen)
            for i, at in enumerate(seen):
                if not at:
                    continue
                scores = call.query[n, head, i].double() @ call.key[n, head // repeats, at].double().T * call.factor
                weights = scores.softmax(-1)
                if new.kind == "uniform":
                    row = torch.full((len(at),), 1.0 / (len(at) if new.normalise else total)).double()
                elif new.kind == "random":
                    row = noise[head, i, at] / noise[head, i, at].sum()
                elif len(at) * weights.max() - 1 < 1e-9:
                    row = weights
                else:
                    row = weights.max() - weights
                    row = row / row.sum() if new.normalise else row
                out[n, head, i] = row @ value[at]
    return out


def allowed_by_hand(call: AttentionCall, n: int, head: int, row: int) -> list[int]:
    keys = call.key.shape[2]
    if call.mask is None:
        return list(range(row + 1 if call.is_causal else keys))
    mask = call.mask.expand(2, call.query.shape[1], call.query.shape[2], keys)
    return mask[n, head, row].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("new", KINDS, ids=str)
def test_closed_forms_equal_the_maps(name: str, new: MapKind) -> None:
    call = CALLS[name]
    want = by_hand(call, new)
    for got in (replace_reference(call, new), replace(call, new)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("normalise", [True, False])
def test_a_row_of_equal_scores_keeps_its_output(normalise: bool) -> None:
    call = make(1, 7)
    call = AttentionCall(query=torch.zeros_like(call.query), key=call.key, value=call.value)
    for function in (replace, replace_reference):
        got = function(call, MapKind("reversed", normalise=normalise))
        torch.testing.assert_close(got, call.value.mean(2, keepdim=True).repeat_interleave(2, 1), atol=1e-5, rtol=0)


def test_the_counter_generator_is_even_and_independent_of_the_shape() -> None:
    draws = counter_random(0, 4, 64, 64, torch.device("cpu"))
    assert 0 < draws.min() < 1e-3
    assert 1 - 1e-3 < draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01
    assert torch.equal(draws[:2, :5, :7], counter_random(0, 2, 5, 7, torch.device("cpu")))
    assert not torch.equal(draws, counter_random(1, 4, 64, 64, torch.device("cpu")))
    flat = draws.reshape(4 * 64, 64) - 0.5
    correlation = (flat @ flat.T / 64 * 12).fill_diagonal_(0)
    assert correlation.abs().max() < 0.7, "rows and heads repeat each other"


@pytest.mark.parametrize("bad", [{"kind": "sideways"}, {"kind": "random", "normalise": False}])
def test_bad_maps_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="map"):
        MapKind(**bad)
