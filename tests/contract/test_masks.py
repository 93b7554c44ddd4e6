"""Segments and the masks made from them, against masks written out pair by pair; MMA against a 4-D mask by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import vlm
from torch import Tensor

import mmfix
import mmfix.layers
from mmfix import segments
from mmfix.errors import MethodError, MmfixError
from mmfix.methods import MMA
from mmfix.segments import Markers, MaskEdit, Role
from mmfix_decoding import Decoder
from mmfix_kernels import AttentionCall
from mmfix_kernels.reference import attend as reference

USER, ANSWER = (90, 91), (92,)
MARKERS = Markers(assistant=ANSWER, user=USER)
I = vlm.IMAGE_ID  # noqa: E741
#        system  user    question image   question  answer  user    question image question answer
TALK = [1, 7, 8, 90, 91, 11, 12, I, I, I, 13, 14, 92, 15, 16, 90, 91, 21, I, I, 22, 23, 92]


def talk(padding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """ids, image and valid of the conversation, left-padded."""
    ids = torch.tensor([[0] * padding + TALK])
    valid = torch.arange(ids.shape[1])[None] >= padding
    return ids, ids == I, valid


def by_hand(edit: MaskEdit, padding: int = 0) -> Tensor:
    """The named pairs, decided one by one from the conversation as a person reads it."""
    turn, image, seen, side = -1, -1, 0, "system"
    facts: list[tuple[str, int, int]] = []
    for n, token in enumerate(TALK):
        if TALK[n : n + 2] == list(USER):
            turn, side = turn + 1, "question"
        if token == 92:
            side = "answer"
        if token == I:
            if TALK[n - 1] != I:
                image, seen = image + 1, seen + 1
            facts.append(("image", turn, image))
        else:
            facts.append((side, turn, -1))
    roles = {"system": Role.SYSTEM, "image": Role.IMAGE, "question": Role.QUESTION, "answer": Role.ANSWER}
    length = len(TALK) + padding
    found = torch.zeros(1, length, length, dtype=torch.bool)
    for q, (q_side, q_turn, q_image) in enumerate(facts):
        for k, (k_side, k_turn, k_image) in enumerate(facts):
            both_user = {q_side, k_side} <= {"question", "image"}
            holds = {
                "any": True,
                "same_turn": q_turn == k_turn,
                "same_image": q_image == k_image >= 0,
                "other_image": q_image >= 0 and k_image >= 0 and q_image != k_image,
                "same_block": (q_side == k_side == "system") or (both_user and q_turn == k_turn),
            }[edit.relation]
            if roles[q_side] in edit.queries and roles[k_side] in edit.keys and holds:
                found[0, q + padding, k + padding] = True
    return found


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(
    "edit",
    [
        MaskEdit(queries=Role.IMAGE, keys=Role.QUESTION, relation="same_turn"),
        MaskEdit(queries=Role.IMAGE, keys=Role.IMAGE, relation="other_image"),
        MaskEdit(queries=Role.IMAGE, keys=Role.IMAGE, relation="same_image"),
        MaskEdit(queries=Role.PROMPT, keys=Role.PROMPT, relation="same_block"),
        MaskEdit(queries=Role.ANSWER | Role.QUESTION, keys=Role.SYSTEM),
    ],
    ids=lambda edit: edit.relation,
)
def test_pairs_are_those_that_a_person_names(edit: MaskEdit, padding: int) -> None:
    found = segments.build(*talk(padding), MARKERS)
    assert bool(found.ends.all())
    got = segments.pairs(found, edit, 0, found.role.shape[1])
    assert torch.equal(got, by_hand(edit, padding))
    assert torch.equal(segments.pairs(found, edit, 5, 9), got[:, 5:9])


def test_without_markers_the_prompt_is_one_question() -> None:
    ids, image, valid = talk()
    found = segments.build(ids, image, valid, None)
    assert found.role[0, :7].tolist() == [int(Role.SYSTEM)] * 7
    assert set(found.role[0, 7:].tolist()) == {int(Role.IMAGE), int(Role.QUESTION)}
    assert not bool(found.ends.any())


def call_of(length: int, mask: Tensor | None, causal: bool = True) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 8, generator=generator) for _ in range(3))
    return AttentionCall(query=q, key=k, value=v, mask=mask, is_causal=causal and mask is None)


@pytest.mark.parametrize("form", ["none", "bool", "additive", "wide"])
@pytest.mark.parametrize("window", [None, 4])
def test_masks_compose_with_padding_windows_and_fixed_caches(form: str, window: int | None) -> None:
    """Whatever the model's mask looks like, a pair is allowed iff it was, or it was opened and lies in the window."""
    ids, image, valid = talk(padding=0 if form == "none" else 2)
    length = ids.shape[1]
    edit = MaskEdit(queries=Role.IMAGE, keys=Role.QUESTION, relation="same_turn")
    opened = segments.opened(segments.build(ids, image, valid, MARKERS), [edit], 0)
    assert opened is not None
    base = torch.ones(length, length, dtype=torch.bool).tril() & valid[:, None, None, :]
    keys = length + 3 if form == "wide" else length
    given: Tensor | None = torch.nn.functional.pad(base, (0, keys - length))
    if form == "none":
        given = None
    elif form == "additive":
        given = torch.zeros(base.shape).masked_fill(~base, torch.finfo(torch.float32).min)
    call = call_of(length, None)
    if given is not None:
        call = AttentionCall(
            query=call.query, key=torch.zeros(1, 2, keys, 8), value=torch.zeros(1, 2, keys, 8), mask=given
        )
    got = opened.apply(call, window, 0)
    got = got if got.dtype == torch.bool else got == 0
    want = by_hand(edit, padding=0 if form == "none" else 2)[:, None]
    if window is not None:
        place = torch.arange(length)
        want = want & ((place[:, None] - place[None, :]).abs() < window)
    assert torch.equal(got[..., :length], base | want)
    assert not bool(got[..., length:].any())


def embedded_mask(inputs: dict[str, Any], until: int | None) -> Tensor:
    """MMA's mask from its formula: causal, or an image row and a later text key before `until`; never padding."""
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    batch, length = ids.shape
    mask = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for b in range(batch):
        end = length if until is None else ids[b].tolist().index(until)
        for q in range(length):
            for k in range(length):
                later_text = ids[b, q] == I and ids[b, k] != I and k < end
                mask[b, 0, q, k] = valid[b, k] and valid[b, q] and (k <= q or later_text)
    return mask


def by_mask(model: Any, inputs: dict[str, Any], mask: Tensor) -> Tensor:
    """Logits of plain dense attention under a 4-D additive mask."""
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return vlm.logits(model, {**inputs, "attention_mask": additive, "position_ids": positions})


@pytest.mark.parametrize("until", [None, 60])
def test_mma_is_the_formula(model: Any, until: int | None) -> None:
    """Two prompts of different length, one of them with two pictures, against the mask made pair by pair."""
    rows = [vlm.tokens(3, "image", 6, seed=1), vlm.tokens(2, "image", 3, "image", 5, seed=2)]
    rows = [[token if token != 60 else 61 for token in row] for row in rows]
    for row in rows:
        row[-2] = 60
    inputs = vlm.batch(rows, vlm.picture(0, 3))
    method = MMA(until="prompt") if until is None else MMA(marker=(until,))
    with mmfix.mitigate(model, method) as fix:
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        got = vlm.logits(model, {**inputs, "position_ids": positions})
        fired = fix.report().fired["mma"]
    want = by_mask(model, inputs, embedded_mask(inputs, until))
    plain = vlm.logits(model, {**inputs, "position_ids": positions})
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=0)
    assert (got - plain)[real].abs().max() > 1e-2
    layers, heads = vlm.LAYERS, vlm.HEADS
    assert fired.fired == 27 * layers * heads, "27 image rows, each of which has later text"


def test_mma_refuses_a_prompt_without_the_marker(llava: Any) -> None:
    with pytest.raises(MethodError, match="processor="), mmfix.mitigate(llava, "mma"):
        pass
    with mmfix.mitigate(llava, MMA(marker=(4, 4, 4))), pytest.raises(MmfixError, match=r"no token ids \[4, 4, 4\]"):
        vlm.logits(llava, vlm.one())


def test_a_share_blends_outputs() -> None:
    """``(1 - s) A_causal V + s A_open V``, exactly, with row sums of one."""
    call = call_of(len(TALK), None)
    ids, image, valid = talk()
    edit = MaskEdit(queries=Role.IMAGE, keys=Role.QUESTION, relation="same_turn", share=0.3)
    opened = segments.opened(segments.build(ids, image, valid, MARKERS), [edit], 0)
    assert opened is not None
    state = mmfix.layers.LayerState.__new__(mmfix.layers.LayerState)
    state.session = type("Quiet", (), {"backend": None, "current": type("Now", (), {"total": len(TALK)})})()
    state.mask_owners = []
    state.repeating = False
    inputs = {
        "query": call.query, "key": call.key, "value": call.value, "mask": None, "is_causal": True,
        "scale": None, "softcap": None,
    }  # fmt: skip
    got = state._attend_opened(opened, call, inputs, None).output
    causal = torch.ones(len(TALK), len(TALK), dtype=torch.bool).tril()[None, None]
    wide = causal | by_hand(edit)[:, None]
    bare = {"query": call.query, "key": call.key, "value": call.value}
    plain, full = (reference(AttentionCall(**bare, mask=m)).output for m in (causal, wide))
    torch.testing.assert_close(got, 0.7 * plain + 0.3 * full, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="share"):
        MaskEdit(queries=Role.IMAGE, keys=Role.TEXT, share=1.5)


def test_markers_come_from_the_chat_template() -> None:
    decoder = Decoder.from_pretrained("tiny")
    markers = segments.chat_markers(decoder.processor)
    text = decoder.processor.tokenizer.decode(list(markers.assistant))
    assert text.strip(), "the assistant's header is not empty"
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a cat?"}]}]
    prompt = decoder.processor.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    ids = decoder.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tuple(ids[-len(markers.assistant) :]) == markers.assistant
