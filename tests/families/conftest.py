"""One tiny model per family, made once per process; each test sees them unchanged."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.families import FAMILIES, Tiny

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other


@functools.cache
def build(name: str) -> Any:
    return FAMILIES[name].build()


@pytest.fixture(params=FAMILIES)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """Each family in turn."""
    return FAMILIES[request.param]


@pytest.fixture
def model(tiny: Tiny) -> Any:
    """The family's model; do not change it."""
    return build(tiny.name)
