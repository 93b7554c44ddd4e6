"""The server as OpenAI's own client sees it."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from serving import PICTURE, PROMPT, data_url, serving, shown

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

from mmfix_decoding import Decoder  # noqa: E402
from mmfix_evals.arms import resolve  # noqa: E402


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.from_pretrained("tiny")


@pytest.fixture(scope="module")
def url(decoder: Decoder) -> Iterator[str]:
    with serving(decoder, "vhr", ("greedy", "var", "causalmm:*"), max_tokens=64, max_images=3) as (_, url):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def ask(client: Any, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": shown(), **more})


def test_models_are_listed_and_found(client: Any) -> None:
    names = ["tiny", "tiny:vhr", "tiny:greedy", "tiny:var", "tiny:causalmm"]
    assert [one.id for one in client.models.list()] == names
    assert client.models.retrieve("tiny:var").id == "tiny:var"
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.models.retrieve("tiny:plausibility")


@pytest.mark.parametrize(
    ("more", "method"),
    [
        ({}, "vhr"),
        ({"model": "tiny:vhr"}, "vhr"),
        ({"model": "tiny:greedy"}, "greedy"),
        ({"extra_body": {"mmfix": {"method": "greedy"}}}, "greedy"),
        ({"extra_body": {"mmfix": {"method": "vhr", "params": {"alpha": 2.0}}}}, "vhr"),
        ({"extra_body": {"mmfix": {"method": "causalmm", "params": {"gamma": 0.5}}}}, "causalmm:gamma=0.5"),
    ],
)
def test_the_answer_is_the_decoders_with_the_method_asked_for(
    client: Any, decoder: Decoder, more: dict[str, Any], method: str
) -> None:
    arm = resolve(method, decoder.model)
    expected = decoder.with_method(list(arm.methods) or None).generate(PICTURE, PROMPT, max_new_tokens=64)
    found = ask(client, **more)
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].finish_reason == expected.finish_reason == "stop"
    assert found.usage.completion_tokens == len(expected.token_ids)
    assert found.usage.prompt_tokens == found.usage.total_tokens - len(expected.token_ids)
    assert found.model_extra["mmfix"]["methods"] == list(arm.spec)
    assert found.model_extra["mmfix"]["fired"] == ((expected.report or {}).get("fired") or {})


def test_the_methods_differ(client: Any) -> None:
    """Otherwise the test before could not tell them apart."""
    one, other = (ask(client, model=f"tiny:{name}").choices[0].message.content for name in ("vhr", "greedy"))
    assert one != other


def test_prompt_tokens_count_the_image(client: Any, decoder: Decoder) -> None:
    inputs = decoder.processor(text=f"USER: <image>\n{PROMPT} ASSISTANT:", images=_image(), return_tensors="pt")
    assert ask(client, max_tokens=1).usage.prompt_tokens == inputs["input_ids"].shape[1]


def _image() -> Any:
    from PIL import Image

    return Image.open(PICTURE).convert("RGB")


def test_a_stream_is_the_answer_in_pieces(client: Any) -> None:
    whole = ask(client, logprobs=True)
    chunks = list(ask(client, stream=True, logprobs=True, stream_options={"include_usage": True}))
    body, last = chunks[:-1], chunks[-1]
    assert body[0].choices[0].delta.role == "assistant"
    assert len(body) > 5
    assert "".join(one.choices[0].delta.content or "" for one in body) == whole.choices[0].message.content
    assert [one.choices[0].finish_reason for one in body] == [None] * (len(body) - 1) + ["stop"]
    assert (last.choices, last.usage) == ([], whole.usage)
    assert body[-1].model_extra["mmfix"] == whole.model_extra["mmfix"]
    assert len({one.id for one in chunks}) == 1
    tokens = [token for one in body if one.choices[0].logprobs for token in one.choices[0].logprobs.content]
    assert tokens == whole.choices[0].logprobs.content
    assert all(one.usage is None for one in ask(client, stream=True, max_tokens=2))


def test_logprobs_are_those_of_the_tokens(client: Any, decoder: Decoder) -> None:
    events = list(decoder.with_method("vhr").stream(PICTURE, PROMPT, max_new_tokens=6, telemetry=False))
    found = ask(client, logprobs=True, max_tokens=6).choices[0].logprobs.content
    assert [one.logprob for one in found] == pytest.approx([event.logprob for event in events], abs=1e-5)
    assert "".join(one.token for one in found).replace(" ", "") == "".join(e.text for e in events).replace(" ", "")


def test_length_and_stop(client: Any) -> None:
    whole = ask(client).choices[0].message.content
    cut = ask(client, max_completion_tokens=3)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 3)
    assert whole.startswith(cut.choices[0].message.content)
    word = whole.split()[4]
    stopped = ask(client, stop=["never said", word])
    assert stopped.choices[0].message.content == whole[: whole.index(word)]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < len(whole.split())
    pieces = [one.choices[0].delta.content or "" for one in ask(client, stop=word, stream=True)]
    assert "".join(pieces) == whole[: whole.index(word)]


def test_sampling_repeats_with_its_seed_and_equals_the_decoders(client: Any, decoder: Decoder) -> None:
    hot = {"temperature": 1.8, "top_p": 0.95, "max_tokens": 24}
    texts = [ask(client, seed=seed, **hot).choices[0].message.content for seed in (1, 1, 2, -1)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    kwargs = {"do_sample": True, "temperature": 1.8, "top_p": 0.95, "top_k": 0, "max_new_tokens": 24}
    assert texts[0] == decoder.with_method("vhr").generate(PICTURE, PROMPT, seed=1, **kwargs).text
    unseeded = {ask(client, **hot).choices[0].message.content for _ in range(4)}
    assert len(unseeded) > 1
    greedy = [ask(client, **more).choices[0].message.content for more in ({}, {"temperature": 0, "seed": 5})]
    assert greedy[0] == greedy[1]


def test_several_pictures_turns_and_a_system_message(client: Any, decoder: Decoder) -> None:
    parts = shown("is there a dog?", 2)[0]["content"]
    talk = [
        {"role": "system", "content": "answer with yes or no."},
        {"role": "user", "content": [parts[0], parts[2]]},
        {"role": "assistant", "content": "yes."},
        {"role": "user", "content": parts},
    ]
    found = ask(client, messages=talk, max_tokens=5, model="tiny:greedy")
    source = {"type": "image", "image": PICTURE}
    text = {"type": "text", "text": "is there a dog?"}
    same = [
        {"role": "system", "content": "answer with yes or no."},
        {"role": "user", "content": [source, text]},
        {"role": "assistant", "content": "yes."},
        {"role": "user", "content": [source, source, text]},
    ]
    expected = "".join(event.text for event in decoder.chat(same, max_new_tokens=5)).strip()
    assert found.choices[0].message.content == expected
    single = ask(client, messages=talk[3:], max_tokens=5, model="tiny:greedy")
    assert found.usage.prompt_tokens > single.usage.prompt_tokens + 64  # the earlier picture was read


def test_text_alone_is_answered(client: Any) -> None:
    answer = ask(client, messages=[{"role": "user", "content": "Is there a dog in the image?"}], model="tiny:greedy")
    assert answer.choices[0].message.content


BAD, UNKNOWN, DENIED = openai.BadRequestError, openai.NotFoundError, openai.PermissionDeniedError
URL = "messages[0].content[0].image_url.url"


def method(text: str) -> dict[str, Any]:
    return {"extra_body": {"mmfix": {"method": text}}}


REFUSED: list[tuple[dict[str, Any], type[Exception], str, str | None]] = [
    ({"model": "gpt-4o"}, UNKNOWN, "model_not_found", "model"),
    ({"model": "tiny:plausibility"}, UNKNOWN, "model_not_found", "model"),
    (method("plausibility"), DENIED, "method_not_allowed", "mmfix.method"),
    (method("vhr:alpha=3"), DENIED, "method_not_allowed", "mmfix.method"),
    (method("causalmm+vhr"), DENIED, "method_not_allowed", "mmfix.method"),
    (method("nonsense"), BAD, "invalid_method", "mmfix.method"),
    (method("causalmm:gamma=-5"), BAD, "invalid_method", "mmfix.method"),
    ({"model": "tiny:var", **method("vhr")}, BAD, "invalid_value", "mmfix"),
    ({"max_tokens": 65}, BAD, "max_tokens_exceeded", "max_tokens"),
    ({"messages": shown(count=4)}, BAD, "too_many_images", "messages"),
    ({"messages": shown("dog " * 2000)}, BAD, "context_length_exceeded", "messages"),
    ({"messages": shown("dog " * 20000)}, BAD, "context_length_exceeded", "messages"),
    ({"messages": shown(url="https://example.org/a.png")}, BAD, "remote_images_disabled", URL),
    ({"messages": shown(url="file:///etc/passwd")}, BAD, "invalid_value", URL),
    ({"messages": shown(url="data:image/png;base64,AAAA")}, BAD, "invalid_image", "messages"),
    ({"messages": [{"role": "user", "content": "<image> what?"}]}, BAD, "invalid_request", None),
    ({"messages": [*shown(), {"role": "assistant", "content": "a"}]}, BAD, "invalid_request", None),
    ({"n": 2}, BAD, "unsupported_value", "n"),
    ({"extra_body": {"nonsense": 1}}, BAD, "unknown_parameter", "nonsense"),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_refusals_are_openai_errors_and_leave_the_server_well(client: Any, stream: bool) -> None:
    for more, kind, code, param in REFUSED:
        with pytest.raises(kind) as refused:
            ask(client, stream=stream, **more)
        assert (refused.value.code, refused.value.param) == (code, param), more
        assert refused.value.type == "invalid_request_error"
        assert len(str(refused.value.body["message"])) > 15
    assert ask(client, max_tokens=1).usage.completion_tokens == 1


def test_raw_mistakes(url: str) -> None:
    def post(body: bytes, path: str = "/v1/chat/completions", kind: str = "application/json") -> tuple[int, Any]:
        request = urllib.request.Request(url + path, body, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]["code"]

    assert post(b"{") == (400, "invalid_json")
    assert post(b"[]") == (400, "invalid_json")
    assert post(b"\xff") == (400, "invalid_json")
    assert post(b'{"temperature": NaN}') == (400, "invalid_json")
    assert post(b"[" * 200_000) == (400, "invalid_json")
    assert post(b"{}") == (400, "invalid_value")
    assert post(b"{}", kind="text/plain") == (415, "unsupported_media_type")
    assert post(b"{}", "/v1/completions") == (404, "not_found")
    assert post(b"{}", "/v1/models") == (405, "method_not_allowed")
    lone = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "\ud800"}]}).encode()
    assert post(lone) == (400, "invalid_request")
    good = json.dumps({"model": "tiny", "messages": shown(url=data_url()), "max_tokens": 1, "user": "me", "stop": None})
    assert post(good.encode(), kind="application/json; charset=utf-8")[0] == 200
