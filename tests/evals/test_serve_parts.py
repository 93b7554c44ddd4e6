"""The parts of the server that need no model: texts and stops, fields, addresses, settings."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfix_evals.cli import main
from mmfix_evals.errors import UsageError
from mmfix_evals.serve.catalogue import Catalogue
from mmfix_evals.serve.chat_request import parse
from mmfix_evals.serve.errors import ApiError
from mmfix_evals.serve.fetch import Fetcher, is_public
from mmfix_evals.serve.metrics import Counter, Histogram
from mmfix_evals.serve.pictures import Pictures
from mmfix_evals.serve.settings import Settings, check_exposure, read_api_key
from mmfix_evals.serve.stops import Text

PIECES = st.lists(st.text("ab \n.", max_size=4), max_size=12)
STOPS = st.lists(st.text("ab \n.", min_size=1, max_size=3), max_size=3)


@settings(max_examples=300, deadline=None)
@given(PIECES, STOPS)
def test_text_equals_cutting_afterwards(pieces: list[str], stops: list[str]) -> None:
    text = Text(stops)
    sent = [text.add(piece) for piece in pieces] + [text.finish()]
    whole = "".join(pieces).lstrip()
    places = [whole.find(stop) for stop in stops if stop in whole]
    assert "".join(sent) == (whole[: min(places)] if places else whole.rstrip())
    assert text.stopped == bool(places)


def test_text_is_sent_as_soon_as_it_is_certain() -> None:
    text = Text(["END"])
    assert [text.add(piece) for piece in (" the", " E", "N", "T", " ", "E")] == ["the", " ", "", "ENT", "", " "]
    assert text.finish() == "E"


def fields(**more: Any) -> Any:
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], **more}
    limits = Settings(name="m", max_tokens=50)
    return parse(json.dumps(body).encode(), Catalogue("m", "vhr", ["greedy"]), limits, Pictures(limits, None))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, {"do_sample": False}),
        ({"temperature": 0, "top_p": 0.5}, {"do_sample": False}),
        ({"temperature": 0.5}, {"do_sample": True, "temperature": 0.5, "top_p": 1.0, "top_k": 0}),
        ({"temperature": 1, "top_p": 0.5, "top_k": 3}, {"do_sample": True, "temperature": 1, "top_p": 0.5, "top_k": 3}),
        ({"repetition_penalty": 1.2}, {"do_sample": False, "repetition_penalty": 1.2}),
    ],
)
def test_sampling_fields(more: dict[str, Any], expected: dict[str, Any]) -> None:
    found = fields(**more)
    assert found.generation == expected
    assert (found.seed is None) == (not expected["do_sample"])


def test_other_fields() -> None:
    assert (fields().max_new_tokens, fields().explicit) == (50, False)
    assert (fields(max_completion_tokens=7).max_new_tokens, fields(max_tokens=7).explicit) == (7, True)
    assert fields(temperature=1, seed=3).seed == fields(temperature=1, seed=3 - 2**63).seed == 3
    assert fields(stop="x").stop == ("x",)
    assert fields(n=1, presence_penalty=0.0, tools=[], user="u", logit_bias=None).arm.name == "vhr"
    developer = fields(messages=[{"role": "developer", "content": "s"}, {"role": "user", "content": "a"}])
    assert developer.messages[0]["role"] == "system"


def said(content: Any, role: Any = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}]}


WRONG: list[dict[str, Any]] = [
    {"model": 3}, {"model": ""}, {"messages": []}, {"messages": "a"}, {"messages": [3]}, said("a", "tool"), said(None),
    said([{"type": "input_audio"}]), said("a", ["user"]), said([]),
    {"max_tokens": 0}, {"max_tokens": 1.5}, {"max_tokens": True}, {"max_tokens": 3, "max_completion_tokens": 4},
    {"temperature": -1}, {"temperature": "hot"}, {"temperature": True}, {"temperature": 10**400}, {"top_p": 1.5},
    {"top_p": 0, "temperature": 1}, {"seed": 1.5}, {"repetition_penalty": 0}, {"n": True}, {"n": 2},
    {"stop": ""}, {"stop": ["a"] * 5}, {"stop": [3]}, {"stop": "a" * 201},
    {"stream": "yes"}, {"stream_options": 3}, {"stream_options": {"include_usage": 1}}, {"logprobs": 1},
    {"mmfix": "vhr"}, {"mmfix": {"methods": "vhr"}}, {"mmfix": {"method": 3}}, {"mmfix": {"params": {"alpha": 2}}},
    {"mmfix": {"method": "vhr", "params": {"a b": 1}}}, {"mmfix": {"method": "vhr", "params": [1]}},
    {"mmfix": {"method": "vhr" * 500}}, {"top_logprobs": 3}, {"response_format": {"type": "json_object"}},
    {"tools": [{"type": "function"}]}, {"presence_penalty": 0.5}, {"logit_bias": {"1": 2}}, {"nonsense": 1},
]  # fmt: skip


@pytest.mark.parametrize("more", WRONG, ids=[json.dumps(one)[:40] for one in WRONG])
def test_wrong_fields_name_themselves(more: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refused:
        fields(**more)
    name = next(iter(more))
    assert refused.value.status == 400
    assert str(refused.value.param).startswith(name)
    assert name in str(refused.value)


@pytest.mark.parametrize(
    "url", ["data:image/png,abc", "data:text/plain;base64,YQ==", "data:image/png;base64,Y Q=", 3, None]
)
def test_wrong_images(url: Any) -> None:
    with pytest.raises(ApiError) as refused:
        fields(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
    assert str(refused.value.param).startswith("messages[0].content[0].image_url")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.5.5", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
        "255.255.255.255", "240.0.0.1", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1",
        "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:1::", "2001:db8::1",
    ],
)  # fmt: skip
def test_private_addresses(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "url", ["ftp://example.org/a", "http:///a", "http://[::1]/a", "http://127.0.0.1:22/", "http://a:b@1.1.1.1/",
            "http://0x7f.1/", "http://2130706433/", "http://localhost/", "http://127.0.0.1:99999/"]
)  # fmt: skip
def test_urls_that_are_not_followed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("connected")

    monkeypatch.setattr("socket.create_connection", never)
    with pytest.raises(ApiError) as refused:
        Fetcher(1000).fetch(url)
    assert refused.value.code == "image_fetch_failed"


def test_a_host_is_refused_if_one_of_its_addresses_is_private(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a name with two addresses would be a way in, and so would a second look-up."""
    asked = []

    def look_up(host: str, port: int, **more: Any) -> list[Any]:
        asked.append(host)
        return [(2, 1, 6, "", (address, port)) for address in ("8.8.8.8", "10.0.0.1")]

    monkeypatch.setattr("socket.getaddrinfo", look_up)
    with pytest.raises(ApiError, match="not public"):
        Fetcher(1000).fetch("http://example.org/a.png")
    assert asked == ["example.org"]


def test_counters_and_histograms_escape_and_add_up() -> None:
    counter = Counter("c", "help")
    counter.add(2, name='a"b\\c\nd')
    assert list(counter.lines())[-1] == r'c{name="a\"b\\c\nd"} 2'
    histogram = Histogram("h", "help", (1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert list(histogram.lines())[2:] == [
        'h_bucket{le="1"} 2',
        'h_bucket{le="2"} 3',
        'h_bucket{le="+Inf"} 4',
        "h_sum 12",
        "h_count 4",
    ]


def test_exposure_and_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        check_exposure(host, None, False)
    with pytest.raises(UsageError, match="--api-key-env"):
        check_exposure("0.0.0.0", None, False)
    check_exposure("0.0.0.0", "key", False)
    check_exposure("0.0.0.0", None, True)
    assert "hidden" not in repr(Settings(name="m", api_key="hidden"))
    monkeypatch.delenv("TOKEN_HERE", raising=False)
    for value in (None, "", "a b", "é"):
        if value is not None:
            monkeypatch.setenv("TOKEN_HERE", value)
        with pytest.raises(UsageError, match="TOKEN_HERE"):
            read_api_key("TOKEN_HERE")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--host", "0.0.0.0"], "--api-key-env"),
        (["--max-tokens", "0"], "--max-tokens 0"),
        (["--max-image-mb", "0"], "--max-image-mb 0"),
        (["--method", "nonsense"], "unknown method"),
        (["--allow", "vhr:alpha=-9"], "alpha"),
        (["--allow", "greedy:*"], "no parameters"),
        (["--api-key-env", "NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE"),
        (["--host", "256.1.1.1", "--allow-anyone"], "--host"),
    ],
)
def test_the_command_refuses_before_loading(words: list[str], says: str, capsys: Any, monkeypatch: Any) -> None:
    def never(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr("mmfix_decoding.Decoder.from_pretrained", never)
    assert main(["serve", *words]) in (1, 2)
    assert says in capsys.readouterr().err
