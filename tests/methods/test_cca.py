"""CCA: golden positions, rings counted one by one, and plain passes given positions and masks by hand."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from support import plain_pass, vlm
from torch import Tensor

import mmfix
from mmfix import segments, spans
from mmfix.errors import MethodError, MmfixError, UnsupportedModel
from mmfix.families import describe
from mmfix.methods import CCA
from mmfix.methods.cca import Rings, patches
from mmfix.positions import rewritten
from mmfix.segments import MaskEdit, Role

STEPS = 3
N = vlm.IMAGE_TOKENS
ROWS = [
    vlm.tokens(3, "image", 4, "image", 5, seed=1),
    vlm.tokens(2, "image", "image", 3, seed=2),  # nothing between the two pictures
    vlm.tokens(6, seed=3),
    vlm.tokens(4, "image", seed=4),  # the first new token follows a picture
]
PICTURES = 5


def ring(y: int, x: int, h: int, w: int) -> int:
    """Peel borders off until the patch is gone."""
    count = 0
    while 0 < y < h - 1 and 0 < x < w - 1:
        y, x, h, w, count = y - 1, x - 1, h - 2, w - 2, count + 1
    return count


def by_hand(ids: list[int], h: int, w: int, rings: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Positions of the tokens, and (picture, ring) of each, (-1, -1) for text."""
    places, facts, following, n, picture = [], [], 0, 0, -1
    while n < len(ids):
        if ids[n] != vlm.IMAGE_ID:
            places, facts, following, n = [*places, following], [*facts, (-1, -1)], following + 1, n + 1
            continue
        picture += 1
        own = [ring(y, x, h, w) for y in range(h) for x in range(w)]
        places += [following + r for r in own]
        facts += [(picture, r) for r in own]
        following, n = following + rings, n + h * w
    return places, facts


def span_of(ids: list[int]) -> spans.TokenSpans:
    image = torch.tensor([ids]) == vlm.IMAGE_ID
    return spans.build(image, torch.ones_like(image))


@pytest.mark.parametrize(
    ("before", "side", "after", "want"),
    [
        (4, 24, 7, [[0, 1, 2, 3], list(range(4, 16)), list(range(16, 23))]),
        (2, 4, 2, [[0, 1], [2, 3], [4, 5]]),
        (1, 5, 1, [[0], [1, 2, 3], [4]]),
        (0, 1, 2, [[], [0], [1, 2]]),
    ],
)
def test_golden_positions(before: int, side: int, after: int, want: list[list[int]]) -> None:
    ids = [5] * before + [vlm.IMAGE_ID] * side**2 + [6] * after
    got = rewritten(CCA(), span_of(ids), 0, len(ids) + 1)[0].tolist()
    end = before + side**2
    assert [got[:before], sorted(set(got[before:end])), got[end:-1]] == want
    assert got[-1] == want[2][-1] + 1, "the first generated token"
    assert got[before : before + side] == [before] * side, "the first row of patches lies in the outer ring"


@pytest.mark.parametrize("grid", [(4, 4), (3, 3), (2, 5), (5, 3), (1, 4)])
def test_rings_of_any_grid(grid: tuple[int, int]) -> None:
    h, w = grid
    ids = [5, 5, *[vlm.IMAGE_ID] * (2 * h * w), 6]
    found = patches(torch.tensor([ids]) == vlm.IMAGE_ID, grid)
    places, facts = by_hand(ids, h, w, (min(h, w) + 1) // 2)
    assert CCA(grid=grid).positions(span_of(ids))[0].tolist() == places
    assert found.ring[0, 2:-1].tolist() == [r for _, r in facts[2:-1]]
    assert int(found.rings[0, 2]) == 1 + max(r for _, r in facts)


def test_open_and_closed_pairs_are_those_of_the_rings() -> None:
    ids = ROWS[0]
    image = torch.tensor([ids]) == vlm.IMAGE_ID
    parts = segments.build(torch.tensor([ids]), image, torch.ones_like(image), None)
    _, facts = by_hand(ids, 3, 3, 2)
    for seen in (True, False):
        edit = MaskEdit(queries=Role.IMAGE, keys=Role.IMAGE, relation=Rings((3, 3), seen), allow=seen)
        got = segments.pairs(parts, edit, 5, len(ids))[0]
        for q in range(5, len(ids)):
            for k in range(len(ids)):
                same = facts[q][0] == facts[k][0] >= 0
                assert bool(got[q - 5, k]) == (same and (facts[k][1] <= facts[q][1]) == seen)


def plain(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Logits of the plain model under positions and masks written token by token; generated tokens are text."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    batch, length = ids.shape
    positions = torch.zeros_like(ids)
    allowed = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for b in range(batch):
        pad = int((mask[b] == 0).sum())
        places, facts = by_hand(ids[b, pad:].tolist(), 3, 3, 2)
        positions[b, pad:] = torch.tensor(places)
        for q, (q_picture, q_ring) in enumerate(facts):
            for k, (k_picture, k_ring) in enumerate(facts):
                inside = q_picture == k_picture >= 0
                allowed[b, 0, pad + q, pad + k] = k_ring <= q_ring if inside else k <= q
    weights = lambda scores, layer: plain_pass.softmax(scores, allowed)  # noqa: E731
    return plain_pass.logits(model, inputs, weights, position_ids=positions)


def test_prefill_and_decoding_of_a_mixed_batch(grouped: Any) -> None:
    """Two pictures, two that touch, none, and one at the very end; left-padded."""
    inputs = vlm.batch(ROWS, vlm.picture(0, PICTURES))
    with mmfix.mitigate(grouped, "cca") as fix:
        assert fix.methods[0] == CCA(grid=(3, 3)), "the configuration tells nine tokens per picture"
        got = vlm.greedy(grouped, inputs, STEPS, suppress_tokens=[vlm.IMAGE_ID])
        fired = fix.report().fired["cca"].fired
    for step in range(STEPS):
        tokens = got.sequences[:, inputs["input_ids"].shape[1] :][:, :step]
        given = {
            **inputs,
            "input_ids": torch.cat([inputs["input_ids"], tokens], 1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1),
        }
        torch.testing.assert_close(got.logits[step], plain(grouped, given)[:, -1], atol=1e-4, rtol=0)
    assert fired > 0
    moved = (got.logits[0] - vlm.greedy(grouped, inputs, 1).logits[0]).abs().amax(-1)
    assert moved[[0, 1, 3]].min() > 1e-2
    assert moved[2] < 1e-4, "a prompt without a picture is left alone"


def test_a_row_whose_pairs_open_and_close_is_counted_once(llava: Any) -> None:
    with mmfix.mitigate(llava, "cca") as fix:
        vlm.logits(llava, vlm.one())
    fired = fix.report().fired["cca"]
    every = vlm.LAYERS * vlm.HEADS
    assert (fired.fired, fired.considered) == (N * every, vlm.one()["input_ids"].shape[1] * every)


def test_outer_to_inner_order_makes_the_mask_block_causal(llava: Any) -> None:
    """The patches put in the order of their rings, under a plain mask of one block per ring, say the same."""
    inputs = vlm.one()
    ids = inputs["input_ids"][0]
    first = int((ids == vlm.IMAGE_ID).nonzero()[0])
    own = torch.tensor([ring(y, x, 3, 3) for y in range(3) for x in range(3)])
    order = torch.arange(len(ids))
    order[first : first + N] = first + own.argsort(stable=True)
    with torch.no_grad():
        embeds = llava.get_input_embeddings()(inputs["input_ids"]).clone()
        embeds[0, first : first + N] = llava.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    block = torch.arange(len(ids))
    block[first : first + N] = first + own.sort().values
    allowed = (block[:, None] >= block[None, :])[None, None]
    position = torch.where(block < first + N, block, block - N + 2)
    given = {"inputs_embeds": embeds[:, order], "attention_mask": inputs["attention_mask"]}
    weights = lambda scores, layer: plain_pass.softmax(scores, allowed)  # noqa: E731
    want = plain_pass.logits(llava, given, weights, position_ids=position[None])
    with mmfix.mitigate(llava, "cca"):
        got = vlm.logits(llava, inputs)
    torch.testing.assert_close(got[:, order], want, atol=1e-4, rtol=0)


def test_what_has_no_centre_is_refused(llava: Any) -> None:
    for grid in ((3,), (0, 3), (3, 3, 3)):
        with pytest.raises(MethodError, match=r"cca\.grid"):
            CCA(grid=grid)  # type: ignore[arg-type]
    ids = [5, *[vlm.IMAGE_ID] * 12, 6]
    with pytest.raises(MmfixError, match=r"run of 12 image tokens is no square; give grid="):
        CCA().positions(span_of(ids))
    with mmfix.mitigate(llava, CCA(grid=(2, 4))), pytest.raises(MmfixError, match="no whole number of pictures of 2 x"):
        vlm.logits(llava, vlm.one())
    with mmfix.mitigate(llava, "cca"), pytest.raises(MmfixError, match="pieces"):
        vlm.greedy(llava, vlm.one(), prefill_chunk_size=6)
    family = describe(llava)
    for facts, error in (({"image_grid_pinpoints": [[1, 2]]}, "tiles"), ({"image_seq_length": 12}, "no square")):
        other = types.SimpleNamespace(whole=types.SimpleNamespace(config=types.SimpleNamespace(**facts)), name="Some")
        with pytest.raises(UnsupportedModel, match=error):
            CCA().prepare(other)  # type: ignore[arg-type]
        assert CCA(grid=(3, 4)).prepare(other) == CCA(grid=(3, 4))  # type: ignore[arg-type]
    nothing = types.SimpleNamespace(whole=types.SimpleNamespace(config=types.SimpleNamespace()), name="Some")
    assert CCA().prepare(nothing).grid is None  # type: ignore[arg-type]
    assert CCA().prepare(family).grid == (3, 3)
    assert mmfix.methods()["cca"].trained_in_paper


def test_one_prompt_of_a_batch_alone(llava: Any) -> None:
    """Confined to the second prompt, the first one is the plain model's."""
    from mmfix.confine import confine

    inputs = vlm.batch([ROWS[0], ROWS[0]], vlm.picture(0, 2).repeat(2, 1, 1, 1))
    with mmfix.mitigate(llava, confine(CCA(), (False, True))):
        both = vlm.greedy(llava, inputs, STEPS)
    single = vlm.batch(ROWS[:1], vlm.picture(0, 2))
    with mmfix.mitigate(llava, "cca"):
        changed = vlm.greedy(llava, single, STEPS)
    for a, b, c in zip(both.logits, vlm.greedy(llava, single, STEPS).logits, changed.logits, strict=True):
        torch.testing.assert_close(a, torch.cat([b, c]), atol=1e-4, rtol=0)
