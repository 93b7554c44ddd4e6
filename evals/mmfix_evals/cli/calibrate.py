"""``mmfix calibrate``: facts about a model that a method needs and that must be measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from mmfix_evals.cli import options, targets
from mmfix_evals.cli.calibrate_common import begin, load, positive

PROMPT = "Please describe this image in detail."

app = typer.Typer(
    help="Measure what a method must know of a model.",
    epilog="Example: mmfix calibrate sinks --model llava-hf/llava-1.5-7b-hf --images pictures/",
    no_args_is_help=True,
)


@app.callback()
def _group() -> None:
    """Measure what a method must know of a model."""


@app.command("var", hidden=True)  # the method that it is for
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

    Stopped and started again, it goes on where it was.
    """
    positive(limit=limit, batch_size=batch_size)
    targets.folder("--save-to", save_to)
    from mmfix_evals import headdata

    asked = headdata.described(images, limit, prompt)
    from mmfix import calibration, sinksearch
    from mmfix_evals import calibrating
    from mmfix_evals.progress import Reporter

    decoder = load(model, device, dtype)
    digest = headdata.digest(asked)
    rows = sinksearch.rows_each(len(asked))
    with Reporter(quiet or as_json) as reporter, decoder.exclusive():
        key = {"data": digest, "batch_size": batch_size, "rows": rows}
        parts = calibrating.parts("sinks", decoder, key, reporter.warn)
        begin(reporter, "sinks", len(asked), "pictures", min(len(asked), len(parts) * batch_size))
        batches = (inputs for inputs, _ in headdata.batches(decoder, asked, batch_size))
        found = sinksearch.find_sinks(decoder.model, batches, progress=reporter.advance, parts=parts, rows=rows)
    data = f"TinyWorld {headdata.SPLIT}" if images is None else "own pictures"
    record = {**calibrating.identity(decoder), "data": data, "data_sha256": digest}
    path = calibration.save(decoder.model, found, save_to, record)
    parts.done()
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
