"""Options that several commands share, each with one name and one explanation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="'tiny' (bundled), a local model folder, or a hub id.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub model.")]
BatchSize = Annotated[int, typer.Option(help="Prompts per batch.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# Of what is calibrated.
Pictures = Annotated[
    Path | None,
    typer.Option("--images", "--data", help="Folder of pictures; default: pictures of TinyWorld's dev split."),
]
AskedPictures = Annotated[
    Path | None,
    typer.Option("--images", "--data", help="Folder of pictures, with --questions; default: TinyWorld's dev split."),
]
Questions = Annotated[
    Path | None, typer.Option(help="JSON Lines with image, text and label (yes or no) about --images.")
]
SaveTo = Annotated[
    Path | None, typer.Option(help="Write mmfix.json into this model folder, not into the user's cache.")
]
