"""A run killed without warning (SIGKILL) resumes to the numbers of an uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import fake_eval
from mmfix_evals.plan import RunConfig
from mmfix_evals.progress import Reporter
from mmfix_evals.run import run
from mmfix_evals.tasks import base

base.register(fake_eval.FakePope)
base.register(fake_eval.FakeChair)
pause = float(sys.argv[3])
decoder = fake_eval.FakeDecoder(before=lambda *_: time.sleep(pause))
config = RunConfig("fake", ("fake-pope", "fake-chair"), ("greedy", "var"), Path(sys.argv[2]), limit=6, batch_size=4,
                   resamples=40)
run(config, ["mmfix"], Reporter(quiet=True), lambda _: decoder)
"""


def command(out: Path, pause: float) -> list[str]:
    return [sys.executable, "-c", SCRIPT, str(HERE), str(out), str(pause)]


@pytest.mark.slow
def test_resume_after_sigkill(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    running = subprocess.Popen(command(cut, 0.05), env=environment)
    path = cut / "samples.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (path.is_file() and path.read_bytes().count(b"\n") >= 14):
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    survived = path.read_bytes().count(b"\n")
    assert 14 <= survived < 84
    assert json.loads((cut / "results.json").read_text())["status"] == "running"
    for out in (cut, whole):
        subprocess.run(command(out, 0), env=environment, check=True)
    resumed, plain = (json.loads((out / "results.json").read_text()) for out in (cut, whole))
    assert resumed["status"] == "complete"
    assert (resumed["metrics"], resumed["comparisons"]) == (plain["metrics"], plain["comparisons"])
    assert path.read_bytes().count(b"\n") == 84
