"""What inspect_ai imports at start-up: the provider's name."""

from __future__ import annotations

from typing import Any

from inspect_ai.model import modelapi


@modelapi(name="mmfix")
def mmfix() -> Any:
    """The provider, loaded when a model of it is asked for."""
    from mmfix_evals.plugins.inspect_ai.provider import MmfixAPI

    return MmfixAPI
