"""The judge's client against a server on 127.0.0.1: order, cache, retries, and a key that appears nowhere."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from mmfix_evals import files
from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.metrics import hallusionbench, judge, mmhal
from mmfix_evals.metrics.judge_cache import Cache, digest
from mmfix_evals.metrics.judge_http import JudgeError

KEY = "sk-test-0123456789abcdef"


class Server(HTTPServer):
    """Answers every prompt with "echo: …", after the failures that a test has put into `script`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Any] = []
        self.prompts: list[str] = []
        self.headers: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.headers.append(dict(self.headers))
        self.server.prompts.append(body["messages"][0]["content"])
        step = self.server.script.pop(0) if self.server.script else None
        if step == "drop":
            self.close_connection = True
            return
        answer: Any = {
            "model": f"{body['model']}-2026-01-01",
            "choices": [{"message": {"content": f"echo: {self.server.prompts[-1]}"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 3},
        }
        status, headers, content = (200, {}, json.dumps(answer)) if step is None else step
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MMFIX_TEST_KEY", KEY)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing for this machine may go through a proxy
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def endpoint(server: Server, **own: Any) -> judge.Endpoint:
    return judge.Endpoint(server.url, "fake", **{"key_variable": "MMFIX_TEST_KEY", "timeout": 30.0, **own})


def test_replies_in_order_equal_prompts_once(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    replies = judge.ask(endpoint(server), ["b", "a", "b"], tmp_path / "c.jsonl", lambda *step: seen.append(step))
    assert [reply.text for reply in replies] == ["echo: b", "echo: a", "echo: b"]
    assert [reply.cached for reply in replies] == [False, False, True]
    assert server.prompts == ["b", "a"]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert (replies[0].model, replies[0].finish_reason, replies[0].usage) == (
        "fake-2026-01-01",
        "stop",
        {"prompt_tokens": 3},
    )
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_what_is_answered_is_never_asked_again(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "c.jsonl"
    first = judge.ask(endpoint(server), ["a", "é \ud800"], cache)
    monkeypatch.delenv("MMFIX_TEST_KEY")  # nothing is sent, so no key is needed
    again = judge.ask(endpoint(server), ["a", "é \ud800"], cache)
    assert [reply.text for reply in again] == [reply.text for reply in first]
    assert len(server.prompts) == 2
    with pytest.raises(UsageError, match="MMFIX_TEST_KEY is not set"):
        judge.ask(endpoint(server, temperature=0.5), ["a"], cache)  # another request, another key of the cache


def test_a_stopped_run_continues(server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "c.jsonl"
    server.script = [None, None, (400, {}, "bad")]
    with pytest.raises(JudgeError, match="400"):
        judge.ask(endpoint(server), ["a", "b", "c", "d"], cache)
    with open(cache, "ab") as stream:
        stream.write(b'{"key": "torn')  # as if the machine had stopped in mid-write
    replies = judge.ask(endpoint(server), ["a", "b", "c", "d"], cache)
    assert [reply.text for reply in replies] == [f"echo: {prompt}" for prompt in "abcd"]
    assert server.prompts == ["a", "b", "c", "c", "d"]
    assert len(files.read_rows(cache)) == 4


def test_the_plan_shows_calls_and_cost_without_sending(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "c.jsonl"
    chosen = endpoint(server, max_tokens=100, price_in=10.0, price_out=30.0)
    judge.ask(chosen, ["old"], cache)
    monkeypatch.delenv("MMFIX_TEST_KEY")
    found = judge.plan(chosen, ["old", "n" * 400, "n" * 400, "m" * 3], cache)
    assert (found.prompts, found.repeated, found.cached, found.calls) == (4, 1, 1, 2)
    assert (found.tokens_in, found.tokens_out_at_most) == (101, 200)
    assert found.cost_at_most == pytest.approx((101 * 10 + 200 * 30) / 1e6)
    assert "2 calls to fake at http://127.0.0.1" in str(found)
    assert judge.plan(endpoint(server), ["x"], cache).cost_at_most is None
    assert len(server.prompts) == 1


def test_retries_wait_and_end(server: Server, tmp_path: Path) -> None:
    waits: list[float] = []
    server.script = [
        (429, {"Retry-After": "7"}, "slow down"),
        (503, {"Retry-After": "soon"}, "busy"),
        (500, {"Retry-After": "9999"}, "oops"),
        "drop",
    ]
    replies = judge.ask(endpoint(server), ["a"], tmp_path / "c.jsonl", sleep=waits.append)
    assert replies[0].text == "echo: a"
    assert waits == [7.0, 2.0, 60.0, 8.0]
    server.script = [(502, {}, "gone")] * 9
    waits.clear()
    with pytest.raises(JudgeError, match=r"failed 3 times, last with 502 .*gone; run again to continue"):
        judge.ask(endpoint(server, retries=2), ["b"], tmp_path / "c.jsonl", sleep=waits.append)
    assert waits == [1.0, 2.0]
    assert len(server.script) == 6


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ((401, {}, f"wrong key {KEY}"), r"401 .*wrong key \*\*\*; check the key"),
        ((302, {"Location": "http://127.0.0.1:9/v1"}, ""), "302 .*redirects are not followed"),
        ((404, {}, "no such model"), "404 .*no such model; check URL, model"),
        ((200, {}, "<html>"), "no JSON object: '<html>'"),
        ((200, {}, "[1]"), "no JSON object"),
        ((200, {}, '{"choices": []}'), "no text in the reply to prompt 1"),
        ((200, {}, '{"choices": [{"message": {"content": null}}]}'), "no text in the reply to prompt 1"),
    ],
)
def test_what_cannot_help_is_not_repeated(server: Server, tmp_path: Path, step: tuple, message: str) -> None:
    server.script = [step]
    waits: list[float] = []
    with pytest.raises(JudgeError, match=message) as caught:
        judge.ask(endpoint(server), ["a"], tmp_path / "c.jsonl", sleep=waits.append)
    assert KEY not in str(caught.value)
    assert waits == []
    assert len(server.prompts) == 1


def test_the_key_is_written_nowhere(server: Server, tmp_path: Path) -> None:
    server.script = [(200, {}, json.dumps({"choices": [{"message": {"content": f"your key is {KEY}"}}]}))]
    chosen = endpoint(server)
    replies = judge.ask(chosen, ["a", "b"], tmp_path / "c.jsonl")
    judge.write_replies(tmp_path / "r.jsonl", [{"i": 0}, {"i": 1}], replies)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()
    assert KEY not in repr((chosen, chosen.describe(), chosen.request("a"), replies, judge.plan(chosen, ["z"], "c")))
    assert replies[0].text == "your key is ***"


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/v1",
        "/etc/passwd",
        "file:///etc/passwd",
        "https://user:secret@host/v1",
        "https://host/v1?api-key=secret",
        "http://example.org/v1",
    ],
)
def test_urls_that_could_leak_are_refused(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        judge.Endpoint(url, "m")
    assert "secret" not in str(caught.value)


def test_endpoints_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge.Endpoint("http://gpu-box/v1", "m", key_variable=None).describe()["url"] == "http://gpu-box/v1"
    for own in ({"model": ""}, {"max_tokens": 0}, {"retries": 99}, {"timeout": 0.0}):
        with pytest.raises(UsageError, match="the judge needs"):
            judge.Endpoint(**{"url": "https://host/v1", "model": "m", **own})
    body = judge.Endpoint("https://h/v1/", "m", options={"max_tokens": None, "seed": 1}).request("p")
    assert body == {
        "url": "https://h/v1/chat/completions",
        "body": {"model": "m", "messages": [{"role": "user", "content": "p"}], "temperature": 0.0, "seed": 1},
    }
    monkeypatch.setenv("BAD_KEY", "two\nlines")
    with pytest.raises(UsageError, match="characters that no key has") as caught:
        judge.ask(judge.Endpoint("https://h/v1", "m", key_variable="BAD_KEY"), ["p"], "never-made.jsonl")
    assert "lines" not in str(caught.value)


def test_no_key_is_sent_where_none_is_named(server: Server, tmp_path: Path) -> None:
    judge.ask(endpoint(server, key_variable=None), ["a"], tmp_path / "c.jsonl")
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize("line", ["not json", "[]", '{"key": "k", "text": "t", "request": {}}'])
def test_a_broken_cache_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "c.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(DataError, match=r"c\.jsonl, line 2: no record"):
        Cache(tmp_path / "c.jsonl")


def test_an_edited_request_is_noticed(tmp_path: Path) -> None:
    request = {"url": "u", "body": {"a": 1}}
    cache = Cache(tmp_path / "sub/c.jsonl")
    cache.add({"key": digest(request), "text": "t", "request": request})
    assert Cache(cache.path).get(digest(request)) is not None
    cache.path.write_text(cache.path.read_text().replace('"a": 1', '"a": 2'))
    with pytest.raises(DataError, match="line 1"):
        Cache(cache.path)


def test_benchmarks_with_a_judge(server: Server, tmp_path: Path) -> None:
    answer = {"choices": [{"message": {"content": "Fine.\nRating: 5"}}], "model": "j-1"}
    server.script = [(200, {}, json.dumps(answer))] * 2
    record = {"image_id": "1", "image_content": ["Dog"], "question": "?", "gt_answer": "g", "model_answer": "m"}
    responses = tmp_path / "r.json"
    responses.write_text(json.dumps([record, {**record, "model_answer": "n"}]))
    mmhal.judge_files(responses, tmp_path / "j.jsonl", endpoint(server), tmp_path / "c.jsonl")
    found = mmhal.score_files(responses, tmp_path / "j.jsonl")
    assert (found["score"], found["judges"]) == (5.0, ["j-1"])

    ids = {"category": "VD", "subcategory": "c", "set_id": "0", "figure_id": "0", "question_id": "0"}
    row = {**ids, "visual_input": "1", "question": "Is it?", "gt_answer": "1", "gt_answer_details": "It is."}
    responses.write_text(json.dumps([{**row, "model_prediction": "Indeed."}]))
    server.script = [
        (200, {}, json.dumps({"choices": [{"message": {"content": word}}]})) for word in ("Correct", "same")
    ]
    for what in ("verdicts", "same"):
        hallusionbench.judge_files(responses, tmp_path / what, endpoint(server), tmp_path / "c.jsonl", what)
    judged = hallusionbench.score_files(responses, "judge", tmp_path / "verdicts", tmp_path / "same")
    assert (judged["aAcc"], judged["error_analysis"]["VI"]) == (1.0, 0)
    with pytest.raises(UsageError, match="'verdicts' or 'same'"):
        hallusionbench.judge_files(responses, tmp_path / "x", endpoint(server), tmp_path / "c.jsonl", "all")


def test_the_command_shows_the_cost_before_it_sends(server: Server, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from mmfix_evals.cli.app import app

    record = {"image_id": "1", "image_content": ["Dog"], "question": "?", "gt_answer": "g", "model_answer": "m"}
    responses, out = tmp_path / "r.json", tmp_path / "j.jsonl"
    responses.write_text(json.dumps([record, {**record, "model_answer": "n"}]))
    words = ["eval", "judge", "mmhal", "--responses", str(responses), "--url", server.url, "--model", "fake", "--out",
             str(out), "--key-variable", "MMFIX_TEST_KEY", "--price-in", "10", "--price-out", "30"]  # fmt: skip
    with pytest.raises(UsageError, match="nothing was sent: add --yes"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert server.prompts == []
    answer = {"choices": [{"message": {"content": "Fine.\nRating: 4"}}], "model": "j-1"}
    server.script = [(200, {}, json.dumps(answer))] * 2
    done = CliRunner().invoke(app, [*words, "--yes"], catch_exceptions=False)
    assert "2 calls to fake" in done.stderr
    assert "cost about" in done.stderr
    assert len(server.prompts) == 2
    scored = ["eval", "score", "mmhal", "--responses", str(responses), "--replies", str(out), "--json"]
    found = json.loads(CliRunner().invoke(app, scored, catch_exceptions=False).stdout)
    assert (found["score"], found["judges"]) == (4.0, ["j-1"])
    CliRunner().invoke(app, words, catch_exceptions=False)  # all answered: nothing to send, no yes needed
    assert len(server.prompts) == 2
    assert all(prompt in (tmp_path / "j.jsonl.cache.jsonl").read_text() for prompt in ("Rating: 4", '"fake"'))
    assert KEY not in (tmp_path / "j.jsonl.cache.jsonl").read_text() + out.read_text()
