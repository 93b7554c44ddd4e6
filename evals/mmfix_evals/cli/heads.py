"""``mmfix heads``: a layer × head map of a model, as JSON and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mmfix_evals.cli import targets
from mmfix_evals.errors import UsageError

EXAMPLE = "Example: mmfix heads --model tiny --score vhd --out heads.json --plot heads.svg"
SHOWN = 10


def heads_command(
    score: Annotated[str, typer.Option(help="vhd, image-mass, retrieval or vseam.")] = "vhd",
    model: Annotated[str, typer.Option(help="'tiny' (bundled), a local model folder, or a hub id.")] = "tiny",
    out: Annotated[Path | None, typer.Option(help="JSON file for the map; methods take it as heads=FILE.")] = None,
    plot: Annotated[Path | None, typer.Option(help="SVG file for the picture of the map.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of pictures; default: pictures of TinyWorld's dev split.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="vseam: JSON Lines with image, text and label about --images.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Pictures (vseam: questions) to look at.")] = 32,
    prompt: Annotated[str, typer.Option(help="Prompt beside every picture.")] = "Please describe this image in detail.",
    needle: Annotated[
        str | None, typer.Option(help="retrieval: object (patches of what is named) or text (a sentence to repeat).")
    ] = None,
    text: Annotated[str | None, typer.Option(help="retrieval: the sentence to repeat.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts per batch.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the map as JSON.")] = False,
) -> None:
    """Score every attention head of a model: what it looks at, what it depends on, what it is good for."""
    if limit < 1 or batch_size < 1:
        raise UsageError("--limit and --batch-size: give numbers of 1 or more")
    from mmfix_decoding import Decoder
    from mmfix_evals import headdata, headmaps
    from mmfix_evals.cli.quiet import hush
    from mmfix_evals.progress import Reporter

    if score not in headmaps.SCORES:
        raise UsageError(f"--score {score!r}: choose one of {', '.join(headmaps.SCORES)}")
    targets.picture("--plot", plot)
    targets.folder("--out", None if out is None else out.parent)
    hush()
    wanted = headmaps.Wanted(
        score, images, questions, limit, prompt, needle, text or headdata.NEEDLE, batch_size=batch_size
    )
    decoder = Decoder.from_pretrained(model, device=device, dtype=dtype)
    with Reporter(quiet) as reporter:
        what = "heads" if score == "vseam" else "prompts"
        reporter.start(f"heads {score}", headmaps.total(wanted, decoder.model), 0, what)
        found = headmaps.measure(decoder, wanted, reporter.advance)
    if out is not None:
        found.write(out)
    if plot is not None:
        from mmfix_evals import headplot

        headplot.draw(found, plot)
    if as_json:
        from dataclasses import asdict

        typer.echo(json.dumps(asdict(found), indent=1))
        return
    layers, heads = found.shape
    typer.echo(f"{score}: {headmaps.SCORES[score]}")
    typer.echo(f"{layers} layers of {heads} heads; {found.prompts} prompts of {found.settings['data']}")
    for layer, head, value in found.ranked()[:SHOWN]:
        typer.echo(f"  layer {layer:2d}  head {head:2d}  {value:.5g}")
    if "gain" in found.also:
        gain = found.also["gain"]
        typer.echo(
            f"p(right answer) {found.also['p_right']:.5g}; at strength {gain['strength']:g} vseam scales a head by "
            f"1 ± {gain['largest']:.5g} at most"
        )
    for path in (out, plot):
        if path is not None:
            typer.echo(f"written to {path}")
    if out is not None:
        use = {"vseam": "vseam", "retrieval": "retrieval-heads"}.get(score, "vhr")
        typer.echo(f"Next: mmfix describe PICTURE --model {model} --method {use}:heads={out}")
