"""Tiny models shared by the tests of single methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import vlm

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other


@pytest.fixture(scope="session")
def llava() -> Any:
    """The tiny LLaVA; do not change it."""
    return vlm.build("llava")


@pytest.fixture(scope="session")
def grouped() -> Any:
    """The tiny LLaVA with grouped queries; do not change it."""
    return vlm.build("llava-gqa")
