"""The tree of commands."""

from __future__ import annotations

from typing import Annotated

import typer

from mmfix_evals.cli import (
    bench,
    bench_scoring,
    build,
    calibrate,
    compare,
    describe,
    fetch,
    heads,
    info,
    judge,
    merge,
    report,
    run,
    score,
    serve,
    sinks,
    tune,
)
from mmfix_evals.cli import calibrate_more as _calibrate_more  # noqa: F401 - enters its commands
from mmfix_evals.cli import calibrate_positional as _calibrate_positional  # noqa: F401 - enters its command
from mmfix_evals.cli import calibrate_vti as _calibrate_vti  # noqa: F401 - enters its command
from mmfix_evals.cli import score_more as _score_more  # noqa: F401 - enters its commands

app = typer.Typer(
    name="mmfix",
    help="Training-free hallucination mitigation for vision-language models.",
    epilog="Example: mmfix eval run --model tiny --methods greedy,var,vhr --limit 50 --out runs/first",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
evaluate = typer.Typer(
    help="Run, score and compare evaluations.",
    epilog="Example: mmfix eval run --model tiny --tasks tinyworld-chair --methods greedy,vhr --limit 50",
    no_args_is_help=True,
)
app.add_typer(evaluate, name="eval")

evaluate.command("run", epilog=run.EXAMPLE)(run.run_command)
evaluate.command("merge", epilog=merge.EXAMPLE)(merge.merge_command)
evaluate.add_typer(score.app, name="score")
evaluate.add_typer(build.app, name="build")
evaluate.command("fetch", epilog=fetch.EXAMPLE)(fetch.fetch_command)
evaluate.command("judge", epilog=judge.EXAMPLE)(judge.judge_command)
evaluate.command("compare", epilog=compare.COMPARE_EXAMPLE)(compare.compare_command)
evaluate.command("report", epilog=report.EXAMPLE)(report.report_command)
evaluate.command("list", epilog=compare.LIST_EXAMPLE)(compare.list_command)
app.command("describe", epilog=describe.EXAMPLE)(describe.describe_command)
app.command("methods", epilog=info.METHODS_EXAMPLE)(info.methods_command)
app.command("heads", epilog=heads.EXAMPLE)(heads.heads_command)
app.command("sinks", epilog=sinks.EXAMPLE)(sinks.sinks_command)
app.command("doctor", epilog=info.DOCTOR_EXAMPLE)(info.doctor_command)
app.add_typer(calibrate.app, name="calibrate")
bench.app.command("scoring", epilog=bench_scoring.EXAMPLE)(bench_scoring.scoring_command)
app.add_typer(bench.app, name="bench")
app.command("serve", epilog=serve.EXAMPLE)(serve.serve_command)
app.command("tune", epilog=tune.EXAMPLE)(tune.tune_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from mmfix_evals.machine import version

        typer.echo(f"mmfix {version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; accepted anywhere on the command line.")
    ] = False,
) -> None:
    """Training-free hallucination mitigation for vision-language models."""
