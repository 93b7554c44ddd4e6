"""ACT against dense attention whose maps are calibrated by hand, key by key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import plain, vlm
from torch import Tensor

import mmfix
from mmfix.errors import MethodError, MmfixError
from mmfix.methods import ACT
from mmfix_kernels import KeyMove

STEPS = 3
HEADS = ((1, 2), (3, 0), (3, 7))


def calibrated(model: Any, heads: Any, limit: Any, keep: float, spare: str, found: list[int] | None = None) -> Tensor:
    """Logits of greedy decoding; sinks are found in the prompt at the first step, and kept for the later ones."""
    inputs = plain.ragged()
    length = inputs["input_ids"].shape[1]
    sinks: dict[tuple[int, int, int], list[int]] = {}

    def edit(output: Tensor, scores: Tensor, weights: Tensor, layer: int, grown: plain.Inputs) -> Tensor:
        output = output.clone()
        for b, head in ((b, h) for b in range(2) for at, h in heads if at == layer):
            valid = grown["attention_mask"][b].bool()
            start = int(valid.int().argmax())
            tokens = int(valid[:length].sum())
            if (b, layer, head) not in sinks:
                line = weights[b, head]
                mean = [float(line[k:length, k].sum()) / (length - k) for k in range(start, length)]
                above = [k + start for k, m in enumerate(mean) if m > limit(tokens)]
                sinks[b, layer, head] = above[1:] if spare == "first-sink" else [k for k in above if k != start]
            chosen = sinks[b, layer, head]
            for row in range(start, weights.shape[2]):
                line = weights[b, head, row].clone()
                mass = line[chosen].sum()
                rest = line.sum() - mass
                if mass > 0 and rest > 1e-12:
                    line *= 1 + (1 - keep) * mass / rest
                    line[chosen] = keep * weights[b, head, row, chosen]
                assert float(line.sum()) == pytest.approx(1.0)
                output[b, head, row] = line @ values(layer, b, head)
        return output

    # The oracle needs values; head outputs are linear in them, so they are read off by solving nothing: see `plain`.
    cache: dict[int, Tensor] = {}

    def values(layer: int, b: int, head: int) -> Tensor:
        return cache[layer][b, head]

    def newest(grown: plain.Inputs, _: int) -> Tensor:
        cache.clear()
        hooks = []
        config = model.config.text_config
        repeats = config.num_attention_heads // config.num_key_value_heads
        for n, layer in enumerate(model.model.language_model.layers):

            def keep_values(module: Any, args: Any, out: Tensor, n: int = n) -> None:
                split = out.view(*out.shape[:2], config.num_key_value_heads, -1).transpose(1, 2)
                cache[n] = split.double().repeat_interleave(repeats, 1)

            hooks.append(layer.self_attn.v_proj.register_forward_hook(keep_values))
        try:
            heads_of = lambda o, s, w, layer: edit(o, s, w, layer, grown)  # noqa: E731
            return plain.dense(model, grown, heads=heads_of)[:, -1]
        finally:
            for hook in hooks:
                hook.remove()

    out = plain.decoded(inputs, newest, STEPS)
    if found is not None:
        found.append(sum(map(len, sinks.values())))
    return out


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"threshold": 0.06}, lambda n: 0.06),
        ({"rule": "relative", "alpha": 1.5}, lambda n: 1.5 / n),
        ({"threshold": 0.06, "spare": "first-sink", "keep": 0.0}, lambda n: 0.06),
    ],
    ids=["constant", "relative", "first-sink"],
)
def test_prefill_and_decoding_equal_dense_attention(model: Any, options: dict[str, Any], limit: Any) -> None:
    """Every prompt of a padded batch, every step, rows that sum to one (requirements 1, 2, 3 and 5)."""
    found: list[int] = []
    want = calibrated(model, HEADS, limit, options.get("keep", 0.4), options.get("spare", "first-token"), found)
    assert found[0] > 4, "no sinks: the test shows nothing"
    with mmfix.mitigate(model, ACT(heads=HEADS, **options)) as fix:
        out = vlm.greedy(model, plain.ragged(), STEPS)
    plain.agrees(out, want)
    moves = [e for state in fix._session.layers for e in state.edits if isinstance(e, KeyMove)]
    assert sum(int(move.chosen.sum()) for move in moves) == found[0]


def test_all_means_layer_two_to_the_last_but_one(llava: Any) -> None:
    with mmfix.mitigate(llava, ACT(heads="all", threshold=0.05)) as fix:
        vlm.logits(llava, vlm.one())
    assert [fired.considered > 0 for fired in fix.report().fired_by_layer["act"]] == [False, False, True, True, False]


def test_no_sink_is_the_identity(llava: Any) -> None:
    inputs = plain.ragged()
    want = vlm.logits(llava, inputs)
    with mmfix.mitigate(llava, ACT(heads="all", threshold=1.0)) as fix:
        torch.testing.assert_close(vlm.logits(llava, inputs), want, atol=1e-5, rtol=0)
    assert fix.report().fired["act"].fired == 0


def test_a_prompt_in_pieces_is_refused(llava: Any) -> None:
    with mmfix.mitigate(llava, ACT(heads=HEADS)), pytest.raises(MmfixError, match="pieces"):
        vlm.greedy(llava, vlm.one(), STEPS, prefill_chunk_size=8)


@pytest.mark.filterwarnings("ignore::mmfix.errors.MmfixWarning")
def test_a_first_picture_in_a_later_turn_is_refused(llava: Any) -> None:
    """The choice was made of a turn that showed nothing, so the picture would be passed over in silence."""
    first = vlm.batch([vlm.tokens(6, seed=3)])
    with mmfix.mitigate(llava, ACT(heads=HEADS)):
        answer = vlm.greedy(llava, first, STEPS)
        turn = torch.cat([answer.sequences, vlm.one()["input_ids"]], dim=1)
        later = {"input_ids": turn, "attention_mask": torch.ones_like(turn), "pixel_values": vlm.picture()}
        with pytest.raises(MmfixError, match=r"act: .* first image came in a later turn"):
            vlm.greedy(llava, later, STEPS, past_key_values=answer.past_key_values)


@pytest.mark.parametrize("wrong", [{"keep": 1.2}, {"threshold": -1}, {"alpha": -1}, {"rule": "x"}, {"spare": "x"}])
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=rf"act\.{next(iter(wrong))}"):
        ACT(**wrong)


def test_without_heads_it_says_what_to_run(llava: Any) -> None:
    with pytest.raises(MethodError, match="mmfix calibrate act"), mmfix.mitigate(llava, "act"):
        pass


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_rows_do_not_count(llava: Any, side: str) -> None:
    """A prompt receives in a padded batch what it receives alone, on either side of the padding."""
    rows = [plain.ROWS[1], vlm.tokens(6, "image", 12, seed=5)]
    chosen = []
    for inputs in (vlm.batch(rows[:1], vlm.picture(2)), vlm.batch(rows, vlm.picture(2, 2), side=side)):
        with mmfix.mitigate(llava, ACT(heads="all", threshold=0.055)) as fix:
            vlm.logits(llava, inputs)
        (move,) = (e for e in fix._session.layers[2].edits if isinstance(e, KeyMove))
        real = inputs["attention_mask"][0].bool()
        chosen.append(move.chosen[0][:, real])
    assert chosen[0].any()
    assert torch.equal(*chosen)
