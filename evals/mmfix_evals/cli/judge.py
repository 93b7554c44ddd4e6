"""``mmfix eval judge``: ask a judge model about answers, after showing what that costs. Imports no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mmfix_evals.cli.score import known
from mmfix_evals.errors import UsageError

EXAMPLE = (
    "Example: mmfix eval judge mmhal --responses answers.json --url http://localhost:8000/v1 --model my-judge "
    "--out replies.jsonl --yes"
)
WHAT = ("mmhal", "hallusionbench", "hallusionbench-same")


def judge_command(
    what: Annotated[str, typer.Argument(help="mmhal, hallusionbench (verdicts) or hallusionbench-same.")],
    responses: Annotated[Path, typer.Option(help="The benchmark's rows with the model's answers.")],
    url: Annotated[str, typer.Option(help="Base of an OpenAI-compatible endpoint, such as https://host/v1.")],
    model: Annotated[str, typer.Option(help="Name of the judge, with its date where it has one.")],
    out: Annotated[Path, typer.Option(help="Where the replies go; give it to `mmfix eval score` afterwards.")],
    key_variable: Annotated[
        str, typer.Option(help="Environment variable that holds the key; '' if the server needs none.")
    ] = "OPENAI_API_KEY",
    price_in: Annotated[float | None, typer.Option(help="Price of a million tokens sent, for the estimate.")] = None,
    price_out: Annotated[float | None, typer.Option(help="Price of a million tokens received.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of one reply.")] = 512,
    cache: Annotated[
        Path | None, typer.Option(help="Prompts and replies, appended as they come; default: OUT.cache.jsonl.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Start without asking.")] = False,
) -> None:
    """Send answers to a judge. What will be sent and what it costs at most is shown first.

    Every prompt and reply is recorded; a prompt that was answered is never sent again.
    """
    from mmfix_evals import files
    from mmfix_evals.metrics import hallusionbench, hallusionbench_rows, judge, mmhal

    known("benchmark", what, WHAT)
    endpoint = judge.Endpoint(
        url, model, key_variable or None, max_tokens=max_tokens, price_in=price_in, price_out=price_out
    )
    store = cache or out.with_name(f"{out.name}.cache.jsonl")
    records = files.read_rows(responses)
    prompts = {
        "mmhal": mmhal.judge_prompts,
        "hallusionbench": hallusionbench_rows.correctness_prompts,
        "hallusionbench-same": hallusionbench_rows.same_prompts,
    }[what](records)
    plan = judge.plan(endpoint, prompts, store)
    typer.echo(str(plan), err=True)
    if plan.calls and not yes:
        if not sys.stdin.isatty():
            raise UsageError("nothing was sent: add --yes to start")
        typer.confirm("Start?", abort=True, err=True)
    if what == "mmhal":
        mmhal.judge_files(responses, out, endpoint, store)
    else:
        kind = "same" if what.endswith("-same") else "verdicts"
        hallusionbench.judge_files(responses, out, endpoint, store, kind)
    typer.echo(f"written to {out}; every prompt and reply is in {store}")
