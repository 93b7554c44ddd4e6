"""Frame-block masks against pairs written down one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import plain_pass, vlm
from support.families import FAMILIES
from torch import Tensor

import mmfix
from mmfix.errors import ConflictError, MethodError, MmfixError, UnsupportedModel
from mmfix.methods import FrameBlock
from mmfix.methods.frame_block import frames

STEPS = 3
N = vlm.IMAGE_TOKENS
ROWS = [
    vlm.tokens(2, "image", "image", 1, "image", 4, seed=1),  # the first two frames touch
    vlm.tokens(3, "image", 5, seed=2),
    vlm.tokens(6, seed=3),
]
PICTURES = 4


def by_hand(ids: list[int], tokens: int) -> list[int]:
    """The frame of each token, -1 for text: a new one begins after text, and after `tokens` tokens of the last."""
    found, number, inside = [], -1, 0
    for n, token in enumerate(ids):
        if token != vlm.IMAGE_ID:
            found.append(-1)
            continue
        inside = 0 if n == 0 or ids[n - 1] != vlm.IMAGE_ID else inside + 1
        number += inside % tokens == 0
        found.append(number)
    return found


def allowed(inputs: dict[str, Any], tokens: int) -> Tensor:
    """Bool[B, 1, T, T]."""
    seen = plain_pass.causal(inputs).clone()
    for b, ids in enumerate(inputs["input_ids"].tolist()):
        frame = by_hand(ids, tokens)
        for q, own in enumerate(frame):
            for k, other in enumerate(frame):
                seen[b, 0, q, k] |= own == other >= 0
    return seen


def expected(model: Any, tokens: int, layers: tuple[int, ...] = tuple(range(vlm.LAYERS))) -> Any:
    def one(inputs: dict[str, Any]) -> Tensor:
        wide, narrow = allowed(inputs, tokens), plain_pass.causal(inputs)
        return plain_pass.logits(
            model, inputs, lambda scores, layer: plain_pass.softmax(scores, wide if layer in layers else narrow)
        )

    return one


@pytest.mark.parametrize(("tokens", "used"), [(None, N), (3, 3), (1, 1)])
def test_frames_see_themselves_whole(grouped: Any, tokens: int | None, used: int) -> None:
    """Frames that touch, one frame and none in a padded batch, at the prompt and in decoding."""
    inputs = vlm.batch(ROWS, vlm.picture(0, PICTURES))
    with mmfix.mitigate(grouped, FrameBlock(tokens=tokens)) as fix:
        assert fix.methods[0].tokens == used, "the configuration tells the tokens of a picture"
        got = vlm.greedy(grouped, inputs, STEPS)
    want = plain_pass.greedy(grouped, inputs, STEPS, expected(grouped, used))
    for a, b in zip(got.logits, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    moved = (got.logits[0] - vlm.logits(grouped, inputs)[:, -1]).abs().amax(-1)
    assert (moved[:2].min() > 1e-2) == (used > 1), "a frame of one token has nothing to open"
    assert moved[2] < 1e-4, "text stays causal"


def test_a_later_frame_is_never_seen(llava: Any) -> None:
    """The first frame's tokens have the same hidden states whatever the second shows."""
    pictures = vlm.picture(0, 2)
    inputs = vlm.batch([vlm.tokens(2, "image", "image", 3, seed=5)], pictures)
    with mmfix.mitigate(llava, "frame-block"):
        first = vlm.logits(llava, inputs)
        second = vlm.logits(llava, {**inputs, "pixel_values": torch.cat([pictures[:1], vlm.picture(9)])})
    torch.testing.assert_close(first[:, : 3 + N], second[:, : 3 + N], atol=1e-5, rtol=0)
    assert (first[:, 3 + N :] - second[:, 3 + N :]).abs().amax() > 1e-2


def test_only_the_chosen_layers_open(llava: Any) -> None:
    inputs = vlm.one()
    with mmfix.mitigate(llava, FrameBlock(layers=(1, -1))):
        got = vlm.logits(llava, inputs)
    torch.testing.assert_close(got, expected(llava, N, (1, vlm.LAYERS - 1))(inputs), atol=1e-4, rtol=0)


def test_runs_where_no_number_is_told() -> None:
    image = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1]]).bool()
    assert frames(image, None).tolist() == [[-1, 0, 0, -1, 1, 1, 1, 1]]
    assert frames(image, 2).tolist() == [[-1, 0, 0, -1, 1, 1, 2, 2]]


def test_what_is_no_whole_frame_is_refused(llava: Any) -> None:
    with mmfix.mitigate(llava, FrameBlock(tokens=4)), pytest.raises(MmfixError, match="no whole number of frames of 4"):
        vlm.logits(llava, vlm.one())
    with mmfix.mitigate(llava, "frame-block"), pytest.raises(MmfixError, match="prefill_chunk_size"):
        vlm.greedy(llava, vlm.one(after=9), prefill_chunk_size=7)
    for params, match in (({"tokens": 0}, "from 1 on"), ({"tokens": 2.5}, "from 1 on")):
        with pytest.raises(MethodError, match=match):
            mmfix.method("frame-block", **params)
    with pytest.raises(MethodError, match="layers from"), mmfix.mitigate(llava, FrameBlock(layers=(7,))):
        pass
    assert mmfix.methods()["frame-block"].trained_in_paper


def test_a_branch_without_some_patches_is_refused(llava: Any) -> None:
    with (
        pytest.raises(ConflictError, match="'damro' and 'frame-block'"),
        mmfix.mitigate(llava, ["damro", "frame-block"]),
    ):
        pass


def test_tiles_of_a_picture_are_no_frames() -> None:
    with (
        pytest.raises(UnsupportedModel, match="rows or tiles"),
        mmfix.mitigate(FAMILIES["llava-next"].build(), "frame-block"),
    ):
        pass
