"""Options that several commands share, each with one name and one explanation."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="'tiny' (bundled), a local model folder, or a hub id.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub model.")]
