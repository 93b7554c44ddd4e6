"""``mmfix eval compare``, ``report`` and ``list``: everything that needs run folders only. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mmfix_evals.choices import unknown
from mmfix_evals.errors import UsageError
from mmfix_evals.stats import RESAMPLES

COMPARE_EXAMPLE = "Example: mmfix eval compare runs/demo   (methods of one run)   or: mmfix eval compare runs/a runs/b"
REPORT_EXAMPLE = "Example: mmfix eval report runs/demo --format md"
LIST_EXAMPLE = "Example: mmfix eval list --json"
FORMATS = ("text", "md", "json")

All = Annotated[bool, typer.Option("--all", help="Show every metric, not only the main ones.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def compare_command(
    folders: Annotated[list[Path], typer.Argument(help="Run folders; the first one is the baseline of the others.")],
    baseline: Annotated[str, typer.Option(help="Within one run: the method to compare with.")] = "greedy",
    parser: Annotated[str | None, typer.Option(help="Score all POPE answers anew with this parser.")] = None,
    intersect: Annotated[
        bool, typer.Option("--intersect", help="Across runs: compare the documents that both have.")
    ] = False,
    other_prompts: Annotated[
        bool, typer.Option("--other-prompts", help="Across runs: prompts may differ, they are what is compared.")
    ] = False,
    resamples: Annotated[
        int | None, typer.Option(help=f"Bootstrap resamples; default: the run's ({RESAMPLES}).")
    ] = None,
    every_metric: All = False,
    as_json: JSON = False,
) -> None:
    """Differences with paired intervals, exact McNemar tests and Holm's correction.

    One folder: its methods against greedy. Several: each method against itself in the first folder. Runs on other
    data, pictures, prompts or scoring rules are refused, naming the field that differs.
    """
    from dataclasses import replace

    from mmfix_evals import compare_table, tables
    from mmfix_evals.compare import compare
    from mmfix_evals.results import open_run

    settings = open_run(folders[0]).settings()
    if resamples is not None:
        if resamples < 1:
            raise UsageError(f"--resamples {resamples}: give a number of 1 or more")
        settings = replace(settings, resamples=resamples)
    found = compare(
        folders,
        baseline=baseline,
        parser=parser,
        intersect=intersect,
        other_prompts=other_prompts,
        settings=settings,
    )
    for warning in found.warnings:
        typer.echo(f"mmfix: warning: {warning}", err=True)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1, ensure_ascii=False))
        return
    console = tables.console_for(typer.get_text_stream("stdout"))
    tables.print_sections(console, compare_table.sections(found, every_metric), compare_table.COLUMNS)
    for note in compare_table.footnotes(found):
        typer.echo(note)


def report_command(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    format_: Annotated[str, typer.Option("--format", help="text, md or json.")] = "text",
    every_metric: All = False,
) -> None:
    """Print the table of a finished run again."""
    from mmfix_evals import results, tables

    if format_ not in FORMATS:
        raise UsageError(unknown("format", format_, FORMATS))
    found = results.read(folder)
    if format_ == "json":
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
    elif format_ == "md":
        typer.echo(tables.markdown(found, every_metric))
    else:
        tables.print_results(found, typer.get_text_stream("stdout"), every_metric)


def list_command(as_json: JSON = False) -> None:
    """Tasks, with their splits, metrics and scoring rules."""
    from mmfix_evals import tasks

    listed = [
        {
            "task": task.name,
            "title": task.title,
            "data_splits": list(task.data_splits),
            "splits": list(task.splits),
            "metrics": [metric.name for metric in task.metrics],
            f"{task.flavour_field}s": list(task.flavours),
            "max_new_tokens": task.max_new_tokens,
        }
        for task in tasks.tasks()
    ]
    if as_json:
        typer.echo(json.dumps(listed, indent=1, ensure_ascii=False))
        return
    for entry in listed:
        typer.echo(f"{entry['task']}: {entry['title']}")
        for name, value in list(entry.items())[2:]:
            if value:
                typer.echo(f"  {name.replace('_', ' ')}: {', '.join(value) if isinstance(value, list) else value}")
