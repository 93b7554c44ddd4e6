"""A judge model behind any OpenAI-compatible endpoint, asked with the standard library alone.

`plan` tells what would be sent and what it costs at most; `ask` sends it: one request after the other, in the order
of the prompts, equal prompts once, answered ones never again (cache). The key is read from an environment variable.
Nothing here is imported or contacted by a benchmark unless its judge is asked for.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmfix_evals.errors import DataError, UsageError
from mmfix_evals.files import place, write_text_atomic
from mmfix_evals.metrics.judge_cache import Cache, digest
from mmfix_evals.metrics.judge_http import JudgeError, check_url, post, read_key

__all__ = [
    "Cache",
    "Endpoint",
    "JudgeError",
    "Plan",
    "Reply",
    "ask",
    "fill",
    "plan",
    "reply_text",
    "write_replies",
]

CHARACTERS_PER_TOKEN = 4  # a rule of thumb for English; the real number depends on the judge's tokeniser


@dataclass(frozen=True)
class Endpoint:
    """Whom to ask, and how.

    Attributes:
        url: base, such as `https://host/v1`; `/chat/completions` is added.
        model: name of the judge, with its date where it has one; belongs into the result.
        key_variable: environment variable that holds the key; None if the server needs none.
        temperature: 0 for the least random judge.
        max_tokens: of a reply.
        timeout: seconds to wait for a reply.
        retries: after 429, 5xx and broken connections.
        price_in, price_out: per million tokens, in any currency, for `plan`.
        options: more fields of the request body; a value of None removes a field.

    Raises:
        UsageError: a URL that is no endpoint or would leak the key, or numbers out of range.
    """

    url: str
    model: str
    key_variable: str | None = "OPENAI_API_KEY"
    temperature: float = 0.0
    max_tokens: int = 512
    timeout: float = 60.0
    retries: int = 5
    price_in: float | None = None
    price_out: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_url(self.url, self.key_variable is not None)
        if not self.model or self.max_tokens < 1 or self.timeout <= 0 or not 0 <= self.retries <= 20:
            raise UsageError("the judge needs a model, max_tokens ≥ 1, timeout > 0 and 0 to 20 retries")

    def request(self, prompt: str) -> dict[str, Any]:
        """`{"url", "body"}` of one prompt; it holds no secret and is what the cache stores."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        chosen = {name: value for name, value in (body | dict(self.options)).items() if value is not None}
        return {"url": f"{self.url.rstrip('/')}/chat/completions", "body": chosen}

    def describe(self) -> dict[str, Any]:
        """What belongs into a result: no key, and nothing that only concerns the transport."""
        own = {"url": self.url, "model": self.model, "temperature": self.temperature, "max_tokens": self.max_tokens}
        return own | {"options": dict(self.options)}


@dataclass(frozen=True)
class Plan:
    """What `ask` would do: `calls` = prompts − repeated − cached. Tokens are estimated at four characters each."""

    url: str
    model: str
    prompts: int
    repeated: int
    cached: int
    calls: int
    tokens_in: int
    tokens_out_at_most: int
    cost_at_most: float | None

    def __str__(self) -> str:
        cost = "no prices given" if self.cost_at_most is None else f"cost about {self.cost_at_most:.2f} at most"
        return (
            f"{self.calls:,} calls to {self.model} at {self.url} ({self.prompts:,} prompts, "
            f"{self.repeated:,} repeated, {self.cached:,} answered before); about {self.tokens_in:,} tokens in, "
            f"at most {self.tokens_out_at_most:,} out; {cost}"
        )


@dataclass(frozen=True)
class Reply:
    """An answer of the judge.

    Attributes:
        text: as received.
        model: as the server names it, which may be more exact than what was asked for.
        finish_reason: "length" means that the text was cut off.
        usage: token counts as the server gives them.
        key: sha256 of the request.
        cached: whether it was there before.
    """

    text: str
    model: str
    finish_reason: str | None
    usage: Mapping[str, Any]
    key: str
    cached: bool


def plan(endpoint: Endpoint, prompts: Sequence[str], cache: str | os.PathLike[str]) -> Plan:
    """Count calls and cost of `ask` with the same arguments, without sending anything or needing the key."""
    known = Cache(cache)
    distinct = {digest(endpoint.request(prompt)): prompt for prompt in prompts}
    new = [prompt for key, prompt in distinct.items() if known.get(key) is None]
    tokens_in = sum(math.ceil(len(prompt) / CHARACTERS_PER_TOKEN) for prompt in new)
    tokens_out = len(new) * endpoint.max_tokens
    cost = None
    if endpoint.price_in is not None and endpoint.price_out is not None:
        cost = (tokens_in * endpoint.price_in + tokens_out * endpoint.price_out) / 1e6
    return Plan(
        url=endpoint.url,
        model=endpoint.model,
        prompts=len(prompts),
        repeated=len(prompts) - len(distinct),
        cached=len(distinct) - len(new),
        calls=len(new),
        tokens_in=tokens_in,
        tokens_out_at_most=tokens_out,
        cost_at_most=cost,
    )


def ask(
    endpoint: Endpoint,
    prompts: Sequence[str],
    cache: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Reply]:
    """The judge's reply to every prompt, in their order.

    Every reply is written to `cache` before the next prompt is sent, so that a stopped run continues where it was.

    Args:
        endpoint: whom to ask.
        prompts: the complete texts.
        cache: JSON Lines file; made if it is not there.
        progress: called with (done, all) after each prompt.
        sleep: waits between retries.

    Raises:
        UsageError: the key is not set. It is not needed if everything is in the cache.
        JudgeError: the endpoint refused or failed too often; what was answered is in the cache.
    """
    known, replies, key = Cache(cache), list[Reply](), None
    for done, prompt in enumerate(prompts, 1):
        request = endpoint.request(prompt)
        name = digest(request)
        record = known.get(name)
        cached = record is not None
        if record is None:
            key = key or read_key(endpoint.key_variable)
            answer = post(request["url"], request["body"], key, endpoint.timeout, endpoint.retries, sleep)
            record = {"key": name, "request": request, **_unpack(answer, request["url"], done)}
            known.add(record)
        replies.append(_reply(record, cached))
        if progress is not None:
            progress(done, len(prompts))
    return replies


def _unpack(answer: Mapping[str, Any], url: str, number: int) -> dict[str, Any]:
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        choice = text = None
    if not isinstance(text, str) or not isinstance(choice, Mapping):
        raise JudgeError(f"{url}: no text in the reply to prompt {number}; run again, or check model and options")
    usage = answer.get("usage")
    return {
        "text": text,
        "model": str(answer.get("model", "")),
        "finish_reason": choice.get("finish_reason"),
        "usage": usage if isinstance(usage, dict) else {},
    }


def _reply(record: Mapping[str, Any], cached: bool) -> Reply:
    return Reply(
        text=record["text"],
        model=str(record.get("model", "")),
        finish_reason=record.get("finish_reason"),
        usage=record.get("usage") or {},
        key=record["key"],
        cached=cached,
    )


def write_replies(
    path: str | os.PathLike[str], identities: Sequence[Mapping[str, Any]], replies: Sequence[Reply]
) -> None:
    """Write JSON Lines: what each prompt was about, with `reply`, `judge`, `finish_reason`, `request_sha256`."""
    lines = [
        json.dumps(
            {
                **identity,
                "reply": reply.text,
                "judge": reply.model,
                "finish_reason": reply.finish_reason,
                "request_sha256": reply.key,
            },
            ensure_ascii=True,
        )
        for identity, reply in zip(identities, replies, strict=True)
    ]
    write_text_atomic(path, "".join(f"{line}\n" for line in lines))


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with every {name} replaced, in one pass, so that braces in the values stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), template)


def reply_text(rows: Sequence[Mapping[str, Any]], index: int) -> str:
    """The judge's text in record `index`: under `reply`, or in an OpenAI chat completion. DataError without one."""
    row = rows[index]
    text = row.get("reply")
    if text is None and "choices" in row:
        try:
            text = row["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            text = None
    if not isinstance(text, str):
        raise DataError(f"{place(rows, index, 'reply')}: no text of the judge under 'reply' or 'choices'")
    return text
