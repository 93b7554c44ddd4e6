"""Rules that the whole project keeps."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import mmfix

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("mmfix", "decoding", "kernels", "evals", "app")


def test_version_stands_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == mmfix.__version__ == importlib.metadata.version("mmfix")


def test_room_folders_are_plain_directories() -> None:
    for folder in FOLDERS[1:]:
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/__init__.py would shadow another package"


def test_readme_is_short_and_shows_the_two_ways_first() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    top = "\n".join(lines[:25])
    assert 'mmfix.mitigate(model, "var")' in top
    assert 'Decoder.from_pretrained("tiny", method="vhr")' in top


def test_readme_lists_every_method() -> None:
    text = (ROOT / "README.md").read_text()
    index = (ROOT / "docs" / "methods" / "README.md").read_text()
    for name, info in mmfix.methods().items():
        (kind,) = [line for line in text.splitlines() if line.startswith(f"| {info.kind} |")]
        assert f"[{name}](docs/methods/{name}.md)" in kind
        assert (ROOT / "docs" / "methods" / f"{name}.md").is_file()
        (row,) = [line for line in index.splitlines() if line.startswith(f"| `{name}` |")]
        assert info.title in row
        assert info.paper.removeprefix("arXiv:") in row


@pytest.mark.parametrize("pattern", [r"trust_remote_code\s*=\s*True", r"\bimport pickle\b", r"\btorch\.load\("])
def test_nothing_unsafe(pattern: str) -> None:
    found = [
        path.relative_to(ROOT)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if re.search(pattern, path.read_text())
    ]
    assert not found


def test_constraints_pin_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["eval"], *extras["dev"]]
    names = {re.split(r"[\[<>=;]", text)[0].lower() for text in wanted} - {"mmfix"}
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert names <= pinned, names - pinned


def test_no_machine_paths() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".txt", ".json", ".jsonl", ""} and path.is_file():
            assert not re.search(r"/(home|root|Users)/\w", path.read_text(errors="replace")), name
