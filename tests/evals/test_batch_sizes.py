"""Batch size: found, halved when memory runs out, and without influence on an answer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_eval
import pytest
import torch

from mmfix_evals import batching
from mmfix_evals.batching import Memory, find_size, is_out_of_memory
from mmfix_evals.errors import UsageError
from mmfix_evals.plan import RunConfig
from mmfix_evals.progress import Reporter
from mmfix_evals.run import TooManyErrors, run
from mmfix_evals.worker import Worker

pytestmark = pytest.mark.usefixtures("fake_tasks")

CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
ERRORS = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError(CPU_MESSAGE)]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig("fake", ("fake-pope",), ("greedy", "var"), tmp_path / "run", limit=4, batch_size=8, resamples=20)


def start(config: RunConfig, decoder: fake_eval.FakeDecoder) -> dict[str, Any]:
    return run(config, ["mmfix"], Reporter(quiet=True), lambda _: decoder)


def answers(config: RunConfig) -> dict[str, str]:
    lines = [json.loads(line) for line in (config.out / "samples.jsonl").read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines)
    return {line["key"]: line["response"] for line in lines}


def room_for(count: int, error: Exception, label: str = "var") -> Callable[[str, Sequence[str]], None]:
    """A device whose memory holds so many prompts of one method."""

    def before(asked: str, prompts: Sequence[str]) -> None:
        if asked == label and len(prompts) > count:
            raise error

    return before


def sizes(decoder: fake_eval.FakeDecoder, label: str) -> list[int]:
    return [len(prompts) for asked, prompts in decoder.calls if asked == label]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
@pytest.mark.parametrize("room", [1, 3, 7])
def test_memory_that_runs_out_halves_the_batch(config: RunConfig, error: Exception, room: int, tmp_path: Path) -> None:
    decoder = fake_eval.FakeDecoder(before=room_for(room, error))
    results = start(config, decoder)
    assert results["status"] == "complete"
    assert not results["errors"]
    whole = replace(config, out=tmp_path / "whole")
    start(whole, fake_eval.FakeDecoder())
    assert answers(config) == answers(whole)
    found = {1: 1, 3: 2, 7: 4}[room]
    assert results["timing"]["reduced_batch_sizes"] == {"fake-pope": found}
    # After the first failures nothing larger is tried again.
    tried = sizes(decoder, "var")
    assert sorted(set(tried), reverse=True) == [8 >> i for i in range(len(set(tried)))]
    assert tried[-24 // found :] == [found] * (24 // found)
    assert results["config"]["batch_size"] == 8


def test_a_document_that_never_fits_is_an_error_and_the_others_are_answered(config: RunConfig) -> None:
    def before(label: str, prompts: Sequence[str]) -> None:
        if label == "var" and any("cup" in prompt for prompt in prompts):
            raise torch.OutOfMemoryError("CUDA out of memory")

    results = start(replace(config, max_errors=9), fake_eval.FakeDecoder(before=before))
    assert len(results["errors"]) == 6
    assert all("OutOfMemoryError: CUDA out of memory" in e["error"] and "cup" not in e for e in results["errors"])
    assert len(answers(config)) == 48
    assert {e["n"] for e in results["metrics"] if (e["method"], e["split"]) == ("var", "random")} == {6}


def test_too_many_errors_keep_everything_and_say_so(config: RunConfig) -> None:
    def before(label: str, prompts: Sequence[str]) -> None:
        if label == "var" and any("cup" in prompt for prompt in prompts):
            raise RuntimeError("no")

    with pytest.raises(TooManyErrors, match=r"Stopped after 3 failed answers .--max-errors 2.; finished samples are"):
        start(replace(config, max_errors=2), fake_eval.FakeDecoder(before=before))
    lines = [json.loads(line) for line in (config.out / "samples.jsonl").read_text().splitlines()]
    assert sum(line["error"] is not None for line in lines) == 3
    assert all((line["response"] is None) == (line["error"] is not None) for line in lines)
    results = json.loads((config.out / "results.json").read_text())
    assert (results["status"], len(results["errors"])) == ("interrupted", 3)
    assert all(e["n"] <= 8 for e in results["metrics"])


def test_an_answer_without_text_is_an_error(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    original = fake_eval.FakeDecoder._answer

    def answer(self: fake_eval.FakeDecoder, content: str, prompt: str) -> fake_eval.FakeAnswer:
        found = original(self, content, prompt)
        return replace(found, text=None) if "cup" in prompt else replace(found, text="")  # type: ignore[arg-type]

    monkeypatch.setattr(fake_eval.FakeDecoder, "_answer", answer)
    results = start(replace(config, max_errors=99), fake_eval.FakeDecoder())
    assert len(results["errors"]) == 12
    assert {e["n"] for e in results["metrics"] if e["split"] == "random"} == {6}  # "" is an answer: it was given


def test_auto_on_a_device_that_tells_nothing_starts_with_the_default(config: RunConfig, tmp_path: Path) -> None:
    config = replace(config, batch_size="auto")
    decoder = fake_eval.FakeDecoder(before=room_for(5, ERRORS[1]))
    results = start(config, decoder)
    assert results["timing"]["batch_sizes"] == {"fake-pope": batching.CPU_SIZE}
    assert results["timing"]["reduced_batch_sizes"] == {"fake-pope": 4}
    whole = replace(config, out=tmp_path / "whole", batch_size=1)
    start(whole, fake_eval.FakeDecoder())
    assert answers(config) == answers(whole)


def test_auto_resumes_with_the_size_that_was_found(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, batch_size="auto")
    monkeypatch.setattr(Worker, "find_batch_size", lambda *_: 5)
    start(config, fake_eval.FakeDecoder())
    monkeypatch.setattr(Worker, "find_batch_size", lambda *_: 7)
    path = config.out / "samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:20]))
    decoder = fake_eval.FakeDecoder()
    assert start(config, decoder)["timing"]["batch_sizes"] == {"fake-pope": 5}
    assert set(sizes(decoder, "var")) == {5, 4}


class Device:
    """Memory that a batch uses in proportion to its size."""

    def __init__(self, total: int, per_prompt: int, honest: bool = True) -> None:
        self.total, self.per_prompt, self.honest = total, per_prompt, honest
        self.peak, self.tried = 100, list[int]()

    def attempt(self, count: int) -> None:
        self.tried.append(count)
        if 100 + count * self.per_prompt > self.total:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.peak = 100 + count * self.per_prompt if self.honest else 100

    def memory(self) -> Memory:
        return Memory(lambda: None, lambda: 100, lambda: self.peak, lambda: self.total - 100)


@pytest.mark.parametrize(
    ("total", "per_prompt", "found", "tried"),
    [
        (10_100, 100, 64, [1, 2, 4, 8, 16, 32, 64]),
        (10_100, 10_000, 1, [1]),
        (100, 100, 1, [1]),
        (10**9, 1, 256, [1, 2, 4, 8, 16, 32, 64, 128, 256]),
    ],
)
def test_doubling_stops_before_memory_runs_out(total: int, per_prompt: int, found: int, tried: list[int]) -> None:
    device = Device(total, per_prompt)
    assert find_size(device.attempt, device.memory()) == found
    assert device.tried == tried
    assert all(100 + count * per_prompt <= total for count in device.tried) or total == 100


def test_doubling_survives_a_device_that_tells_too_little() -> None:
    device = Device(10_100, 100, honest=False)
    assert find_size(device.attempt, device.memory()) == 64
    assert device.tried[-1] == 128


def test_another_failure_ends_the_search() -> None:
    def attempt(count: int) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        find_size(attempt, Device(10, 1).memory())


def test_the_real_errors_of_torch_are_recognised() -> None:
    """Asked of torch itself, in a process whose memory is limited."""
    code = (
        "import torch, sys\n"
        "from mmfix_evals.batching import is_out_of_memory\n"
        "try:\n    torch.empty(2**46)\n"
        "except RuntimeError as problem:\n    sys.exit(0 if is_out_of_memory(problem) else repr(problem))\n"
        "sys.exit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(map(is_out_of_memory, [*ERRORS, MemoryError(), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")]))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"))
    assert not any(map(is_out_of_memory, [RuntimeError("shape mismatch"), ValueError("out of memory"), KeyError("x")]))


def test_sizes_as_written_on_the_command_line() -> None:
    assert (batching.parse_size("16"), batching.parse_size(" AUTO ")) == (16, "auto")
    with pytest.raises(UsageError, match="--batch-size 'many': give a number of 1 or more, or auto"):
        batching.parse_size("many")
