"""The edge cases of grouped attention (algebra, section 12): empty, full, hidden and padded groups of keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.calls import BACKENDS, GATE, VAR_MOVE, causal, edit_sets, groups, random_call
from support.dense import dense
from support.eager import additive

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
    grouped_attention,
)  # fmt: skip
from mmfix_kernels import dense as dense_path

by_backend = pytest.mark.parametrize("backend", BACKENDS)
MOVE = MassMove(source=Group.SINK, target=Group.IMAGE_NONSINK, share=0.6)
HIDE = ScoreEdit(group=Group.IMAGE, bias=float("-inf"))
SCORE_AND_MASS = [name for name in edit_sets() if name not in ("plain", "heads", "heads-by-row")]


def labelled(labels: list[int], **options: Any) -> AttentionCall:
    """A call of two batch rows whose keys bear `labels`, every row touched."""
    both = torch.tensor([labels, labels], dtype=torch.int8)
    return random_call(options.pop("q_len", 3), len(labels), groups=KeyGroups.plain(both), masses="all", **options)


def bare(call: AttentionCall, backend: str) -> Any:
    """The same call without edits, through the same dense path."""
    return grouped_attention(replace(call, edits=(), masses="all"), backend)


@by_backend
@pytest.mark.parametrize(
    ("labels", "edit"),
    [
        ([0, 0, 4, 4, 5], MOVE),  # no source and no target
        ([2, 0, 4, 4, 5], MOVE),  # no target: a text-only prompt
        ([2, 3, 3, 3, 5], MOVE),  # every image token is a sink
        ([2, 2, 2, 2, 2], MOVE),  # a row of sinks only
        ([1, 1, 1, 1, 1], MOVE),  # a row of targets only
        ([2, 1, 1, 0, 0], replace(MOVE, gate=GATE)),  # no image sink: the gate stays closed
        ([2, 0, 0, 0, 0], replace(MOVE, gate=GATE)),  # no image: the share is 0/0
        ([2, 3, 1, 0, 0], replace(MOVE, gate=replace(GATE, min_mass=1.0))),
        ([2, 3, 1, 0, 0], replace(MOVE, gate=replace(GATE, max_share=0.0))),
        ([0, 0, 4, 4, 5], ScoreEdit(group=Group.IMAGE, gain=3.0, abs_gain=1.0, bias=float("-inf"))),
    ],
)
def test_nothing_to_do_is_bitwise_nothing(backend: str, labels: list[int], edit: Any) -> None:
    call = labelled(labels, edits=[edit])
    got, plain = grouped_attention(call, backend), bare(call, backend)
    assert torch.equal(got.output, plain.output)
    assert torch.equal(got.masses, plain.masses)
    assert got.fired[0, 0] == 0


@by_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "edit",
    [
        ScoreEdit(group=Group.IMAGE),
        MassMove(source=Group.SINK, target=Group.IMAGE_NONSINK, share=0.0),
        replace(VAR_MOVE, share=0.0),
        HeadScale(scale=torch.ones(4)),
    ],
    ids=["score", "move", "gated", "heads"],
)
def test_strength_zero_is_vanilla_bit_for_bit(backend: str, dtype: torch.dtype, edit: Any) -> None:
    call = random_call(7, 19, edits=[edit], dtype=dtype, masses="all")
    got = grouped_attention(call, backend)
    assert torch.equal(got.output, bare(call, backend).output)
    if not isinstance(edit, ScoreEdit):
        assert got.fired[0, 0] == 0


@by_backend
@pytest.mark.parametrize("edits", list(edit_sets()))
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_padding_row_is_zeros(backend: str, edits: str, kind: str) -> None:
    """Left padding: rows that see nothing give zeros and no mass, and are not counted; others are as without it."""
    mask = causal(7, 7, 2, pad=3)
    if kind == "float":
        mask = additive(mask)
    call = random_call(7, 7, edits=edit_sets()[edits], mask=mask, masses="all")
    got = grouped_attention(call, backend)
    assert got.output.isfinite().all()
    assert (got.output[0, :, :3] == 0).all()
    assert got.masses is not None
    assert (got.masses[0, :, :3] == 0).all()
    torch.testing.assert_close(got.masses[0, :, 3:].sum(-1), torch.ones(4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(got.output.double(), dense(call).output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [3, 7])
def test_padding_rows_are_zeros_in_the_fused_path(rows: int) -> None:
    call = random_call(7, 7, mask=causal(7, 7, 2, pad=3), edits=[] if rows == 7 else [replace(MOVE, rows=Rows.LAST)])
    got = grouped_attention(call, "sdpa").output
    assert (got[0, :, :3] == 0).all()
    assert got.isfinite().all()


@by_backend
def test_padding_keys_count_for_nothing(backend: str) -> None:
    """What padding holds, and what it is labelled, does not matter to a row that cannot see it."""
    call = random_call(4, 9, edits=edit_sets()["everything"], mask=causal(4, 9, 2, pad=3), masses="all")
    labels = call.groups.labels.clone()  # type: ignore[union-attr]
    found = []
    for label in (Label.PADDING, Label.IMAGE_SINK, Label.SYSTEM):
        labels[0, :3] = int(label)
        key, value = call.key.clone(), call.value.clone()
        key[0, :, :3], value[0, :, :3] = 50.0 * int(label), -3.0
        other = replace(call, key=key, value=value, groups=groups(2, 4, 9, labels=labels.clone()))
        found.append(grouped_attention(other, backend))
    for other in found[1:]:
        torch.testing.assert_close(other.output, found[0].output, atol=1e-6, rtol=0)
        assert torch.equal(other.fired, found[0].fired)


@by_backend
@pytest.mark.parametrize("edits", list(edit_sets()))
def test_the_first_causal_row_sees_one_key(backend: str, edits: str) -> None:
    call = random_call(9, 9, is_causal=True, edits=edit_sets()[edits], masses="all")
    got = grouped_attention(call, backend)
    factor = torch.ones(2, 4, 1)
    for edit in call.edits:
        if isinstance(edit, HeadScale):
            factor = factor * edit.scale.expand(2, 4)[..., None]
        elif isinstance(edit, ScoreEdit) and edit.bias == float("-inf"):
            factor = factor * (~call.groups.member(edit.group)[:, :1, None]).float()  # type: ignore[union-attr]
    torch.testing.assert_close(got.output[:, :, 0], call.value[:, :, 0] * factor, atol=1e-6, rtol=0)


@by_backend
def test_a_hidden_group_is_as_if_absent(backend: str) -> None:
    """Also when it holds the largest score of the row, and when nothing else is left (zeros, not NaN)."""
    call = labelled([0, 1, 1, 0, 3, 5], edits=[HIDE], q_len=1)
    call = replace(call, key=call.key.index_fill(2, torch.tensor([1]), 30.0), query=call.query.abs())
    kept = torch.tensor([0, 3, 5])
    without = replace(
        call, key=call.key[:, :, kept], value=call.value[:, :, kept], mask=None, edits=(), masses="none", groups=None
    )
    got = grouped_attention(call, backend)
    torch.testing.assert_close(got.output, grouped_attention(without, "reference").output, atol=1e-6, rtol=0)
    everything = labelled([1, 3, 1], edits=[HIDE], mask=torch.ones(1, 1, 3, 3).bool())
    assert (grouped_attention(everything, backend).output == 0).all()


@by_backend
@pytest.mark.parametrize("second", [{"gain": 1.5}, {"gain": 0.0}, {"bias": 1.0}, {"abs_gain": 0.5}])
def test_what_one_edit_hid_stays_hidden_for_the_next(backend: str, second: dict[str, float]) -> None:
    call = labelled([0, 1, 1, 0, 3, 5], edits=[HIDE], q_len=1)
    both = replace(call, edits=[HIDE, ScoreEdit(group=Group.IMAGE, **second)])
    torch.testing.assert_close(grouped_attention(both, backend).output, grouped_attention(call, backend).output)


@by_backend
def test_the_whole_row_can_be_moved(backend: str) -> None:
    """share 1 leaves nothing on the source, and the target keeps its proportions."""
    call = labelled([2, 3, 1, 1, 0], edits=[replace(MOVE, share=1.0)])
    call = replace(call, value=torch.eye(5).expand(2, 4, 5, 5), mask=None)
    got, plain = grouped_attention(call, backend).output, bare(call, backend).output
    assert (got[..., :2] == 0).all()
    torch.testing.assert_close(got[..., 2] / got[..., 3], plain[..., 2] / plain[..., 3], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[..., 4], plain[..., 4], atol=1e-7, rtol=0)


@by_backend
def test_gates_decide_per_row_and_head(backend: str) -> None:
    """Masses are set by hand through the scores: text 1/4 sink 1/4 image 1/2 and neighbours of the thresholds."""
    labels = torch.tensor([[0, 3, 1]], dtype=torch.int8)
    weights = torch.tensor(
        [[0.25, 0.25, 0.5], [0.85, 0.05, 0.1], [0.25, 0.5, 0.25], [0.79, 0.09, 0.12], [0.5, 0.3, 0.2]]
    )
    opens = [True, False, False, True, False]  # mass >= 0.2 and sink share <= 0.5
    call = AttentionCall(
        query=torch.ones(1, 1, 5, 1), key=torch.zeros(1, 1, 3, 1), value=torch.eye(3)[None, None],
        mask=weights.log()[None, None], edits=[replace(MOVE, gate=GATE)], groups=KeyGroups.plain(labels), masses="all",
    )  # fmt: skip
    got = grouped_attention(call, backend)
    moved = (got.output[0, 0] - weights).abs().amax(-1) > 1e-4
    assert moved.tolist() == opens
    assert got.fired.tolist() == [[2, 5]]
    torch.testing.assert_close(got.output[0, 0, 0], torch.tensor([0.25, 0.1, 0.65]), atol=1e-6, rtol=0)
    gate = MassGate(group=Group.IMAGE, min_mass=0.2, part=Group.IMAGE_SINK, max_share=0.4, slack=0.2)
    release = replace(MOVE, gate=gate)
    slack = grouped_attention(replace(call, edits=[release]), backend)  # 0.25/(0.75+0.4) and so on
    assert ((slack.output[0, 0] - weights).abs().amax(-1) > 1e-4).tolist() == [True, False, False, True, True]


@by_backend
def test_masses_by_label(backend: str) -> None:
    weights = torch.tensor([0.05, 0.1, 0.15, 0.2, 0.25, 0.13, 0.07, 0.05])
    call = AttentionCall(
        query=torch.ones(1, 1, 1, 1), key=torch.zeros(1, 1, 8, 1), value=torch.randn(1, 1, 8, 2),
        mask=weights.log().view(1, 1, 1, 8), masses="last",
        groups=KeyGroups.plain(torch.arange(8, dtype=torch.int8)[None]),
    )  # fmt: skip
    got = grouped_attention(call, backend)
    assert got.masses is not None
    torch.testing.assert_close(got.masses[0, 0, 0], weights, atol=1e-6, rtol=0)
    last = grouped_attention(random_call(7, 19, masses="last", edits=edit_sets()["var"]), backend).masses
    every = grouped_attention(random_call(7, 19, masses="all", edits=edit_sets()["var"]), backend).masses
    torch.testing.assert_close(last, every[:, :, -1:], atol=1e-6, rtol=0)  # type: ignore[index]


@pytest.mark.parametrize("edits", list(edit_sets()))
@pytest.mark.parametrize("chunk", [1, 100, 1000])
@pytest.mark.parametrize("masses", ["none", "last", "all"])
def test_chunks_change_nothing(edits: str, chunk: int, masses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({}, {"is_causal": True}):
        call = random_call(9, 9, edits=edit_sets()[edits], masses=masses, **options)
        whole = grouped_attention(call, "sdpa")
        with monkeypatch.context() as patch:
            patch.setattr(dense_path, "CHUNK", chunk)
            pieces = grouped_attention(call, "sdpa")
        torch.testing.assert_close(pieces.output, whole.output)
        assert torch.equal(pieces.fired, whole.fired)
        if masses != "none":
            torch.testing.assert_close(pieces.masses, whole.masses)


def test_rows_before_the_first_edited_one_are_plain_bit_for_bit() -> None:
    for options in ({}, {"is_causal": True}):
        call = random_call(9, 9, edits=[VAR_MOVE], **options)
        plain = grouped_attention(replace(call, edits=()), "sdpa").output
        first = call.groups.first[Rows.AFTER_IMAGE]  # type: ignore[union-attr]
        got = grouped_attention(call, "sdpa").output
        torch.testing.assert_close(got[:, :, :first], plain[:, :, :first], atol=1e-6, rtol=0)
        assert (got[:, :, first:] - plain[:, :, first:]).abs().max() > 1e-2
