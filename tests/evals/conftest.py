"""Fixtures of the evaluation tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fake_eval
import pytest

from mmfix_decoding import Decoder
from mmfix_evals.cli import main

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fake_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks ``fake-pope`` and ``fake-chair`` are known like any other."""
    fake_eval.register(monkeypatch, fake_eval.FakePope(), fake_eval.FakeChair())


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """The ``mmfix`` command: its exit code, standard output and standard error."""

    def run(*argv: Any) -> tuple[int, str, str]:
        code = main([str(word) for word in argv])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture(scope="session")
def bundled() -> Decoder:
    """The bundled model, loaded once; tests leave it as it is."""
    return Decoder.from_pretrained("tiny", device="cpu")
