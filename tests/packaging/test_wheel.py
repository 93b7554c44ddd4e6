"""The wheel, installed into a fresh environment, works from another folder."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Build dependencies are installed beside the tests: no isolation, so no download.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (built,) = folder.glob("*.whl")
    return built


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for package in ("mmfix", "mmfix_kernels", "mmfix_decoding", "mmfix_evals", "mmfix_app"):
        assert f"{package}/__init__.py" in names
    assert any(name.startswith("mmfix_decoding/tiny/") and name.endswith(".safetensors") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "kernels/", "decoding/", "evals/"))]
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".bin"))]
    assert wheel.stat().st_size < 16e6


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it."""
    environment = tmp_path_factory.mktemp("fresh") / "env"
    venv.EnvBuilder(with_pip=True).create(environment)
    python = environment / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    # The dependencies are those of the running environment; mmfix itself must come from the wheel.
    site = next((environment / "lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return environment


@pytest.mark.slow
def test_describe_in_a_fresh_environment(environment: Path, tmp_path: Path) -> None:
    python = environment / "bin" / "python"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (96, 96), (90, 140, 90)).save(elsewhere / "picture.png")

    where = [str(python), "-I", "-c", "import mmfix, mmfix_decoding; print(mmfix.__file__, mmfix_decoding.__file__)"]
    found = subprocess.run(where, check=True, capture_output=True, text=True, cwd=elsewhere).stdout
    assert found.count(str(environment)) == 2, found

    command = [str(environment / "bin" / "mmfix"), "describe", "picture.png", "--model", "tiny", "--method", "vhr"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert "vhr" in done.stdout
    assert "Traceback" not in done.stderr


HARNESSES = """
import importlib.metadata, json, sys, types

# Stand-ins of what the harnesses provide; both plug-ins must be found and loaded without a model.
for name, parts in json.loads(sys.argv[1]).items():
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update({part: lambda *args, **named: (lambda given: given) for part in parts})
found = {}
for group in ("lmms_eval.models", "inspect_ai"):
    mine = [one for one in importlib.metadata.distribution("mmfix").entry_points if one.group == group]
    loaded = [one.load() for one in mine]
    found[group] = [[one.name, one.value, getattr(what, "__file__", None) or what.__code__.co_filename]
                    for one, what in zip(mine, loaded)]
found["heavy"] = sorted({"torch", "transformers", "mmfix", "mmfix_decoding"} & set(sys.modules))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_harnesses_find_their_plugins_in_the_installed_package(environment: Path, tmp_path: Path) -> None:
    standing_in = {"inspect_ai": [], "inspect_ai.model": ["modelapi"]}
    command = [str(environment / "bin" / "python"), "-I", "-c", HARNESSES, json.dumps(standing_in)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["heavy"] == []  # a plug-in that imports torch slows every other user of the harness down
    expected = {
        "lmms_eval.models": "mmfix_evals.plugins.lmms_eval.manifest:manifests",
        "inspect_ai": "mmfix_evals.plugins.inspect_ai.registry",
    }
    for group, value in expected.items():
        ((name, declared, file),) = found[group]
        assert (name, declared) == ("mmfix", value)
        assert file.startswith(str(environment))
