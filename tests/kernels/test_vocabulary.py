"""Edits are checked where they are written, calls where they are made; and laws that hold for any of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.calls import BACKENDS, causal, groups, random_call
from support.dense import dense

from mmfix_kernels import (
    AttentionCall,
    Group,
    HeadScale,
    KeyGroups,
    Label,
    MassGate,
    MassMove,
    Rows,
    ScoreEdit,
    backends,
    forced_backend,
    grouped_attention,
)  # fmt: skip

by_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), float("inf")])
def test_shares_outside_zero_and_one(share: float) -> None:
    with pytest.raises(ValueError, match="share of attention"):
        MassMove(source=Group.SINK, target=Group.IMAGE_NONSINK, share=share)
    for name in ("min_mass", "max_share"):
        values = {"min_mass": 0.1, "max_share": 0.1, name: share}
        with pytest.raises(ValueError, match=f"MassGate.{name}"):
            MassGate(group=Group.IMAGE, part=Group.IMAGE_SINK, **values)


def test_a_group_cannot_be_source_and_target() -> None:
    with pytest.raises(ValueError, match="disjoint"):
        MassMove(source=Group.SINK, target=Group.IMAGE, share=0.5)


@pytest.mark.parametrize("heads", [(), (-1,), (1, 1)])
def test_malformed_heads(heads: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="heads="):
        ScoreEdit(group=Group.IMAGE, heads=heads)
    with pytest.raises(ValueError, match="heads="):
        MassMove(source=Group.SINK, target=Group.IMAGE_NONSINK, share=0.5, heads=heads)


@by_backend
@pytest.mark.parametrize(
    "edit",
    [
        ScoreEdit(group=Group.IMAGE, heads=(4,), bias=1.0),
        MassMove(source=Group.SINK, target=Group.IMAGE_NONSINK, share=0.5, heads=(4,)),
    ],
)
def test_heads_that_do_not_exist(backend: str, edit: Any) -> None:
    with pytest.raises(ValueError, match=r"query heads 0\.\.3"):
        grouped_attention(random_call(edits=[edit]), backend)


@by_backend
@pytest.mark.parametrize("shape", [(3,), (2, 3), (3, 4), (4, 1), (1, 4)])
def test_head_scales_of_the_wrong_shape(backend: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="HeadScale"):
        grouped_attention(random_call(edits=[HeadScale(scale=torch.ones(shape))]), backend)


def test_calls_that_do_not_fit() -> None:
    q, kv, labels = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8), torch.zeros(2, 5, dtype=torch.int8)
    for bad in (
        {"query": torch.zeros(2, 3, 3, 8)},  # 3 query heads, 2 key heads
        {"query": torch.zeros(1, 4, 3, 8)},
        {"query": torch.zeros(2, 4, 3, 4)},
        {"value": torch.zeros(2, 2, 4, 8)},
        {"value": torch.zeros(2, 4, 5, 8)},
        {"is_causal": True},
        {"masses": "all"},
        {"edits": [ScoreEdit(group=Group.IMAGE, bias=1.0)]},
        {"groups": KeyGroups.plain(labels[:, :4])},
        {"groups": KeyGroups.plain(labels[:1])},
    ):
        with pytest.raises(ValueError, match=r"\w+ .*\w+"):
            AttentionCall(**{"query": q, "key": kv, "value": kv, **bad})
    AttentionCall(query=q, key=kv, value=kv, edits=[HeadScale(scale=torch.ones(4))])  # needs no groups


def test_the_environment_chooses_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMFIX_BACKEND", raising=False)
    assert forced_backend() is None
    monkeypatch.setenv("MMFIX_BACKEND", "")
    assert forced_backend() is None
    for name in backends():
        monkeypatch.setenv("MMFIX_BACKEND", name)
        assert forced_backend() == name
    monkeypatch.setenv("MMFIX_BACKEND", "flash")
    with pytest.raises(ValueError, match=r"MMFIX_BACKEND='flash'.*sdpa, reference or unset"):
        forced_backend()
    assert set(BACKENDS) <= set(backends())


def test_groups_are_sets_of_labels() -> None:
    assert Group.IMAGE.labels() == (Label.IMAGE, Label.IMAGE_SINK)
    assert Group.SINK == Group.TEXT_SINK | Group.IMAGE_SINK
    assert not Group.TEXT & Group.IMAGE
    for group in Group:
        assert Label.PADDING not in group.labels()
    labels = torch.arange(8, dtype=torch.int8)[None]
    for group in (*Group, Group.TEXT | Group.IMAGE):
        member = KeyGroups.plain(labels).member(group)[0].nonzero().flatten().tolist()
        assert tuple(member) == group.labels()


_group = st.integers(1, 0x7F).map(Group)
_edit = st.one_of(
    st.builds(
        ScoreEdit, group=_group, rows=st.sampled_from(Rows), heads=st.sampled_from([None, (0,), (1, 3)]),
        gain=st.floats(-1, 2), abs_gain=st.floats(-1, 1), bias=st.floats(-3, 3),
    ),
    st.builds(
        lambda source, target, share, rows, heads: MassMove(
            source=Group(source), target=Group(target & ~source or ~source & 0x7F), share=share, rows=rows, heads=heads
        ),
        source=st.integers(1, 0x3F), target=st.integers(1, 0x7F), share=st.floats(0, 1),
        rows=st.sampled_from(Rows), heads=st.sampled_from([None, (2,)]),
    ),
    st.builds(HeadScale, scale=st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4).map(torch.tensor)),
)  # fmt: skip


@by_backend
@settings(max_examples=60, deadline=None, derandomize=True)
@given(edits=st.lists(_edit, max_size=4), seed=st.integers(0, 1000), pad=st.integers(0, 4), rows=st.integers(1, 5))
def test_any_edits_agree_with_the_equations(backend: str, edits: list[Any], seed: int, pad: int, rows: int) -> None:
    call = random_call(rows, 9, edits=edits, seed=seed, mask=causal(rows, 9, 2, pad=pad), masses="all", kv_heads=2)
    got, want = grouped_attention(call, backend), dense(call)
    torch.testing.assert_close(got.output.double(), want.output, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(got.masses.double(), want.masses, atol=1e-5, rtol=0)  # type: ignore[union-attr]
    assert got.fired.tolist() == want.fired


@by_backend
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), order=st.permutations(range(9)))
def test_the_order_of_keys_does_not_matter(backend: str, seed: int, order: list[int]) -> None:
    edits = [
        ScoreEdit(group=Group.IMAGE, gain=1.2, bias=0.3),
        MassMove(source=Group.SINK, target=Group.IMAGE_NONSINK, share=0.4),
    ]
    call = random_call(2, 9, seed=seed, edits=edits, mask=torch.ones(1, 1, 1, 9).bool())
    moved = replace(
        call, key=call.key[:, :, order], value=call.value[:, :, order],
        groups=groups(2, 2, 9, labels=call.groups.labels[:, order]),  # type: ignore[union-attr]
    )  # fmt: skip
    a, b = grouped_attention(call, backend), grouped_attention(moved, backend)
    torch.testing.assert_close(a.output, b.output, atol=1e-5, rtol=0)
    assert torch.equal(a.fired, b.fired)


@by_backend
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_a_mass_move_is_a_correction_of_plain_attention(backend: str, seed: int, share: float) -> None:
    """out = o + share * W_source * (o_target - o_source), from three plain attention calls."""
    move = MassMove(source=Group.SINK, target=Group.IMAGE_NONSINK, share=share)
    call = random_call(2, 12, seed=seed, edits=[move], mask=torch.ones(1, 1, 1, 12).bool(), masses="all")
    labels = call.groups.labels.clone()  # type: ignore[union-attr]
    labels[:, :3] = torch.tensor([Label.TEXT_SINK, Label.IMAGE, Label.IMAGE_SINK])
    call = replace(call, groups=KeyGroups.plain(labels))
    plain = replace(call, edits=())
    only = {}
    for group in (move.source, move.target):
        mask = call.groups.member(group)[:, None, None, :]  # type: ignore[union-attr]
        only[group] = grouped_attention(replace(plain, mask=mask), "reference").output
    whole = grouped_attention(plain, "reference")
    mass = whole.masses[..., list(move.source.labels())].sum(-1, keepdim=True)  # type: ignore[index]
    want = whole.output + share * mass * (only[move.target] - only[move.source])
    torch.testing.assert_close(grouped_attention(call, backend).output, want, atol=1e-5, rtol=0)
