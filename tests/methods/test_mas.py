"""MAS against masks written pair by pair from the conversation as a person reads it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support import plain_pass, vlm
from torch import Tensor

import mmfix
from mmfix.errors import MethodError, MmfixError
from mmfix.methods import MAS
from mmfix_decoding import Decoder

USER, ANSWER = (90, 91), (92,)
I = [vlm.IMAGE_ID] * vlm.IMAGE_TOKENS  # noqa: E741
SYSTEM = [1, 7, 8]
FIRST = [*USER, 11, 12, *I, 13, 14]
REPLY = [*ANSWER, 15, 16]
SECOND = [*USER, 21, 22, 23]
TALK = [*SYSTEM, *FIRST, *REPLY, *SECOND, *ANSWER]
BLOCKS = [range(3), range(3, 3 + len(FIRST)), range(len(TALK) - 1 - len(SECOND), len(TALK) - 1)]
STEPS = 3


def by_hand(length: int, blocks: list[range], pad: int = 0) -> Tensor:
    """Bool[length, length]: causal, or both in one block; `pad` places before it that nobody sees."""
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for q in range(pad, length):
        for k in range(pad, length):
            allowed[q, k] = k <= q or any(q - pad in block and k - pad in block for block in blocks)
    return allowed


def expected(model: Any, inputs: dict[str, Any], blocks: list[list[range]]) -> list[Tensor]:
    def one(inputs: dict[str, Any]) -> Tensor:
        mask = inputs["attention_mask"]
        length = mask.shape[1]
        pads = (mask == 0).sum(-1).tolist()
        allowed = torch.stack([by_hand(length, b, pad) for b, pad in zip(blocks, pads, strict=True)])[:, None]
        return plain_pass.logits(model, inputs, lambda scores, layer: plain_pass.softmax(scores, allowed))

    return plain_pass.greedy(model, inputs, STEPS, one)


class Chat:
    """A processor with a chat template of the markers above, one token per character."""

    chat_template = "yes"

    def apply_chat_template(self, talk: list[dict[str, Any]], tokenize: bool, add_generation_prompt: bool) -> str:
        turns = {"user": "UV", "assistant": "W"}
        text = "".join(turns[turn["role"]] + turn["content"][0]["text"] for turn in talk)
        return text + ("W" if add_generation_prompt else "")

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        known = {"U": 90, "V": 91, "W": 92}
        return {"input_ids": [known.get(c, ord(c) % 64) for c in text]}


def test_blocks_of_a_conversation_and_of_a_padded_batch(grouped: Any) -> None:
    """System, two user turns (a picture inside the first), answers causal; decoding plain."""
    short = [*SYSTEM, *USER, 31, *I, *ANSWER]
    inputs = vlm.batch([TALK, short], vlm.picture(0, 2))
    with mmfix.mitigate(grouped, "mas", processor=Chat()) as fix:
        assert fix.methods[0] == MAS(marker=ANSWER)
        got = vlm.greedy(grouped, inputs, STEPS)
    want = expected(grouped, inputs, [BLOCKS, [range(3), range(3, len(short) - 1)]])
    for a, b in zip(got.logits, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert (got.logits[0] - vlm.logits(grouped, inputs)[:, -1]).abs().max() > 1e-2


def test_turns_on_a_cache_equal_the_whole(llava: Any) -> None:
    """A prompt in pieces that end where blocks end gives the logits of the whole prompt."""
    whole = vlm.batch([TALK], vlm.picture())
    cut = [0, len(SYSTEM) + len(FIRST) + 1, len(TALK) - len(SECOND) - 1, len(TALK)]
    with torch.no_grad(), mmfix.mitigate(llava, "mas", processor=Chat()):
        want = vlm.logits(llava, whole)
        cache, parts = None, []
        for start, stop in itertools.pairwise(cut):
            piece = {
                "input_ids": whole["input_ids"][:, start:stop],
                "attention_mask": whole["attention_mask"][:, :stop],
            }
            pictures = {} if start else {"pixel_values": whole["pixel_values"]}
            out = llava(**piece, **pictures, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-4, rtol=0)


def test_a_piece_that_ends_inside_a_block_is_refused(llava: Any) -> None:
    with mmfix.mitigate(llava, MAS(until="prompt")), pytest.raises(MmfixError, match="pieces"):
        vlm.greedy(llava, vlm.one(after=9), prefill_chunk_size=14)


def test_spans_alone_are_enough(llava: Any) -> None:
    """Embeddings with an image mask: text before the image is one block, the rest another."""
    inputs = vlm.one(after=5)
    image = inputs["input_ids"] == vlm.IMAGE_ID
    with torch.no_grad():
        embeds = llava.get_input_embeddings()(inputs["input_ids"]).clone()
        embeds[image] = torch.cat(list(llava.model.get_image_features(inputs["pixel_values"]).pooler_output))
    with mmfix.mitigate(llava, MAS(until="prompt")) as fix:
        fix.image_mask = image
        got = vlm.greedy(llava, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}, STEPS)
    length = image.shape[1]
    want = expected(llava, inputs, [[range(4), range(4, length)]])
    for a, b in zip(got.logits, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_only_the_chosen_layers_open(llava: Any) -> None:
    inputs = vlm.one()
    wide = by_hand(inputs["input_ids"].shape[1], [range(4), range(4, 19)])
    narrow = plain_pass.causal(inputs)
    want = plain_pass.logits(
        llava, inputs, lambda scores, layer: plain_pass.softmax(scores, wide if layer in (1, 4) else narrow)
    )
    with mmfix.mitigate(llava, MAS(until="prompt", layers=(1, 4))):
        torch.testing.assert_close(vlm.logits(llava, inputs), want, atol=1e-4, rtol=0)


def test_what_is_not_known_is_refused(llava: Any) -> None:
    with pytest.raises(MethodError, match="processor="), mmfix.mitigate(llava, "mas"):
        pass
    with pytest.raises(MethodError, match="choose 'assistant' or 'prompt'"):
        MAS(until="turn")  # type: ignore[arg-type]
    with mmfix.mitigate(llava, MAS(marker=(4, 4, 4))), pytest.raises(MmfixError, match=r"no token ids \[4, 4, 4\]"):
        vlm.logits(llava, vlm.one())
    assert mmfix.methods()["mas"].trained_in_paper


def test_it_runs_with_a_real_chat_template() -> None:
    decoder = Decoder.from_pretrained("tiny", method="mas")
    with mmfix.mitigate(decoder.model, "mas", processor=decoder.processor) as fix:
        assert fix.methods[0].answer_marker


@pytest.mark.filterwarnings("ignore::mmfix.errors.MmfixWarning")
def test_a_first_image_after_the_first_piece_is_refused(llava: Any) -> None:
    """The system block is a piece by itself: it ran as a prompt without an image, which is left alone."""
    inputs = vlm.batch([[*SYSTEM, *USER, 31, *I, *ANSWER]], vlm.picture())
    cut = len(SYSTEM)
    with torch.no_grad(), mmfix.mitigate(llava, "mas", processor=Chat()):
        cache = llava(input_ids=inputs["input_ids"][:, :cut], use_cache=True).past_key_values
        with pytest.raises(MmfixError, match="first image came after its first piece"):
            llava(**{**inputs, "input_ids": inputs["input_ids"][:, cut:]}, past_key_values=cache)


def test_layers_that_the_model_does_not_have_are_refused(llava: Any) -> None:
    with pytest.raises(MethodError, match="layer"), mmfix.mitigate(llava, MAS(until="prompt", layers=(vlm.LAYERS,))):
        pass
