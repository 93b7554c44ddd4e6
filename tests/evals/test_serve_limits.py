"""The server under pressure: a full line, clients that leave, requests that are too large, strangers, stopping."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest
from serving import PICTURE, Pace, SlowDecoder, data_url, serving, shown, until

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

from mmfix_decoding import Decoder  # noqa: E402
from mmfix_evals.serve.fetch import Fetcher  # noqa: E402


@pytest.fixture(scope="module")
def loaded() -> Decoder:
    return Decoder.from_pretrained("tiny")


@pytest.fixture
def slow(loaded: Decoder) -> SlowDecoder:
    decoder = SlowDecoder(loaded.model, loaded.processor, model_id="tiny")
    decoder.pace = Pace()
    return decoder


def connect(url: str, **more: Any) -> Any:
    return openai.OpenAI(**{"base_url": f"{url}/v1", "api_key": "unused", "max_retries": 0, **more})


def ask(client: Any, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": shown(), "max_tokens": 2, **more})


def post(url: str, body: bytes, **headers: str) -> tuple[int, dict[str, str], Any]:
    """Status, headers and content of one raw request."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)
    try:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), json.loads(answer.read())
    finally:
        connection.close()


def page(url: str, path: str = "/metrics", **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url + path, headers=headers)) as answer:
        return str(answer.read().decode())


def metric(url: str, name: str) -> float:
    """A value of the metrics page; `name` as it stands there, labels included."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", page(url), re.M)
    return float(found[1]) if found else 0.0


def test_one_at_a_time_a_bounded_line_and_no_one_lost(slow: SlowDecoder) -> None:
    slow.pace.seconds = 0.05
    with serving(slow, "greedy", max_queue=2) as (_, url), ThreadPoolExecutor(3) as pool:
        clients = [connect(url) for _ in range(3)]
        done: list[int] = []

        def one(number: int) -> Any:
            answer = ask(clients[number], max_tokens=8, stream=number == 1)
            text = "".join(c.choices[0].delta.content or "" for c in answer) if number == 1 else answer
            done.append(number)
            return text

        futures = []
        for number in range(3):
            futures.append(pool.submit(one, number))
            until(lambda: metric(url, "mmfix_generating") + metric(url, "mmfix_queue_length") == len(futures))
        assert (metric(url, "mmfix_generating"), metric(url, "mmfix_queue_length")) == (1, 2)
        with pytest.raises(openai.RateLimitError) as refused:
            ask(connect(url))
        assert refused.value.code == "queue_full"
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
        answers = [future.result(30) for future in futures]
        assert done == [0, 1, 2]
        assert slow.pace.steps == 24  # nobody's tokens were computed twice or left out
        assert answers[0].choices[0].message.content == answers[1] == answers[2].choices[0].message.content
        until(lambda: metric(url, "mmfix_generating") == 0)
        assert metric(url, 'mmfix_errors_total{code="queue_full"}') == 1
        assert ask(clients[0]).usage.completion_tokens == 2


def test_the_official_client_waits_and_comes_again(slow: SlowDecoder) -> None:
    slow.pace.seconds = 0.05
    with serving(slow, "greedy", max_queue=0) as (_, url), ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, connect(url), max_tokens=8)
        assert slow.pace.begun.wait(10)
        assert ask(connect(url, max_retries=4)).usage.completion_tokens == 2
        assert first.result(30).usage.completion_tokens == 8


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_ends_its_generation(slow: SlowDecoder, stream: bool) -> None:
    slow.pace.seconds = 0.03
    with serving(slow, "vhr") as (_, url):
        body = {"model": "tiny", "messages": shown(), "max_tokens": 400, "stream": stream}
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        if stream:
            connection.getresponse().read(300)
        until(lambda: slow.pace.steps >= 3)
        connection.close()
        until(lambda: metric(url, "mmfix_generating") == 0)
        steps = slow.pace.steps
        assert steps < 200
        assert metric(url, 'mmfix_cancelled_total{method="vhr"}') == 1
        assert metric(url, 'mmfix_requests_total{method="vhr",status="499"}') == 1
        time.sleep(0.15)
        assert slow.pace.steps == steps
        assert ask(connect(url)).usage.completion_tokens == 2
    assert not any("_mmfix" in module.__dict__ for module in slow.model.modules())


def test_a_client_that_leaves_the_line_is_never_computed(slow: SlowDecoder) -> None:
    slow.pace.seconds = 0.05
    with serving(slow, "greedy") as (_, url), ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, connect(url), max_tokens=12)
        assert slow.pace.begun.wait(10)
        with pytest.raises(openai.APITimeoutError):
            ask(connect(url, timeout=0.2), max_tokens=400)
        until(lambda: metric(url, "mmfix_queue_length") == 0)
        first.result(30)
        assert slow.pace.steps == 12


def test_what_fails_is_told_without_internals_and_the_next_one_is_served(
    slow: SlowDecoder, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(slow, "vhr") as (_, url):
        client = connect(url)
        slow.pace.fail_at = 0
        with pytest.raises(openai.InternalServerError) as failed:
            ask(client)
        assert failed.value.code == "internal_error"
        assert "RuntimeError" in str(failed.value)
        assert "secret" not in str(failed.value.body)
        assert "secret path" in caplog.text
        slow.pace = slow.pace.__class__()
        slow.pace.fail_at, slow.pace.seconds = 4, 0.02
        with pytest.raises(openai.APIError, match="RuntimeError"):
            list(ask(client, stream=True, max_tokens=9))
        slow.pace.fail_at = -1
        assert ask(client).usage.completion_tokens == 2
        assert metric(url, 'mmfix_errors_total{code="internal_error"}') == 2


def test_too_large_is_refused_by_size_before_it_is_read(loaded: Decoder) -> None:
    with serving(loaded, "greedy", max_images=1, max_image_mb=0.05) as (service, url):
        most = service.settings.max_body_bytes
        status, _, answer = post(url, b"x" * (most + 1))
        assert (status, answer["error"]["code"]) == (413, "too_large")
        status, _, answer = post(url, iter([b"x" * 65536] * (most // 65536 + 2)))  # type: ignore[arg-type]
        assert (status, answer["error"]["code"]) == (413, "too_large")
        with pytest.raises(openai.APIStatusError) as refused:
            ask(connect(url), messages=shown(url=data_url(PICTURE.read_bytes() + b"\0" * 50_000)))
        assert (refused.value.status_code, refused.value.code) == (413, "image_too_large")
        assert ask(connect(url)).usage.completion_tokens == 2


def test_a_body_that_does_not_come_is_not_waited_for(loaded: Decoder) -> None:
    with serving(loaded, "greedy", max_queue=0, body_seconds=0.2) as (_, url):
        status, _, answer = post(url, b"{", **{"Content-Length": "100"})
        assert (status, answer["error"]["code"]) == (408, "timeout")
        assert ask(connect(url)).usage.completion_tokens == 2


def test_only_who_has_the_token_or_speaks_to_this_machine(loaded: Decoder) -> None:
    with serving(loaded, "greedy", api_key="correct-horse") as (_, url):
        for key in ("wrong", "correct-hors", "correct-horse2"):
            with pytest.raises(openai.AuthenticationError) as refused:
                ask(connect(url, api_key=key))
            assert refused.value.code == "invalid_api_key"
        assert ask(connect(url, api_key="correct-horse")).usage.completion_tokens == 2
        assert json.loads(page(url, "/healthz"))["status"] == "ok"
        for path in ("/metrics", "/v1/models"):
            with pytest.raises(urllib.error.HTTPError) as closed:
                page(url, path)
            assert closed.value.code == 401
        assert 'mmfix_errors_total{code="invalid_api_key"} 5' in page(url, Authorization="Bearer correct-horse")
        assert ask(connect(url.replace("127.0.0.1", "localhost"), api_key="correct-horse")).choices
    with serving(loaded, "greedy") as (_, url):
        assert post(url, b"{}", Host="evil.example")[0] == 403
        assert post(url, b"{}", Host="localhost:1234")[0] == 400


class _Pictures(http.server.BaseHTTPRequestHandler):
    """A picture, places that lead to it, one that leads astray, one that never ends."""

    def do_GET(self) -> None:
        if self.path.startswith("/moved"):
            left = int(self.path[6:])
            self.send_response(302)
            self.send_header("Location", f"/moved{left - 1}" if left else "/picture.png?a=1")
            self.end_headers()
        elif self.path == "/inside":
            self.send_response(302)
            self.send_header("Location", "http://169.254.169.254/latest/meta-data")
            self.end_headers()
        elif self.path == "/drip":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            except OSError:
                pass
        elif self.path.startswith("/picture.png"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PICTURE.read_bytes() + b"\0" * (50_000 if self.path.endswith("large") else 0))
        else:
            self.send_error(404)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def pictures() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pictures)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join(5)


def test_remote_images_are_fetched_only_where_allowed(loaded: Decoder, pictures: str) -> None:
    fetcher = Fetcher(40_000, seconds=1.0, allowed=lambda address: address == "127.0.0.1", ports=None)
    with serving(loaded, "greedy", fetcher=fetcher) as (_, url):
        client = connect(url)

        def code(path: str) -> str:
            with pytest.raises(openai.APIStatusError) as refused:
                ask(client, messages=shown(url=path if "//" in path else pictures + path))
            return str(refused.value.code)

        expected = ask(client, max_tokens=12).choices[0].message.content
        for path in ("/picture.png", "/moved2"):
            found = ask(client, max_tokens=12, messages=shown(url=pictures + path))
            assert found.choices[0].message.content == expected
        assert code("/moved3") == "image_fetch_failed"
        assert code("/inside") == "image_fetch_failed"
        assert code("/drip") == "image_fetch_failed"
        assert code("/missing") == "image_fetch_failed"
        assert code("/picture.png?large") == "image_too_large"
        assert code("http://user:word@127.0.0.1/a.png") == "image_fetch_failed"
    with serving(loaded, "greedy", allow_remote_images=True) as (_, url):
        with pytest.raises(openai.BadRequestError, match="images are fetched from ports 80 and 443 only"):
            ask(connect(url), messages=shown(url=f"{pictures}/picture.png"))
        with pytest.raises(openai.BadRequestError, match="address that is not public"):
            ask(connect(url), messages=shown(url="http://127.0.0.1/picture.png"))


def test_the_metrics_page_says_what_happened(loaded: Decoder) -> None:
    with serving(loaded, "vhr", ("greedy",)) as (_, url):
        usage = [ask(connect(url), model=name).usage for name in ("tiny", "tiny", "tiny:greedy")]
        until(lambda: metric(url, 'mmfix_generated_tokens_total{method="greedy"}'))
        assert metric(url, 'mmfix_requests_total{method="vhr",status="200"}') == 2
        assert metric(url, 'mmfix_prompt_tokens_total{method="vhr"}') == 2 * usage[0].prompt_tokens
        assert metric(url, 'mmfix_generated_tokens_total{method="vhr"}') == 4
        assert metric(url, "mmfix_images_total") == 3
        for name in ("mmfix_time_to_first_token_seconds", "mmfix_request_seconds"):
            buckets = [float(n) for n in re.findall(rf'^{name}_bucket{{method="vhr",le=".*"}} (\d+)$', page(url), re.M)]
            assert len(buckets) == 12
            assert buckets == sorted(buckets)
            assert buckets[-1] == metric(url, f'{name}_count{{method="vhr"}}') == 2
            assert 0 < metric(url, f'{name}_sum{{method="vhr"}}') < 60
        for line in page(url).splitlines():
            assert re.fullmatch(r'# (HELP|TYPE) mmfix_\w+ .+|mmfix_\w+({\w+="[^"]*"(,\w+="[^"]*")*})? [\d.e+-]+', line)


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_the_command_serves_and_stops_well(tmp_path: Any) -> None:
    words = [sys.executable, "-m", "mmfix_evals.cli", "serve", "--method", "vhr", "--port", "0", "--max-tokens", "90"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"serving tiny, tiny:vhr at (http://127\.0\.0\.1:\d+)/v1", line)
        assert found, line
        stream = ask(connect(found[1]), stream=True, max_tokens=90)
        first = next(stream)
        process.send_signal(signal.SIGTERM)
        rest = list(stream)  # the answer under way is finished
        assert first.id == rest[-1].id
        assert rest[-1].choices[0].finish_reason in ("stop", "length")
        assert process.wait(20) == 0
        assert "chat vhr 200" in process.stderr.read()
    finally:
        process.kill()
