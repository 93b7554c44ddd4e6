"""generate: batches, broadcasting, seeds, arguments, methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_llava import make_model, make_processor, picture
from transformers import StoppingCriteria, StoppingCriteriaList

import mmfix
from mmfix.errors import ImageError, MmfixError, UnsupportedModel, UsageError
from mmfix_decoding import Answer, Decoder
from mmfix_decoding.answer import cut
from mmfix_decoding.options import plan

LONG = {"max_new_tokens": 12}
METHODS = ["vhr", mmfix.method("var", sink_dims=(3, 7), tau=1.0, min_image_mass=0.0, max_sink_share=1.0, first_layer=0)]


def essence(answers: list[Answer]) -> list[tuple[Any, ...]]:
    """All of an answer but its time and its report."""
    return [(a.text, a.token_ids, a.tokens, a.prompt, a.finish_reason) for a in answers]


@pytest.fixture(params=[None, *METHODS], ids=["plain", "vhr", "var"])
def any_decoder(request: pytest.FixtureRequest, decoder: Decoder) -> Decoder:
    return decoder.with_method(request.param)


def test_one_answer(decoder: Decoder, pictures: list[Image.Image]) -> None:
    answer = decoder.generate(pictures[0], "is there a cat ?", **LONG)
    assert isinstance(answer, Answer)
    inputs = decoder.processor(
        text="<s> USER: <image> is there a cat ? ASSISTANT:",
        images=pictures[0],
        return_tensors="pt",
        add_special_tokens=False,
    )
    row = decoder.model.generate(**inputs, max_new_tokens=12, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ].tolist()
    assert answer.token_ids == [token for token in row if token != 2]
    assert answer.finish_reason == ("stop" if 2 in row else "length")
    assert answer.tokens == decoder.processor.tokenizer.convert_ids_to_tokens(answer.token_ids)
    assert answer.text == decoder.processor.tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip()
    assert answer.prompt == "is there a cat ?"
    assert answer.seconds > 0
    assert answer.report is None


def test_answers_differ_and_end_both_ways(decoder: Decoder, pictures: list[Image.Image], questions: list[str]) -> None:
    """What the tests below compare must be able to differ."""
    answers = decoder.generate(pictures, questions, **LONG)
    assert len({tuple(a.token_ids) for a in answers}) == len(answers)
    assert {a.finish_reason for a in answers} == {"stop", "length"}


@pytest.mark.parametrize("batch_size", [None, 2])
def test_batch_equals_singles(
    any_decoder: Decoder, pictures: list[Image.Image], questions: list[str], batch_size: int | None
) -> None:
    together = any_decoder.generate(pictures, questions, batch_size=batch_size, **LONG)
    alone = [any_decoder.generate(i, q, **LONG) for i, q in zip(pictures, questions, strict=True)]
    assert essence(together) == essence(alone)


def test_order_is_kept(decoder: Decoder, pictures: list[Image.Image], questions: list[str]) -> None:
    forth = decoder.generate(pictures, questions, batch_size=2, **LONG)
    back = decoder.generate(pictures[::-1], questions[::-1], batch_size=3, **LONG)
    assert [a.prompt for a in forth] == questions
    assert essence(forth) == essence(back[::-1])


def test_broadcasting(decoder: Decoder, pictures: list[Image.Image], questions: list[str]) -> None:
    one_image = decoder.generate(pictures[0], questions, **LONG)
    assert essence(one_image) == essence(decoder.generate([pictures[0]] * 5, questions, **LONG))
    one_prompt = decoder.generate(pictures, questions[0], **LONG)
    assert essence(one_prompt) == essence(decoder.generate(pictures, [questions[0]] * 5, **LONG))


def test_lists_in_lists_out(decoder: Decoder, pictures: list[Image.Image]) -> None:
    single = decoder.generate(pictures[0], "dog ?", **LONG)
    for image, prompt in (([pictures[0]], "dog ?"), (pictures[0], ["dog ?"]), ((pictures[0],), ("dog ?",))):
        assert essence(decoder.generate(image, prompt, **LONG)) == essence([single])
    assert decoder.generate([], [], **LONG) == []
    assert decoder.generate(pictures[0], [], **LONG) == []


def test_sources_are_equal(decoder: Decoder, pictures: list[Image.Image], tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    pictures[1].save(path)
    sources = [pictures[1], path, str(path), path.read_bytes()]
    answers = decoder.generate(sources, "dog ?", **LONG)
    assert len({a.text for a in answers}) == 1


def test_several_images_in_one_prompt(decoder: Decoder, pictures: list[Image.Image]) -> None:
    a, b, c = pictures[:3]
    answers = decoder.generate([[a, b], [c]], ["describe the two picture", "dog ?"], **LONG)
    assert essence(answers[1:]) == essence([decoder.generate(c, "dog ?", **LONG)])
    assert essence(answers[:1]) == essence(decoder.generate([[a, b]], ["describe the two picture"], **LONG))
    swapped = decoder.generate([[b, a]], ["describe the two picture"], **LONG)
    assert swapped[0].token_ids != answers[0].token_ids


def test_a_prompt_without_an_image(decoder: Decoder, pictures: list[Image.Image]) -> None:
    alone = decoder.generate(None, "describe a dog please", **LONG)
    both = decoder.generate([None, pictures[0], []], ["describe a dog please"] * 3, **LONG)
    assert essence(both[:1]) == essence(both[2:]) == essence([alone])
    assert both[1].token_ids != alone.token_ids


def test_generation_arguments_reach_the_model(
    decoder: Decoder, pictures: list[Image.Image], questions: list[str]
) -> None:
    greedy = decoder.generate(pictures, questions, **LONG)
    beams = decoder.generate(pictures, questions, num_beams=3, **LONG)
    assert essence(beams) != essence(greedy)
    pairs = zip(pictures, questions, strict=True)
    assert essence(beams) == essence([decoder.generate(i, q, num_beams=3, **LONG) for i, q in pairs])
    assert all(len(a.token_ids) == 3 for a in decoder.generate(pictures, questions, max_new_tokens=3, min_new_tokens=3))
    banned = decoder.generate(pictures[0], questions[0], bad_words_ids=[[n] for n in greedy[0].token_ids], **LONG)
    assert not set(banned.token_ids) & set(greedy[0].token_ids)


def test_a_generation_config_is_taken_as_it_is(decoder: Decoder, pictures: list[Image.Image]) -> None:
    config = type(decoder.model.generation_config)(do_sample=True, temperature=5.0, eos_token_id=2, pad_token_id=0)
    hot = [decoder.generate(pictures[0], "dog ?", generation_config=config, seed=s, **LONG).text for s in range(3)]
    assert len(set(hot)) == 3


class StopAt(StoppingCriteria):  # type: ignore[misc]
    """Ends every row that has just said a word; what a stop string does."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] == self.token


def test_rows_that_a_criterion_ends_are_cut(
    decoder: Decoder, pictures: list[Image.Image], questions: list[str]
) -> None:
    plain = decoder.generate(pictures, questions, **LONG)
    word = plain[0].token_ids[1]
    ended = decoder.generate(pictures, questions, stopping_criteria=StoppingCriteriaList([StopAt(word)]), **LONG)
    for before, after in zip(plain, ended, strict=True):
        place = before.token_ids.index(word) + 1 if word in before.token_ids else 12
        assert after.token_ids == before.token_ids[:place]
        assert after.finish_reason == ("stop" if place < 12 else before.finish_reason)
    assert len({len(a.token_ids) for a in ended}) > 1


def test_stop_strings_bring_their_tokenizer(decoder: Decoder) -> None:
    chosen = plan(decoder.model, decoder.processor, 5, None, None, {"stop_strings": ["."]})
    assert chosen.kwargs["tokenizer"] is decoder.processor.tokenizer


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "prompt", "words"),
    [
        (["a", "b"], ["x", "y", "z"], "2 images and 3 prompts"),
        (["a"], ["x", "y"], "1 images and 2 prompts"),
        (None, "", "prompt is empty"),
        (None, " \n\t", "prompt is empty"),
        (None, ["dog ?", " "], "item 1 of 2 is empty"),
        (None, 5, "int"),
        (None, None, "NoneType"),
        (None, ["dog", None], "item 1 of 2 is a NoneType"),
        (None, "a \ud800 b", "Unicode"),
        (None, "is <image> a cat", "image token '<image>'"),
        (None, ["cat", "is <image> a cat"], "item 1 of 2 holds the image token"),
    ],
)
def test_bad_prompts(decoder: Decoder, image: Any, prompt: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        decoder.generate(image, prompt, **LONG)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
        ({"max_new_tokens": None}, "max_new_tokens=None"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": "x"}, "seed='x'"),
        ({"max_length": 5}, "max_new_tokens"),
        ({"streamer": 1}, "stream()"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"input_ids": 1}, "image and prompt"),
        ({"return_dict_in_generate": True}, "stream()"),
        ({"temprature": 0.5}, "'temprature'"),
    ],
)
def test_bad_arguments(decoder: Decoder, kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        decoder.generate(picture(0), "dog ?", **kwargs)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)


def test_a_bad_image_is_named_by_its_place(decoder: Decoder, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"^item 1 of 2: image '.*none\.png' does not exist"):
        decoder.generate([picture(0), tmp_path / "none.png"], "dog ?", **LONG)
    with pytest.raises(ImageError, match=r"^image '.*none\.png' does not exist"):
        decoder.generate(tmp_path / "none.png", "dog ?", **LONG)


def test_after_a_failed_call_everything_works(decoder: Decoder, pictures: list[Image.Image], tmp_path: Path) -> None:
    mitigated = decoder.with_method("vhr")
    expected = decoder.generate(pictures[0], "dog ?", **LONG).token_ids
    for image, kwargs in ((tmp_path / "none.png", {}), (pictures[0], {"typo": 1})):
        with pytest.raises(MmfixError):
            mitigated.generate([pictures[0], image], "dog ?", batch_size=1, **kwargs, **LONG)
    assert decoder.generate(pictures[0], "dog ?", **LONG).token_ids == expected


# -- other checkpoints ------------------------------------------------------------------------------------------------


def test_without_a_chat_template(decoder: Decoder, pictures: list[Image.Image]) -> None:
    bare = Decoder(decoder.model, make_processor(template=None))
    answers = bare.generate([pictures[0], None], ["dog ?", "a cat"], **LONG)
    texts = ["<image>\ndog ?", "a cat"]
    for answer, text, image in zip(answers, texts, [pictures[0], None], strict=True):
        inputs = bare.processor(text=text, images=image, return_tensors="pt")
        row = bare.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer.token_ids == cut(row.tolist(), {2}, 0, 12)[0]


def test_with_the_tokenizers_template_only(decoder: Decoder) -> None:
    bare = Decoder(decoder.model, make_processor(template=None))
    bare.processor.tokenizer.chat_template = "USER: {{ messages[0]['content'] }} ASSISTANT:"
    other = Decoder(
        decoder.model, make_processor("USER: {{ '<image>' }}\n{{ messages[0].content[1].text }} ASSISTANT:")
    )
    assert essence([bare.generate(picture(0), "dog ?", **LONG)]) == essence(
        [other.generate(picture(0), "dog ?", **LONG)]
    )


def test_a_template_that_drops_the_image_is_refused(decoder: Decoder) -> None:
    blind = Decoder(decoder.model, make_processor("USER: {{ messages[0]['content'][-1]['text'] }} ASSISTANT:"))
    with pytest.raises((UnsupportedModel, ValueError)):
        blind.generate(picture(0), "dog ?", **LONG)


def test_a_tokenizer_without_padding(decoder: Decoder, pictures: list[Image.Image], questions: list[str]) -> None:
    processor = make_processor()
    processor.tokenizer.pad_token = None
    assert essence(Decoder(decoder.model, processor).generate(pictures, questions, **LONG)) == essence(
        decoder.generate(pictures, questions, **LONG)
    )


def test_a_checkpoint_that_names_no_end_token(pictures: list[Image.Image], questions: list[str]) -> None:
    """The tokenizer's end token is used; without it generate() would never stop."""
    model = make_model()
    expected = essence(Decoder(model, make_processor()).generate(pictures, questions, **LONG))
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    assert essence(Decoder(model, make_processor()).generate(pictures, questions, **LONG)) == expected


def test_a_checkpoints_sampling_defaults_do_not_break_greedy(pictures: list[Image.Image], questions: list[str]) -> None:
    model = make_model()
    expected = essence(Decoder(model, make_processor()).generate(pictures, questions, **LONG))
    model.generation_config.do_sample, model.generation_config.temperature = True, 3.0
    model.generation_config.top_p, model.generation_config.top_k = 0.9, 20
    assert essence(Decoder(model, make_processor()).generate(pictures, questions, **LONG)) == expected
