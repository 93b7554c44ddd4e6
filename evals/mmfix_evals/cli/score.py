"""``mmfix eval score``: answers that exist already, from anywhere, or a run folder scored again. Imports no torch.

A scorer is one command of :data:`app`. A first argument that is no scorer is taken as a run folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mmfix_evals.choices import unknown
from mmfix_evals.errors import UsageError

RUN = "run"
JSON = Annotated[bool, typer.Option("--json", help="Print JSON: unrounded numbers, fractions.")]


class ScorerGroup(TyperGroup):
    """``score pope …`` and ``score RUN_FOLDER`` in one place: what names no scorer is handed to ``score run``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in ("--help", *self.commands):
            args = [RUN, *args]
        return list(super().parse_args(ctx, args))


app = typer.Typer(
    cls=ScorerGroup,
    help="Score answers that exist already: files of one benchmark, or a run folder of `mmfix eval run`.",
    epilog="Example: mmfix eval score pope --questions coco_pope_random.json --answers answers.jsonl --json",
    no_args_is_help=True,
)


@app.command(
    "pope",
    epilog="Example: mmfix eval score pope --questions coco_pope_random.json --answers answers.jsonl --json",
)
def pope_command(
    questions: Annotated[Path, typer.Option(help="Question file (JSON Lines with question_id, text, label).")],
    answers: Annotated[Path, typer.Option(help="Answers (JSON Lines with question_id and answer or text).")],
    parser: Annotated[str, typer.Option(help="Rule that turns a text into yes or no; see `mmfix eval list`.")] = (
        "official"
    ),
    as_json: JSON = False,
) -> None:
    """Accuracy, precision, recall, F1 and yes ratio of POPE answers."""
    from mmfix_evals.metrics import pope

    known("parser", parser, pope.PARSERS)
    show(pope.score_files(questions, answers, parser), as_json)


@app.command(
    "chair",
    epilog="Example: mmfix eval score chair --captions captions.jsonl --ground-truth annotations/ --json",
)
def chair_command(
    captions: Annotated[Path, typer.Option(help="Captions (JSON Lines with image_id and caption).")],
    ground_truth: Annotated[Path, typer.Option(help="JSON file {image_id: [objects]} or folder of COCO annotations.")],
    synonyms: Annotated[Path | None, typer.Option(help="Another word table, in the published format.")] = None,
    unknown_image: Annotated[
        str, typer.Option(help="Images without ground truth: 'error', or 'empty' as upstream does.")
    ] = "error",
    truncate: Annotated[
        str | None, typer.Option(help="'last-period' cuts every caption after its last period first.")
    ] = None,
    flavour: Annotated[
        str, typer.Option(help="'pattern' (original, no data needed) or 'wordnet' (OPERA, PAI; NLTK data).")
    ] = "pattern",
    as_json: JSON = False,
) -> None:
    """CHAIR_s, CHAIR_i, recall and length of captions."""
    from mmfix_evals.metrics import chair

    known("--flavour", flavour, chair.FLAVOURS)

    known("--unknown-image", unknown_image, ("error", "empty"))
    if truncate is not None:
        known("--truncate", truncate, ("last-period",))
    show(chair.score_files(captions, ground_truth, synonyms, unknown_image, truncate, flavour), as_json)


@app.command(RUN, epilog="Example: mmfix eval score runs/demo --parser strict3way --json")
def run_folder_command(
    folder: Annotated[Path, typer.Argument(help="A run folder, or the name of a scorer.")],
    parser: Annotated[str | None, typer.Option(help="POPE parser; default: that of the run.")] = None,
    every_metric: Annotated[bool, typer.Option("--all", help="Show every metric, not only the main ones.")] = False,
    as_json: JSON = False,
) -> None:
    """Score a run folder again from its samples.jsonl alone: no model, no pictures."""
    if not folder.exists():
        scorers = [name for name in _scorers() if name != RUN]
        raise UsageError(f"{unknown('scorer', str(folder), scorers)}; or give an existing run folder")
    from mmfix_evals.rescore import rescore

    found = rescore(folder, parser)
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    from mmfix_evals import tables

    console = tables.console_for(typer.get_text_stream("stdout"))
    tables.print_sections(console, tables.sections(found, every_metric))
    for warning in found["warnings"]:
        typer.echo(f"mmfix: warning: {warning}", err=True)


def _scorers() -> list[str]:
    return [str(info.name) for info in app.registered_commands]


def known(kind: str, given: str, choices: Any) -> None:
    if given not in choices:
        raise UsageError(unknown(kind, given, choices))


def show(score: dict[str, Any], as_json: bool, echo: Callable[..., None] = typer.echo) -> None:
    """A score as JSON, or as lines of name, value and interval with the warnings on standard error."""
    if as_json:
        echo(json.dumps(score, indent=1, ensure_ascii=False))
        return
    drawn = score.get("intervals", {})
    for name, value in score.items():
        if isinstance(value, float):
            echo(f"{name:<14} {value:.6f}{_interval(drawn.get(name))}")
        elif value is None:
            echo(f"{name:<14} {'none' if name == 'truncate' else 'undefined'}")
        elif isinstance(value, (int, str)):
            echo(f"{name:<14} {value}")
    for split, part in score.get("splits", {}).items():
        own = part.get("intervals", {})
        values = (f"{k} {v:.6f}{_interval(own.get(k))}" for k, v in part.items() if isinstance(v, float))
        echo(f"{split:<14} " + ("  ".join(values) or "undefined"))
    if "interval_method" in score:
        echo(_method(score["interval_method"]))
    for warning in score["warnings"]:
        echo(f"mmfix: warning: {warning}", err=True)


def _interval(drawn: dict[str, Any] | None) -> str:
    if drawn is None or drawn["ci_low"] is None:
        return ""
    return f" [{drawn['ci_low']:.6f}, {drawn['ci_high']:.6f}]"


def _method(how: dict[str, Any]) -> str:
    count, unit = how["n_units"], how["unit"]
    if count < 2:
        return f"no intervals: there is one {unit} only" if count else "no intervals: nothing was scored"
    return (
        f"[intervals]    {how['confidence']:.0%}, {how['name']}: {count} x {unit} drawn {how['resamples']} times, "
        f"seed {how['seed']}"
    )
