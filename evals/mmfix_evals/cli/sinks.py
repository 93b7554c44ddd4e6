"""``mmfix sinks``: attention sinks of one picture and prompt, layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mmfix_evals.cli import targets
from mmfix_evals.errors import UsageError

EXAMPLE = "Example: mmfix sinks picture.png --model tiny --out sinks.json --plot sinks.svg"


def sinks_command(
    image: Annotated[str | None, typer.Argument(help="A picture; default: the first of TinyWorld's dev split.")] = None,
    model: Annotated[str, typer.Option(help="'tiny' (bundled), a local model folder, or a hub id.")] = "tiny",
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "Please describe this image in detail.",
    dims: Annotated[
        str | None,
        typer.Option(help="Sink dimensions, as 1415,2533; default: known or calibrated ones."),
    ] = None,
    tau: Annotated[float | None, typer.Option(help="Threshold on phi; default: as calibrated, else 20.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the sinks.")] = None,
    plot: Annotated[Path | None, typer.Option(help="SVG file: counts per layer, image sinks over the picture.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which tokens are attention sinks at each layer, and in which hidden dimensions; as `var` defines them."""
    given = _numbers(dims)
    targets.picture("--plot", plot)
    targets.folder("--out", None if out is None else out.parent)
    from mmfix_decoding import Decoder, load_image
    from mmfix_evals import headdata, tinyworld
    from mmfix_evals.cli.quiet import hush

    hush()
    picture = load_image(image) if image is not None else tinyworld.render(tinyworld.scene(headdata.SPLIT, 0))
    decoder = Decoder.from_pretrained(model, device=device, dtype=dtype)
    content, found = measure(decoder, picture, prompt, given, tau)
    content["image"] = image if image is not None else f"TinyWorld {headdata.SPLIT} 0"
    if out is not None:
        from mmfix.storage import write_json

        write_json(out, content)
    if plot is not None:
        from mmfix_evals import sinkplot

        title = f"{Path(str(decoder.model_id)).name}: dimensions {', '.join(map(str, found.dims))}, tau {found.tau:g}"
        sinkplot.draw(found, picture, decoder.image_grids(picture, prompt), title, plot)
    if as_json:
        typer.echo(json.dumps(content, indent=1))
        return
    text, visual = found.counts()
    typer.echo(f"sink dimensions {', '.join(map(str, found.dims))}, tau {found.tau:g}")
    typer.echo("layer  text  image  largest dimensions (|x| / RMS)")
    for layer, one in enumerate(found.layers):
        sizes = ", ".join(f"{d} ({s:.1f})" for d, s in zip(one.dims, one.sizes, strict=True))
        typer.echo(f"{layer:5d}  {text[layer]:4d}  {visual[layer]:5d}  {sizes}")
    for path in (out, plot):
        if path is not None:
            typer.echo(f"written to {path}")


def measure(
    decoder: Any, picture: Any, prompt: str, dims: tuple[int, ...] | None = None, tau: float | None = None
) -> tuple[dict[str, Any], Any]:
    """The sinks of one picture and prompt, as JSON and as :class:`mmfix.sinks.Sinks`.

    Args:
        dims, tau: None takes what `var` would take for this model.
    """
    import mmfix
    from mmfix import sinks
    from mmfix_evals import headdata
    from mmfix_evals.fingerprint import fingerprint

    family = mmfix.describe(decoder.model)
    fields: dict[str, Any] = {} if dims is None else {"sink_dims": dims}
    fields |= {} if tau is None else {"tau": tau}
    var: Any = mmfix.calibrated(decoder.model, "var", **fields).prepare(family)
    asked = headdata.Asked(picture, prompt)
    inputs, _ = next(iter(headdata.batches(decoder, [asked], 1)))
    with decoder.exclusive():
        (found,) = sinks.observe(family, inputs, var.sink_dims, var.tau)
    tokens = decoder.processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    known = fingerprint(decoder)
    content = {
        "model": known["id"], "revision": known["revision"] or known["sha256"], "prompt": prompt,
        "data_sha256": headdata.digest([asked]), "sink_dims": list(found.dims), "tau": found.tau,
        "layers": sinks.described(found, tokens),
    }  # fmt: skip
    return content, found


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UsageError(f"--dims {text!r}: give whole numbers with commas, such as 1415,2533") from None
