"""``generate()`` as ever: every way of decoding agrees with the model fed the same tokens step by step."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from support import vlm
from support.cases import NAMES, NEWEST_ROW, active, case_of
from transformers import TextIteratorStreamer

import mmfix
from mmfix import Method
from mmfix.errors import MmfixError, MmfixWarning

METHODS: list[Method] = [active(name) for name in NAMES]
by_method = pytest.mark.parametrize("method", METHODS, ids=NAMES)
STEPS = 6


def forced(model: Any, inputs: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    """[steps, V]: logits of one prompt when it is followed by `tokens`, one decode step at a time."""
    mask = inputs["attention_mask"]
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        found = [out.logits[0, -1]]
        for token in tokens[:-1]:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            out = model(
                input_ids=token.view(1, 1), attention_mask=mask, past_key_values=out.past_key_values, use_cache=True
            )
            found.append(out.logits[0, -1])
    return torch.stack(found)


def new_tokens(out: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return out.sequences[:, inputs["input_ids"].shape[1] :]


@by_method
def test_greedy_is_the_step_by_step_argmax(model: Any, method: Method) -> None:
    inputs = vlm.one()
    with mmfix.mitigate(model, method):
        out = vlm.greedy(model, inputs, STEPS)
        steps = forced(model, inputs, new_tokens(out, inputs)[0])
    torch.testing.assert_close(torch.cat(out.logits), steps, atol=1e-5, rtol=0)
    assert steps.argmax(-1).tolist() == new_tokens(out, inputs)[0].tolist()


@by_method
def test_beams_are_scored_by_the_mitigated_model(model: Any, method: Method) -> None:
    rows = [vlm.tokens(3, "image", 6, seed=1), vlm.tokens(5, "image", 9, seed=2)]
    inputs = vlm.batch(rows, vlm.picture(0, 2))
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "length_penalty": 0.0}
    plain = vlm.greedy(model, inputs, STEPS, **options)
    with mmfix.mitigate(model, method):
        out = vlm.greedy(model, inputs, STEPS, **options)
    assert out.sequences.shape[0] == 4
    assert (out.sequences_scores - plain.sequences_scores).abs().max() > 1e-3
    for n, tokens in enumerate(new_tokens(out, inputs)):
        single = vlm.batch([rows[n // 2]], vlm.picture(0, 2)[n // 2 : n // 2 + 1])
        with mmfix.mitigate(model, method):
            steps = forced(model, single, tokens).log_softmax(-1)
        score = steps.gather(1, tokens[:, None]).sum()
        torch.testing.assert_close(out.sequences_scores[n], score, atol=1e-3, rtol=0)


@by_method
def test_sampling_with_a_seed_and_several_sequences(model: Any, method: Method) -> None:
    inputs = vlm.one()
    found = []
    for _ in range(2):
        with mmfix.mitigate(model, method):
            torch.manual_seed(3)
            found.append(vlm.greedy(model, inputs, STEPS, do_sample=True, top_k=0, num_return_sequences=3))
    out = found[0]
    assert torch.equal(out.sequences, found[1].sequences)
    tokens = new_tokens(out, inputs)
    assert len({str(row.tolist()) for row in tokens}) == 3
    for n in range(3):
        with mmfix.mitigate(model, method):
            steps = forced(model, inputs, tokens[n])
        torch.testing.assert_close(torch.stack([step[n] for step in out.logits]), steps, atol=1e-4, rtol=0)


@by_method
def test_a_static_cache(model: Any, method: Method) -> None:
    inputs = vlm.batch([vlm.tokens(3, "image", 6, seed=1), vlm.tokens(5, "image", 9, seed=2)], vlm.picture(0, 2))
    with mmfix.mitigate(model, method, telemetry=True) as fix:
        if case_of(method).longer_prompt:
            with pytest.raises(MmfixError, match="fixed-size cache"):
                vlm.greedy(model, inputs, STEPS, cache_implementation="static")
            return
        want, masses = vlm.greedy(model, inputs, STEPS), fix.masses()
        got, static_masses = vlm.greedy(model, inputs, STEPS, cache_implementation="static"), fix.masses()
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert masses is not None
    assert static_masses is not None
    for name, value in masses.items():
        torch.testing.assert_close(static_masses[name], value, atol=1e-4, rtol=0)


@by_method
@pytest.mark.parametrize("padding", [0, 5])
def test_a_static_cache_with_one_prompt(model: Any, method: Method, padding: int) -> None:
    if case_of(method).longer_prompt:
        pytest.skip("no cache of fixed size")
    ids = vlm.tokens(3, "image", 6, seed=1)
    inputs = vlm.batch([ids], vlm.picture(), len(ids) + padding)
    with mmfix.mitigate(model, method):
        want = vlm.greedy(model, inputs, STEPS)
        got = vlm.greedy(model, inputs, STEPS, cache_implementation="static")
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@by_method
def test_no_cache_equals_cache(model: Any, method: Method) -> None:
    for seed in range(2):
        inputs = vlm.one(seed)
        with mmfix.mitigate(model, method):
            want = vlm.greedy(model, inputs, STEPS)
            got = vlm.greedy(model, inputs, STEPS, use_cache=False)
        for a, b in zip(got.logits, want.logits, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@by_method
def test_prompt_lookup_equals_greedy(model: Any, method: Method) -> None:
    ids = vlm.tokens(3, "image", 6, seed=1)
    ids += ids[-4:] * 3  # repetition, so that candidates are found
    inputs = vlm.batch([ids], vlm.picture())
    lengths: list[int] = []
    plain = [vlm.greedy(model, inputs, 12, **extra).sequences for extra in ({}, {"prompt_lookup_num_tokens": 3})]
    assert torch.equal(*plain), "the plain model disagrees with itself: the test shows nothing"
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with mmfix.mitigate(model, method):
        want = vlm.greedy(model, inputs, 12)
        lengths.clear()
        got = vlm.greedy(model, inputs, 12, prompt_lookup_num_tokens=3)
    handle.remove()
    assert any(length > 1 for length in lengths[1:]), "no candidates were tried: the test shows nothing"
    assert torch.equal(got.sequences, want.sequences)


@by_method
@pytest.mark.parametrize("size", [5, 14])
def test_a_prompt_in_pieces(model: Any, method: Method, size: int) -> None:
    """Pieces give what the whole prompt gives, or are refused where a method compares or opens what lies in both."""
    inputs = vlm.one(after=9)
    refused = method.info.kind in ("head scale", "mask") and not (size == 14 and case_of(method).whole_pictures)
    refused = refused and not case_of(method).any_pieces
    refused = refused or case_of(method).other_prompt or case_of(method).ahead or method.info.name in NEWEST_ROW
    with mmfix.mitigate(model, method) as fix:
        want = vlm.greedy(model, inputs, STEPS)
        fired = fix.report().fired[method.info.name].fired
        if refused:
            with pytest.raises(MmfixError, match="pieces"):
                vlm.greedy(model, inputs, STEPS, prefill_chunk_size=size)
            return
        got = vlm.greedy(model, inputs, STEPS, prefill_chunk_size=size)
        assert fix.report().fired[method.info.name].fired >= 2 * fired
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@by_method
def test_a_further_turn_on_the_cache(model: Any, method: Method) -> None:
    """A second turn continues the cache as a whole prompt of both turns would, apart from what a method freezes."""
    first = vlm.one(after=9)
    with mmfix.mitigate(model, method):
        answer = vlm.greedy(model, first, STEPS, use_cache=True)
        turn = torch.cat([answer.sequences, torch.tensor([[21, 22, 23, 24]])], dim=1)
        whole = {**first, "input_ids": turn, "attention_mask": torch.ones_like(turn)}
        seen = {name: value for name, value in whole.items() if name != "pixel_values"}  # its image is in the cache
        # Without an answer's marker the second turn is part of the first question, which a mask opens.
        masked = method.info.kind == "mask" and not case_of(method).whole_pictures
        if masked or case_of(method).other_prompt:
            with pytest.raises(MmfixError, match="pieces"):
                vlm.greedy(model, seen, STEPS, past_key_values=answer.past_key_values)
            return
        got = vlm.greedy(model, seen, STEPS, past_key_values=answer.past_key_values)
        want = vlm.greedy(model, whole, STEPS)
    # Heads, sinks among generated tokens, and what was the newest row were chosen in the first turn.
    alike = method.info.kind == "contrast" and method.info.name not in NEWEST_ROW
    if alike:
        assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        assert torch.isfinite(a[a > -1e9]).all()
        if alike:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_an_image_after_the_first_piece_cannot_be_contrasted(llava: Any) -> None:
    with (
        mmfix.mitigate(llava, active("causalmm-language")),
        pytest.warns(MmfixWarning, match="no image tokens"),
        pytest.raises(MmfixError, match="first piece"),
    ):
        vlm.greedy(llava, vlm.one(), STEPS, prefill_chunk_size=3)


class Words:
    """The part of a tokenizer that a streamer needs."""

    def decode(self, ids: Any, **options: Any) -> str:
        return "".join(f"{int(n)} " for n in torch.as_tensor(ids).flatten())


@by_method
def test_streaming_in_a_thread(model: Any, method: Method) -> None:
    inputs = vlm.one()
    with mmfix.mitigate(model, method) as fix:
        want = new_tokens(vlm.greedy(model, inputs, STEPS), inputs)[0].tolist()
        before = fix.report().fired[method.info.name].fired
        streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=60.0)
        thread = threading.Thread(target=vlm.greedy, args=(model, inputs, STEPS), kwargs={"streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
        assert fix.report().fired[method.info.name].fired == 2 * before
    assert [int(word) for word in text.split()] == want


def embedded(model: Any, inputs: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    """The same prompt as embeddings without ids, and its image mask."""
    ids = inputs["input_ids"]
    image = ids == vlm.IMAGE_ID
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids).clone()
        features = model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        embeds[image] = torch.cat(list(features))
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}, image


@by_method
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="greedy"),
        pytest.param(
            {"num_beams": 2},
            id="beams",
        ),
    ],
)
def test_inputs_embeds_with_an_image_mask(model: Any, method: Method, options: dict[str, Any]) -> None:
    inputs = vlm.batch([vlm.tokens(3, "image", 6, seed=1), vlm.tokens(5, "image", 9, seed=2)], vlm.picture(0, 2))
    embeds, image = embedded(model, inputs)
    with mmfix.mitigate(model, method) as fix:
        want = vlm.greedy(model, inputs, STEPS, **options)
        fix.image_mask = image
        looks = any(branch.looks for branch in method.branches(mmfix.describe(model)))
        if case_of(method).sees_pictures or method.steers_tower or looks:
            with pytest.raises(MmfixError, match="cannot look at the picture anew"):
                vlm.greedy(model, embeds, STEPS, **options)
            return
        if case_of(method).other_prompt:
            with pytest.raises(MmfixError, match="pass input_ids"):
                vlm.greedy(model, embeds, STEPS, **options)
            return
        got = vlm.greedy(model, embeds, STEPS, **options)
    assert torch.equal(got.sequences, new_tokens(want, inputs))
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
