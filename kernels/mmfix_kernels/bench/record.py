"""What a record of a benchmark says beside its numbers, and what must hold before it may be written."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mmfix_kernels import grouped_attention
from mmfix_kernels.attention import BACKENDS
from mmfix_kernels.bench.cases import EDITS, Case

ROOT = Path(__file__).resolve().parents[3]
DEVICE_CASES = "tests/kernels/triton"


class RedTests(RuntimeError):  # noqa: N818 - what it is, not that it is an error
    """The kernels do not pass their tests, so nothing may be reported about their speed."""


def command_line(description: str | None, file: str, device: str) -> argparse.ArgumentParser:
    """The options of every benchmark that is run as a module: `--out`, `--device`, `--limit`, `--tests-passed`.

    Args:
        description: what the benchmark measures.
        file: that it writes its records to.
        device: default of `--device`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {file}")
    parser.add_argument("--device", default=device)
    parser.add_argument("--limit", type=float, help="seconds after which nothing further is begun")
    parser.add_argument("--tests-passed", action="store_true", help="the caller has just run tests/kernels, all green")
    return parser


def exit_code(measure: Callable[[], object]) -> int:
    """Measure; 1 with the reason on standard error while the kernel tests are red, else 0."""
    try:
        measure()
    except RedTests as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


def require_green(device: torch.device, tests_passed: bool = False) -> str:
    """Run what proves the kernels right, and say what it was.

    In a checkout these are the kernel tests (on a GPU the same cases on the device); an installed copy has none, and
    checks every backend against the reference instead.

    Raises:
        RedTests: something failed; its output is in the message.
    """
    if tests_passed:
        return "tests/kernels, by the caller"
    if not (ROOT / DEVICE_CASES).is_dir():
        self_check(device)
        return "self-check"
    environment = dict(os.environ)
    paths = ["tests/kernels"]
    if device.type == "cuda":
        environment["MMFIX_BACKEND"] = "triton"
        names = ("device", "map", "prefix", "statistics", "refusal", "other")
        paths = ["--rootdir", DEVICE_CASES, *(f"{DEVICE_CASES}/{name}_cases.py" for name in names)]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", *paths]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RedTests(f"{run.stdout[-4000:]}{run.stderr[-1000:]}\nthe kernel tests are red: nothing is reported")
    return "tests/kernels"


def self_check(device: torch.device) -> None:
    """Every backend that serves here against the reference, on small cases; RedTests where one differs."""
    for edit in EDITS:
        for phase in ("prefill", "decode"):
            call = Case(phase, edit, 320, heads=4, kv_heads=2, width=64, dtype="float32").call(device, 0)
            for name, backend in BACKENDS.items():
                if not backend.why_not(call) and not agrees(call, name):
                    raise RedTests(
                        f"backend {name!r} differs from the reference on {phase} {edit}: nothing is reported"
                    )


def agrees(call: Any, backend: str) -> bool:
    """Whether a backend gives the reference's output, to a few roundings of the call's dtype."""
    got = grouped_attention(call, backend).output.float()
    want = grouped_attention(call, "reference").output.float()
    allowed = 16 * torch.finfo(call.query.dtype).eps * float(want.abs().max())
    return float((got - want).abs().max()) <= allowed


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


def revision() -> tuple[str | None, bool | None]:
    """Revision and dirty flag of the checkout that this package runs from.

    Files without their git (an installed copy, a copy of the tree on another machine) have the revision that
    ``MMFIX_REVISION`` names, or None.
    """
    top = answer("git", "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT:
        return os.environ.get("MMFIX_REVISION") or None, None
    changes = answer("git", "status", "--porcelain")
    return answer("git", "rev-parse", "HEAD"), None if changes is None else bool(changes)


def cpu_name() -> str:
    """The processor's own name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    found = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.processor() or platform.machine()


def provenance(device: torch.device, seed: int, checked: str) -> dict[str, Any]:
    """Where and with what the numbers were made."""
    gpu = device.type == "cuda"
    git, dirty = revision()
    return {
        "device": torch.cuda.get_device_name(device) if gpu else cpu_name(),
        "device_type": device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "driver": answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "transformers": installed("transformers"),
        "mmfix": installed("mmfix"),
        "git": git,
        "dirty": dirty,
        "checked": checked,
        "seed": seed,
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def append(path: Path, record: dict[str, Any]) -> None:
    """One line more in a file of records."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The records of some files, in order."""
    return [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.strip()]
