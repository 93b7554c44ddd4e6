"""Run the kernels from changed source: their modules are executed again, in place, afterwards from the true source."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# In the order of their imports.
MODULES = (
    "blocks", "maps", "masks", "rows", "state", "epilogue", "kernels", "merge", "tensors", "arguments", "launch",
    "columns", "vocabulary",
)  # fmt: skip


def execute(folder: Path, changed: dict[str, str]) -> None:
    """Run the kernel modules again, in place, from their source or from `changed` source (written to `folder`)."""
    for name in MODULES:
        module = importlib.import_module(f"mmfix_kernels.triton.{name}")
        assert module.__file__ is not None
        path = Path(module.__file__)
        source = changed.get(name, path.read_text())
        if changed:  # the interpreter reads a function's source from the file that its code names
            path = folder / f"{name}.py"
            path.write_text(source)
        exec(compile(source, str(path), "exec"), module.__dict__)


Mutate = Callable[[str, str, str], None]  # module, a piece of its source, what stands there instead


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[Mutate]:
    """Break a module; it is whole again after the test."""

    def mutate(name: str, old: str, new: str) -> None:
        module = importlib.import_module(f"mmfix_kernels.triton.{name}")
        assert module.__file__ is not None
        source = Path(module.__file__).read_text()
        assert old in source, "the mutation has no place: the kernel has changed"
        execute(tmp_path, {name: source.replace(old, new)})

    yield mutate
    execute(tmp_path, {})
