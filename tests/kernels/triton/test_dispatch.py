"""Without a GPU and without the interpreter the Triton backend refuses, says why, and stays out of the way."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmfix_kernels import AttentionCall, attention, backends, grouped_attention
from mmfix_kernels import triton as backend


def small(device: str = "cpu") -> AttentionCall:
    query, key, value = torch.randn(3, 1, 2, 5, 16, device=device).unbind(0)
    return AttentionCall(query=query, key=key, value=value, is_causal=True)


def test_import_does_not_import_triton() -> None:
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import mmfix_kernels; "
        "sys.exit('triton' in sys.modules and not before)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_machine_without_a_gpu_says_so_once() -> None:
    assert backends()["triton"] != ""
    attended = grouped_attention(small())
    assert (attended.backend, attended.reason) == ("sdpa", "")
    with pytest.raises(ValueError, match="triton"):
        grouped_attention(small(), "triton")


def test_interpreting_needs_both_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for interpret, forced in (("1", ""), ("", "triton"), ("", "")):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        monkeypatch.setenv("MMFIX_BACKEND", forced)
        assert backend.why_not(small()) == "no CUDA device"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("MMFIX_BACKEND", "triton")
    assert backend.why_not(small()) == ""


def test_without_triton_the_message_has_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "installed", lambda: False)
    assert "pip install" in backend.why_not(small())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
def test_a_gpu_serves_by_triton() -> None:
    assert grouped_attention(small("cuda"), "triton").backend == "triton"


def test_it_is_not_chosen_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = attention.Backend(lambda call: "", lambda call: pytest.fail("the opt-in backend was chosen"))
    monkeypatch.setitem(attention.BACKENDS, "triton", chosen)
    assert grouped_attention(small()).backend == "sdpa"


def test_every_environment_variable_stands_in_the_table() -> None:
    root = Path(__file__).resolve().parents[3]
    table = (root / "docs/kernels.md").read_text().split("## Environment variables")[1]
    files = [path for part in ("mmfix", "kernels", "decoding", "evals", "app") for path in (root / part).rglob("*.py")]
    named = r"""environ(?:\.get|\.pop|\.setdefault)?[\[(]\s*"(\w+)"|ENVIRONMENT = "(\w+)"|environment\.get\("(\w+)\""""
    found = {name for path in files for names in re.findall(named, path.read_text()) for name in names if name}
    assert {"MMFIX_BACKEND", "MMFIX_DATA", "WORLD_SIZE", "TRITON_INTERPRET"} <= found
    assert sorted(name for name in found if f"`{name}" not in table) == []
