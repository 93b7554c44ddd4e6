"""Timing with a cold L2 cache, and the ceilings of the machine measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLUSH_BYTES = 512 << 20  # several times any L2; long enough that the host is ahead when the measured work starts
GRAPH_SECONDS = 5e-3  # longer work hides its launches anyway, and a graph would hold its memory a second time


@dataclass(frozen=True)
class Timing:
    """Seconds at the 20th, 50th and 80th percentile; `mode` says how the work was started."""

    p20: float
    p50: float
    p80: float
    runs: int
    mode: str  # "graph": replay of a CUDA graph; "launch": ordinary launches; "cpu": wall clock
    host_p50: float | None = None  # seconds the host needs to launch the work once


def percentiles(seconds: list[float]) -> tuple[float, float, float]:
    ordered = sorted(seconds)
    return tuple(ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))  # type: ignore[return-value]


def time_cpu(work: Callable[[], object], budget: float) -> Timing:
    """Wall clock after two warm-up runs; at least five runs."""
    for _ in range(2):
        work()
    seconds: list[float] = []
    until = time.perf_counter() + budget
    while len(seconds) < 5 or (time.perf_counter() < until and len(seconds) < 200):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return Timing(*percentiles(seconds), len(seconds), "cpu")


def time_cpu_in_turns(works: dict[str, Callable[[], object]], budget: float) -> dict[str, Timing]:
    """Wall clock of several works that take turns, so that a machine that slows down slows all of them alike."""
    for work in works.values():
        work()
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    until, rounds = time.perf_counter() + budget, 0
    while rounds < 5 or (time.perf_counter() < until and rounds < 200):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - begin)
        rounds += 1
    return {name: Timing(*percentiles(found), len(found), "cpu") for name, found in seconds.items()}


def captured(work: Callable[[], object]) -> Callable[[], object] | None:
    """The work as a CUDA graph, or None where it cannot be captured."""
    try:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        torch.cuda.synchronize()
    except (RuntimeError, torch.cuda.OutOfMemoryError):
        torch.cuda.synchronize()
        return None
    return graph.replay


def waits(work: Callable[[], object]) -> bool:
    """Whether the work waits for the device, or fails when it may not: then no CUDA graph can hold it."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()
    return False


def time_cuda(work: Callable[[], object], budget: float) -> Timing:
    """Device time between events, with the L2 emptied before every run; at least ten runs, three of long work."""
    once = 0.0
    for _ in range(3):  # the last one counts: the first may compile
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        once = time.perf_counter() - begin
    least = 10 if 10 * once < budget else 3
    host: list[float] = []
    for _ in range(least):
        begin = time.perf_counter()
        work()
        host.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
    replay = captured(work) if once < GRAPH_SECONDS and not waits(work) else None
    run = work if replay is None else replay
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    until = time.perf_counter() + budget
    while len(events) < least or (time.perf_counter() < until and len(events) < 100):
        pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        flush.zero_()
        pair[0].record()
        run()
        pair[1].record()
        pair[1].synchronize()
        events.append(pair)
    seconds = [begin.elapsed_time(end) / 1e3 for begin, end in events]
    return Timing(*percentiles(seconds), len(seconds), "launch" if replay is None else "graph", percentiles(host)[1])


def time_work(work: Callable[[], object], device: torch.device, budget: float) -> Timing:
    return time_cuda(work, budget) if device.type == "cuda" else time_cpu(work, budget)


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches: bytes per second of a copy, FLOP per second of a matrix product."""

    bytes_per_second: float
    flops_per_second: float

    def floor(self, bytes_moved: int, flops: int) -> float:
        """The least time in which the work could be done."""
        return max(bytes_moved / self.bytes_per_second, flops / self.flops_per_second)


def ceilings(device: torch.device) -> Ceilings:
    """Measure both on random data."""
    gpu = device.type == "cuda"
    source = torch.randn((1 << 30) if gpu else (1 << 24), device=device)  # 4 GiB or 64 MiB of float32
    target = torch.empty_like(source)
    copy = time_work(lambda: target.copy_(source), device, 0.5)
    moved = 2 * source.numel() * source.element_size()
    n, dtype = (8192, torch.bfloat16) if gpu else (1024, torch.float32)
    x = torch.randn(n, n, device=device).to(dtype)
    product = time_work(lambda: x @ x, device, 0.5)
    return Ceilings(moved / copy.p50, 2 * n**3 / product.p50)
