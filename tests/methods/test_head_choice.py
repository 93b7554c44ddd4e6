"""Heads chosen beforehand: VHR with fixed heads, V-SEAM and retrieval-head ablation, against dense attention."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support import plain, vlm
from torch import Tensor

import mmfix
from mmfix.errors import DataError, MethodError, MmfixError
from mmfix.heads import HeadMap, chosen
from mmfix.methods import PAI, VHR, VSEAM, RetrievalHeads

STEPS = 3
HEADS = ((1, 2), (3, 0), (3, 7))


def scaled(model: Any, factors: dict[tuple[int, int], float], inputs: plain.Inputs) -> Tensor:
    """Logits of greedy decoding with head outputs multiplied, at every position of prompts with a picture."""

    def heads(output: Tensor, scores: Tensor, weights: Tensor, layer: int) -> Tensor:
        output = output.clone()
        for (at, head), factor in factors.items():
            if at == layer:
                output[plain.image(inputs).any(-1), head] *= factor
        return output

    return plain.decoded(inputs, lambda grown, _: plain.dense(model, grown, heads=heads)[:, -1], STEPS)


def test_fixed_heads_of_vhr(model: Any) -> None:
    with mmfix.mitigate(model, VHR(heads=HEADS, alpha=2.0)) as fix:
        out = vlm.greedy(model, plain.ragged(), STEPS)
    plain.agrees(out, scaled(model, dict.fromkeys(HEADS, 2.0), plain.ragged()))
    assert fix.report().extra_prefills == 0


def test_factors_of_vseam(model: Any) -> None:
    """1 + lambda score, clipped to 0 … 2."""
    triples = ((0, 1, 0.2), (1, 2, -0.3), (3, 0, 0.9), (3, 7, -0.8))
    with mmfix.mitigate(model, VSEAM(heads=triples, strength=2.0)):
        out = vlm.greedy(model, plain.ragged(), STEPS)
    factors = {(0, 1): 1.4, (1, 2): 0.4, (3, 0): 2.0, (3, 7): 0.0}
    plain.agrees(out, scaled(model, factors, plain.ragged()))
    assert VSEAM(heads=triples, strength=2.0).largest == 1.0
    assert VSEAM(heads=triples, strength=0.1).largest == pytest.approx(0.09)


def test_zero_and_uniform_heads(model: Any) -> None:
    with mmfix.mitigate(model, RetrievalHeads(heads=HEADS)):
        out = vlm.greedy(model, plain.ragged(), STEPS)
    plain.agrees(out, scaled(model, dict.fromkeys(HEADS, 0.0), plain.ragged()))

    def even(scores: Tensor, allowed: Tensor, layer: int) -> Tensor:
        scores = scores.clone()
        for at, head in HEADS:
            if at == layer:
                scores[:, head] = 0.0  # under the mask: the keys that a row may see, each alike
        return scores

    with mmfix.mitigate(model, RetrievalHeads(heads=HEADS, ablation="uniform")):
        out = vlm.greedy(model, plain.ragged(), STEPS)
    inputs = plain.ragged()
    want = plain.decoded(inputs, lambda grown, _: plain.dense(model, grown, scores=even)[:, -1], STEPS)
    plain.agrees(out, want)


@pytest.mark.filterwarnings("ignore::mmfix.errors.MmfixWarning")
@pytest.mark.parametrize(
    "method",
    [VHR(heads=HEADS), VSEAM(heads=((1, 2, 0.5), (3, 0, -0.5))), RetrievalHeads(heads=HEADS, ablation="uniform")],
)
def test_prompts_without_a_picture_are_left_alone(model: Any, method: Any) -> None:
    rows = [plain.ROWS[0], vlm.tokens(14, seed=3)]
    inputs = vlm.batch(rows, vlm.picture(1))
    want = vlm.logits(model, inputs)
    with mmfix.mitigate(model, method):
        got = vlm.logits(model, inputs)
    torch.testing.assert_close(got[1, -15:], want[1, -15:], atol=1e-5, rtol=0)
    assert (got[0, -1] - want[0, -1]).abs().max() > 1e-2
    with mmfix.mitigate(model, method), pytest.raises(MmfixError, match="first image came after"):
        vlm.greedy(model, vlm.one(system=8), STEPS, prefill_chunk_size=5)


@pytest.mark.filterwarnings("ignore::mmfix.errors.MmfixWarning")
def test_a_picture_may_first_come_in_a_later_turn(llava: Any) -> None:
    """The turn before it was answered as a prompt without a picture, which stays as it was."""
    with mmfix.mitigate(llava, RetrievalHeads(heads=HEADS)):
        first = vlm.greedy(llava, vlm.batch([vlm.tokens(4, seed=6)]), 2)
        talk = vlm.batch([[*first.sequences[0].tolist(), *vlm.tokens("image", 5, seed=7)]], vlm.picture(6))
        got = vlm.greedy(llava, talk, 1, past_key_values=first.past_key_values).logits[0]
    assert torch.equal(first.sequences, vlm.greedy(llava, vlm.batch([vlm.tokens(4, seed=6)]), 2).sequences)
    assert (got - vlm.logits(llava, talk)[:, -1]).abs().max() > 1e-2


def test_a_branch_without_the_picture_is_not_scaled(model: Any) -> None:
    """With PAI's guidance the text-only row stays the plain model's, also in front of the picture."""
    inputs = vlm.batch([vlm.tokens(20, "image", 6, seed=4)], vlm.picture(4))
    factors = dict.fromkeys(HEADS, 0.0)
    with mmfix.mitigate(model, [PAI(alpha=0.0, gamma=1.5, beta=1e-9), RetrievalHeads(heads=HEADS)]):
        out = vlm.greedy(model, inputs, STEPS)
    without = plain.text_only(inputs)
    c, u = scaled(model, factors, inputs).log_softmax(-1)[:, 0], vlm.logits(model, without)[:, -1].log_softmax(-1)
    kept = out.logits[0] > -1e9
    torch.testing.assert_close(out.logits[0][kept], (1.5 * (c - u) + u)[kept].float(), atol=2e-4, rtol=0)


def ranking() -> HeadMap:
    values = tuple(tuple(round(0.1 * layer - 0.01 * head, 2) for head in range(8)) for layer in range(5))
    return HeadMap("vhd", "tiny", None, "0" * 64, 3, values)


def test_a_file_is_a_choice_of_heads(model: Any, tmp_path: Path) -> None:
    path = ranking().write(tmp_path / "heads.json")
    assert HeadMap.read(path) == ranking()
    assert chosen(str(path), 0.05, "x") == ((4, 0, 0.4), (4, 1, 0.39))
    assert chosen(str(path), 3, "x") == ((4, 0, 0.4), (4, 1, 0.39), (4, 2, 0.38))
    assert len(chosen(str(path), 1e9, "x") or ()) == 40
    assert mmfix.parse(f"vhr:heads={path},top=1") == VHR(heads=((4, 0, 0.4),), top=1)
    assert mmfix.parse("vhr:heads=[[1,2],[3,0],[3,7]],alpha=3") == VHR(heads=HEADS, alpha=3)
    assert mmfix.from_spec(mmfix.spec(VHR(heads=str(path), top=2))) == VHR(heads=str(path), top=2)
    with pytest.raises(MethodError, match=r"heads.json holds the score 'vhd'.* of the score 'vseam'"):
        VSEAM(heads=str(path))
    signed = dataclasses.replace(ranking(), score="vseam").write(tmp_path / "signed.json")
    assert VSEAM(heads=str(signed)).largest == pytest.approx(0.4)
    with mmfix.mitigate(model, RetrievalHeads(heads=str(path), top=2)) as fix:
        vlm.logits(model, vlm.one())
    by_layer = [fired.fired for fired in fix.report().fired_by_layer["retrieval-heads"]]
    assert by_layer == [0, 0, 0, 0, 2 * 19]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"values": [[1], [2, 3]]}', '{"values": [[NaN]]}'])
def test_files_that_are_no_head_maps(tmp_path: Path, content: str) -> None:
    path = tmp_path / "heads.json"
    path.write_text(content)
    for given in (path, tmp_path / "none.json"):
        with pytest.raises(DataError, match="mmfix heads") as caught:
            VHR(heads=str(given))
        assert str(given) in str(caught.value)


def test_heads_that_cannot_be_meant(model: Any) -> None:
    for heads in (((1,),), ((1, -2),), ((0.5, 1),), (3,), ((1, 2), (1, 2)), ((1, 2, float("nan")),)):
        with pytest.raises(MethodError, match="heads"):
            RetrievalHeads(heads=heads)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="needs a score"):
        VSEAM(heads=HEADS)
    for method in (VSEAM, RetrievalHeads):
        with pytest.raises(MethodError, match="no head is named"):
            method(heads=())
    with pytest.raises(MethodError, match="give one of the two"):
        VHR(heads=HEADS, layers=(1,))
    with pytest.raises(MethodError, match="ablation"):
        RetrievalHeads(heads=HEADS, ablation="none")  # type: ignore[arg-type]
    wrong = (VHR(heads=((9, 0),)), VSEAM(heads=((0, 8, 0.1),)), RetrievalHeads(heads=((5, 0),)))
    for method in wrong:
        with pytest.raises(MethodError, match="none of this model's"), mmfix.mitigate(model, method):
            pass
    for name in ("vseam", "retrieval-heads"):
        with pytest.raises(MethodError, match="mmfix heads --score"), mmfix.mitigate(model, name):
            pass
