"""The model for tasks that give whole conversations (``doc_to_messages``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmfix_evals.errors import UsageError
from mmfix_evals.plugins.lmms_eval.base import MmfixBase


class MmfixChat(MmfixBase):
    """Requests are ``([context,] doc_to_messages, generation arguments, document id, task, split)``."""

    is_simple = False

    def _arguments(self, request: Any) -> Mapping[str, Any]:
        found: Mapping[str, Any] = request.args[-4]
        return found

    def _talk(self, arguments: Sequence[Any]) -> list[dict[str, Any]]:
        messages = arguments[-5](self._document(arguments))
        return [{"role": one["role"], "content": _content(one["content"])} for one in messages]


def _content(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [_part(part) for part in content]


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    kind = part.get("type")
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        return {"type": "image", "image": part["url"] if "url" in part else part.get("image")}
    raise UsageError(f"mmfix takes texts and pictures, and the task gives {kind!r}; choose an image task")
