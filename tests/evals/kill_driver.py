"""Kills a run with SIGKILL at random moments, many times, and resumes it; prints what it found as JSON.

A program of its own, not a test: the libraries are loaded once and every run is a forked process. Lines are written in
two pieces with a pause between them, so that many of the kills fall inside a line.

    python kill_driver.py FOLDER ROUNDS SEED
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import fake_eval

from mmfix_evals import machine
from mmfix_evals.plan import RunConfig
from mmfix_evals.progress import Reporter
from mmfix_evals.results import without_times
from mmfix_evals.run import run
from mmfix_evals.samples import SampleLog
from mmfix_evals.tasks import base

PAUSE = 0.002


def slow_write(self: SampleLog, line: bytes) -> None:
    middle = random.randrange(1, len(line))
    for piece in (line[:middle], line[middle:]):
        self._file.write(piece)
        time.sleep(PAUSE)


def work(out: Path, methods: tuple[str, ...]) -> None:
    def before(label: str, prompts: Any) -> None:
        time.sleep(PAUSE)
        if any("cup" in prompt for prompt in prompts):  # some documents can never be answered
            raise RuntimeError("no luck")

    tasks = ("fake-pope", "fake-chair")
    config = RunConfig("fake", tasks, methods, out, limit=3, batch_size=4, resamples=10, max_errors=99)
    run(config, ["mmfix"], Reporter(quiet=True), lambda _: fake_eval.FakeDecoder(before=before))


def start(out: Path, methods: tuple[str, ...]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - a warning about a torn line is expected
        work(out, methods)
    except BaseException as problem:
        print(repr(problem), flush=True)
        os._exit(1)
    os._exit(0)


def kill(out: Path, methods: tuple[str, ...], size: float, pause: float) -> bool:
    """Start a run, wait until it has written about so many bytes and a moment longer, and kill it; whether that was
    in time. Sizes, not times, so that the kills are spread over the run however busy the machine is."""
    child = start(out, methods)
    path = out / "samples.jsonl"
    while size > 0 and (path.stat().st_size if path.is_file() else 0) < size:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(PAUSE / 2)
    time.sleep(pause)
    if os.waitpid(child, os.WNOHANG)[0]:
        return False
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kept(out: Path) -> list[bytes]:
    path = out / "samples.jsonl"
    return path.read_bytes().splitlines(keepends=True) if path.is_file() else []


def numbers(out: Path) -> str:
    return json.dumps(without_times(json.loads((out / "results.json").read_text())), indent=1)


def answers(out: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in kept(out)]
    # A document that failed is asked again on resume and fails again: its line may stand there twice.
    keys = [line["key"] for line in lines if line["error"] is None]
    assert len(keys) == len(set(keys)), "an answer stands there twice"
    return {line["key"]: {**line, "seconds": 0} for line in lines}


def main(folder: Path, rounds: int, seed: int) -> None:
    base.register(fake_eval.FakePope)
    base.register(fake_eval.FakeChair)
    SampleLog._write = slow_write  # type: ignore[method-assign]
    # Neither is what is looked at here, and each takes longer than the run.
    machine.git = machine.versions = dict  # type: ignore[assignment]
    methods = ("greedy", "var")
    whole = folder / "whole"
    work(whole, methods)  # in this process, so that every child finds all libraries loaded
    size = len(b"".join(kept(whole)))
    rng = random.Random(seed)
    found: dict[str, list[Any]] = {"survived": [], "torn": [], "equal": [], "answers": [], "ended": []}
    for number in range(rounds):
        out = folder / f"cut-{number}"
        while not kill(out, methods, min(1, rng.uniform(-0.1, 1.1)) * size, rng.uniform(0, 4 * PAUSE)):
            shutil.rmtree(out)  # it was done before it could be killed, which does not count
        lines = kept(out)
        found["survived"].append(len(lines))
        found["torn"].append(bool(lines) and not lines[-1].endswith(b"\n"))
        found["ended"].append(os.waitpid(start(out, methods), 0)[1])
        found["equal"].append(numbers(out) == numbers(whole))
        found["answers"].append(answers(out) == answers(whole))
    print(json.dumps({**found, "total": len(kept(whole)), "errors": len(json.loads(numbers(whole))["errors"])}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
