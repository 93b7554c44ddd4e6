"""Measure the kernels against their peers: ``python kernels/benchmarks/bench.py --out FOLDER``.

One JSON line per case and backend: p20/p50/p80 in seconds, bytes, FLOPs, the floor (bytes over the measured copy
bandwidth or FLOPs over the measured matrix rate, whichever is longer), the ratio to that floor and to SDPA without
edits. Compile time is not in it. Runs on any device; on a CPU only the ratios between backends mean something, and
the Triton kernels are not measured there. Nothing is reported while the kernel tests are red.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from cases import Case, cases
from peers import ours, peers
from timing import Ceilings, ceilings, time_work

ROOT = Path(__file__).resolve().parents[2]


def tests_are_green() -> bool:
    """Run the kernel tests; their output is shown when they fail."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests/kernels")], cwd=ROOT, capture_output=True, text=True
    )
    if run.returncode:
        print(run.stdout[-4000:], run.stderr[-1000:], file=sys.stderr)
    return run.returncode == 0


def answer(*command: str) -> str | None:
    """What a command prints; None where it fails or does not exist."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def provenance(device: torch.device, seed: int) -> dict[str, Any]:
    """Where and with what the numbers were made."""
    gpu = device.type == "cuda"
    changes = answer("git", "status", "--porcelain")
    return {
        "device": torch.cuda.get_device_name(device) if gpu else f"cpu ({os.cpu_count()} cores, {platform.machine()})",
        "driver": answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "torch": torch.__version__,
        "triton": installed("triton"),
        "transformers": installed("transformers"),
        "git": answer("git", "rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "seed": seed,
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def measure(
    work: Callable[[], object], case: Case, device: torch.device, budget: float, roof: Ceilings
) -> dict[str, Any]:
    """The numbers of one backend on one case."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    timing = time_work(work, device, budget)
    floor = roof.floor(case.bytes(), case.flops())
    record: dict[str, Any] = {
        "p20": timing.p20, "p50": timing.p50, "p80": timing.p80, "runs": timing.runs, "mode": timing.mode,
        "host_p50": timing.host_p50, "floor": floor, "ratio_to_floor": timing.p50 / floor,
    }  # fmt: skip
    if device.type == "cuda":
        record["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return record


def run_case(case: Case, device: torch.device, seed: int, budget: float, roof: Ceilings) -> list[dict[str, Any]]:
    """All backends and peers on one case, in one run."""
    call = case.call(device, seed)
    works: dict[str, Callable[[], Callable[[], object]] | str] = {}
    for name, build in peers(call).items():
        works[name] = lambda build=build: build(call)
    for name, work in ours(call).items():
        works[f"mmfix-{name}"] = work if isinstance(work, str) else (lambda work=work: work)
    records: list[dict[str, Any]] = []
    for name, make in works.items():
        record = {"case": case.name, "backend": name, "bytes": case.bytes(), "flops": case.flops()}
        if isinstance(make, str):
            record["unmeasured"] = make
        else:
            try:
                record |= measure(make(), case, device, budget, roof)
            except torch.cuda.OutOfMemoryError:
                record["unmeasured"] = "out of memory"
        if device.type == "cuda":
            torch.cuda.empty_cache()
        records.append(record)
    vanilla = records[0].get("p50")
    for record in records:
        if vanilla and "p50" in record:
            record["ratio_to_sdpa"] = record["p50"] / vanilla
    return records


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for kernels.jsonl")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a few cases only")
    parser.add_argument("--budget", type=float, default=0.4, help="seconds of measuring per case and backend")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests-passed", action="store_true", help="the caller has just run tests/kernels, all green")
    args = parser.parse_args(argv)
    if not args.tests_passed and not tests_are_green():
        print("the kernel tests are red: nothing is reported", file=sys.stderr)
        return 1
    device = torch.device(args.device)
    if device.type == "cpu":
        print("CPU: only the ratios between backends mean something here; the Triton kernels are not measured")
    roof = ceilings(device)
    shared = provenance(device, args.seed)
    shared |= {"copy_bytes_per_s": roof.bytes_per_second, "matmul_flops_per_s": roof.flops_per_second}
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "kernels.jsonl").open("a") as file, torch.inference_mode():
        for case in cases(device, args.quick):
            for record in run_case(case, device, args.seed, args.budget, roof):
                file.write(json.dumps(record | shared) + "\n")
                file.flush()
                told = record.get("unmeasured") or (
                    f"{record['p50'] * 1e6:9.1f} us, {record['ratio_to_sdpa']:.2f} x SDPA"
                )
                print(f"{record['case']:48} {record['backend']:16} {told}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
