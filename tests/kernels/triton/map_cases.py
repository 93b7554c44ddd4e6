"""Replaced maps by the kernels against maps written out in float64; run like device_cases.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from device_cases import GATE, check, make, moved, relabelled, serve
from exact import exact, visible
from support.eager import padded

from mmfix_kernels import AttentionCall, Group, HeadScale, Label, MapReplacement, MassMove, ScoreEdit
from mmfix_kernels import triton as backend

KINDS: dict[str, dict[str, Any]] = {
    "uniform": {"kind": "uniform"},
    "uniform as released": {"kind": "uniform", "normalise": False},
    "random": {"kind": "random", "seed": 3},
    "random as released": {"kind": "random", "seed": 2**31 - 1, "normalise": False},
    "reversed": {"kind": "reversed"},
    "reversed as released": {"kind": "reversed", "normalise": False},
}
by_kind = pytest.mark.parametrize("kind", KINDS)


def shaped(shape: str, *edits: Any, **options: Any) -> AttentionCall:
    """A call of one of five shapes; padded items bear the padding label."""
    if shape == "decode":
        call = make(1, 70, 32, heads=4, kv_heads=2, **options)
    elif shape == "causal":
        call = make(20, 20, 32, **options)
    elif shape == "full":
        call = make(20, 33, 32, is_causal=False, **options)
    else:
        rows, keys = (20, 20) if shape == "padded" else (2, 40)
        call = make(rows, keys, 32, batch=2, mask=padded(rows, keys, 5), **options)
        assert call.groups is not None
        labels = call.groups.labels.clone()
        labels[1, :5] = int(Label.PADDING)
        call = relabelled(call, labels)
    return replace(call, edits=edits)


def checked(call: AttentionCall) -> torch.Tensor:
    """`check`; a reversed map divides by n*Mx - 1, which is small where weights are nearly equal."""
    maps = [edit for edit in call.edits if isinstance(edit, MapReplacement)]
    if not any(edit.kind == "reversed" and edit.normalise for edit in maps):
        return check(call)
    before = exact(replace(call, edits=[edit for edit in call.edits if edit not in maps]))
    whole = visible(call)[0].sum(-1) * before.weights.amax(-1)
    turned = whole - 1 > 1e-6
    return check(call, float(((whole + 1) / (whole - 1))[turned].max()) if turned.any() else 1.0)


@by_kind
@pytest.mark.parametrize("shape", ["causal", "decode", "padded", "padded decode"])
def test_replaced_maps(kind: str, shape: str) -> None:
    checked(shaped(shape, MapReplacement(**KINDS[kind]), masses="all"))


@pytest.mark.parametrize("heads", [None, (1,)])
@pytest.mark.parametrize(("rows", "keys"), [(20, 20), (3, 33)])
def test_shuffled_maps_of_bidirectional_attention(heads: tuple[int, ...] | None, rows: int, keys: int) -> None:
    edit = MapReplacement(kind="shuffled", seed=5, heads=heads, batch=torch.tensor([True, False]))
    check(make(rows, keys, 32, batch=2, is_causal=False, masses="all"))
    call = replace(make(rows, keys, 32, batch=2, is_causal=False, masses="all"), edits=[edit])
    output = check(call)
    assert (output[0, 1] - serve(replace(call, edits=())).output[0, 1]).abs().max() > 1e-2


@by_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    call = shaped("decode", MapReplacement(**KINDS[kind]), dtype=dtype)
    want, got = exact(call).output, serve(call).output.double()
    size = float(exact(replace(call, edits=())).weights.amax()) * 70 if "reversed as" in kind else 1.0
    assert float((got - want).abs().max()) <= 4 * torch.finfo(dtype).eps * size * float(call.value.abs().max())


@pytest.mark.parametrize("shape", ["padded", "padded decode"])
def test_branches_with_different_maps_share_one_call(shape: str) -> None:
    """Each batch row has a map of its own, or none, also for some heads only; head scales act on all."""
    first, second = torch.tensor([True, False]), torch.tensor([False, True])
    scale = HeadScale(scale=torch.tensor([0.5, 2.0]))
    edits = [MapReplacement(kind="reversed", batch=first, heads=(1,)), MapReplacement(kind="random", batch=second)]
    checked(shaped(shape, *edits, scale, masses="last"))
    checked(shaped(shape, MapReplacement(kind="uniform", batch=second), scale))


@by_kind
def test_a_map_after_other_edits(kind: str) -> None:
    """A reversed map turns the moved weights around; scores edited before the softmax stay edited elsewhere."""
    move = MassMove(source=Group.SINK, target=Group.IMAGE_NONSINK, share=0.6, gate=GATE)
    lift = ScoreEdit(group=Group.IMAGE, abs_gain=0.5, heads=(0,))
    checked(shaped("causal", lift, move, MapReplacement(**KINDS[kind], heads=(0,)), masses="all"))
    checked(shaped("decode", move, MapReplacement(**KINDS[kind], heads=(0, 3)), masses="all"))


@by_kind
def test_equal_scores_and_single_keys(kind: str) -> None:
    for call in (shaped("causal", MapReplacement(**KINDS[kind])), shaped("decode", MapReplacement(**KINDS[kind]))):
        call = replace(call, query=torch.zeros_like(call.query))
        want, got = exact(call), serve(call)
        torch.testing.assert_close(got.output.double(), want.output, atol=1e-5, rtol=0)
        assert got.output.isfinite().all()
    one = make(1, 1, 32)
    checked(replace(one, edits=[MapReplacement(**KINDS[kind])]))


@pytest.mark.parametrize("kind", ["random", "random as released", "shuffled"])
def test_a_wrong_seed_is_caught(kind: str) -> None:
    options = KINDS.get(kind, {"kind": "shuffled", "seed": 1})
    call = shaped("full", MapReplacement(**options))
    want = exact(call).output
    wrong = serve(replace(call, edits=[MapReplacement(**{**options, "seed": 4})])).output
    assert float((serve(call).output.double() - want).abs().max()) < 1e-4
    assert float((wrong.double() - want).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", ["uniform as released", "random", "random as released"])
def test_a_wrong_label_is_caught(kind: str) -> None:
    call = shaped("padded", MapReplacement(**KINDS[kind]))
    assert call.groups is not None
    labels = call.groups.labels.clone()
    labels[0, 2] = int(Label.PADDING)
    want = exact(call).output
    assert float((serve(relabelled(call, labels)).output.double() - want).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        ([MapReplacement(kind="uniform"), MapReplacement(kind="random")], "after their map was replaced"),
        ([MapReplacement(kind="shuffled")], "under a mask"),
        ([MapReplacement(kind="uniform", heads=(0,))] * 9, "replaced maps"),
        ([ScoreEdit(group=Group.IMAGE, bias=1.0), MapReplacement(kind="shuffled")], "other edits"),
    ],
)
def test_refusals_say_why(edits: list[Any], reason: str) -> None:
    assert reason in backend.why_not(moved(shaped("causal", *edits)))
