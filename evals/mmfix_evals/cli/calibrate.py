"""``mmfix calibrate``: facts about a model that a method needs and that must be measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmfix_evals.cli import options
from mmfix_evals.cli.calibrate_common import load, positive
from mmfix_evals.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPT = "Please describe this image in detail."
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

app = typer.Typer(
    help="Measure what a method must know of a model.",
    epilog="Example: mmfix calibrate sinks --model llava-hf/llava-1.5-7b-hf --images pictures/",
    no_args_is_help=True,
)


@app.callback()
def _group() -> None:
    """Measure what a method must know of a model."""


@app.command("sinks", epilog="Example: mmfix calibrate sinks --model tiny --limit 32 --json")
def sinks_command(
    model: options.Model = "tiny",
    images: options.Pictures = None,
    limit: Annotated[int, typer.Option(help="Pictures to look at.")] = 16,
    prompt: Annotated[str, typer.Option(help="Prompt beside every picture.")] = PROMPT,
    batch_size: options.BatchSize = 4,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    save_to: options.SaveTo = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Find the hidden dimensions in which attention sinks are massive, and keep them for `var`.

    One prefill per picture and nothing of it is kept, so that a stopped run begins anew.
    """
    positive(limit=limit, batch_size=batch_size)
    from mmfix_evals import headdata

    asked = headdata.described(images, limit, prompt)
    from mmfix import calibration
    from mmfix_evals import calibrating
    from mmfix_evals.progress import Reporter

    decoder = load(model, device, dtype)
    with Reporter(quiet or as_json) as reporter, decoder.exclusive():
        reporter.start("calibrate sinks", len(asked), 0)
        batches = (inputs for inputs, _ in headdata.batches(decoder, asked, batch_size))
        found = calibration.find_sinks(decoder.model, batches, progress=reporter.advance)
    data = f"TinyWorld {headdata.SPLIT}" if images is None else "own pictures"
    record = {**calibrating.identity(decoder), "data": data, "data_sha256": headdata.digest(asked)}
    path = calibration.save(decoder.model, found, save_to, record)
    if as_json:
        typer.echo(json.dumps({**asdict(found), **record, "file": str(path)}, indent=1))
        return
    typer.echo(f"sink dimensions   {', '.join(map(str, found.sink_dims))}")
    typer.echo(f"tau               {found.tau:g}")
    typer.echo(f"phi               sinks {found.sink_phi:.1f} (median), others {found.other_phi:.1f} (99th percentile)")
    typer.echo(f"sinks per prompt  {found.sinks_per_prompt:.1f}, in the image {found.image_sinks_per_prompt:.1f}")
    typer.echo(f"prompts           {found.prompts}, {data}")
    if not found.massive:
        typer.echo(
            "The model shows no massive activations: its sinks hardly differ from other tokens, and var has little"
        )
        typer.echo("to move. That is a fact about this model, not a setting to tune.")
    typer.echo(f"written to {path}")
    typer.echo(f"Next: mmfix describe PICTURE --model {model} --method var")


def pictures_of(folder: Path | None, limit: int) -> Iterator[Image]:
    if folder is None:
        from mmfix_evals import tinyworld

        for index in range(limit):
            yield tinyworld.render(tinyworld.scene("dev", index))
        return
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give --images a folder of pictures")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(f"{folder}: holds no picture ({', '.join(SUFFIXES)}); give another folder")
    from mmfix_decoding import load_image

    for path in paths[:limit]:
        yield load_image(path)


def batches_of(decoder: Any, pictures: list[Image], prompt: str, size: int) -> Iterator[dict[str, Any]]:
    """Processor outputs, as the decoder itself makes them."""
    from mmfix_decoding import prompts

    for first in range(0, len(pictures), size):
        batch = pictures[first : first + size]
        requests, _ = prompts.pair(batch, [prompt] * len(batch))
        yield prompts.encode(prompts.load_images(requests), decoder.processor, decoder.model)
