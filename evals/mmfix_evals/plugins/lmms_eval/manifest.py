"""What lmms-eval reads at start-up: the names of two classes."""

from __future__ import annotations

from typing import Any

MODEL = "mmfix"
_PACKAGE = "mmfix_evals.plugins.lmms_eval"


def manifests() -> list[Any]:
    """The manifests of the entry-point group ``lmms_eval.models``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id=MODEL,
            simple_class_path=f"{_PACKAGE}.simple.MmfixSimple",
            chat_class_path=f"{_PACKAGE}.chat.MmfixChat",
        )
    ]
