"""generate: seeds that hold anywhere, and methods that leave no trace."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_llava import picture

import mmfix
from mmfix.errors import MethodError
from mmfix_decoding import Answer, Decoder

LONG = {"max_new_tokens": 12}
METHODS = ["vhr", mmfix.method("var", sink_dims=(3, 7), tau=1.0, min_image_mass=0.0, max_sink_share=1.0, first_layer=0)]


def essence(answers: list[Answer]) -> list[tuple[Any, ...]]:
    """All of an answer but its time and its report."""
    return [(a.text, a.token_ids, a.tokens, a.prompt, a.finish_reason) for a in answers]


@pytest.fixture(params=[None, *METHODS], ids=["plain", "vhr", "var"])
def any_decoder(request: pytest.FixtureRequest, decoder: Decoder) -> Decoder:
    return decoder.with_method(request.param)


# -- seeds ------------------------------------------------------------------------------------------------------------

HOT: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 6}


def test_a_seed_fixes_the_answer_wherever_it_stands(
    any_decoder: Decoder, pictures: list[Image.Image], questions: list[str]
) -> None:
    pictures, questions = pictures[:3], questions[:3]
    together = any_decoder.generate(pictures, questions, seed=7, **HOT)
    for n in (0, 2):
        assert essence([any_decoder.generate(pictures[n], questions[n], seed=7, **HOT)]) == essence(together[n : n + 1])
    back = any_decoder.generate(pictures[::-1], questions[::-1], seed=7, batch_size=2, **HOT)
    assert essence(back[::-1]) == essence(together)
    other = any_decoder.generate(pictures, questions, seed=8, **HOT)
    assert all(a.token_ids != b.token_ids for a, b in zip(together, other, strict=True))


def test_prompt_and_picture_are_part_of_the_seed(decoder: Decoder) -> None:
    """Else every answer of a list would draw the same numbers."""
    from mmfix_decoding.prompts import single
    from mmfix_decoding.sampling import request_seed

    seeds = {
        request_seed(seed, single(image, prompt).load())
        for seed in (0, 1)
        for image in (picture(0), picture(1), picture(0, (30, 40)), [picture(0), picture(1)], None)
        for prompt in ("dog ?", "cat ?")
    }
    assert len(seeds) == 20
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("kwargs", [{"seed": 3}, {"seed": 3, **HOT}])
def test_the_callers_random_state_is_untouched(decoder: Decoder, kwargs: dict[str, Any]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    decoder.generate(picture(0), "dog ?", **{"max_new_tokens": 4, **kwargs})
    assert torch.equal(torch.rand(4), expected)


def test_without_a_seed_the_callers_state_is_drawn_from(decoder: Decoder) -> None:
    texts = []
    for state in (1, 1, 2):
        torch.manual_seed(state)
        texts.append(decoder.generate(picture(0), "dog ?", **HOT).token_ids)
    assert texts[0] == texts[1] != texts[2]


def test_seeded_draws_of_several_threads_do_not_mix(folder: Path, questions: list[str]) -> None:
    decoders = [Decoder.from_pretrained(folder) for _ in range(2)]  # two models: two locks
    expected = [decoders[0].generate(picture(n), questions[n], seed=n, **HOT).token_ids for n in range(2)]
    got: dict[int, list[list[int]]] = {0: [], 1: []}

    def work(n: int) -> None:
        for _ in range(4):
            got[n].append(decoders[n].generate(picture(n), questions[n], seed=n, **HOT).token_ids)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {n: [expected[n]] * 4 for n in range(2)}


# -- methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=["vhr", "var"])
def test_a_method_changes_answers_and_leaves_the_model(
    decoder: Decoder, pictures: list[Image.Image], questions: list[str], method: Any
) -> None:
    plain = decoder.generate(pictures, questions, **LONG)
    mitigated = decoder.with_method(method).generate(pictures, questions, **LONG)
    assert essence(mitigated) != essence(plain)
    assert essence(decoder.generate(pictures, questions, **LONG)) == essence(plain)
    report = mitigated[0].report
    assert report is not None
    assert all(answer.report is report for answer in mitigated)  # one call, one report
    (fired,) = report["fired"].values()
    assert fired["fired"] > 0
    assert report["prompts"] == len(questions)


def test_the_engine_without_a_method_changes_nothing(
    decoder: Decoder, pictures: list[Image.Image], questions: list[str]
) -> None:
    watched = decoder.generate(pictures, questions, telemetry=True, **LONG)
    assert essence(watched) == essence(decoder.generate(pictures, questions, **LONG))
    assert watched[0].report is not None
    assert set(watched[0].report["masses"]) >= {"image", "text", "generated"}


def test_with_method_shares_model_and_processor(decoder: Decoder) -> None:
    other = decoder.with_method("vhr")
    assert other.model is decoder.model
    assert other.processor is decoder.processor
    assert (other.model_id, other.method, decoder.method) == (decoder.model_id, "vhr", None)
    assert other.with_method(None).method is None


def test_an_unknown_method_is_refused_at_once(decoder: Decoder) -> None:
    for method in ("vhrr", ["vhr", "nothing"]):
        with pytest.raises(MethodError):
            decoder.with_method(method)
        with pytest.raises(MethodError):  # before the model is looked for
            Decoder.from_pretrained("no/where", method=method)


def test_methods_of_concurrent_calls_do_not_mix(
    decoder: Decoder, pictures: list[Image.Image], questions: list[str]
) -> None:
    decoders = [decoder, *(decoder.with_method(method) for method in METHODS)]
    expected = [essence(d.generate(pictures, questions, **LONG)) for d in decoders]
    got: list[list[Any]] = [[] for _ in decoders]

    def work(n: int) -> None:
        for k in (2, 5):
            got[n].append(essence(decoders[n].generate(pictures, questions, batch_size=k, **LONG)))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(decoders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [[one] * 2 for one in expected]
