"""The body of ``POST /v1/chat/completions``, checked field by field.

A field that would change the answer and is not supported is refused; one that cannot change it is ignored.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from mmfix_evals.arms import Arm
from mmfix_evals.serve.catalogue import Catalogue
from mmfix_evals.serve.errors import ApiError, invalid
from mmfix_evals.serve.pictures import Pictures
from mmfix_evals.serve.settings import Settings

_USED = frozenset(
    ("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "repetition_penalty",
     "stop", "seed", "stream", "stream_options", "logprobs", "mmfix")
)  # fmt: skip
_IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
)
# Fields that are accepted only with the value that changes nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "echo": (False,),
}
_STOPS, _STOP_LENGTH = 4, 200
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class ChatRequest:
    """One request.

    Args:
        model: name under which it was asked.
        arm: the method to use.
        messages: as :meth:`mmfix_decoding.Decoder.chat` takes them, images as bytes.
        images: number of images.
        characters: number of characters of all texts.
        max_new_tokens: limit on the answer.
        explicit: whether the request gave that limit.
        generation: arguments of ``generate()``: greedy, or sampling with its temperature.
        seed: for sampling; None when greedy.
        stop: stop strings.
        stream, include_usage, logprobs: as OpenAI defines them.
    """

    model: str
    arm: Arm
    messages: list[dict[str, Any]]
    images: int
    characters: int
    max_new_tokens: int
    explicit: bool
    generation: dict[str, Any]
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    logprobs: bool


def parse(body: bytes, catalogue: Catalogue, settings: Settings, pictures: Pictures) -> ChatRequest:
    """Check a body.

    Raises:
        ApiError: what is wrong with which field.
    """
    given = {name: value for name, value in _object(body).items() if value is not None}
    _known(given)
    model = given.get("model")
    if not isinstance(model, str) or not model:
        raise invalid("model", f"give the name of a model, such as {catalogue.name!r}")
    arm = catalogue.choose(model, given.get("mmfix"))
    limit, explicit = _max_tokens(given, settings.max_tokens)
    generation, seed = _sampling(given)
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool):
        raise invalid("stream_options", 'give {"include_usage": true} or leave it out')
    messages = _messages(given.get("messages"), pictures)
    return ChatRequest(
        model=model,
        arm=arm,
        messages=messages,
        images=pictures.count,
        characters=sum(len(p.get("text", "")) for message in messages for p in message["content"]),
        max_new_tokens=limit,
        explicit=explicit,
        generation=generation,
        seed=seed,
        stop=_stop(given.get("stop")),
        stream=_flag(given, "stream"),
        include_usage=options.get("include_usage", False),
        logprobs=_flag(given, "logprobs"),
    )


def _object(body: bytes) -> dict[str, Any]:
    def refuse(name: str) -> float:
        raise ValueError(f"{name} is no JSON number")

    try:
        found = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = str(error)[:200] if isinstance(error, ValueError) else "too deeply nested"
        raise ApiError(400, f"the request body is not valid JSON: {reason}", "invalid_json") from error
    if not isinstance(found, dict):
        raise ApiError(400, "the request body is not a JSON object", "invalid_json")
    return found


def _known(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if name in _NEUTRAL:
            if not any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
                       for neutral in _NEUTRAL[name]):  # fmt: skip
                raise ApiError(
                    400, f"{name}={json.dumps(value)[:100]} is not supported; leave it out", "unsupported_value",
                    param=name,
                )  # fmt: skip
        elif name not in _USED and name not in _IGNORED:
            raise ApiError(400, f"unknown field {name[:100]!r}; leave it out", "unknown_parameter", param=name[:100])


def _max_tokens(given: dict[str, Any], most: int) -> tuple[int, bool]:
    found = {given[name] for name in ("max_tokens", "max_completion_tokens") if _whole(given, name, 1) is not None}
    if len(found) > 1:
        raise invalid("max_tokens", "differs from max_completion_tokens; give one of them")
    if not found:
        return most, False
    wanted = int(found.pop())
    if wanted > most:
        raise ApiError(
            400, f"max_tokens={wanted} is above this server's limit of {most}; ask for {most} or fewer",
            "max_tokens_exceeded", param="max_tokens",
        )  # fmt: skip
    return wanted, True


def _sampling(given: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """Arguments of ``generate()`` and the seed. Without a temperature, or at 0, decoding is greedy."""
    temperature = _number(given, "temperature", 0.0, 2.0, 0.0)
    top_p = _number(given, "top_p", 0.0, 1.0, 1.0)
    top_k = _whole(given, "top_k", -1)
    penalty = _number(given, "repetition_penalty", 0.01, 10.0, 1.0)
    seed = _whole(given, "seed", -(2**63))
    generation: dict[str, Any] = {"do_sample": temperature > 0}
    if penalty != 1.0:
        generation["repetition_penalty"] = penalty
    if temperature == 0:
        return generation, None
    if top_p == 0:
        raise invalid("top_p", "must be above 0; for greedy decoding give temperature 0")
    generation |= {"temperature": temperature, "top_p": top_p, "top_k": max(top_k or 0, 0)}
    return generation, secrets.randbits(62) if seed is None else seed % 2**63


def _stop(value: Any) -> tuple[str, ...]:
    found = [] if value is None else [value] if isinstance(value, str) else value
    good = isinstance(found, list) and len(found) <= _STOPS
    if not good or not all(isinstance(one, str) and 0 < len(one) <= _STOP_LENGTH for one in found):
        raise invalid("stop", f"give a string or up to {_STOPS} of them, each of 1 to {_STOP_LENGTH} characters")
    return tuple(found)


def _messages(value: Any, pictures: Pictures) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise invalid("messages", "give a list of messages that ends with a user's")
    return [_message(message, f"messages[{n}]", pictures) for n, message in enumerate(value)]


def _message(message: Any, where: str, pictures: Pictures) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise invalid(where, 'give {"role": …, "content": …}')
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise invalid(f"{where}.role", f"give one of {', '.join(_ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise invalid(f"{where}.content", "give a text or a list of parts")
    return {
        "role": _ROLES[role],
        "content": [_part(part, f"{where}.content[{n}]", pictures) for n, part in enumerate(content)],
    }


def _part(part: Any, where: str, pictures: Pictures) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        return {"type": "image", "image": pictures.read(part.get("image_url"), f"{where}.image_url")}
    raise invalid(where, 'give {"type": "text", "text": …} or {"type": "image_url", "image_url": {"url": …}}')


def _flag(given: dict[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise invalid(name, "give true or false")
    return value


def _whole(given: dict[str, Any], name: str, low: int) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise invalid(name, f"give a whole number of at least {low}")
    return value


def _number(given: dict[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise invalid(name, "give a number")
    if not low <= value <= high:
        raise invalid(name, f"give a number from {low:g} to {high:g}")
    return float(value)
