"""``mmfix eval report``: finished runs as a page, as tables, as a model-card snippet. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mmfix_evals.choices import unknown
from mmfix_evals.errors import UsageError

EXAMPLE = (
    "Example: mmfix eval report runs/demo --html demo.html   or: mmfix eval report runs/a runs/b --latex tables.tex"
)
FORMATS = ("text", "md", "json", "latex", "model-index")


def report_command(
    folders: Annotated[list[Path], typer.Argument(help="Run folders.")],
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page: tables, plots, samples.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown tables.")] = None,
    latex: Annotated[Path | None, typer.Option(help="Write LaTeX tables (booktabs).")] = None,
    model_index: Annotated[Path | None, typer.Option(help="Write the model-index part of a model card (YAML).")] = None,
    format_: Annotated[
        str,
        typer.Option("--format", help="Else print: text, md, json, latex or model-index."),
    ] = "text",
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "mmfix report",
    baseline: Annotated[str, typer.Option(help="On the page: the method the others are shown beside.")] = "greedy",
    pictures: Annotated[bool, typer.Option(help="On the page: small pictures, where they can be found.")] = True,
    every_metric: Annotated[bool, typer.Option("--all", help="Show every metric, not only the main ones.")] = False,
) -> None:
    """Report finished runs: print their tables again, or write a page, Markdown, LaTeX or a model-index snippet."""
    from mmfix_evals import files

    if format_ not in FORMATS:
        raise UsageError(unknown("format", format_, FORMATS))
    wanted = {"html": html, "md": markdown, "latex": latex, "model-index": model_index}
    if not any(wanted.values()):
        _print(folders, format_, every_metric)
        return
    from mmfix_evals import report

    runs = report.read(folders)
    for kind, path in wanted.items():
        if path is not None:
            text = (
                report.html(runs, title, baseline, pictures) if kind == "html" else _text(folders, kind, every_metric)
            )
            files.write_text_atomic(path, text)
            typer.echo(f"written to {path}")


def _print(folders: list[Path], format_: str, every_metric: bool) -> None:
    from mmfix_evals import results, tables

    if format_ == "json":
        found = [results.read(folder) for folder in folders]
        typer.echo(json.dumps(found[0] if len(found) == 1 else found, indent=1, ensure_ascii=False))
    elif format_ != "text":
        typer.echo(_text(folders, format_, every_metric))
    else:
        for folder in folders:
            if len(folders) > 1:
                typer.echo(f"{folder}\n")
            tables.print_results(results.read(folder), typer.get_text_stream("stdout"), every_metric)


def _text(folders: list[Path], kind: str, every_metric: bool) -> str:
    from mmfix_evals import length_table, report, results, tables

    if kind == "md":
        found = [results.read(folder) for folder in folders]
        parts = [
            "\n".join(filter(None, (tables.markdown(one, every_metric), length_table.markdown(one)))) for one in found
        ]
        named = [f"## {folder.name}\n\n{part}" for folder, part in zip(folders, parts, strict=True)]
        return parts[0] if len(parts) == 1 else "\n".join(named)
    runs = report.read(folders)
    return report.latex(runs) if kind == "latex" else report.model_index(runs)
