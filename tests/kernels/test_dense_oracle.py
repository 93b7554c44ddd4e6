"""Every backend against the equations in float64 (tests/support/dense.py), on ugly shapes, in float32 and bfloat16."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.calls import BACKENDS, causal, edit_sets, groups, random_call
from support.dense import dense
from support.eager import additive, eager

from mmfix_kernels import Attended, AttentionCall, Label, grouped_attention

EDITS = list(edit_sets())
by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_edits = pytest.mark.parametrize("edits", EDITS)


def plain64(call: AttentionCall) -> torch.Tensor:
    """Plain attention in float64."""
    wide = {name: getattr(call, name).double() for name in ("query", "key", "value")}
    return eager(replace(call, **wide))


def allowance(call: AttentionCall, largest: float) -> float:
    """Twice the error of plain eager attention on the same tensors, in the same dtype.

    An edit may enlarge the output, and a few rows may happen to round well, so the error counts relative to the
    largest value and never as less than the rounding of that value.
    """
    exact = plain64(call)
    size = float(exact.abs().max())
    error = float((eager(call).double() - exact).abs().max())
    return 2 * max(error / size, torch.finfo(call.query.dtype).eps) * max(largest, size)


def check(call: AttentionCall, backend: str) -> Attended:
    """Output, masses and fired counts of one call; edits may enlarge values, so the error is taken relative to them."""
    want, got = dense(call), grouped_attention(call, backend)
    assert got.output.dtype == call.query.dtype
    allowed = allowance(call, float(want.output.abs().max()))
    error = float((got.output.double() - want.output).abs().max())
    assert error <= allowed, f"{error:.3g} > {allowed:.3g}"
    if call.query.dtype == torch.float32:  # in bfloat16 a gate may tip over on the rounding of the scores
        assert got.fired.tolist() == want.fired
    if call.masses != "none":
        rows = want.masses if call.masses == "all" else want.masses[:, :, -1:]
        assert got.masses is not None
        assert got.masses.dtype == torch.float32
        scores = call.query.shape[-1] ** 0.5 * torch.finfo(call.query.dtype).eps * 40
        torch.testing.assert_close(got.masses.double(), rows, atol=scores, rtol=0)
    assert got.backend == backend
    return got


@by_backend
@by_edits
def test_every_edit(backend: str, edits: str) -> None:
    call = random_call(edits=edit_sets()[edits], masses="all")
    got = check(call, backend)
    if edits != "plain":
        assert (got.fired[:, 0] > 0).any(), "no edit fired: the test shows nothing"


@by_backend
@pytest.mark.parametrize("edits", ["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("q_len", "s_len"), [(1, 1), (1, 7), (7, 7), (1, 63), (7, 63), (1, 111), (63, 63)])
@pytest.mark.parametrize("width", [8, 60, 80])
def test_ugly_shapes(backend: str, edits: str, dtype: torch.dtype, q_len: int, s_len: int, width: int) -> None:
    batch = 1 if q_len == 63 else 2
    check(
        random_call(
            q_len, s_len, width, 2, 1, batch, seed=q_len + s_len, dtype=dtype, edits=edit_sets(2, batch)[edits],
            masses="last",
        ),
        backend,
    )  # fmt: skip


@by_backend
@by_edits
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 1), (7, 1), (14, 2), (4, 2)])
def test_grouped_query_heads(backend: str, edits: str, heads: int, kv_heads: int) -> None:
    call = random_call(3, 19, 8, heads, kv_heads, edits=edit_sets(heads)[edits], masses="all")
    check(call, backend)


@by_backend
@pytest.mark.parametrize("edits", ["plain", "var", "abs-gain", "everything"])
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True, "q_len": 19},
        {"mask": None, "is_causal": False},
        {"mask": causal(5, 19, 2, pad=4)},
        {"mask": additive(causal(5, 19, 2, pad=4))},
        {"mask": additive(causal(5, 19, 2, pad=4), torch.finfo(torch.float32).min)},
        {"mask": torch.linspace(-1, 1, 2 * 4 * 5 * 19).view(2, 4, 5, 19)},
        {"mask": torch.linspace(-1, 1, 19).view(1, 1, 1, 19)},
        {"mask": causal(5, 19, 2, pad=4)[:, :, -1:]},
        {"scale": 0.11, "mask": causal(5, 19)},
    ],
    ids=["causal", "full", "bool", "inf", "finfo", "bias", "row", "padding-row", "scale"],
)
def test_masks_and_scale(backend: str, edits: str, options: dict[str, Any]) -> None:
    options = dict(options)
    call = random_call(options.pop("q_len", 5), 19, edits=edit_sets()[edits], masses="all", **options)
    check(call, backend)


@by_edits
def test_softcap_goes_to_the_reference(edits: str) -> None:
    call = random_call(5, 19, softcap=2.0, edits=edit_sets()[edits])
    got = grouped_attention(call)
    assert got.backend == "reference"
    assert "soft cap" in got.reason
    torch.testing.assert_close(got.output.double(), dense(call).output, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="soft cap"):
        grouped_attention(call, "sdpa")


@by_backend
@by_edits
def test_the_negative_control(backend: str, edits: str) -> None:
    """One wrong label among the keys is seen: the comparison above has teeth."""
    if edits in ("plain", "heads", "heads-by-row"):
        pytest.skip("no label matters here")
    call = random_call(7, 19, edits=edit_sets()[edits], masses="all")
    labels = call.groups.labels.clone()  # type: ignore[union-attr]
    labels[:, 3] = int(Label.IMAGE)
    right = replace(call, groups=groups(2, 7, 19, labels=labels))
    labels = labels.clone()
    labels[:, 3] = int(Label.SYSTEM)
    wrong = replace(call, groups=groups(2, 7, 19, labels=labels))
    want = dense(right).output
    allowed = allowance(right, float(want.abs().max()))
    assert (grouped_attention(right, backend).output.double() - want).abs().max() <= allowed
    assert (grouped_attention(wrong, backend).output.double() - want).abs().max() > 100 * allowed


@by_backend
@pytest.mark.parametrize("masses", ["last", "all"])
@by_edits
def test_masses_sum_to_one_and_rows_keep_their_sum(backend: str, masses: str, edits: str) -> None:
    """With the identity as values, attention returns its own map."""
    call = random_call(7, 19, masses=masses, edits=[e for e in edit_sets()[edits] if type(e).__name__ != "HeadScale"])
    call = replace(call, value=torch.eye(19).expand(2, 4, 19, 19))
    got = check(call, backend)
    torch.testing.assert_close(got.output.sum(-1), torch.ones(2, 4, 7), atol=1e-5, rtol=0)
    assert (got.output >= 0).all()
    assert (got.output[~call.mask.expand(2, 4, 7, 19)] == 0).all()  # type: ignore[union-attr]
    assert got.masses is not None
    torch.testing.assert_close(got.masses.sum(-1), torch.ones(got.masses.shape[:3]), atol=1e-5, rtol=0)
