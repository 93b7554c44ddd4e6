"""A run killed without warning (SIGKILL) resumes to the numbers of an uninterrupted one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).resolve().parent / "kill_driver.py"
ROUNDS = 20


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_at_random_moments(tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, [str(DRIVER.parent), *sys.path]))
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(tmp_path), str(ROUNDS), "7"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ended"] == [0] * ROUNDS
    assert found["equal"] == [True] * ROUNDS
    assert found["answers"] == [True] * ROUNDS
    assert found["errors"] == 6
    # The kills fell into different places, some of them into the middle of a line.
    assert len(set(found["survived"])) > ROUNDS // 4
    assert any(found["torn"])
    assert max(found["survived"]) <= found["total"] == 42
