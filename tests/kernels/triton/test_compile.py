"""The kernels compile for real GPUs without one, and the default configuration keeps everything in registers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_default_configurations_compile_without_spills(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "mmfix_kernels.triton.compile_report", "--scope", "quick", "--targets", "sm_90"]
    run = subprocess.run([*command, "--out", str(tmp_path)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    table = (tmp_path / "compile.md").read_text()
    assert table.count("| attend_kernel | sm_90 |") == 3
    assert "merge_kernel" in table
