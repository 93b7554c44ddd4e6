"""The kernels in Triton's interpreter, in a process of its own: the variables must be set before the first import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["0/4", "1/4", "2/4", "3/4"])
def test_the_kernels_equal_their_equations(shard: str) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "MMFIX_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    environment["MMFIX_SHARD"] = shard
    arguments = ["-p", "no:xdist", "-p", "no:cacheprovider", "-q", "--rootdir", str(HERE)]
    files = [
        str(HERE / f"{name}_cases.py")
        for name in (
            "device",
            "map",
            "prefix",
            "statistics",
            "refusal",
            "other",
            "mutation",
            "mutation_rare",
            "mutation_statistics",
            "model",
        )
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, *files],
        env=environment, cwd=HERE, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
