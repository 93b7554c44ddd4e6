"""Measure the attention backends against their peers, one JSON line per case and backend.

A line holds p20/p50/p80 in seconds, bytes, FLOPs, the floor (bytes over the measured copy bandwidth or FLOPs over the
measured matrix rate, whichever is longer), the ratio to that floor and to SDPA without edits. Compile time is not in
it. On a CPU only the ratios between backends mean something, and the Triton kernels are not measured there. A backend
whose answer differs from the reference is not timed; the other cases go on, and the run fails at its end.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmfix_kernels import AttentionCall
from mmfix_kernels.bench.cases import Case, cases
from mmfix_kernels.bench.peers import ours, peers
from mmfix_kernels.bench.record import RedTests, agrees, append, provenance, require_green
from mmfix_kernels.bench.timing import Ceilings, Timing, ceilings, time_cpu_in_turns, time_cuda

CHECKABLE = 1 << 28  # scores that the reference can hold: larger cases are not compared with it


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def measure_kernels(
    out: Path,
    device: str = "cpu",
    quick: bool = False,
    budget: float = 0.4,
    seed: int = 0,
    tests_passed: bool = False,
    limit: float | None = None,
    only: str = "",
) -> Path:
    """Measure every case of the device and append the records to ``out/kernels.jsonl``.

    Args:
        out: folder, made where it does not exist.
        device: "cpu", "cuda", …
        quick: a few cases only.
        budget: seconds of measuring per case and backend.
        seed: of the random tensors.
        tests_passed: the caller has just seen the kernel tests green.
        limit: seconds after which no further case is begun.
        only: cases whose name begins with this text, for instance "decode".

    Raises:
        RedTests: the kernel tests fail; or, after the other cases, a backend fails or differs from the reference.
    """
    begin = time.monotonic()
    on = torch.device(device)
    checked = require_green(on, tests_passed)
    if on.type == "cpu":
        print("CPU: only the ratios between backends mean something here; the Triton kernels are not measured")
    roof = ceilings(on)
    shared = provenance(on, seed, checked)
    shared |= {"copy_bytes_per_s": roof.bytes_per_second, "matmul_flops_per_s": roof.flops_per_second}
    out.mkdir(parents=True, exist_ok=True)
    path = out / "kernels.jsonl"
    wrong: list[str] = []
    with torch.inference_mode():
        for case in cases(on, quick):
            if not case.name.startswith(only):
                continue
            if limit is not None and time.monotonic() - begin > limit:
                print(f"not measured, {limit:g} s have passed: {case.name} and what follows")
                break
            for record in run_case(case, on, seed, budget, roof):
                append(path, record | shared)
                print(line(record), flush=True)
                if "failed" in record:
                    wrong.append(record["failed"])
    if wrong:
        raise RedTests("\n".join(wrong))
    return path


def line(record: dict[str, Any]) -> str:
    """One record for a person."""
    told = record.get("unmeasured")
    if told is None:
        told = f"{record['p50'] * 1e6:9.1f} us, {record['ratio_to_floor']:.2f} x floor"
        told += f", {record['ratio_to_sdpa']:.2f} x SDPA" if "ratio_to_sdpa" in record else ""
    return f"{record['case']:48} {record['backend']:16} {told}"


def run_case(case: Case, device: torch.device, seed: int, budget: float, roof: Ceilings) -> list[dict[str, Any]]:
    """All backends and peers on one case, in one run; plain SDPA comes first."""
    call = case.call(device, seed)
    works: dict[str, Callable[[], Callable[[], object]] | str] = dict(peers(call))
    works |= {
        f"mmfix-{name}": work if isinstance(work, str) else partial(_same, work) for name, work in ours(call).items()
    }
    records: dict[str, dict[str, Any]] = {name: {"case": case.name, "backend": name, **case.size()} for name in works}
    waiting: dict[str, Callable[[], Callable[[], object]]] = {}
    for name, work in works.items():
        if isinstance(work, str):
            records[name]["unmeasured"] = work
        elif reason := differs(call, case, name):
            records[name] |= {"unmeasured": reason, "failed": f"backend {name!r} {reason} on {case.name}"}
        else:
            waiting[name] = work
    timings = _on_cuda(waiting, records, budget) if device.type == "cuda" else _on_cpu(waiting, budget)
    floor = roof.floor(case.bytes(), case.flops())
    for name, timing in timings.items():
        records[name] |= {
            "p20": timing.p20, "p50": timing.p50, "p80": timing.p80, "runs": timing.runs, "mode": timing.mode,
            "host_p50": timing.host_p50, "floor": floor, "ratio_to_floor": timing.p50 / floor,
        }  # fmt: skip
    vanilla = next(iter(records.values())).get("p50")
    for record in records.values():
        if vanilla and "p50" in record:
            record["ratio_to_sdpa"] = record["p50"] / vanilla
    return list(records.values())


def _same(work: Callable[[], object]) -> Callable[[], object]:
    return work


def differs(call: AttentionCall, case: Case, name: str) -> str:
    """Why one of our backends may not be timed; "" for a peer, and where its answer is the reference's."""
    backend = name.removeprefix("mmfix-")
    if backend == name or case.scores() > CHECKABLE:
        return ""
    try:
        return "" if agrees(call, backend) else "differs from the reference"
    except Exception as error:  # whatever it is, the other backends and cases go on
        return told(error)


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _on_cpu(waiting: dict[str, Callable[[], Callable[[], object]]], budget: float) -> dict[str, Timing]:
    return time_cpu_in_turns({name: build() for name, build in waiting.items()}, budget * len(waiting))


def _on_cuda(
    waiting: dict[str, Callable[[], Callable[[], object]]], records: dict[str, dict[str, Any]], budget: float
) -> dict[str, Timing]:
    """One after the other, so that each allocates only what it needs; memory is measured too."""
    timings: dict[str, Timing] = {}
    for name, build in waiting.items():
        try:
            work, records[name]["peak_bytes"] = with_peak(build)
            timings[name] = time_cuda(work, budget)
        except torch.cuda.OutOfMemoryError:
            records[name]["unmeasured"] = "out of memory"
        except Exception as error:  # a peer that this version of torch cannot run does not end the others
            records[name]["unmeasured"] = told(error)
            if name.startswith("mmfix"):
                records[name]["failed"] = f"backend {name!r} on {records[name]['case']}: {told(error)}"
    return timings


def with_peak(build: Callable[[], Callable[[], object]]) -> tuple[Callable[[], object], int]:
    """The work, and the most bytes that building and running it held at once beside the call's own tensors."""
    gc.collect()
    torch.cuda.empty_cache()
    build()()  # what is made once and kept, and compiling, are not counted
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work = build()
    work()
    torch.cuda.synchronize()
    return work, torch.cuda.max_memory_allocated() - before
