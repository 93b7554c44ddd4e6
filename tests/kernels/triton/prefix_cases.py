"""Decode with a prefix that branches share, and edits of some batch rows, against float64; run like device_cases.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from device_cases import EDITS, check, make, moved, serve
from exact import exact
from map_cases import checked
from support.eager import additive

from mmfix_kernels import AttentionCall, Label, MapReplacement, Rows
from mmfix_kernels import triton as backend
from mmfix_kernels.triton import launch


def branched(
    prompts: int,
    branches: int,
    before: int,
    after: int,
    edits: str | list[Any] = "plain",
    rows: int = 1,
    **options: Any,
) -> AttentionCall:
    """`branches` batch rows for each prompt share `before` keys and have `after` of their own."""
    batch = prompts * branches
    call = make(rows, before + after, 32, batch=batch, is_causal=False, **options)
    assert call.groups is not None
    labels = call.groups.labels.clone()
    labels[:, :before] = labels[::branches, :before].repeat_interleave(branches, 0)
    key, value = call.key[:, :, before:], call.value[:, :, before:]
    prefix = (call.key[::branches, :, :before], call.value[::branches, :, :before])
    return replace(
        call, key=key, value=value, prefix_key=prefix[0], prefix_value=prefix[1],
        groups=replace(call.groups, labels=labels), edits=EDITS[edits] if isinstance(edits, str) else edits,
    )  # fmt: skip


@pytest.mark.parametrize("edits", ["plain", "all"])
@pytest.mark.parametrize(
    ("prompts", "branches", "before", "after", "rows"),
    [(1, 2, 70, 5, 1), (2, 3, 33, 5, 1), (1, 1, 40, 7, 1), (1, 2, 33, 40, 3), (2, 2, 1, 1, 1), (1, 2, 20, 5, 18)],
)
def test_a_shared_prefix(prompts: int, branches: int, before: int, after: int, rows: int, edits: str) -> None:
    """One or several prompts, queries and chunks; one branch is plain attention; prefill repeats the prefix."""
    check(branched(prompts, branches, before, after, edits, rows, masses="all"))


def test_grouped_heads_and_masks_of_branches() -> None:
    """Each branch hides other keys of the prefix; one of them sees no prefix at all."""
    mask = torch.ones(4, 1, 1, 45, dtype=torch.bool)
    mask[1, :, :, 3:30] = mask[2, :, :, :40] = mask[3, :, :, 42:] = False
    call = branched(2, 2, 40, 5, "plain", heads=4, kv_heads=2, mask=mask)
    check(call)
    check(replace(call, mask=additive(mask), edits=EDITS["var"]))


@pytest.mark.parametrize("kind", ["random", "reversed", "uniform"])
def test_branches_with_maps_of_their_own(kind: str) -> None:
    chosen = torch.tensor([False, True])
    maps = [MapReplacement(kind=kind, seed=3, batch=chosen)]
    call = branched(1, 2, 40, 9, maps, masses="last")
    output = checked(call)
    plain = serve(replace(call, edits=())).output
    torch.testing.assert_close(output[::2], plain[::2], atol=1e-6, rtol=1e-6)
    checked(replace(call, edits=[MapReplacement(kind=kind, normalise=False, batch=~chosen)]))


@pytest.mark.parametrize("edits", ["var", "pai", "release"])
@pytest.mark.parametrize("rows", [1, 20])
def test_edits_of_some_batch_rows(edits: str, rows: int) -> None:
    call = make(rows, 20 if rows == 20 else 40, 32, edits, batch=3, masses="all")
    chosen = torch.tensor([True, False, True])
    call = replace(call, edits=[replace(edit, batch=chosen) for edit in call.edits])
    output = check(call)
    torch.testing.assert_close(output[1], serve(replace(call, edits=())).output[1])


@pytest.mark.parametrize("rows", [Rows.LAST, Rows.AFTER_IMAGE])
@pytest.mark.parametrize("length", [3, 20])
def test_maps_of_some_rows(rows: Rows, length: int) -> None:
    call = make(length, length, 32, batch=2, heads=4, kv_heads=2)
    for kind in ("reversed", "random"):
        checked(replace(call, edits=[MapReplacement(kind=kind, rows=rows, heads=(0, 2))]))


def test_the_prefix_is_read_once_for_its_branches() -> None:
    """One program per key head and chunk of the prefix serves all rows of a prompt; nothing is repeated in memory."""
    call = moved(branched(2, 3, 64, 8))
    plan = backend.plan_of(call)
    assert not isinstance(plan, str)
    before, after, _ = launch.prepare(call, plan)[1]
    assert before.grid[1] == 2
    assert after.grid[1] == 6
    assert before.arguments["p_k"].data_ptr() == call.prefix_key.data_ptr()  # type: ignore[union-attr]


def test_labels_of_the_prefix_must_agree() -> None:
    call = branched(1, 2, 20, 5, "var")
    assert call.groups is not None
    labels = call.groups.labels.clone()
    labels[1, 3] = int(Label.MARKED)
    call = moved(replace(call, groups=replace(call.groups, labels=labels)))
    assert "differently" in backend.why_not(call)


def test_a_wrong_label_is_caught() -> None:
    call = branched(1, 2, 40, 9, "pai")
    assert call.groups is not None
    labels = call.groups.labels.clone()
    labels[:, 2] = int(Label.IMAGE)
    other = labels.clone()
    other[:, 2] = int(Label.SYSTEM)
    want = exact(replace(call, groups=replace(call.groups, labels=labels))).output
    wrong = serve(replace(call, groups=replace(call.groups, labels=other))).output
    assert float((wrong.double() - want).abs().max()) > 1e-3
