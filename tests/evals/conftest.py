"""Fixtures of the evaluation tests."""

from __future__ import annotations

import fake_eval
import pytest


@pytest.fixture
def fake_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks ``fake-pope`` and ``fake-chair`` are known like any other."""
    fake_eval.register(monkeypatch, fake_eval.FakePope(), fake_eval.FakeChair())
