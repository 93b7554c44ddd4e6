"""Labels per head: each head is attention of its own, with its own labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.calls import BACKENDS, causal, edit_sets, groups, random_call
from torch import Tensor

from mmfix_kernels import AttentionCall, Group, HeadScale, MapReplacement, Rows, ScoreEdit, grouped_attention
from mmfix_kernels.edits import HeadSelect, SplitSoftmax
from mmfix_kernels.keyed import HeadMean, KeyGain, KeyMove
from mmfix_kernels.statistics import column_mass

HEADS = 4
by_backend = pytest.mark.parametrize("backend", BACKENDS)


def labelled(edits: list[Any], kv_heads: int = HEADS, **options: Any) -> AttentionCall:
    """A call in which every head labels the keys differently."""
    labels = torch.randint(0, 6, (2, HEADS, 63), generator=torch.Generator().manual_seed(3)).to(torch.int8)
    return random_call(
        heads=HEADS, kv_heads=kv_heads, groups=groups(2, 7, 63, labels=labels), edits=edits, masses="all", **options
    )


def alone(call: AttentionCall, head: int) -> AttentionCall:
    """The call of one head, its labels those of all heads of it."""
    assert call.groups is not None
    group = call.query.shape[1] // call.key.shape[1]
    kept = slice(head // group, head // group + 1)
    edits = []
    for edit in call.edits:
        if isinstance(edit, HeadScale):
            edits.append(HeadScale(scale=edit.scale[..., head : head + 1]))
        elif isinstance(edit, KeyMove):
            edits.append(replace(edit, chosen=edit.chosen[:, head : head + 1]))
        elif getattr(edit, "heads", None) is None:
            edits.append(edit)
        elif head in edit.heads:
            edits.append(replace(edit, heads=None))
    labels = call.groups.labels[:, head]
    mask = call.mask if call.mask is None or call.mask.shape[1] == 1 else call.mask[:, head : head + 1]
    return replace(
        call, query=call.query[:, head : head + 1], key=call.key[:, kept], value=call.value[:, kept], mask=mask,
        groups=replace(call.groups, labels=labels), edits=edits,
    )  # fmt: skip


MORE = {
    "split": [SplitSoftmax(group=Group.IMAGE, heads=(1, 2))],
    "uniform": [MapReplacement(kind="uniform", heads=(0, 3), rows=Rows.AFTER_IMAGE)],
    "reversed in one item": [MapReplacement(kind="reversed", batch=torch.tensor([False, True]))],
    "keys": [
        KeyGain(gain=torch.linspace(0, 1, 126).view(2, 63), rows=Rows.LAST),
        KeyMove(chosen=torch.arange(2 * HEADS * 9).view(2, HEADS, 9) % 4 == 0, share=0.5, rows=Rows.ALL),
    ],
}


@by_backend
@pytest.mark.parametrize("edits", [*edit_sets(), *MORE])
@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_every_head_is_attention_with_its_own_labels(edits: str, backend: str, kv_heads: int) -> None:
    call = labelled({**edit_sets(), **MORE}[edits], kv_heads)
    found = grouped_attention(call, backend)
    assert found.backend == backend
    each = [grouped_attention(alone(call, head), "reference") for head in range(HEADS)]
    torch.testing.assert_close(found.output, torch.cat([one.output for one in each], dim=1), atol=1e-5, rtol=1e-5)
    assert found.masses is not None
    torch.testing.assert_close(found.masses, torch.cat([one.masses for one in each if one.masses is not None], dim=1))
    if all(getattr(edit, "heads", None) is None for edit in call.edits):
        assert torch.equal(found.fired, torch.stack([one.fired for one in each]).sum(0))


@by_backend
def test_labels_that_are_the_same_in_all_heads_are_shared_labels(backend: str) -> None:
    for options in ({}, {"mask": causal(7, 63, 2, pad=3)}, {"mask": causal(7, 63, 2).expand(2, HEADS, 7, 63)}):
        shared = random_call(edits=edit_sets()["everything"], masses="last", **options)
        assert shared.groups is not None
        labels = shared.groups.labels[:, None].expand(-1, HEADS, -1)
        call = replace(shared, groups=replace(shared.groups, labels=labels))
        found, wanted = grouped_attention(call, backend), grouped_attention(shared, backend)
        torch.testing.assert_close(found.output, wanted.output, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found.masses, wanted.masses, atol=1e-6, rtol=1e-5)
        assert torch.equal(found.fired, wanted.fired)


@by_backend
def test_a_shared_prefix_is_repeated(backend: str) -> None:
    call = labelled(edit_sets()["var"])

    def parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
        return tensor[:1, :, :40], tensor[:, :, 40:]

    (first_key, key), (first_value, value) = parts(call.key), parts(call.value)
    split = replace(call, key=key, value=value, prefix_key=first_key, prefix_value=first_value)
    both = [torch.cat([one.expand(2, -1, -1, -1), rest], dim=2) for one, rest in (parts(call.key), parts(call.value))]
    whole = grouped_attention(replace(call, key=both[0], value=both[1]), backend)
    torch.testing.assert_close(grouped_attention(split, backend).output, whole.output)


def test_column_masses_of_labels_per_head() -> None:
    call = replace(labelled([ScoreEdit(group=Group.IMAGE, bias=1.0)]), masses="none")
    found = column_mass(call, Rows.AFTER_IMAGE)
    each = [column_mass(alone(call, head), Rows.AFTER_IMAGE).mass for head in range(HEADS)]
    torch.testing.assert_close(found.mass, torch.cat(each, dim=1))


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (HeadSelect(group=Group.IMAGE, keep=1, factor=0.0), "weighs heads against each other"),
        (ScoreEdit(group=Group.IMAGE, mean_abs_gain=0.5), "weighs heads against each other"),
        (MapReplacement(kind="random"), "a random map depends on the number of the head"),
    ],
)
def test_edits_across_heads_are_refused(edit: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        grouped_attention(labelled([edit]))


def test_heads_are_averaged_behind_labels_of_their_own() -> None:
    mean = HeadMean(heads=torch.tensor([True, False, False, False]))
    found = grouped_attention(labelled([VAR := edit_sets()["var"][0], mean]))
    plain = grouped_attention(labelled([VAR]))
    torch.testing.assert_close(found.output[:, 0], plain.output[:, 1:].mean(1))
    assert torch.equal(found.fired[0], plain.fired[0])


def test_labels_of_another_number_of_heads_are_refused() -> None:
    call = labelled([])
    assert call.groups is not None
    with pytest.raises(ValueError, match="or per head and key"):
        replace(call, groups=replace(call.groups, labels=call.groups.labels[:, :2]))
