"""What the commands that calibrate share: counts checked, the model loaded, progress, results printed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

from mmfix_evals.errors import UsageError

if TYPE_CHECKING:
    from mmfix_decoding import Decoder
    from mmfix_evals.progress import Reporter


def positive(**counts: int) -> None:
    """Refuse a count below 1; the message names the option."""
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"--{name.replace('_', '-')} {count}: give a number of 1 or more")


def load(model: str, device: str, dtype: str) -> Decoder:
    from mmfix_decoding import Decoder
    from mmfix_evals.cli.quiet import hush

    hush()
    return Decoder.from_pretrained(model, device=device, dtype=dtype)


def begin(reporter: Reporter, name: str, total: int, what: str, found: int = 0) -> None:
    """Say what is calibrated, on how much, and how much of it an earlier run has done."""
    reporter.start(f"calibrate {name}", total, 0, what)
    if found:
        reporter.say(f"{found} of the {total} {what} were done by a run that was stopped; going on from there")


def print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content, indent=1))
