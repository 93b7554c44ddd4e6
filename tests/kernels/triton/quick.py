"""Make Triton's interpreter fast enough for tests: it patches the whole language at every device-function call."""

from __future__ import annotations

from typing import Any


def quicken() -> None:
    """Patch each language module once per kernel launch; does nothing on a version with another layout."""
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in ("InterpretedFunction", "GridExecutor", "_patch_lang")):
        return
    patched: set[str] = set()
    launch = interpreter.GridExecutor.__call__

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Which language module a function sees ("tl" or its core) decides what has to be patched for it.
        module = self.fn.__module__ if self.fn.__module__.startswith("triton") else "kernel"
        if module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch_afresh
    interpreter.InterpretedFunction.__call__ = call
