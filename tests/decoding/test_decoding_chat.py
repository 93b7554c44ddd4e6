"""chat: conversations with a system message, earlier turns and pictures between the texts."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image
from small_llava import make_processor

from mmfix.errors import UsageError
from mmfix_decoding import Decoder
from mmfix_decoding.conversation import PromptTooLong, conversation, render

ROLES = (
    "{% for m in messages %}[{{ m['role'] }}]{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}|{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SHOT: dict[str, Any] = {"type": "image", "image": "unread.png"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize("kwargs", [{}, {"do_sample": True, "temperature": 2.0, "seed": 3}], ids=["greedy", "sampled"])
def test_one_turn_gives_the_tokens_of_stream(
    decoder: Decoder, pictures: list[Image.Image], kwargs: dict[str, Any]
) -> None:
    both = [{"type": "image", "image": one} for one in pictures[:2]]
    expected = list(decoder.stream(pictures[:2], "is there a cat ?", max_new_tokens=8, **kwargs))
    found = list(decoder.chat([user(*both, text("is there a cat ?"))], max_new_tokens=8, **kwargs))
    assert [event.token_id for event in found] == [event.token_id for event in expected]
    assert len(found) > 1


def test_earlier_turns_and_their_pictures_matter(decoder: Decoder, pictures: list[Image.Image]) -> None:
    def logprobs(shown: Image.Image, said: str) -> list[float]:
        talk = [
            user({"type": "image", "image": shown}, text("is there a cat ?")),
            {"role": "assistant", "content": said},
            user(text("dog ?")),
        ]
        return [event.logprob for event in decoder.chat(talk, max_new_tokens=3)]

    base = logprobs(pictures[0], "yes")
    assert base == logprobs(pictures[0], "yes")
    assert base != logprobs(pictures[1], "yes")
    assert base != logprobs(pictures[0], "no")


def test_parts_keep_their_order() -> None:
    talk = conversation(
        [user(text("a"), SHOT, text("b"), SHOT), {"role": "assistant", "content": "yes"}, user(text("dog ?"))]
    )
    shown = render(talk, make_processor(ROLES), "<image>")
    assert shown == "[user]a|<image>|b|<image>|[assistant]yes|[user]dog ?|[assistant]"
    assert talk.sources == ("unread.png", "unread.png")


def test_a_system_message_goes_where_the_template_wants_it() -> None:
    talk = conversation([{"role": "system", "content": "please"}, user(SHOT, text("dog ?"))])
    knows = "{# system #}" + ROLES
    assert render(talk, make_processor(knows), "<image>") == "[system]please|[user]<image>|dog ?|[assistant]"
    assert render(talk, make_processor(ROLES), "<image>") == "[user]<image>|please\ndog ?|[assistant]"
    assert render(talk, make_processor(None), "<image>") == "<image>\nplease\ndog ?"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "does not end with a user message"),
        ([user(text("a")), {"role": "assistant", "content": "b"}], "does not end with a user message"),
        ([{"role": "tool", "content": "a"}], "role 'tool'"),
        ([user(text("a")), {"role": "system", "content": "b"}, user(text("c"))], "must be the first"),
        ([{"role": "system", "content": [SHOT]}, user(text("c"))], "holds an image"),
        ([user(SHOT)], "has no text"),
        ([user(text(" "))], "has no text"),
        ([user(text("\ud800"))], "lone surrogate"),
        ([{"role": "user", "content": []}], "neither text nor a list"),
        ([user({"type": "video"})], "holds a part"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: list[Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        conversation(messages)


def test_rendering_refuses_what_the_model_has_no_form_for() -> None:
    several = conversation([user(text("a")), {"role": "assistant", "content": "b <image>"}, user(text("c"))])
    with pytest.raises(UsageError, match="image token"):
        render(several, make_processor(ROLES), "<image>")
    several = conversation([user(text("a")), {"role": "assistant", "content": "b"}, user(text("c"))])
    with pytest.raises(UsageError, match="no chat template"):
        render(several, make_processor(None), "<image>")
    with pytest.raises(UsageError, match="refuses this conversation: roles must alternate"):
        render(several, make_processor("{{ raise_exception('roles must alternate') }}"), "<image>")


def test_a_prompt_above_the_limit_is_refused_before_anything_is_computed(
    decoder: Decoder, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = [user({"type": "image", "image": pictures[0]}, text("dog ?"))]
    stream = decoder.chat(talk, max_new_tokens=2)
    list(stream)
    tokens = decoder.processor(text="<s> USER: <image> dog ? ASSISTANT:", images=pictures[0])["input_ids"]
    count = len(tokens[0])
    assert list(decoder.chat(talk, max_new_tokens=2, max_prompt_tokens=count))
    monkeypatch.setattr(type(decoder.model), "forward", None)
    with pytest.raises(PromptTooLong) as refused:
        next(decoder.chat(talk, max_new_tokens=2, max_prompt_tokens=count - 1))
    assert (refused.value.tokens, refused.value.limit) == (count, count - 1)
