"""stream: the tokens of generate, one at a time, and a way out at any moment."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from small_llava import picture
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import mmfix
from mmfix.errors import ImageError, UsageError
from mmfix_decoding import Decoder, TokenEvent
from mmfix_decoding.streaming import TokenStream

LONG = {"max_new_tokens": 12}
HOT: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "top_k": 10, "suppress_tokens": [4], "seed": 4, **LONG}
VAR = mmfix.method("var", sink_dims=(3, 7), tau=1.0, min_image_mass=0.0, max_sink_share=1.0, first_layer=0)


class Slow(LogitsProcessor):  # type: ignore[misc]
    """Makes a step take time and counts the steps; fails at one of them if asked to."""

    def __init__(self, seconds: float = 0.0, fail_at: int = -1) -> None:
        self.steps = 0
        self.seconds = seconds
        self.fail_at = fail_at

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.steps == self.fail_at:
            raise RuntimeError("a step that fails")
        self.steps += 1
        time.sleep(self.seconds)
        return scores


def fresh(model: Any) -> bool:
    """Whether nothing of mmfix is left on the model."""
    modules = list(model.modules())
    hooks = [h for module in modules for h in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())]
    return (
        not any("_mmfix" in module.__dict__ for module in modules)
        and not any(hook.__module__.startswith("mmfix") for hook in hooks)  # transformers leaves some of its own
        and model.config.text_config._attn_implementation == "sdpa"
    )


@pytest.fixture(autouse=True)
def _left_clean(decoder: Decoder) -> Iterator[None]:
    yield
    assert fresh(decoder.model)
    assert not [thread for thread in threading.enumerate() if thread.name == "mmfix-stream"]


@pytest.mark.parametrize("kwargs", [LONG, HOT, {**HOT, "seed": 11}], ids=["greedy", "sampled", "another seed"])
@pytest.mark.parametrize("method", [None, "vhr", VAR], ids=["plain", "vhr", "var"])
def test_stream_equals_generate(
    decoder: Decoder, pictures: list[Image.Image], questions: list[str], method: Any, kwargs: dict[str, Any]
) -> None:
    decoder = decoder.with_method(method)
    for n in (0, 4):  # one is cut by its length, the other ends by itself when greedy
        answer = decoder.generate(pictures[n], questions[n], **kwargs)
        events = list(decoder.stream(pictures[n], questions[n], **kwargs))
        assert [event.token_id for event in events] == answer.token_ids
        assert "".join(event.text for event in events).strip() == answer.text
        assert [event.index for event in events] == list(range(len(events)))


@pytest.mark.parametrize("kwargs", [LONG, HOT], ids=["greedy", "sampled"])
def test_logprob_and_entropy_are_of_the_final_distribution(
    decoder: Decoder, pictures: list[Image.Image], kwargs: dict[str, Any]
) -> None:
    events = list(decoder.stream(pictures[0], "is there a cat ?", telemetry=False, **kwargs))
    inputs = decoder.processor(
        text="<s> USER: <image> is there a cat ? ASSISTANT:", images=pictures[0], return_tensors="pt"
    )
    ids = inputs["input_ids"]
    for event in events:
        with torch.no_grad():
            logits = decoder.model(
                input_ids=ids, pixel_values=inputs["pixel_values"], attention_mask=torch.ones_like(ids)
            ).logits[0, -1]
        if "temperature" in kwargs:
            logits[kwargs["suppress_tokens"]] = -torch.inf
            logits = logits / kwargs["temperature"]
            logits[logits < logits.topk(kwargs["top_k"]).values[-1]] = -torch.inf
        logprobs = logits.double().log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum()
        assert event.logprob == pytest.approx(float(logprobs[event.token_id]), abs=1e-4)
        assert event.entropy == pytest.approx(float(entropy), abs=1e-4)
        ids = torch.cat([ids, torch.tensor([[event.token_id]])], dim=1)


def test_masses(decoder: Decoder, pictures: list[Image.Image]) -> None:
    for method in (None, "vhr"):
        events = list(decoder.with_method(method).stream(pictures[0], "is there a cat ?", **LONG))
        for event in events:
            assert event.masses is not None
            assert event.masses["image"] + event.masses["text"] == pytest.approx(1.0, abs=1e-4)
        assert events[0].masses is not None
        assert events[0].masses["generated"] == 0.0
        assert events[-1].masses is not None
        assert events[-1].masses["generated"] > 0.0
    assert all(e.masses is None for e in decoder.stream(pictures[0], "dog ?", telemetry=False, **LONG))


def test_masses_are_of_the_position_that_chose_the_token(decoder: Decoder, pictures: list[Image.Image]) -> None:
    events = list(decoder.stream(pictures[0], "dog ?", **LONG))
    with mmfix.mitigate(decoder.model, None, telemetry=True) as fix:
        inputs = decoder.processor(text="<s> USER: <image> dog ? ASSISTANT:", images=pictures[0], return_tensors="pt")
        with torch.no_grad():
            decoder.model(**inputs)
        masses = fix.masses()
    assert masses is not None
    assert events[0].masses == pytest.approx({name: float(mass[0]) for name, mass in masses.items()}, abs=1e-5)


def test_report_after_the_end(decoder: Decoder, pictures: list[Image.Image]) -> None:
    with decoder.with_method("vhr").stream(pictures[0], "dog ?", **LONG) as stream:
        assert stream.report is None
        assert isinstance(next(stream), TokenEvent)
        list(stream)
        assert stream.report is not None
        assert stream.report["fired"]["vhr"]["fired"] > 0


# -- leaving early ----------------------------------------------------------------------------------------------------


def leave_by_close(stream: TokenStream) -> None:
    next(stream)
    stream.close()


def leave_by_break(stream: TokenStream) -> None:
    for _ in stream:
        break


def leave_by_with(stream: TokenStream) -> None:
    with stream:
        next(stream)


def leave_by_error(stream: TokenStream) -> None:
    def read() -> None:
        with stream:
            for _ in stream:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read()


@pytest.mark.parametrize("leave", [leave_by_close, leave_by_break, leave_by_with, leave_by_error])
def test_leaving_early_stops_and_restores(decoder: Decoder, pictures: list[Image.Image], leave: Any) -> None:
    expected = decoder.generate(pictures[1], "dog ?", **LONG).token_ids
    slow = Slow(0.02)
    leave(
        decoder.with_method(VAR).stream(
            pictures[0],
            "is there a cat ?",
            max_new_tokens=500,
            min_new_tokens=500,
            logits_processor=LogitsProcessorList([slow]),
        )
    )
    gc.collect()
    steps = slow.steps
    assert steps < 400
    assert fresh(decoder.model)  # at once: nothing runs on in the background
    time.sleep(0.06)
    assert slow.steps == steps
    assert decoder.generate(pictures[1], "dog ?", **LONG).token_ids == expected


def test_a_stream_that_never_began_holds_nothing(decoder: Decoder, pictures: list[Image.Image]) -> None:
    stream = decoder.with_method("vhr").stream(pictures[0], "dog ?", **LONG)
    assert fresh(decoder.model)
    stream.close()
    assert list(stream) == []


def test_a_finished_stream_stays_finished(decoder: Decoder, pictures: list[Image.Image]) -> None:
    stream = decoder.stream(pictures[0], "dog ?", **LONG)
    assert list(stream)
    assert list(stream) == []
    stream.close()
    stream.close()


def test_an_open_stream_does_not_lock_its_own_thread_out(decoder: Decoder, pictures: list[Image.Image]) -> None:
    expected = [event.token_id for event in decoder.with_method("vhr").stream(pictures[0], "dog ?", **LONG)]
    plain = decoder.generate(pictures[0], "dog ?", **LONG).token_ids
    stream = decoder.with_method("vhr").stream(pictures[0], "dog ?", **LONG)
    first = next(stream)
    assert decoder.generate(pictures[0], "dog ?", **LONG).token_ids == plain  # waits for the stream, not for its reader
    assert [first.token_id, *(event.token_id for event in stream)] == expected


def test_closing_a_stream_that_waits_for_its_turn(decoder: Decoder, pictures: list[Image.Image]) -> None:
    slow = LogitsProcessorList([Slow(0.05)])
    busy = decoder.stream(pictures[0], "dog ?", max_new_tokens=400, min_new_tokens=400, logits_processor=slow)
    next(busy)
    waiting = decoder.stream(pictures[0], "dog ?", **LONG)
    reader = threading.Thread(target=lambda: next(waiting, None))
    reader.start()
    time.sleep(0.1)
    assert reader.is_alive()
    waiting._cancelled.set()  # what close() does, from the reader's own thread
    reader.join(timeout=20)
    assert not reader.is_alive()
    busy.close()


# -- errors -----------------------------------------------------------------------------------------------------------


def test_an_error_in_the_worker_reaches_the_reader(decoder: Decoder, pictures: list[Image.Image]) -> None:
    for kwargs in ({}, {"do_sample": True, "seed": 1}):
        failing = LogitsProcessorList([Slow(fail_at=3)])
        stream = decoder.with_method("vhr").stream(pictures[0], "dog ?", logits_processor=failing, **LONG, **kwargs)
        assert [next(stream).index for _ in range(3)] == [0, 1, 2]
        with pytest.raises(RuntimeError, match="a step that fails"):
            next(stream)
        assert list(stream) == []
        assert fresh(decoder.model)
    assert decoder.generate(pictures[0], "dog ?", do_sample=True, seed=1, **LONG).token_ids  # no lock is held


class Failing(StoppingCriteria):  # type: ignore[misc]
    """Fails after a token is drawn and before the stream has seen it."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("a criterion that fails")


def test_an_error_between_draw_and_event_leaves_the_random_state(decoder: Decoder) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    stream = decoder.stream(picture(0), "dog ?", stopping_criteria=StoppingCriteriaList([Failing()]), **HOT)
    with pytest.raises(RuntimeError, match="a criterion that fails"):
        next(stream)
    assert torch.equal(torch.rand(3), expected)
    assert decoder.generate(picture(0), "dog ?", **HOT).token_ids  # no lock is held


def test_bad_input_is_refused_at_once(decoder: Decoder, pictures: list[Image.Image]) -> None:
    for kwargs in ({"num_beams": 2}, {"max_new_tokens": 0}, {"prompt_lookup_num_tokens": 3}, {"streamer": 1}):
        with pytest.raises(UsageError) as caught:
            decoder.stream(pictures[0], "dog ?", **kwargs)
        assert ";" in str(caught.value)
    for prompt in ("", ["a", "b"], None):
        with pytest.raises(UsageError):
            decoder.stream(pictures[0], prompt, **LONG)  # type: ignore[arg-type]
    with pytest.raises(ImageError):
        decoder.stream("nothing.png", "dog ?", **LONG)
    with pytest.raises(UsageError, match="'temprature'"):
        list(decoder.stream(pictures[0], "dog ?", temprature=1.0, **LONG))


# -- seeds ------------------------------------------------------------------------------------------------------------


def test_reader_and_stream_draw_apart(decoder: Decoder) -> None:
    """Draws between tokens neither change the stream nor are changed by it, in value or in state."""
    quiet = [event.token_id for event in decoder.stream(picture(0), "dog ?", **HOT)]
    torch.manual_seed(5)
    expected = [torch.rand(3) for _ in quiet]
    torch.manual_seed(5)
    stream = decoder.stream(picture(0), "dog ?", logits_processor=LogitsProcessorList([Slow(0.01)]), **HOT)
    got = [(event.token_id, torch.rand(3)) for event in stream]
    assert [token for token, _ in got] == quiet
    assert all(torch.equal(draw, one) for (_, draw), one in zip(got, expected, strict=True))


def test_several_images(decoder: Decoder, pictures: list[Image.Image]) -> None:
    answer = decoder.generate([[pictures[0], pictures[1]]], ["two picture"], **LONG)[0]
    events = decoder.stream(pictures[:2], "two picture", **LONG)
    assert [event.token_id for event in events] == answer.token_ids
