"""``mmfix eval fetch``: question files from a pinned revision. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmfix_evals.errors import UsageError

EXAMPLE = "Example: mmfix eval fetch pope-coco"


def fetch_command(
    task: Annotated[str, typer.Argument(help="A task with published question files; see `mmfix eval list`.")],
    folder: Annotated[
        Path | None, typer.Option("--data", help="Data folder, as of `mmfix eval run`; default: MMFIX_DATA.")
    ] = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="Only say what would be downloaded, and to where.")] = False,
) -> None:
    """Download a task's question files (not its pictures) into the data folder and check them.

    The addresses name a revision. Where the sha256 of a file is known in advance, other content is refused.
    """
    from mmfix_evals import tasks
    from mmfix_evals.tasks import data

    wanted = list(getattr(tasks.get(task), "questions", {}).values())
    if not wanted:
        raise UsageError(f"task {task} has no question files to download")
    with data.below(folder):
        if dry:
            for source in wanted:
                typer.echo(f"{data.root() / source.path}  {source.url}  sha256 {source.sha256 or 'by revision'}")
            return
        for source, digest, fresh in data.fetch(wanted):
            typer.echo(f"{data.root() / source.path}  sha256 {digest}  {'downloaded' if fresh else 'was there'}")
