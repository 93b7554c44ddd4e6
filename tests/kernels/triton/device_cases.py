"""Kernels against their equations: on a GPU where there is one, else in Triton's interpreter.

Not collected by name: test_interpreter.py runs it in a process of its own, with TRITON_INTERPRET=1; on a CUDA machine
kernels/benchmarks/gpu_check.sh runs it as it stands.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from exact import allowance, exact
from quick import quicken
from support.eager import additive, padded

from mmfix_kernels import (
    Attended,
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
)
from mmfix_kernels import triton as backend
from mmfix_kernels.triton import launch, tensors

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
if INTERPRETED:
    quicken()
torch.set_num_threads(1)

GATE = MassGate(group=Group.IMAGE, min_mass=0.3, part=Group.IMAGE_SINK, max_share=0.3)
VAR = MassMove(source=Group.SINK, target=Group.IMAGE_NONSINK, share=0.6, gate=GATE)
PAI = ScoreEdit(group=Group.IMAGE, abs_gain=0.5, rows=Rows.LAST)
EDITS: dict[str, list[Any]] = {
    "plain": [],
    "var": [VAR],
    "release": [replace(VAR, gate=replace(GATE, slack=0.03))],
    "pai": [PAI],
    "all": [
        PAI,
        replace(VAR, heads=(1,)),
        ScoreEdit(group=Group.SYSTEM, gain=0.7, bias=0.3, heads=(0,)),
        HeadScale(scale=torch.tensor([0.5, 1.0])),
    ],
    "two moves": [
        replace(VAR, rows=Rows.AFTER_IMAGE),
        MassMove(source=Group.TEXT_SINK, target=Group.IMAGE_SINK, share=0.25),
    ],
    "hidden": [ScoreEdit(group=Group.IMAGE_SINK, bias=float("-inf")), replace(VAR, gate=replace(GATE, min_mass=0.0))],
}


def moved(call: AttentionCall) -> AttentionCall:
    """The call on the device under test."""
    groups = call.groups
    if groups is not None:
        rows = {kind: None if mask is None else mask.to(DEVICE) for kind, mask in groups.rows.items()}
        groups = replace(groups, labels=on_device(groups.labels), rows=rows)
    mask = None if call.mask is None else on_device(call.mask)
    names = ("query", "key", "value", "prefix_key", "prefix_value")
    tensors = {name: on_device(getattr(call, name)) for name in names if getattr(call, name) is not None}
    return replace(call, mask=mask, groups=groups, **tensors)


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the device with its strides."""
    if DEVICE.type == "cpu":
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE).copy_(tensor)


def serve(call: AttentionCall) -> Attended:
    """The call by the kernels; the answer on the CPU."""
    got = grouped_attention(moved(call), "triton")
    assert got.backend == "triton"
    masses = None if got.masses is None else got.masses.cpu()
    return replace(got, output=got.output.cpu(), masses=masses, fired=got.fired.cpu())


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unwritten memory is NaN, and chunks are short, so that a hundred keys are split."""

    def poisoned(*shape: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, float("nan") if dtype.is_floating_point else 2**30, dtype=dtype, device=like.device)

    monkeypatch.setattr(tensors, "empty", poisoned)
    monkeypatch.setattr(launch, "MIN_CHUNK", 32)


def make(
    rows: int, keys: int, width: int, edits: str = "plain", *, heads: int = 2, kv_heads: int = 1, batch: int = 1,
    dtype: torch.dtype = torch.float32, seed: int = 0, first: int = 0, **options: Any,
) -> AttentionCall:  # fmt: skip
    """A random call; rows from the middle on count as after the image, the last row as last."""
    random = torch.Generator().manual_seed(seed + 1000 * rows + keys)
    shapes = ((batch, heads, rows, width), (batch, kv_heads, keys, width), (batch, kv_heads, keys, width))
    query, key, value = (torch.randn(shape, generator=random).to(dtype) for shape in shapes)
    labels = torch.randint(0, 5, (batch, keys), generator=random, dtype=torch.int8)
    at = torch.arange(rows).expand(batch, rows)
    masks = {Rows.ALL: None, Rows.AFTER_IMAGE: at >= max(first, rows // 2), Rows.LAST: at >= rows - 1}
    starts = {Rows.ALL: first, Rows.AFTER_IMAGE: max(first, rows // 2), Rows.LAST: rows - 1}
    masks[Rows.GENERATED], starts[Rows.GENERATED] = at >= rows - 1, rows - 1
    if first:
        masks[Rows.ALL] = at >= first
    return AttentionCall(
        query=query, key=key, value=value, groups=KeyGroups(labels=labels, rows=masks, first=starts),
        edits=EDITS[edits], **{"is_causal": "mask" not in options and rows == keys, **options},
    )  # fmt: skip


def check(call: AttentionCall, condition: float = 1.0) -> torch.Tensor:
    """Output, masses and counters against float64; `condition` is how much an edit enlarges errors of rounding."""
    assert backend.why_not(moved(call)) == ""
    want, got = exact(call), serve(call)
    allowed = allowance(call, float(want.output.abs().max()), DEVICE) * condition
    error = float((got.output.double() - want.output).abs().max())
    assert error <= allowed, f"output is off by {error:.3g}; allowed {allowed:.3g}"
    if call.query.dtype == torch.float32:  # in half precision a gate may tip over on the rounding of the scores
        assert got.fired.tolist() == want.fired
    if call.masses != "none":
        rows = want.masses if call.masses == "all" else want.masses[:, :, -1:]
        assert got.masses is not None
        worst = float((got.masses.double() - rows).abs().max())
        assert worst <= 40 * call.query.shape[-1] ** 0.5 * torch.finfo(call.query.dtype).eps * condition
    return got.output


@pytest.mark.parametrize(
    ("rows", "keys", "width", "edits"),
    [
        (1, 1, 64, "var"),
        (7, 7, 80, "plain"),
        (7, 7, 64, "all"),
        (63, 63, 96, "var"),
        (111, 111, 64, "two moves"),
        (1, 7, 96, "all"),
        (1, 63, 80, "plain"),
        (1, 111, 64, "var"),
        (1, 111, 96, "two moves"),
        (3, 111, 80, "all"),
        (63, 63, 64, "hidden"),
        (1, 111, 64, "hidden"),
        (1, 63, 64, "release"),
        (20, 20, 64, "release"),
        (20, 20, 256, "pai"),
        (1, 20, 32, "pai"),
        (1, 63, 20, "plain"),
    ],
)
def test_ugly_shapes(rows: int, keys: int, width: int, edits: str) -> None:
    check(make(rows, keys, width, edits))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "keys", "edits"), [(63, 63, "plain"), (40, 40, "pai"), (1, 111, "all")])
def test_half_precision(dtype: torch.dtype, rows: int, keys: int, edits: str) -> None:
    call = make(rows, keys, 64, edits, dtype=dtype, masses="last")
    moves = [e if not isinstance(e, MassMove) else replace(e, gate=None) for e in call.edits]
    check(replace(call, edits=moves))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 2), (4, 2), (7, 1), (14, 2)])
@pytest.mark.parametrize(("rows", "keys"), [(1, 63), (3, 40), (18, 18)])
def test_grouped_query_heads(heads: int, kv_heads: int, rows: int, keys: int) -> None:
    if rows == 18 and heads > 7:
        heads, kv_heads = 4, 1  # one program per head: keep the interpreter's time down
    call = make(rows, keys, 32, "var", heads=heads, kv_heads=kv_heads)
    check(replace(call, edits=[*call.edits, HeadScale(scale=torch.linspace(0.5, 2, heads))]))


@pytest.mark.parametrize("edits", ["plain", "all"])
@pytest.mark.parametrize("kind", ["bool", "-inf", "finfo", "bias", "row", "per head", "full"])
@pytest.mark.parametrize(("rows", "keys"), [(20, 20), (2, 40)])
def test_masks(kind: str, edits: str, rows: int, keys: int) -> None:
    mask: torch.Tensor | None = padded(rows, keys, 5)
    assert mask is not None
    if kind in ("-inf", "finfo"):
        mask = additive(mask, float("-inf") if kind == "-inf" else torch.finfo(torch.float32).min)
    elif kind == "bias":
        mask = additive(mask, float("-inf")) + torch.linspace(-1, 1, keys)
    elif kind == "row":
        mask = mask[:, :, -1:]
    elif kind == "per head":
        mask = mask.repeat(1, 2, 1, 1)
        mask[:, 1, :, 7] = False
    elif kind == "full":
        mask = None
    call = make(rows, keys, 32, edits, batch=2, mask=mask, is_causal=False, masses="all")
    output = check(call)
    if kind in ("bool", "-inf", "finfo") and rows == keys:
        assert (output[1, :, :5] == 0).all(), "a row that sees nothing has output 0"


def relabelled(call: AttentionCall, labels: torch.Tensor) -> AttentionCall:
    assert call.groups is not None
    return replace(call, groups=replace(call.groups, labels=labels))


@pytest.mark.parametrize("label", [Label.TEXT, Label.IMAGE, Label.IMAGE_SINK, Label.TEXT_SINK, Label.PADDING])
@pytest.mark.parametrize(("rows", "keys"), [(20, 20), (1, 70)])
def test_one_label_only(label: Label, rows: int, keys: int) -> None:
    """All-sink rows, no image, all image: empty groups everywhere, and where nothing can move nothing changes."""
    call = make(rows, keys, 32, "two moves", masses="all")
    check(relabelled(call, torch.full((1, keys), int(label), dtype=torch.int8)))


@pytest.mark.parametrize("first", [0, 5, 20])
def test_rows_before_the_first_edit_are_plain(first: int) -> None:
    call = make(40, 40, 32, "all", first=first)
    output = check(call)
    plain = serve(replace(call, edits=call.edits[-1:])).output
    torch.testing.assert_close(output[:, :, :first], plain[:, :, :first], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(output, plain)


@pytest.mark.parametrize("masses", ["last", "all"])
@pytest.mark.parametrize(("rows", "keys"), [(20, 20), (1, 70)])
def test_masses_without_edits(masses: str, rows: int, keys: int) -> None:
    check(make(rows, keys, 32, masses=masses))


@pytest.mark.parametrize(("rows", "keys"), [(20, 20), (1, 70)])
def test_row_statistics(rows: int, keys: int) -> None:
    """The log-sum-exp and the largest weight of every row, from both kernels."""
    call = make(rows, keys, 32)
    want = exact(call)
    plan = backend.plan_of(call)
    assert not isinstance(plan, str)
    stats = launch.attend(moved(call), plan, stats=True)[1]
    assert stats is not None
    stats = stats.cpu()
    torch.testing.assert_close(stats[..., 0].double(), want.lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats[..., 1].double(), want.weights.amax(-1), atol=1e-5, rtol=1e-5)


def test_layouts_and_small_target_masses() -> None:
    """Transposed tensors, labels that are a slice, and a target whose mass is far below half precision's smallest."""
    call = make(18, 18, 32, "plain", dtype=torch.float16)
    query, key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (call.query, call.key, call.value))
    labels = torch.zeros(1, 30, dtype=torch.int8)[:, 12:]
    labels[:, 3::4] = int(Label.IMAGE)
    bias = torch.where(labels == int(Label.IMAGE), -20.0, 0.0)[:, None, None].double()
    mask = torch.ones(18, 18, dtype=torch.bool).tril()
    mask = torch.where(mask, bias, float("-inf")).float()
    move = MassMove(source=Group.TEXT, target=Group.IMAGE_NONSINK, share=0.5)
    call = AttentionCall(
        query=query, key=key, value=value, mask=mask, groups=KeyGroups.plain(labels), edits=[move]
    )  # fmt: skip
    check(call)


def test_a_target_with_next_to_no_mass() -> None:
    """A target whose mass is below the smallest normal float: what is gained stays finite, as in the reference."""
    call = make(1, 40, 32, mask=torch.where(torch.arange(40) < 9, -90.0, 0.0)[None, None, None], is_causal=False)
    labels = torch.zeros(1, 40, dtype=torch.int8)
    labels[:, :9] = int(Label.IMAGE)
    move = MassMove(source=Group.TEXT, target=Group.IMAGE, share=1.0)
    output = serve(replace(relabelled(call, labels), edits=[move])).output
    assert float(output.abs().max()) <= float(call.value.abs().max()), "an average of values, and finite"


def test_a_wrong_label_is_caught() -> None:
    """Negative control: the comparison has teeth."""
    call = make(20, 20, 32, "var")
    assert call.groups is not None
    labels = call.groups.labels.clone()
    labels[:, 0] = int(Label.IMAGE)
    other = labels.clone()
    other[:, 0] = int(Label.SYSTEM)
    want = exact(relabelled(call, labels)).output
    allowed = allowance(call, float(want.abs().max()), DEVICE)
    right, wrong = (serve(relabelled(call, n)).output for n in (labels, other))
    assert float((right.double() - want).abs().max()) <= allowed
    assert float((wrong.double() - want).abs().max()) > 100 * allowed


def test_a_missing_gate_is_caught() -> None:
    """Negative control: without the gate other rows move."""
    call = make(20, 20, 32, "var")
    want = exact(call)
    assert 0 < want.fired[0][0] < want.fired[0][1], "the gate must be open for some rows and closed for others"
    ungated = serve(replace(call, edits=[replace(VAR, gate=None)]))
    assert ungated.fired.tolist() != want.fired
    assert float((ungated.output.double() - want.output).abs().max()) > 1e-3
