"""One request to an OpenAI-compatible endpoint: bounded retries, no redirects, and a key that is never shown."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from mmfix_evals.errors import EvalError, UsageError

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
LONGEST_WAIT = 60.0  # seconds, also for a server that asks for more
LARGEST_REPLY = 4_000_000  # bytes
SHOWN = 300  # characters of a server's message
SHORTEST_SECRET = 8  # shorter "keys" are placeholders of local servers, not worth blanking in texts
HIDDEN = "***"


class JudgeError(EvalError):
    """The judge's endpoint refused, failed too often or answered something unusable; what was asked is kept."""


def check_url(url: str, with_key: bool) -> None:
    """Refuse a URL that could leak the key or end up with a secret in a file.

    Raises:
        UsageError: not http(s), user name, password, query or fragment in it, or a key over plain http to another
            machine.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"judge URL {parts.scheme}://{parts.hostname or ''}: give http(s)://host[:port]/path")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise UsageError(
            "the judge URL must not hold a user name, password, query or fragment: it is written into results; "
            "put the key into an environment variable"
        )
    if with_key and parts.scheme == "http" and parts.hostname not in LOOPBACK:
        raise UsageError(
            f"judge URL http://{parts.hostname}: the key would cross the network unencrypted; use https, "
            "or no key variable if the server needs none"
        )


def read_key(variable: str | None) -> str | None:
    """The key in an environment variable; None if no variable is named. Raises UsageError if it is unset or unusable.

    The value is never part of a message, a result or a cache.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UsageError(f"the environment variable {variable} is not set; put the judge's key into it")
    if not key.isascii() or not key.isprintable():
        raise UsageError(f"the key in {variable} holds characters that no key has; set the variable again")
    return key


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another place; it becomes an error instead."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def post(
    url: str,
    body: Mapping[str, Any],
    key: str | None,
    timeout: float = 60.0,
    retries: int = 5,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Send `body` as JSON and return the JSON object that comes back.

    After 429, 5xx, a broken connection or a timeout it waits 1, 2, 4, … seconds, or what the server's `Retry-After`
    says, at most a minute, and tries again, `retries` times.

    Raises:
        JudgeError: another status, too many failures, or a reply that is no JSON object.
    """
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
    if urllib.parse.urlsplit(url).hostname in LOOPBACK:
        handlers.append(urllib.request.ProxyHandler({}))
    opener = urllib.request.build_opener(*handlers)
    for attempt in range(retries + 1):
        wait = float(2**attempt)
        try:
            request = urllib.request.Request(url, data=data, headers=headers, method="POST")
            with opener.open(request, timeout=timeout) as answer:
                return _parse(url, _text(answer, key))
        except urllib.error.HTTPError as error:
            problem = f"{error.code} {error.reason}: {_text(error, key)[:SHOWN]}"
            if error.code != 429 and error.code < 500:
                raise JudgeError(f"{url}: {hide(problem, key)}{_advice(error.code)}") from None
            wait = _retry_after(error.headers.get("Retry-After"), wait)
        except (OSError, http.client.HTTPException) as error:
            problem = f"{type(error).__name__}: {error}"
        if attempt < retries:
            sleep(min(wait, LONGEST_WAIT))
    raise JudgeError(f"{url}: failed {retries + 1} times, last with {hide(problem, key)}; run again to continue")


def hide(text: str, key: str | None) -> str:
    """The text with the key blanked out, should a server repeat it."""
    return text.replace(key, HIDDEN) if key is not None and len(key) >= SHORTEST_SECRET else text


def _text(answer: Any, key: str | None) -> str:
    try:
        content = answer.read(LARGEST_REPLY + 1)
    except http.client.IncompleteRead as error:
        raise ConnectionError(f"connection closed in mid-reply: {error}") from None
    if len(content) > LARGEST_REPLY:
        raise JudgeError(f"the judge's reply is longer than {LARGEST_REPLY} bytes; check the endpoint")
    return hide(content.decode("utf-8", errors="replace"), key)


def _parse(url: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise JudgeError(
            f"{url}: the reply is no JSON object: {text[:SHOWN]!r}; is this an OpenAI-compatible endpoint?"
        )
    return found


def _advice(status: int) -> str:
    if status in (401, 403):
        return "; check the key in the environment variable"
    if 300 <= status < 400:
        return "; redirects are not followed, give the final URL"
    return "; check URL, model and options" if status in (400, 404, 422) else ""


def _retry_after(value: str | None, default: float) -> float:
    try:
        wait = float(value) if value is not None else default
    except ValueError:
        return default
    return wait if 0 <= wait < float("inf") else default
