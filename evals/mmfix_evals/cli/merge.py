"""``mmfix eval merge``. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "Example: mmfix eval merge runs/demo --out runs/demo   (runs/demo/shard-0-of-4, … -3-of-4)"


def merge_command(
    folders: Annotated[list[Path], typer.Argument(help="Shard folders, or the folder that they stand in.")],
    out: Annotated[Path, typer.Option(help="Run folder to write; may be the folder that the shards stand in.")],
) -> None:
    """Join the shards of one run into a run folder, score it, and print its table.

    Refuses shards that are missing, incomplete, there twice, or of different runs, by name. Nothing of the shards is
    changed; the same command may be repeated.
    """
    from mmfix_evals import tables
    from mmfix_evals.merge import merge

    tables.print_results(merge(folders, out), typer.get_text_stream("stdout"))
    typer.echo(f"\nRun folder: {out}")
    typer.echo(f"Next: mmfix eval compare {out}")
