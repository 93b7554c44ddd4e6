"""One running app for all tests that need one, with the bundled model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from mmfix_app.limits import Limits
from mmfix_app.service import Service
from mmfix_decoding import Decoder


@pytest.fixture(scope="session")
def service() -> Service:
    return Service(Decoder.from_pretrained("tiny", device="cpu"))


@pytest.fixture(scope="session")
def served() -> Iterator[tuple[Any, str]]:
    """The running app, which looks every second for files that are too old, and its address."""
    from mmfix_app.cli import launch

    demo, address = launch(block=False, quiet=True, device="cpu", limits=replace(Limits(), look_seconds=1))
    yield demo, address
    demo.close(verbose=False)
