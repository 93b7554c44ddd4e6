"""Ids to text: where an answer ends, and pieces that join to the whole."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmfix_decoding.answer import Answer, Detokenizer, TokenEvent, cut
from mmfix_decoding.streaming import Tap

EOS, PAD = 2, 0


@pytest.mark.parametrize(
    ("row", "pad", "ids", "reason"),
    [
        ([5, 6, 7], PAD, [5, 6, 7], "length"),
        ([5, 6, EOS], PAD, [5, 6], "stop"),
        ([5, EOS, PAD], PAD, [5], "stop"),
        ([EOS, PAD, PAD], PAD, [], "stop"),
        ([5, EOS, EOS], EOS, [5], "stop"),  # padded with the end token
        ([5, PAD, PAD], PAD, [5], "stop"),  # ended by a stop string
        ([5, PAD, 6], PAD, [5, PAD, 6], "length"),
        ([5, 6], None, [5, 6], "stop"),  # ended by a criterion
    ],
)
def test_cut(row: list[int], pad: int | None, ids: list[int], reason: str) -> None:
    assert cut(row, {EOS, 3}, pad, limit=3) == (ids, reason)


def test_an_answer_prints_as_its_text() -> None:
    assert str(Answer("a cat", [1], ["a"], "what?", "stop", 0.1)) == "a cat"


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind: one token per byte, so that every accented character takes several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: n for n, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama's kind: word pieces that begin with a bar, and bytes for what the vocabulary lacks."""
    pieces = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "▁a", "▁cat", "cat", "s", ".", "'", "▁n", "t"]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def words(cleanup: bool) -> PreTrainedTokenizerFast:
    """Whole words, joined with spaces, with or without the clean-up of spaces before punctuation."""
    vocabulary = ["<unk>", "a", "cat", ".", ",", "'", "n't", "'s", "do", "</s>"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", clean_up_tokenization_spaces=cleanup
    )


TOKENIZERS: dict[str, Any] = {
    "bytes": byte_level(),
    "fallback": byte_fallback(),
    "words": words(False),
    "cleaned words": words(True),
}


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.add(token) for token in ids] + [detokenizer.flush()]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=12))
def test_bytes_join_to_the_text(text: str) -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    got = pieces(tokenizer, ids)
    assert "".join(got) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in got)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["bytes", "words", "cleaned words"]), st.data())
def test_any_ids_join_to_the_whole(kind: str, data: st.DataObject) -> None:
    """Also malformed ones: lone continuation bytes, special tokens, apostrophes in a row."""
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(257, 265), st.characters(codec="utf-8")), max_size=8))
def test_byte_fallback_joins_to_the_whole(parts: list[int | str]) -> None:
    tokenizer = TOKENIZERS["fallback"]
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else [1 + byte for byte in part.encode()]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_words_come_one_by_one() -> None:
    assert pieces(TOKENIZERS["words"], [1, 2, 3]) == ["a", " cat", " .", ""]
    assert pieces(TOKENIZERS["cleaned words"], [8, 6, 2, 3]) == ["do", "n't", " cat", ".", ""]


def test_an_unfinished_character_is_held_back() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer("né", add_special_tokens=False)["input_ids"]
    assert pieces(tokenizer, ids) == ["n", "", "é", ""]
    assert pieces(tokenizer, ids[:-1]) == ["n", "", "\ufffd"]


def watched(ids: list[int]) -> list[TokenEvent]:
    """Events of a generation of `ids` by the byte-level tokenizer."""
    events: list[TokenEvent] = []
    tap = Tap(TOKENIZERS["bytes"], frozenset({300}), lambda: None, events.append, threading.Event(), None)
    for n in range(len(ids)):
        tap(torch.tensor([ids[: n + 1]]), (torch.zeros(1, 301),))
    tap.finish()
    return events


def test_every_token_makes_one_event_and_no_text_is_lost() -> None:
    ids = TOKENIZERS["bytes"]("né it's \n", add_special_tokens=False)["input_ids"]
    for length in range(len(ids) + 1):
        for end in ([], [300], [300, 300]):  # cut, ended, and ended with a step too many
            events = watched(ids[:length] + end)
            assert [event.token_id for event in events] == ids[:length]
            assert [event.index for event in events] == list(range(length))
            assert "".join(event.text for event in events) == TOKENIZERS["bytes"].decode(ids[:length])
    assert [event.text for event in watched(ids[:4])] == ["n", "", "é", " "]
