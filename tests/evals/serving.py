"""A server on a free port for tests, and a model that can be made slow."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import LogitsProcessor, LogitsProcessorList

from mmfix_decoding import Decoder

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "example.png"
PROMPT = "Please describe this image in detail."


def data_url(data: bytes | None = None) -> str:
    return "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes() if data is None else data).decode()


def shown(text: str = PROMPT, count: int = 1, url: str | None = None) -> list[dict[str, Any]]:
    """Messages with `count` pictures and a text."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url or data_url()}}] * count
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@dataclass
class Pace:
    """How slow the model is, and what it did."""

    seconds: float = 0.0
    steps: int = 0
    fail_at: int = -1
    begun: threading.Event = field(default_factory=threading.Event)


class Paced(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self._pace.steps == self._pace.fail_at:
            raise RuntimeError("secret path /srv/x")
        self._pace.steps += 1
        self._pace.begun.set()
        time.sleep(self._pace.seconds)
        scores[:, 2] = -float("inf")  # never ends by itself
        return scores


class SlowDecoder(Decoder):
    """Answers until its limit, each token taking its time."""

    pace = Pace()

    def with_method(self, method: Any) -> SlowDecoder:
        found = SlowDecoder(self.model, self.processor, method=method, model_id=self.model_id)
        found.pace = self.pace
        return found

    def chat(self, messages: Any, **kwargs: Any) -> Any:
        return super().chat(messages, logits_processor=LogitsProcessorList([Paced(self.pace)]), **kwargs)


@contextmanager
def serving(
    decoder: Decoder, method: str = "vhr", allow: tuple[str, ...] = (), fetcher: Any = None, **limits: Any
) -> Iterator[tuple[Any, str]]:
    """A running server: its service and its URL without ``/v1``."""
    from mmfix_evals.serve.catalogue import Catalogue
    from mmfix_evals.serve.server import BACKLOG, address, bind, make_server
    from mmfix_evals.serve.service import Service
    from mmfix_evals.serve.settings import Settings

    service = Service(
        decoder, Catalogue("tiny", method, allow, decoder.model), Settings(name="tiny", **limits), fetcher
    )
    server = make_server(service, grace=1)
    with bind("127.0.0.1", 0) as sock:
        sock.listen(BACKLOG)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        try:
            yield service, address(sock).removesuffix("/v1")
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def until(true: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)
