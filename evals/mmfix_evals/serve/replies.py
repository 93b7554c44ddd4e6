"""Answers as OpenAI's objects, with one field more: ``mmfix`` says which method ran and how often it acted."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from mmfix_decoding import TokenEvent
from mmfix_evals.machine import version
from mmfix_evals.serve.chat_request import ChatRequest
from mmfix_evals.serve.generation import End

DONE = b"data: [DONE]\n\n"


def event(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Reply:
    """Builds the objects of one answer."""

    def __init__(self, request: ChatRequest, tokenizer: Any) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": f"mmfix-{version()}",
        }

    def completion(self, text: str, events: Sequence[TokenEvent], end: End) -> dict[str, Any]:
        """The whole answer."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(events),
            "finish_reason": end.finish_reason,
        }
        return {
            **self._head, "object": "chat.completion", "choices": [choice], "usage": usage(end),
            "mmfix": self._method(end),
        }  # fmt: skip

    def start(self) -> bytes:
        """The first event of a stream: whose turn it is."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, text: str, events: Sequence[TokenEvent]) -> bytes:
        """Some text."""
        return self._chunk({"content": text}, self._logprobs(events))

    def end(self, end: End) -> bytes:
        """The last events of a stream."""
        closing = self._chunk({}, None, end.finish_reason, mmfix=self._method(end))
        if self._request.include_usage:
            closing += event({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(end)})
        return closing + DONE

    def _chunk(
        self, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None, **more: Any
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        content = {**self._head, "object": "chat.completion.chunk", "choices": [choice], **more}
        if self._request.include_usage:
            content["usage"] = None
        return event(content)

    def _logprobs(self, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None
        return {"content": [self._token(one) for one in events], "refusal": None}

    def _token(self, one: TokenEvent) -> dict[str, Any]:
        text = str(self._tokenizer.decode([one.token_id]))
        return {"token": text, "logprob": one.logprob, "bytes": list(text.encode()), "top_logprobs": []}

    def _method(self, end: End) -> dict[str, Any]:
        report = end.report or {}
        return {
            "method": self._request.arm.name,
            "methods": list(self._request.arm.spec),
            "fired": report.get("fired") or {},
            "passes_per_token": report.get("passes_per_token", 1.0),
        }


def usage(end: End) -> dict[str, int]:
    """Token counts; the prompt's hold its image tokens."""
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
    }
