"""Tiny models shared by the contract tests, made once per session; each test sees them unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import steered, vlm

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other

_BUILT: dict[str, Any] = {}


def _model(name: str) -> Any:
    if name not in _BUILT:
        _BUILT[name] = steered.calibrated(vlm.build(name))
    return _BUILT[name]


@pytest.fixture(params=vlm.MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    """Each tiny model in turn; do not change it."""
    return _model(request.param)


@pytest.fixture
def llava() -> Any:
    """The tiny LLaVA; do not change it."""
    return _model("llava")


@pytest.fixture
def built() -> Any:
    """A tiny model by name; do not change it."""
    return _model
