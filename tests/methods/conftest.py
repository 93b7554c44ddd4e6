"""Tiny models of the method tests, made once; do not change them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support import vlm

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other

_build = functools.cache(vlm.build)


@pytest.fixture(scope="session")
def llava() -> Any:
    """The tiny LLaVA."""
    return _build("llava")


@pytest.fixture(scope="session")
def grouped() -> Any:
    """The tiny LLaVA with grouped queries."""
    return _build("llava-gqa")


@pytest.fixture(params=vlm.MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    """The tiny LLaVA with as many key heads as query heads, and with half as many."""
    return _build(request.param)
