"""Edits of single keys and of finished heads, against sums written out."""

from __future__ import annotations

import pytest
import torch
from support.calls import BACKENDS, causal, random_call

from mmfix_kernels import AttentionCall, HeadMean, KeyGain, KeyMove, Rows, grouped_attention
from mmfix_kernels.statistics import column_mass

by_backend = pytest.mark.parametrize("backend", BACKENDS)


def maps(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores and values in float64 and the mask, key heads repeated."""
    repeats = call.query.shape[1] // call.key.shape[1]
    key, value = (x.double().repeat_interleave(repeats, 1) for x in (call.key, call.value))
    scores = call.query.double() @ key.transpose(-1, -2) * call.query.shape[-1] ** -0.5
    assert call.mask is not None
    return scores, value, call.mask.expand_as(scores)


@by_backend
def test_key_gain_adds_a_share_of_the_magnitude(backend: str) -> None:
    call = random_call(q_len=5, s_len=11, heads=4, kv_heads=2, mask=causal(5, 11, 2, pad=2))
    gain = torch.tensor([[0.0, 0.9, 0.5, 0.0, 0.0, 2.0, 0.3], [0.0] * 7])  # four keys came later
    edit = KeyGain(gain=gain, rows=Rows.LAST)
    got = grouped_attention(AttentionCall(**{**vars(call), "edits": [edit]}), backend)
    scores, value, mask = maps(call)
    for b in range(2):
        for key in range(7):
            scores[b, :, 4, key] += gain[b, key] * scores[b, :, 4, key].abs()
    want = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value
    torch.testing.assert_close(got.output.double(), want, atol=1e-5, rtol=0)
    assert got.fired.tolist() == [[4, 8]]  # the second prompt has no gain


@by_backend
def test_key_move_keeps_rows_whole_and_proportional(backend: str) -> None:
    call = random_call(q_len=6, s_len=9, heads=4, kv_heads=2, mask=causal(6, 9, 2, pad=1))
    chosen = torch.zeros(2, 4, 7, dtype=torch.bool)
    chosen[0, 1, [2, 4]] = chosen[1, 3, 5] = chosen[1, 0, 6] = True
    edit = KeyMove(chosen=chosen, share=0.6, rows=Rows.ALL)
    got = grouped_attention(AttentionCall(**{**vars(call), "edits": [edit]}), backend)
    scores, value, mask = maps(call)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0)
    fired = 0
    for b, h, row in ((b, h, row) for b in range(2) for h in range(4) for row in range(6)):
        line, sinks = weights[b, h, row], chosen[b, h].nonzero()[:, 0]
        others = [k for k in range(9) if k not in sinks.tolist()]
        mass = float(line[sinks].sum())
        if mass > 0:
            fired += 1
            line[others] += 0.6 * mass * line[others] / line[others].sum()
            line[sinks] *= 0.4
            assert float(line.sum()) == pytest.approx(1.0)
    torch.testing.assert_close(got.output.double(), weights @ value, atol=1e-5, rtol=0)
    assert got.fired.tolist() == [[fired, 2 * 4 * 6]]
    masses = column_mass(AttentionCall(**{**vars(call), "edits": [edit]}), backend=None).mass
    torch.testing.assert_close(masses.double(), weights.sum(2), atol=1e-5, rtol=0)


@by_backend
def test_a_row_with_nothing_but_chosen_keys_keeps_its_map(backend: str) -> None:
    call = random_call(q_len=3, s_len=3, heads=2, kv_heads=2, batch=1, mask=causal(3, 3, 1))
    everything = KeyMove(chosen=torch.ones(1, 2, 3, dtype=torch.bool), share=1.0, rows=Rows.ALL)
    plain = grouped_attention(call, backend)
    got = grouped_attention(AttentionCall(**{**vars(call), "edits": [everything]}), backend)
    torch.testing.assert_close(got.output, plain.output, atol=1e-6, rtol=0)
    assert got.fired.tolist() == [[0, 6]]


@by_backend
def test_head_mean_is_the_mean_of_all_other_heads(backend: str) -> None:
    call = random_call(heads=4, kv_heads=2)
    heads = torch.tensor([[True, False, False, True], [False, True, False, False]])
    plain = grouped_attention(call, backend).output
    got = grouped_attention(AttentionCall(**{**vars(call), "edits": [HeadMean(heads=heads)]}), backend)
    want = plain.clone()
    want[0, 0] = (plain[0, 1] + plain[0, 2] + plain[0, 3]) / 3
    want[0, 3] = (plain[0, 0] + plain[0, 1] + plain[0, 2]) / 3
    want[1, 1] = (plain[1, 0] + plain[1, 2] + plain[1, 3]) / 3
    torch.testing.assert_close(got.output, want, atol=1e-6, rtol=0)
    assert got.fired.tolist() == [[3 * 7, 8 * 7]]
    with pytest.raises(ValueError, match="HeadMean"):
        grouped_attention(AttentionCall(**{**vars(call), "edits": [HeadMean(heads=heads[:, :3])]}), backend)


def test_windows_and_batch_rows() -> None:
    """A call that lost its first keys shifts the edit; a confined edit is that of some rows."""
    chosen = torch.arange(12).reshape(2, 2, 3) % 2 == 0
    move = KeyMove(chosen=chosen, share=0.5, rows=Rows.ALL)
    assert torch.equal(move.behind(2).chosen, chosen[..., 2:])
    rows = torch.tensor([True, False])
    assert torch.equal(move.of(rows).chosen, chosen & torch.tensor([True, False])[:, None, None])
    gain = KeyGain(gain=torch.ones(2, 3), rows=Rows.LAST)
    assert gain.behind(1).of(rows).gain.tolist() == [[1, 1], [0, 0]]
    assert HeadMean(heads=torch.ones(2, 3).bool()).of(rows).heads.sum(1).tolist() == [3, 0]
    with pytest.raises(ValueError, match="share of attention"):
        KeyMove(chosen=chosen, share=1.2, rows=Rows.ALL)
    for edit in (move, gain):
        with pytest.raises(ValueError, match="cannot serve"):
            grouped_attention(AttentionCall(**{**vars(random_call()), "edits": [edit]}), "triton")
