"""SPIN against dense attention whose head outputs are scaled by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import plain, vlm
from torch import Tensor

import mmfix
from mmfix.errors import MethodError
from mmfix.methods import SPIN
from mmfix_kernels import AttentionCall, Group, HeadSelect, KeyGroups, Rows, grouped_attention

STEPS = 3


def oracle(model: Any, kept: int, factor: float, rank: str, layers: tuple[int, ...]) -> Tensor:
    inputs = plain.ragged()
    prompt = inputs["input_ids"].shape[1]

    def newest(grown: dict[str, Any], _: int) -> Tensor:
        keys = plain.image(grown)

        def heads(output: Tensor, scores: Tensor, weights: Tensor, layer: int) -> Tensor:
            output = output.clone()
            for b in range(output.shape[0]) if layer in layers else ():
                for row in range(prompt - 1, output.shape[2]):
                    found = (scores if rank == "scores" else weights)[b, :, row][:, keys[b]].sum(-1)
                    for head in found.topk(len(found) - kept, largest=False).indices.tolist():
                        output[b, head, row] *= factor
            return output

        return plain.dense(model, grown, heads=heads)[:, -1]

    return plain.decoded(inputs, newest, STEPS)


@pytest.mark.parametrize("rank", ["mass", "scores"])
def test_decoding_equals_dense_attention(model: Any, rank: Any) -> None:
    """By mass, and by sums of signed scores as released; only the newest row is scaled (requirements 1 and 2)."""
    with mmfix.mitigate(model, SPIN(keep=0.7, factor=0.1, rank=rank, layers=(0, 2, 3))):
        out = vlm.greedy(model, plain.ragged(), STEPS)
    plain.agrees(out, oracle(model, 5, 0.1, rank, (0, 2, 3)))


def test_the_two_ranks_differ_where_scores_are_negative() -> None:
    """Head 0 gives the image nearly all its attention by negative scores, head 1 a third by positive ones."""
    query = torch.eye(2)[None, :, None]
    key = torch.tensor([[-1.0, 0.5], [-1.0, 0.5], [-9.0, 2.0]])[None, None].expand(1, 2, -1, -1)
    groups = KeyGroups.plain(torch.tensor([[1, 1, 0]], dtype=torch.int8))
    value = torch.ones(1, 2, 3, 1)
    for backend in ("reference", "sdpa"):
        for by, want in (("mass", [1.0, 0.25]), ("scores", [0.25, 1.0])):
            edit = HeadSelect(group=Group.IMAGE, keep=1, factor=0.25, by=by)  # type: ignore[arg-type]
            call = AttentionCall(query=query, key=key, value=value, scale=1.0, groups=groups, edits=[edit])
            found = grouped_attention(call, backend)
            torch.testing.assert_close(found.output[0, :, 0, 0], torch.tensor(want))
            assert found.fired.tolist() == [[1, 2]]


@pytest.mark.parametrize("by", ["mass", "scores"])
def test_backends_agree_on_rows_batch_and_masks(by: Any) -> None:
    """Rows that see no image key, prompts that are not chosen and hidden keys change nothing."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, 4, 6, 8, generator=generator) for _ in range(3))
    labels = torch.tensor([[4, 4, 1, 1, 0, 0]] * 3, dtype=torch.int8)
    groups = KeyGroups(
        labels=labels,
        rows={Rows.ALL: None, Rows.AFTER_IMAGE: None, Rows.LAST: torch.arange(6)[None, :].expand(3, -1) >= 1},
        first={Rows.ALL: 0, Rows.AFTER_IMAGE: 0, Rows.LAST: 1},
    )
    chosen = torch.tensor([True, False, True])
    edit = HeadSelect(group=Group.IMAGE, keep=2, factor=0.0, by=by, rows=Rows.LAST, batch=chosen)
    call = AttentionCall(query=query, key=key, value=value, is_causal=True, groups=groups, edits=[edit])
    first, second = grouped_attention(call, "reference"), grouped_attention(call, "sdpa")
    torch.testing.assert_close(first.output, second.output, atol=1e-5, rtol=0)
    assert first.fired.tolist() == second.fired.tolist() == [[2 * 4 * 2, 2 * 4 * 5]]
    silent = (second.output == 0).all(-1)  # [B, H, L]
    assert silent.sum(1).tolist() == [[0, 0, 2, 2, 2, 2], [0] * 6, [0, 0, 2, 2, 2, 2]]
    with pytest.raises(ValueError, match="cannot serve"):
        grouped_attention(call, "triton")


def test_the_head_count_is_rounded_down() -> None:
    """Requirement 3: floor, and never one less by the last bit of a product."""
    assert [SPIN(keep=share).kept(heads) for share, heads in ((0.95, 32), (0.8, 32), (0.7, 8), (0.29, 100))] == [
        30, 25, 5, 29,
    ]  # fmt: skip
    assert SPIN(keep=0.0).kept(8) == 0
    assert SPIN(keep=1.0).kept(8) == 8


@pytest.mark.parametrize("nothing", [{"factor": 1.0}, {"keep": 1.0}, {"layers": ()}])
def test_what_changes_nothing(llava: Any, nothing: dict[str, Any]) -> None:
    inputs = plain.ragged()
    want = vlm.logits(llava, inputs)
    with mmfix.mitigate(llava, SPIN(**nothing)):
        assert torch.equal(vlm.logits(llava, inputs), want)


@pytest.mark.parametrize("wrong", [{"keep": 1.1}, {"factor": -0.1}, {"rank": "size"}])
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=f"spin.{next(iter(wrong))}"):
        SPIN(**wrong)


def test_of_heads_that_look_alike_the_first_are_kept() -> None:
    """Masses of one replaced map differ by rounding only, later heads here by a bit more each."""
    looks = torch.nextafter(torch.tensor(0.3), torch.tensor(1.0)) - torch.tensor(0.3)
    weights = (0.3 + looks * torch.arange(6)).view(1, 6, 1, 1)
    edit = HeadSelect(group=Group.IMAGE, keep=2, factor=0.0)
    factors = edit.factors(torch.zeros_like(weights), weights, torch.ones(1, 1, 1, 1, dtype=torch.bool))
    assert factors.flatten().tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
