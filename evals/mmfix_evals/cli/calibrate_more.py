"""``mmfix calibrate act`` and ``mmfix calibrate sofa``: parameters that a paper chooses on held-out questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmfix_evals.cli import options as shared
from mmfix_evals.cli import targets
from mmfix_evals.cli.calibrate import app
from mmfix_evals.cli.calibrate_common import begin, load, positive, print_json
from mmfix_evals.errors import UsageError


@app.command("act", epilog="Example: mmfix calibrate act --model tiny --limit 96 --options rule=relative,alpha=5")
def act_command(
    model: shared.Model = "tiny",
    images: shared.AskedPictures = None,
    questions: shared.Questions = None,
    limit: Annotated[int, typer.Option(help="Questions to ask.")] = 96,
    options: Annotated[
        str, typer.Option(help="Further parameters of act, field=value,field=value; kept with the heads.")
    ] = "",
    batch_size: shared.BatchSize = 8,
    device: shared.Device = "auto",
    dtype: shared.Dtype = "auto",
    save_to: shared.SaveTo = None,
    quiet: shared.Quiet = False,
    as_json: shared.AsJson = False,
) -> None:
    """Find the heads whose attention calibration alone answers more questions rightly, and keep them for `act`.

    Stopped and started again, it goes on where it was.
    """
    positive(limit=limit, batch_size=batch_size)
    targets.folder("--save-to", save_to)
    import mmfix
    from mmfix import calibration
    from mmfix_evals import calibrating
    from mmfix_evals.progress import Reporter

    method = mmfix.parse(f"act:{options}" if options else "act")
    given = {piece.partition("=")[0].strip() for piece in options.split(",") if "=" in piece}
    if given & {"heads", "top"}:
        raise UsageError("--options heads, top: these are what is looked for; leave them out")
    chosen = {name: getattr(method, name) for name in sorted(given & set(method.info.params))}
    asked, data = calibrating.act_questions(images, questions, limit)
    decoder = load(model, device, dtype)
    with Reporter(quiet) as reporter:
        begin(reporter, "act", len(calibrating.candidates(decoder)) + 2, "settings")
        found = calibrating.act(decoder, asked, chosen, reporter.advance, batch_size)
    path = calibration.keep(decoder.model, "act", found.values, {"data": data, **found.record}, save_to)
    if as_json:
        print_json({"values": found.values, "data": data, **found.record, "file": str(path)})
        return
    scores = found.record["scores"]
    heads = ", ".join("{}.{}".format(*head) for head in found.values["heads"]) or "none"
    typer.echo(f"heads             {heads} (layer.head), of {len(scores['gain'])} tried")
    typer.echo(f"right answers     plain {scores['plain']:.3f}, all chosen heads {scores['chosen']:.3f}")
    typer.echo(f"questions         {found.record['questions']} of {data}; the same ones chose the heads")
    if not found.record["fired"]:
        typer.echo("No key of any prompt received enough attention to be a sink: try --options rule=relative,alpha=2")
    elif not found.values["heads"]:
        typer.echo("No head alone helps on these questions: act with these values is the plain model.")
    typer.echo(f"written to {path}")
    typer.echo(f"Next: mmfix eval run --model {model} --methods greedy,act --tasks tinyworld-pope")


@app.command("sofa", epilog="Example: mmfix calibrate sofa --model tiny --limit 64 --step 0.1")
def sofa_command(
    model: shared.Model = "tiny",
    images: shared.AskedPictures = None,
    questions: Annotated[
        Path | None, typer.Option(help="JSON Lines with images (two files), text and label (yes or no) about --images.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Pictures; two make a pair.")] = 64,
    step: Annotated[float, typer.Option(help="Distance of the values of sigma that are tried, 0 to 1.")] = 0.1,
    layers: Annotated[str, typer.Option(help="SoFA's layers: even, odd or all.")] = "even",
    batch_size: shared.BatchSize = 8,
    device: shared.Device = "auto",
    dtype: shared.Dtype = "auto",
    save_to: shared.SaveTo = None,
    quiet: shared.Quiet = False,
    as_json: shared.AsJson = False,
) -> None:
    """Choose SoFA's sigma by right answers about two pictures, and report how often their order changes the answer.

    Stopped and started again, it goes on where it was.
    """
    positive(limit=limit, batch_size=batch_size)
    targets.folder("--save-to", save_to)
    if limit < 2:
        raise UsageError("--limit 1: two pictures make a pair; give 2 or more")
    if not 0.01 <= step <= 1.0:
        raise UsageError(f"--step {step:g}: give a number from 0.01 to 1")
    if (images is None) != (questions is None):
        raise UsageError("--images and --questions go together: give both, or neither for TinyWorld's dev split")
    import mmfix
    from mmfix import calibration
    from mmfix_evals import calibrating, headdata
    from mmfix_evals.progress import Reporter

    own = None if images is None or questions is None else headdata.pair_questions(images, questions, limit)
    mmfix.method("sofa", layers=layers)
    sigmas = calibrating.grid(step)
    decoder = load(model, device, dtype)
    with Reporter(quiet) as reporter:
        begin(reporter, "sofa", len(sigmas), "settings")
        found = calibrating.sofa(decoder, limit, sigmas, layers, reporter.advance, batch_size, own)
    path = calibration.keep(decoder.model, "sofa", found.values, found.record, save_to)
    if as_json:
        print_json({"values": found.values, **found.record, "file": str(path)})
        return
    typer.echo("sigma  accuracy  same answer in both orders")
    for row in found.record["scores"]:
        mark = " <" if row["sigma"] == found.values["sigma"] else ""
        typer.echo(f"{row['sigma']:5.2f}  {row['accuracy']:8.3f}  {row['consistency']:.3f}{mark}")
    typer.echo(f"{found.record['scores'][0]['pairs']} questions in two orders, {found.record['data']}")
    if not any(row["fired"] for row in found.record["scores"]):
        typer.echo("sofa never fired: in these prompts two pictures cannot be told apart, so that sigma says nothing.")
    typer.echo(f"written to {path}")
    typer.echo(f"Next: mmfix eval run --model {model} --methods greedy,sofa --tasks tinyworld-position")
