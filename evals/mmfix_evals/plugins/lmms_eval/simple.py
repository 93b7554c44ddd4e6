"""The model for tasks that give a text and pictures (``doc_to_text``, ``doc_to_visual``)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from mmfix_evals.errors import UsageError
from mmfix_evals.plugins.lmms_eval.base import MmfixBase

PLACEHOLDER = "<image>"


class MmfixSimple(MmfixBase):
    """Requests are ``(context, generation arguments, doc_to_visual, document id, task, split)``."""

    is_simple = True

    def _arguments(self, request: Any) -> Mapping[str, Any]:
        found: Mapping[str, Any] = request.args[1]
        return found

    def _talk(self, arguments: Sequence[Any]) -> list[dict[str, Any]]:
        context, doc_to_visual = str(arguments[0]), arguments[2]
        visuals = doc_to_visual(self._document(arguments)) or []
        images = [{"type": "image", "image": _picture(one)} for one in visuals]
        pieces = context.split(PLACEHOLDER)
        if len(pieces) - 1 != len(images):  # the places are not those of these images: they stand in front
            return [{"role": "user", "content": [*images, _text("".join(pieces).strip())]}]
        content: list[dict[str, Any]] = []
        for number, piece in enumerate(pieces):
            content += [_text(piece.strip())] if piece.strip() else []
            content += images[number : number + 1]
        return [{"role": "user", "content": content}]


def _picture(visual: Any) -> Any:
    if isinstance(visual, (Image.Image, bytes, str, os.PathLike)):
        return visual  # of a file that is no picture the decoder says so
    raise UsageError(f"mmfix takes pictures, and the task gives a {type(visual).__name__}; choose an image task")


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
