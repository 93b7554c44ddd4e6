"""``mmfix calibrate positional``: the hidden dimension that carries position, for `positional-hidden`."""

from __future__ import annotations

from typing import Annotated

import typer

from mmfix_evals.cli import options, targets
from mmfix_evals.cli.calibrate import app
from mmfix_evals.cli.calibrate_common import begin, load, positive, print_json


@app.command("positional-hidden", hidden=True)  # the method that it is for
@app.command("positional", epilog="Example: mmfix calibrate positional --model tiny --limit 96")
def positional_command(
    model: options.Model = "tiny",
    images: options.AskedPictures = None,
    questions: options.Questions = None,
    limit: Annotated[int, typer.Option(help="Questions to ask.")] = 96,
    texts: Annotated[int, typer.Option(help="Random texts in which positional dimensions are looked for.")] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 256,
    top: Annotated[int, typer.Option(help="Dimensions that are tried.")] = 10,
    batch_size: options.BatchSize = 8,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    save_to: options.SaveTo = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Find the hidden dimension that carries position and whose scaling helps most, and keep it.

    Stopped and started again, it goes on where it was.
    """
    positive(limit=limit, batch_size=batch_size, texts=texts, tokens=tokens, top=top)
    targets.folder("--save-to", save_to)
    from mmfix import calibration
    from mmfix_evals import calibrating
    from mmfix_evals.calibrating_positional import positional
    from mmfix_evals.progress import Reporter

    asked, data = calibrating.act_questions(images, questions, limit)
    decoder = load(model, device, dtype)
    factors = (0.0, -1.0)
    with Reporter(quiet) as reporter:
        begin(reporter, "positional", 2 + top * len(factors), "settings")
        found = positional(decoder, asked, factors, texts, tokens, top, reporter.advance, batch_size)
    record = {"data": data, **found.record}
    path = calibration.keep(decoder.model, "positional-hidden", found.values, record, save_to)
    if as_json:
        print_json({"values": found.values, **record, "file": str(path)})
        return
    scores = found.record["scores"]
    best = max(row["p_right"] for row in scores["tried"])
    typer.echo(f"dimension         {found.values['dims'][0]}, times {found.values['factor']:g}")
    typer.echo(f"right answer      plain {scores['plain']['p_right']:.3f}, scaled {best:.3f} (mean probability)")
    typer.echo(f"questions         {found.record['questions']} of {data}; the same ones chose the dimension")
    if found.values["factor"] == 1.0:
        typer.echo("No dimension helps on these questions: with these values the method is the plain model.")
    typer.echo(f"written to {path}")
    typer.echo(f"Next: mmfix eval run --model {model} --methods greedy,positional-hidden --tasks tinyworld-pope")
