"""Importing mmfix changes nothing, imports nothing heavy beside torch, and shadows no other package."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def fresh(code: str) -> str:
    """What `code` prints in a new interpreter."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT / "tests"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["kernels", "decoding", "evals", "app"])
def test_no_folder_of_ours_is_a_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an ``__init__.py``, ``kernels/`` would shadow the package that transformers imports."""
    monkeypatch.syspath_prepend(str(ROOT))
    assert not (ROOT / name / "__init__.py").exists()
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None:
        assert not Path(spec.origin).is_relative_to(ROOT / name)


def test_importing_is_free_of_effects_and_the_first_mitigation_registers() -> None:
    code = """
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as mask
before = {key: id(value) for key, value in attention.items()}
import mmfix, mmfix.methods
mmfix.method("vhr")
print("mmfix" in attention.valid_keys(), "mmfix" in mask.valid_keys())
from support import vlm
model = vlm.build("llava")
mmfix.describe(model)
print("mmfix" in attention.valid_keys())
with mmfix.mitigate(model, None):
    print("mmfix" in attention.valid_keys(), "mmfix" in mask.valid_keys())
after = {key: id(value) for key, value in attention.items()}
print({key for key in after if before.get(key) != after[key]})
"""
    assert fresh(code).splitlines() == ["False False", "False", "True True", "{'mmfix'}"]


def test_import_mmfix_leaves_transformers_models_and_triton_alone() -> None:
    heavy = ("triton", "transformers.modeling_utils", "gradio")
    assert fresh(f"import sys, mmfix; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_the_kernels_import_no_transformers() -> None:
    code = "import sys, mmfix_kernels; print([m for m in ('triton', 'transformers', 'mmfix') if m in sys.modules])"
    assert fresh(code) == "[]"


def test_methods_can_be_listed_twice() -> None:
    code = "import mmfix; a = mmfix.methods(); from mmfix.methods import VAR; print(list(mmfix.methods()) == list(a))"
    assert fresh(code) == "True"
