"""Progress on standard error: a bar on a terminal, a line per task elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Reporter:
    """Tells a person what a run is doing; never writes to standard output."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False)
        bar = not quiet and sys.stderr.isatty()
        self._progress = (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            if bar
            else None
        )
        self._task = None if self._progress is None else self._progress.add_task("", total=None, visible=False)

    def start(self, name: str, total: int, done: int, what: str = "answers", where: str = "samples.jsonl") -> None:
        """A task of ``total`` answers (or something else) begins, ``done`` of which exist already."""
        if self._progress is not None and self._task is not None:
            self._progress.reset(self._task, total=total, completed=done, description=name, visible=True)
        elif not self.quiet:
            found = f" ({done} of them found in {where})" if done else ""
            self.say(f"{name}: {total} {what}{found} …")

    def advance(self, count: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, count)

    def say(self, text: str) -> None:
        """A remark; not shown when quiet."""
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A warning; always shown."""
        self.console.print(f"mmfix: warning: {text}", markup=False, soft_wrap=True)

    def __enter__(self) -> Reporter:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
