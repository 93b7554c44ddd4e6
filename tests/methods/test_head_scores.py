"""What heads are scored by, against hooks on the model itself and models made for the purpose."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import plain, vlm
from torch import Tensor

from mmfix import retrieval
from mmfix.errors import MmfixError
from mmfix.headscores import answer_probability, importance, look, mean_looks


def test_looks_are_those_of_single_prompts_and_of_eager_maps(model: Any) -> None:
    inputs = plain.ragged()
    found = look(model, inputs)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(eager(**inputs, output_attentions=True).attentions)[:, :, :, -1]  # [layers, B, H, T]
    torch.testing.assert_close(found.weights, maps, atol=1e-5, rtol=0)
    image = plain.image(inputs)
    torch.testing.assert_close(found.mass[2, 1], maps[2, 1][:, image[1]].sum(-1), atol=1e-5, rtol=0)
    for row in range(2):
        alone = look(model, vlm.batch([plain.ROWS[row]], vlm.picture(1, 2)[row : row + 1]))
        torch.testing.assert_close(found.divergence[:, row], alone.divergence[:, 0], atol=1e-4, rtol=0)
    means = mean_looks(model, [inputs, inputs])
    torch.testing.assert_close(means["vhd"], found.divergence.mean(1), atol=1e-5, rtol=0)
    assert means["prompts"] == 4
    assert found.t_vhd(2)[0] == pytest.approx(float(found.divergence[:, 0].sort(-1).values[:, -2:].sum()), rel=1e-5)
    with pytest.raises(MmfixError, match="no prompts"):
        mean_looks(model, [])


def averaged(model: Any, inputs: plain.Inputs, layer: int, head: int) -> Tensor:
    """Logits with one head's output put to the mean of the others, by a hook before the output projection."""

    def mean(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        heads = args[0].unflatten(-1, (vlm.HEADS, -1)).clone()
        others = [h for h in range(vlm.HEADS) if h != head]
        heads[..., head, :] = heads[..., others, :].mean(-2)
        return (heads.flatten(-2),)

    hook = model.model.language_model.layers[layer].self_attn.o_proj.register_forward_pre_hook(mean)
    try:
        return vlm.logits(model, inputs)
    finally:
        hook.remove()


def test_importance_is_what_the_right_answer_loses(model: Any) -> None:
    inputs, answers = plain.ragged(), [(7, 8), (42,)]
    told: list[int] = []
    scores, sure = importance(model, [(inputs, answers), (inputs, answers[::-1])], told.append)
    assert sum(told) == scores.numel() == vlm.LAYERS * vlm.HEADS

    def right(logits: Tensor) -> Tensor:
        p = logits[:, -1].softmax(-1)
        return torch.stack([p[0, 7] + p[0, 8], p[1, 42], p[0, 42], p[1, 7] + p[1, 8]])

    before = right(vlm.logits(model, inputs))
    assert sure == pytest.approx(float(before.mean()), abs=1e-5)
    for layer, head in ((0, 3), (3, 2), (4, 7)):
        want = (before - right(averaged(model, inputs, layer, head))).mean()
        assert float(scores[layer, head]) == pytest.approx(float(want), abs=1e-5)
    torch.testing.assert_close(answer_probability(model, inputs, answers), before[:2], atol=1e-5, rtol=0)
    with pytest.raises(MmfixError, match="no questions"):
        importance(model, [])


def hand_made(tokens: list[list[int]], peaks: list[list[int]], heads: int = 2) -> retrieval.Decoded:
    """Answers of one prompt in which head 0 of the only layer peaks where told and head 1 always at key 0."""
    spots = torch.zeros(len(peaks[0]), 1, len(tokens), heads, dtype=torch.long)
    spots[:, 0, :, 0] = torch.tensor(peaks).T
    return retrieval.Decoded(torch.tensor(tokens), spots, torch.zeros(spots.shape))


def test_a_head_that_copies_scores_one_and_another_none() -> None:
    ids = torch.tensor([[1, 11, 12, 13, 5, 11]])
    needle = torch.tensor([[False, True, True, True, False, False]])
    found = hand_made([[11, 12, 13, 2, 11]], [[1, 2, 3, 4, 5]])
    scores, recall = retrieval.copied(found, ids, needle, (2,))
    assert scores[0, 0].tolist() == [pytest.approx(1.0), 0.0]
    assert recall.tolist() == [1.0]
    # The right token at another place, another token of the needle, a generated key, and what follows the end: no hits.
    found = hand_made([[11, 12, 13, 2, 11]], [[5, 1, 9, 1, 1]])
    scores, recall = retrieval.copied(found, ids, needle, (2,))
    assert scores[0, 0].tolist() == [0.0, 0.0]
    scores, recall = retrieval.copied(hand_made([[11, 7, 2]], [[1, 1, 1]]), ids, needle, (2,))
    assert scores[0, 0, 0] == pytest.approx(1 / 3)
    assert recall[0] == pytest.approx(1 / 3)


def test_things_that_are_named_and_looked_at() -> None:
    found = hand_made([[11, 12, 13]], [[2, 3, 8]])
    patches = torch.tensor([False, False, True, True, False])
    scores, count = retrieval.placed(found, [[(0, patches), (1, ~patches), (2, patches)]])
    assert count == 3
    assert scores[0].tolist() == [
        pytest.approx(1 / 3),
        pytest.approx(1 / 3),
    ]  # head 1 is at key 0 when ~patches is told


def test_decoding_sees_the_newest_row_of_every_step(model: Any) -> None:
    """Peaks and masses are those of eager maps over the whole text so far, in a padded batch."""
    inputs = plain.ragged()
    needle = plain.image(inputs)
    found = retrieval.decode(model, inputs, needle, 3)
    assert torch.equal(found.tokens, vlm.greedy(model, inputs, 3).sequences[:, -3:])
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    for step in range(3):
        with torch.no_grad():
            maps = torch.stack(eager(**inputs, output_attentions=True).attentions)[:, :, :, -1]
        assert torch.equal(found.peaks[step], maps.argmax(-1))
        mass = maps[..., : needle.shape[1]].masked_fill(~needle[None, :, None], 0.0).sum(-1)
        torch.testing.assert_close(found.mass[step], mass, atol=1e-5, rtol=0)
        inputs = plain.grown(inputs, found.tokens[:, step : step + 1])
