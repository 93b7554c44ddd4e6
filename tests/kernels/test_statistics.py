"""Column masses and head divergence on any device; their kernels are in triton/statistics_cases.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.calls import causal, edit_sets, random_call
from support.dense import dense

from mmfix_kernels import (
    AttentionCall,
    HeadScale,
    MapReplacement,
    Rows,
    closed_forms,
    column_mass,
    head_divergence,
    row_weights,
)
from mmfix_kernels.statistics import column_reference


def by_hand(call: AttentionCall, rows: Rows) -> torch.Tensor:
    """With the identity as values, attention returns its own map."""
    edits = [edit for edit in call.edits if not isinstance(edit, HeadScale)]
    heads, keys = call.query.shape[1], call.key.shape[2]
    identity = torch.eye(keys).expand(call.query.shape[0], heads, keys, keys)
    weights = dense(replace(call, key=call.key, value=identity[:, : call.key.shape[1]], edits=edits)).output
    chosen = call.groups.rows[rows]  # type: ignore[union-attr]
    return (weights if chosen is None else weights * chosen[:, None, :, None]).sum(2)


@pytest.mark.parametrize("edits", ["plain", "heads", "bias", "var"])
@pytest.mark.parametrize("rows", list(Rows))
@pytest.mark.parametrize("options", [{"is_causal": True}, {"mask": causal(9, 9, 2, pad=3)}], ids=["causal", "padded"])
def test_column_masses(edits: str, rows: Rows, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    call = random_call(9, 9, edits=edit_sets()[edits], kv_heads=2, **options)
    want = by_hand(call, rows)
    monkeypatch.setattr(closed_forms, "CHUNK", 1)  # one row at a time
    got = column_mass(call, rows)
    assert got.backend == ("sdpa" if edits in ("plain", "heads") else "reference")
    torch.testing.assert_close(got.mass.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(column_mass(call, rows, "reference").mass.double(), want, atol=1e-5, rtol=1e-5)


def test_column_masses_of_replaced_maps_and_prefixes() -> None:
    call = random_call(1, 11, batch=4, mask=None, edits=[MapReplacement(kind="uniform")])
    torch.testing.assert_close(column_mass(call).mass, torch.full((4, 4, 11), 1 / 11))
    whole = replace(call, edits=(), key=call.key[:2].repeat_interleave(2, 0))
    shared = replace(
        whole, key=whole.key[:, :, 6:], value=whole.value[:, :, 6:], prefix_key=whole.key[::2, :, :6],
        prefix_value=whole.value[::2, :, :6],
    )  # fmt: skip
    torch.testing.assert_close(column_mass(shared).mass, column_reference(whole))


def test_what_cannot_be_summed_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    call = random_call(3, 9, edits=edit_sets()["var"])
    with pytest.raises(ValueError, match=r"'triton' cannot serve.*softmax only"):
        column_mass(call, backend="triton")
    monkeypatch.setenv("MMFIX_BACKEND", "triton")
    assert "softmax only" in column_mass(call).reason
    with pytest.raises(ValueError, match="groups"):
        column_mass(replace(call, edits=(), groups=None), Rows.LAST)
    with pytest.raises(ValueError, match="choose"):
        column_mass(call, backend="flash")


def test_head_divergence() -> None:
    heads = torch.tensor([[[3.0, 4.0], [1.0, 1.0]]])
    got = head_divergence(heads, torch.tensor([[[0.0, 0.0], [1.0, 2.0]]]))
    assert got.distance.tolist() == [[5.0, 1.0]]
    assert got.size.tolist() == [[0.0, 5.0]]
    assert got.backend == "reference"
    with pytest.raises(ValueError, match="expected"):
        head_divergence(heads, heads[:, :1])


@pytest.mark.parametrize("kind", ["causal", "bool", "additive", "none"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_rows_of_weights_are_those_of_the_whole_map(kind: str, softcap: float | None) -> None:
    """Grouped queries, a shared prefix, a row that sees nothing: against a map written out in float64."""
    torch.manual_seed(5)
    query, key, prefix = torch.randn(4, 4, 7, 8), torch.randn(4, 2, 7, 8), torch.randn(2, 2, 3, 8)
    shared = {} if kind == "causal" else {"prefix_key": prefix, "prefix_value": prefix}
    whole = key if kind == "causal" else torch.cat([prefix.repeat_interleave(2, 0), key], 2)
    allowed = torch.ones(4, 1, 7, whole.shape[2], dtype=torch.bool)
    if kind != "none":
        allowed = allowed.tril(whole.shape[2] - 7).clone()
    if kind in ("bool", "additive"):
        allowed[1, :, 2] = False
    mask = None if kind in ("causal", "none") else allowed
    if kind == "additive":
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    call = AttentionCall(
        query=query, key=key, value=key, mask=mask, is_causal=kind == "causal", softcap=softcap, **shared
    )
    scores = query.double() @ whole.double().repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    want = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
    rows = torch.tensor([[6, 0], [2, 5], [3, 3], [1, 6]])
    got = row_weights(call, rows)
    for b in range(4):
        torch.testing.assert_close(got[b].double(), want[b][:, rows[b]], atol=1e-6, rtol=0)
