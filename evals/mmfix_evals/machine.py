"""What a result depends on besides its configuration: versions, revision, machine. No names of hosts or folders."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("mmfix", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "nltk", "textblob")
ROOT = Path(__file__).resolve().parents[2]


def version() -> str:
    """The version of mmfix, without importing torch where the package is installed."""
    try:
        return metadata.version("mmfix")
    except metadata.PackageNotFoundError:
        import mmfix

        return str(mmfix.__version__)


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages a result depends on; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = version() if name == "mmfix" else None
    return found


def git() -> dict[str, Any] | None:
    """Revision and dirty flag of the checkout that mmfix runs from; None for an installed copy."""
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return None
        return {"revision": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def machine(device: str | None = None) -> dict[str, Any]:
    """CPU model, cores this process may use, threads, and the GPU of ``device`` (None on a CPU)."""
    import torch

    on_gpu = device is not None and device.startswith("cuda") and torch.cuda.is_available()
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
    }


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's own name without trade marks; its architecture where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return " ".join(re.sub(r"\((R|TM|r|tm)\)", "", named[1]).split()) if named else platform.machine()


def describe(machine: dict[str, Any]) -> str:
    """One phrase for a footnote."""
    if machine.get("gpu"):
        return str(machine["gpu"])
    return f"{machine.get('cpu')}, {machine.get('cores')} cores"
