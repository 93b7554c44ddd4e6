"""Let several processes share the cases: ``MMFIX_SHARD=2/8`` takes every eighth, from the third on."""

from __future__ import annotations

import os

import pytest


@pytest.hookimpl(trylast=True)  # what -k leaves is shared
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if shard := os.environ.get("MMFIX_SHARD"):
        first, step = map(int, shard.split("/"))
        items[:] = items[first::step]
