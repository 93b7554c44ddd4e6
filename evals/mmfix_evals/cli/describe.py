"""``mmfix describe``: what the plain model says of a picture, and what it says with a method."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from mmfix_evals.cli.options import Device, Dtype, Model

EXAMPLE = "Example: mmfix describe picture.png --model tiny --method vhr"
PROMPT = "Please describe this image in detail."
PLAIN = "plain"


def describe_command(
    image: Annotated[str, typer.Argument(help="A picture: PNG, JPEG, WebP, BMP, GIF or TIFF.")],
    model: Model = "tiny",
    method: Annotated[
        str, typer.Option(help="A method, name:field=value,field=value, or several joined by +; see `mmfix methods`.")
    ] = "var",
    prompt: Annotated[str, typer.Option(help="What to ask.")] = PROMPT,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens per answer.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed, for sampling.")] = 0,
    gen_kwargs: Annotated[str | None, typer.Option("--gen-kwargs", help="More arguments of generate().")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the plain answer and the one with a method side by side. Neither is checked against the picture."""
    from mmfix_evals.arms import parse_arguments, resolve
    from mmfix_evals.errors import UsageError

    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {max_new_tokens}: give a number of 1 or more")
    arguments = {"do_sample": False, "max_new_tokens": max_new_tokens, **parse_arguments(gen_kwargs)}
    resolve(method)
    from mmfix_decoding import Decoder, load_image
    from mmfix_evals.cli.quiet import hush

    hush()
    picture = load_image(image)
    decoder = Decoder.from_pretrained(model, device=device, dtype=dtype)
    arm = resolve(method, decoder.model)
    plain = decoder.generate(picture, prompt, seed=seed, **arguments)
    treated = decoder.with_method(list(arm.methods) or None).generate(picture, prompt, seed=seed, **arguments)
    answers = {PLAIN: plain, arm.name: treated}
    if as_json:
        typer.echo(json.dumps(_content(image, model, prompt, arm.spec, answers), indent=1, ensure_ascii=False))
        return
    _print(answers)
    for name, found in ((treated.report or {}).get("calibrated") or {}).items():
        source = f" on {found['data']}" if "data" in found else ""
        typer.echo(f"{name}: {', '.join(found['values'])} as calibrated for this model{source}.")
    typer.echo(fired_line(arm.name, treated.report, plain.text == treated.text))


def _content(
    image: str, model: str, prompt: str, spec: tuple[dict[str, Any], ...], answers: dict[str, Any]
) -> dict[str, Any]:
    return {
        "image": str(image),
        "model": model,
        "prompt": prompt,
        "method": list(spec),
        "answers": {
            name: {
                "text": answer.text,
                "tokens": len(answer.token_ids),
                "finish_reason": answer.finish_reason,
                "seconds": answer.seconds,
                "report": answer.report,
            }
            for name, answer in answers.items()
        },
    }


def _print(answers: dict[str, Any]) -> None:
    """Two columns on a terminal, two labelled blocks elsewhere."""
    if not sys.stdout.isatty():
        for name, answer in answers.items():
            typer.echo(f"[{name}]\n{answer.text}\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True)
    for name in answers:
        table.add_column(Text(name), ratio=1)
    table.add_row(*(Text(answer.text) for answer in answers.values()))
    Console(highlight=False).print(table)


def fired_line(name: str, report: dict[str, Any] | None, same: bool) -> str:
    """How often the method acted, in one line."""
    counted = (report or {}).get("fired") or {}
    parts = [
        f"{one} changed {found['fired']} of {found['considered']} places it looked at" for one, found in counted.items()
    ]
    if not parts:
        return f"{name}: no method was applied."
    end = " The answers are the same." if same else ""
    return f"{'; '.join(parts)}.{end}"
