"""Replaced maps: both backends against maps written out in float64, degenerate rows, and no map at prefill."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from replaced import noise, replaced
from support.dense import visible
from support.eager import additive, padded

from mmfix_kernels import (
    AttentionCall,
    Group,
    HeadScale,
    KeyGroups,
    Label,
    MapReplacement,
    MassMove,
    closed_forms,
    grouped_attention,
    sdpa,
)
from mmfix_kernels.maps import counter_uniform

KINDS = [
    {"kind": "uniform"},
    {"kind": "uniform", "normalise": False},
    {"kind": "reversed"},
    {"kind": "reversed", "normalise": False},
    {"kind": "random", "seed": 3},
    {"kind": "random", "seed": 3, "normalise": False},
    {"kind": "shuffled", "seed": 5},
]
IDS = ["-".join(str(value) for value in kind.values()) for kind in KINDS]
by_backend = pytest.mark.parametrize("backend", ["reference", "sdpa"])


def make(rows: int, keys: int, width: int = 16, heads: int = 4, kv_heads: int = 2, pad: int = 0, **options: Any) -> Any:
    """A call of two batch rows; with `pad`, the second is padded on the left and labelled so."""
    random = torch.Generator().manual_seed(rows * 100 + keys)
    shapes = ((2, heads, rows, width), (2, kv_heads, keys, width), (2, kv_heads, keys, width))
    query, key, value = (torch.randn(shape, generator=random) for shape in shapes)
    labels = torch.zeros(2, keys, dtype=torch.int8)
    labels[:, 1:4] = int(Label.IMAGE)
    if pad:
        labels[1, :pad] = int(Label.PADDING)
        options["mask"] = padded(rows, keys, pad)
    return AttentionCall(query=query, key=key, value=value, groups=KeyGroups.plain(labels), **options)


CALLS = {
    "causal": make(9, 9, is_causal=True),
    "decode": make(1, 23),
    "full": make(5, 23),
    "padded": make(9, 9, pad=3),
    "padded row": make(3, 12, pad=4),
    "per head": make(5, 5, mask=torch.ones(5, 5).tril().bool() & (torch.arange(4) < 9)[None, :, None, None]),
    "additive": make(4, 6, mask=additive(padded(4, 6, 0), torch.finfo(torch.float32).min)),
}


def plain64(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights in float64 and the allowed keys."""
    repeats = call.query.shape[1] // call.key.shape[1]
    scores = call.query.double() @ call.key.double().repeat_interleave(repeats, 1).transpose(2, 3) * call.factor
    seen, _ = visible(call.mask, call.is_causal, tuple(scores.shape))
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0), seen


def check(call: AttentionCall, backend: str) -> torch.Tensor:
    weights, seen = plain64(call)
    counted = []
    for edit in call.edits:
        if isinstance(edit, MapReplacement):
            weights, count = replaced(call, edit, weights, seen)
            counted.append(count)
    want = weights @ call.value.double().repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
    got = grouped_attention(call, backend)
    torch.testing.assert_close(got.output.double(), want, atol=5e-5, rtol=5e-5)
    assert got.fired[: len(counted)].tolist() == counted
    return got.output


@by_backend
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_replaced_maps(name: str, kind: dict[str, Any], backend: str) -> None:
    check(replace(CALLS[name], edits=[MapReplacement(**kind)]), backend)


@by_backend
@pytest.mark.parametrize("name", ["causal", "decode", "padded"])
@pytest.mark.parametrize("kind", KINDS, ids=IDS)
@pytest.mark.parametrize("where", [{"heads": (1, 2)}, {"batch": torch.tensor([False, True])}], ids=["heads", "batch"])
def test_some_heads_or_some_batch_rows(name: str, kind: dict[str, Any], where: dict[str, Any], backend: str) -> None:
    call = replace(CALLS[name], edits=[MapReplacement(**kind, **where)])
    got, plain = check(call, backend), grouped_attention(replace(call, edits=()), backend).output
    untouched = (slice(None), [0, 3]) if "heads" in where else (0,)
    torch.testing.assert_close(got[untouched], plain[untouched])


@by_backend
def test_branches_with_different_maps_share_one_call(backend: str) -> None:
    first, second = torch.tensor([True, False]), torch.tensor([False, True])
    edits = [MapReplacement(kind="uniform", batch=first), MapReplacement(kind="random", seed=9, batch=second)]
    check(replace(CALLS["padded"], edits=edits), backend)
    check(replace(CALLS["padded"], edits=[edits[0], MapReplacement(kind="reversed")]), backend)  # one after the other


@by_backend
@pytest.mark.parametrize("normalise", [True, False])
def test_a_row_of_equal_scores(normalise: bool, backend: str) -> None:
    """Normalised, it keeps its output; as released it has no weight left."""
    call = make(3, 7, edits=[MapReplacement(kind="reversed", normalise=normalise)])
    call = replace(call, query=torch.zeros_like(call.query))
    got = grouped_attention(call, backend).output
    want = call.value.mean(2, keepdim=True).repeat_interleave(2, 1) * normalise
    torch.testing.assert_close(got, want.expand_as(got), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_a_wrong_seed_or_label_is_caught(kind: dict[str, Any]) -> None:
    call = CALLS["padded"]
    right = check(replace(call, edits=[MapReplacement(**kind)]), "sdpa")
    if "seed" in kind:
        wrong = grouped_attention(replace(call, edits=[MapReplacement(**{**kind, "seed": 4})]), "sdpa").output
        assert (wrong - right).abs().max() > 1e-2
    labels = call.groups.labels.clone()
    labels[0, 4] = int(Label.PADDING)
    relabelled = replace(call, groups=KeyGroups.plain(labels), edits=[MapReplacement(**kind)])
    if (kind.get("normalise", True) is False and kind["kind"] != "reversed") or kind["kind"] in ("random", "shuffled"):
        assert (grouped_attention(relabelled, "sdpa").output - right).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
@pytest.mark.parametrize("mask", [False, True])
def test_no_chunk_holds_a_map(kind: dict[str, Any], mask: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill in pieces of one row gives the same; uniform maps of causal rows never make a score."""
    call = CALLS["full" if kind["kind"] == "shuffled" else "padded" if mask else "causal"]
    call = replace(call, edits=[MapReplacement(**kind), HeadScale(scale=torch.linspace(0, 2, 4))])
    whole = grouped_attention(call, "sdpa")
    monkeypatch.setattr(closed_forms, "CHUNK", 1)
    monkeypatch.setattr(sdpa, "dense_rows", lambda *args: pytest.fail("the whole map was made"))
    if kind["kind"] == "uniform":
        monkeypatch.setattr(closed_forms, "plain_weights", lambda *args: pytest.fail("scores were made"))
    pieces = grouped_attention(call, "sdpa")
    torch.testing.assert_close(pieces.output, whole.output, atol=1e-5, rtol=1e-5)
    assert torch.equal(pieces.fired, whole.fired)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"masses": "all"}, "group masses"),
        ({"edits": [MassMove(source=Group.TEXT, target=Group.IMAGE, share=0.5)]}, "scores or masses"),
        ({"edits": [MapReplacement(kind="uniform"), MapReplacement(kind="random")]}, "two replacements"),
        ({"edits": [MapReplacement(kind="shuffled")]}, "under a mask"),
    ],
)
def test_what_needs_the_map_takes_it(change: dict[str, Any], reason: str) -> None:
    call = replace(CALLS["causal"], **{"edits": [MapReplacement(kind="uniform")], **change})
    assert reason in closed_forms.why_not(call)
    got, want = grouped_attention(call, "sdpa"), grouped_attention(call, "reference")
    torch.testing.assert_close(got.output, want.output, atol=1e-5, rtol=1e-5)


def test_the_choice_of_batch_rows_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = torch.tensor([True, False])
    assert closed_forms.chosen_items(chosen, 2) == (True, False)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("read again"))
        assert closed_forms.chosen_items(chosen, 2) == (True, False)
    at = id(chosen)
    del chosen
    assert at not in closed_forms._READ
    assert closed_forms.chosen_items(None, 3) == (True, True, True)


def test_the_counter_generator() -> None:
    """The same numbers as Python's integers give, even, and different for every head, row, key and seed."""
    head, row, key = (torch.arange(n).view(shape) for n, shape in ((4, (4, 1, 1)), (64, (1, 64, 1)), (64, (1, 1, 64))))
    draws = counter_uniform(0, head, row, key)
    for at in ((0, 0, 0), (3, 5, 63), (1, 63, 2)):
        assert float(draws[at]) == noise(0, *at)
    assert float(counter_uniform(2**31 - 1, head, row, key)[2, 3, 4]) == noise(2**31 - 1, 2, 3, 4)
    assert 0 < draws.min() < 1e-3
    assert 1 - 1e-3 < draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01
    assert not torch.equal(draws, counter_uniform(1, head, row, key))
    flat = draws.reshape(4 * 64, 64) - 0.5
    assert (flat @ flat.T / 64 * 12).fill_diagonal_(0).abs().max() < 0.7, "rows and heads repeat each other"


def test_bad_maps_are_refused() -> None:
    with pytest.raises(ValueError, match="MapReplacement"):
        MapReplacement(kind="sideways")  # type: ignore[arg-type]
