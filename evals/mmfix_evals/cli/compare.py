"""``mmfix eval compare`` and ``list``: everything that needs run folders only. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mmfix_evals.errors import UsageError
from mmfix_evals.stats import RESAMPLES

COMPARE_EXAMPLE = "Example: mmfix eval compare runs/demo   (methods of one run)   or: mmfix eval compare runs/a runs/b"
LIST_EXAMPLE = "Example: mmfix eval list --json"

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
    match_length: Annotated[
        bool,
        typer.Option("--match-length", help="CHAIR with the longer of two captions cut to the length of the shorter."),
    ] = False,
    resamples: Annotated[
        int | None, typer.Option(help=f"Bootstrap resamples; default: the run's ({RESAMPLES}).")
    ] = None,
    every_metric: All = False,
    as_latex: Annotated[bool, typer.Option("--latex", help="Print LaTeX tables (booktabs).")] = False,
    as_json: JSON = False,
) -> None:
    """Differences with paired intervals, exact McNemar tests and Holm's correction.

    One folder: its methods against greedy. Several: each method against itself in the first folder. Runs on other
    data, pictures, prompts or scoring rules are refused, naming the field that differs.
    """
    from dataclasses import replace

    from mmfix_evals import compare_table, length_table, tables
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
        match_length=match_length,
    )
    for warning in found.warnings:
        typer.echo(f"mmfix: warning: {warning}", err=True)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1, ensure_ascii=False))
        return
    if as_latex:
        from mmfix_evals.report.latex import differences

        typer.echo(differences(found, every_metric))
        return
    console = tables.console_for(typer.get_text_stream("stdout"))
    if match_length:
        tables.print_sections(console, length_table.sections(found.entries), length_table.COLUMNS)
        notes = [*length_table.footnotes(found.entries), *found.notes]
    else:
        tables.print_sections(console, compare_table.sections(found, every_metric), compare_table.COLUMNS)
        notes = compare_table.footnotes(found)
    for note in notes:
        typer.echo(note)


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
