"""Several turns, several pictures between them, and a system message, for models whose chat template has room for it.

The messages are those of ``transformers``: ``{"role": "user", "content": "…"}``, or as content a list of
``{"type": "text", "text": "…"}`` and ``{"type": "image", "image": source}``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmfix.errors import UsageError

ROLES = ("system", "user", "assistant")
Part = dict[str, str]
Turn = dict[str, Any]


class PromptTooLong(UsageError):  # noqa: N818 - names what is wrong, as UnsupportedModel does
    """The encoded prompt has more tokens than the caller allows.

    Attributes:
        tokens: tokens of the prompt, image tokens included.
        limit: tokens allowed.
    """

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(
            f"the prompt has {tokens} tokens, images included, and {limit} are allowed; shorten the conversation, "
            "send fewer images or ask for a shorter answer"
        )
        self.tokens = tokens
        self.limit = limit


@dataclass(frozen=True)
class Conversation:
    """Checked messages that end with a user's turn.

    Args:
        turns: ``{"role", "content"}`` with a list of text parts and ``{"type": "image"}`` markers as content.
        sources: the images of the markers, in order.
        prompt: text of the last turn.
        limit: most tokens that the encoded prompt may have; None for no limit.
    """

    turns: tuple[Turn, ...]
    sources: tuple[Any, ...]
    prompt: str
    limit: int | None = None

    @property
    def simple(self) -> bool:
        """True for one user's turn with its images before one text: what ``Decoder.generate`` renders."""
        kinds = [part["type"] for part in self.turns[-1]["content"]]
        return len(self.turns) == 1 and kinds == ["image"] * (len(kinds) - 1) + ["text"]

    def canonical(self) -> str:
        """The turns as one text: equal conversations have equal texts (images are not in it)."""
        return self.prompt if self.simple else json.dumps(self.turns, ensure_ascii=False, sort_keys=True)

    def texts(self) -> list[str]:
        """Every text of every turn."""
        return [part["text"] for turn in self.turns for part in turn["content"] if part["type"] == "text"]


def conversation(messages: Sequence[Mapping[str, Any]], limit: int | None = None) -> Conversation:
    """Check messages.

    Args:
        messages: see the module.
        limit: as in :class:`Conversation`.

    Raises:
        UsageError: no message, an unknown role or part, a system message that is not first, an image outside a user's
            turn, a last turn that is not the user's or has no text.
    """
    turns: list[Turn] = []
    sources: list[Any] = []
    for number, message in enumerate(messages):
        where = f"message {number}"
        role = message.get("role")
        if role not in ROLES:
            raise UsageError(f"{where} has role {role!r}; use one of {', '.join(ROLES)}")
        if role == "system" and number:
            raise UsageError(f"{where} is a system message; it must be the first one")
        content, images = _parts(message.get("content"), where)
        if images and role != "user":
            raise UsageError(f"{where} of role {role} holds an image; images belong into user messages")
        turns.append({"role": role, "content": content})
        sources += images
    if not turns or turns[-1]["role"] != "user":
        raise UsageError("the conversation does not end with a user message; add the question to answer")
    prompt = "\n".join(part["text"] for part in turns[-1]["content"] if part["type"] == "text")
    if not prompt.strip():
        raise UsageError("the last user message has no text; add a question or an instruction")
    return Conversation(tuple(turns), tuple(sources), prompt, limit)


def _parts(content: Any, where: str) -> tuple[list[Part], list[Any]]:
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or not content:
        raise UsageError(f"the content of {where} is neither text nor a list of parts; give one of them")
    parts: list[Part] = []
    images: list[Any] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": _valid(part["text"], where)})
        elif kind == "image" and part.get("image") is not None:
            parts.append({"type": "image"})
            images.append(part["image"])
        else:
            raise UsageError(
                f'{where} holds a part that is neither {{"type": "text", "text": …}} nor '
                '{"type": "image", "image": …}; use these two'
            )
    return parts, images


def _valid(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where} is not valid Unicode ({error.reason} at {error.start}); remove the lone surrogate"
        ) from error
    return text


def render(talk: Conversation, processor: Any, image_token: str | None) -> str:
    """The prompt text of a conversation, ready for the answer, in the words of the model's chat template.

    A template that does not know system messages gets the system text at the start of the first user's turn.

    Raises:
        UsageError: a text holds the model's image token, the template refuses the conversation, or there is no
            template and more than one turn.
    """
    if image_token and any(image_token in text for text in talk.texts()):
        raise UsageError(
            f"a message holds the image token {image_token!r}; leave it out: the decoder places the images itself"
        )
    for renderer in (processor, processor.tokenizer):
        template = getattr(renderer, "chat_template", None)
        if not template:
            continue
        turns = talk.turns if "system" in str(template) else _folded(talk.turns)
        if renderer is not processor:  # a template for text alone
            turns = tuple({**turn, "content": _flat(turn["content"], image_token)} for turn in turns)
        return _apply(renderer, list(turns))
    turns = _folded(talk.turns)
    if len(turns) > 1:
        raise UsageError("this model has no chat template, so it has no form for several turns; send one user message")
    return _flat(turns[0]["content"], image_token)


def _folded(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns with the system text laid before the first text of the user."""
    if turns[0]["role"] != "system" or len(turns) < 2:
        return turns
    system = "\n".join(part["text"] for part in turns[0]["content"])
    first = turns[1]
    content = list(first["content"])
    at = next((n for n, part in enumerate(content) if part["type"] == "text"), len(content))
    content[at : at + 1] = [
        {"type": "text", "text": "\n".join([system, *(part["text"] for part in content[at : at + 1])])}
    ]
    return ({**first, "content": content}, *turns[2:])


def _flat(content: list[Part], image_token: str | None) -> str:
    return "\n".join((image_token or "") if part["type"] == "image" else part["text"] for part in content).lstrip("\n")


def _apply(renderer: Any, turns: list[Turn]) -> str:
    from jinja2 import TemplateError

    try:
        return str(renderer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"the model's chat template refuses this conversation: {reason}; change its turns") from error
