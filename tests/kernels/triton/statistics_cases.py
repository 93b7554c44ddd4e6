"""Column masses, head divergence, and masks on edge tiles only, by their kernels; run like device_cases.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from device_cases import DEVICE, VAR, check, make, moved, on_device
from exact import exact
from support.eager import additive, padded

from mmfix_kernels import AttentionCall, Rows
from mmfix_kernels.statistics import column_mass, column_reference, divergence_reference, head_divergence
from mmfix_kernels.triton import arguments, launch


@pytest.mark.parametrize("edits", ["plain", "pai"])
@pytest.mark.parametrize("shape", ["causal", "decode", "padded", "additive", "grouped"])
@pytest.mark.parametrize("rows", [Rows.ALL, Rows.AFTER_IMAGE])
def test_column_masses(shape: str, edits: str, rows: Rows) -> None:
    mask = padded(40, 40, 5)
    call = {
        "causal": lambda: make(70, 70, 32, edits),
        "decode": lambda: make(1, 70, 32, edits, heads=4, kv_heads=2),
        "padded": lambda: make(40, 40, 16, edits, batch=2, mask=mask),
        "additive": lambda: make(40, 40, 16, edits, batch=2, mask=additive(mask)),
        "grouped": lambda: make(18, 18, 80, edits, heads=4, kv_heads=2),
    }[shape]()
    want = exact(call).weights
    chosen = call.groups.rows[rows]  # type: ignore[union-attr]
    want = (want if chosen is None else want * chosen[:, None, :, None]).sum(2)
    got = column_mass(moved(call), rows, "triton")
    assert got.backend == "triton"
    torch.testing.assert_close(got.mass.cpu().double(), want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(column_reference(call, rows).double(), want, atol=2e-5, rtol=2e-5)


def test_column_masses_of_rows_that_differ_between_prompts() -> None:
    """The chosen rows start later in the second prompt than in the first."""
    call = make(20, 20, 16, batch=2)
    assert call.groups is not None
    chosen = torch.arange(20) >= torch.tensor([[7], [12]])
    rows, first = call.groups.rows | {Rows.AFTER_IMAGE: chosen}, call.groups.first | {Rows.AFTER_IMAGE: 7}
    call = replace(call, groups=replace(call.groups, rows=rows, first=first))
    want = (exact(call).weights * chosen[:, None, :, None]).sum(2)
    got = column_mass(moved(call), Rows.AFTER_IMAGE, "triton")
    torch.testing.assert_close(got.mass.cpu().double(), want, atol=2e-5, rtol=2e-5)


def test_column_masses_under_a_mask_of_each_head() -> None:
    mask = padded(20, 20, 5)[:1].repeat(1, 2, 1, 1)
    mask[:, 1, :, 7] = False
    call = make(20, 20, 16, mask=mask)
    got = column_mass(moved(call), Rows.ALL, "triton")
    torch.testing.assert_close(got.mass.cpu().double(), exact(call).weights.sum(2), atol=2e-5, rtol=2e-5)


def test_column_masses_say_what_they_cannot_do() -> None:
    call = replace(make(5, 5, 32), edits=[VAR])
    with pytest.raises(ValueError, match="softmax only"):
        column_mass(moved(call), backend="triton")
    got = column_mass(moved(call))
    assert (got.backend, "softmax only" in got.reason) == ("reference", True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_head_divergence(dtype: torch.dtype) -> None:
    with_image, without = torch.randn(2, 3, 5, 80).to(dtype).unbind(0)
    with_image = with_image.transpose(1, 2).contiguous().transpose(1, 2)
    got = head_divergence(on_device(with_image), without.to(DEVICE), "triton")
    want = divergence_reference(with_image, without)
    for a, b in zip((got.distance, got.size), want, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-5, rtol=1e-5)


def window_mask(size: int, reach: int, pad: int = 0) -> torch.Tensor:
    """Bool[1, 1, size, size]: causal, `reach` keys back."""
    at = torch.arange(size)
    mask = (at[None, :] <= at[:, None]) & (at[:, None] - at[None, :] < reach)
    mask[:, :pad] = False
    return mask[None, None]


def segment_mask(size: int) -> torch.Tensor:
    """Bool[1, 1, size, size]: three segments that see themselves only, in both directions."""
    segment = torch.bucketize(torch.arange(size), torch.tensor([50, 110]))
    return (segment[:, None] == segment[None, :])[None, None]


MASKS = {
    "window": window_mask(150, 40),
    "wide window": window_mask(150, 100, pad=3),
    "segments": segment_mask(150),
    "per head": torch.cat([window_mask(150, 40), segment_mask(150)], 1),
    "additive": additive(segment_mask(150)),
    "bias": torch.linspace(-1, 1, 150).expand(1, 1, 150, 150).masked_fill(~window_mask(150, 40), -torch.inf),
}


@pytest.mark.parametrize("name", MASKS)
def test_window_and_segment_masks(name: str) -> None:
    check(make(150, 150, 16, "var" if name == "segments" else "plain", mask=MASKS[name], is_causal=False))


@pytest.mark.parametrize("additive", [False, True])
def test_the_mask_is_read_on_edge_tiles_only(additive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in the mask elsewhere does not matter once the tiles are known: it is not read there."""
    mask = MASKS["additive" if additive else "segments"]
    call = moved(make(150, 150, 16, mask=mask, is_causal=False))
    true = arguments.summary

    def then_spoiled(given: torch.Tensor, *rest: object) -> torch.Tensor:
        blocks = true(given, *rest)  # type: ignore[arg-type]
        rows, keys = (150 + blocks.shape[2] - 1) // blocks.shape[2], 32
        rows = 1 << (rows - 1).bit_length()
        states = set(blocks.flatten().tolist())
        assert states == {0, 1, 2}
        for tile, block in (blocks[0, 0] != 1).nonzero().tolist():
            part = given[..., tile * rows : (tile + 1) * rows, block * keys : (block + 1) * keys]
            part.copy_((part == 0).to(part.dtype) if not additive else torch.full_like(part, float("nan")))
        return blocks

    want = launch.attend(call, backend_plan(call))[0].output.clone()
    monkeypatch.setattr(arguments, "summary", then_spoiled)
    call = replace(call, mask=call.mask.clone())  # type: ignore[union-attr]
    got = launch.attend(call, backend_plan(call))[0].output
    assert torch.equal(got, want)


def backend_plan(call: AttentionCall) -> launch.Plan:
    from mmfix_kernels import triton as backend

    plan = backend.plan_of(call)
    assert not isinstance(plan, str)
    return plan
