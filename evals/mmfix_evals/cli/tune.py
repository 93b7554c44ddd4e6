"""``mmfix tune``."""

from __future__ import annotations

import datetime
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mmfix_evals.stats import RESAMPLES

EXAMPLE = "Example: mmfix tune vhr --model tiny --task tinyworld-chair --split dev --trials 20 --limit 50"


def tune_command(
    method: Annotated[
        str, typer.Argument(help="A method; name:field=value,field=value fixes those fields and searches the others.")
    ],
    model: Annotated[str, typer.Option(help="'tiny' (bundled), a local model folder, or a hub id.")] = "tiny",
    task: Annotated[str, typer.Option(help="Task; see `mmfix eval list`.")] = "tinyworld-pope",
    split: Annotated[str, typer.Option(help="Data split to search on; never the test split.")] = "dev",
    test_split: Annotated[
        str, typer.Option("--test-split", help="Where the best values are asked once, at the end.")
    ] = "test",
    no_test: Annotated[
        bool, typer.Option("--no-test", help="Search only; the study stays open for more trials.")
    ] = False,
    trials: Annotated[int, typer.Option(help="Trials of the whole search; the first is the method as given.")] = 20,
    metric: Annotated[
        str | None, typer.Option(help="What is searched for; default: accuracy, else F1, else the task's first metric.")
    ] = None,
    only: Annotated[
        str, typer.Option(help="Parameters to search, separated by commas; default: all with ranges.")
    ] = "",
    limit: Annotated[int, typer.Option(help="Number of IMAGES on each split.")] = 100,
    out: Annotated[Path | None, typer.Option(help="Folder of the search. The same command resumes it.")] = None,
    batch_size: Annotated[str, typer.Option("--batch-size", help="Prompts per batch, or auto.")] = "16",
    seed: Annotated[int, typer.Option(help="Seed of the search, of sampling and of the bootstrap.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens per answer; default: the task's.")] = None,
    gen_kwargs: Annotated[str | None, typer.Option("--gen-kwargs", help="More arguments of generate().")] = None,
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples.")] = RESAMPLES,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; warnings and results only.")] = False,
) -> None:
    """Search a method's declared ranges on one data split, then ask the best values once on another.

    Values chosen on a split look better there than they are: the table shows both splits and the gap between them.
    """
    from mmfix_evals.arms import parse_arguments
    from mmfix_evals.batching import parse_size
    from mmfix_evals.cli.quiet import hush
    from mmfix_evals.plan import RunConfig
    from mmfix_evals.progress import Reporter
    from mmfix_evals.tasks import get
    from mmfix_evals.tune import TuneConfig, tune
    from mmfix_evals.tune_goal import objective
    from mmfix_evals.tune_space import space

    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    named = re.sub(r"[^\w.-]+", "-", method)
    base = RunConfig(
        model=model,
        tasks=(task,),
        methods=(method,),
        out=out or Path("runs") / f"tune-{named}-{stamp}",
        split=split,
        limit=limit,
        batch_size=parse_size(batch_size),
        seed=seed,
        device=device,
        dtype=dtype,
        revision=revision,
        max_new_tokens=max_new_tokens,
        gen_kwargs=parse_arguments(gen_kwargs),
        resamples=resamples,
    )
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    goal = objective(get(task), metric)
    config = TuneConfig(space(method, wanted), base, goal, trials, None if no_test else test_split)
    config.check()
    hush(quiet)
    with Reporter(quiet or as_json) as reporter:
        found = tune(config, ["mmfix", *sys.argv[1:]], reporter)
    if as_json:
        typer.echo(json.dumps({**found, "folder": str(base.out)}, indent=1, ensure_ascii=False))
        return
    print_tuned(found, goal, base.out)


def print_tuned(found: dict[str, Any], goal: Any, folder: Path) -> None:
    """The objective, the best values, and the table of splits with their gap."""
    from mmfix_evals import tables

    show = tables.formatter(goal.metric)
    signed = tables.formatter(goal.metric, signed=True)
    splits = [split for split in (found["split"], found["test_split"]) if split is not None]
    columns = ["method", "images"]
    for split in splits:
        columns += [split, "95% CI", "to greedy", "95% CI"]
    columns += [f"p on {splits[-1]}", *(["gap"] if len(splits) == 2 else [])]
    rows = [tables.Row(_cells(row, splits, show, signed)) for row in found["rows"]]
    typer.echo(f"Objective: {goal}.")
    without = f", {found['without_value']} of them without a value" if found["without_value"] else ""
    typer.echo(f"Searched on {found['split']}: {found['trials']} trials{without}. Best: {found['best']['method']}\n")
    tables.print_sections(tables.console_for(sys.stdout), [tables.Section("", rows)], columns)
    if len(splits) == 2:
        typer.echo(
            f"gap: {splits[0]} minus {splits[1]}. The best of {found['trials']} trials was chosen on {splits[0]}, "
            f"where it is too good by construction; the number to report is that on {splits[1]}."
        )
    if found["best"]["method"] == found["method"]:
        typer.echo("No trial was better than the method as given.")
    typer.echo(f"Folder: {folder}")


def _cells(row: dict[str, Any], splits: list[str], show: Any, signed: Any) -> tuple[str, ...]:
    from mmfix_evals import tables

    cells = [row["method"], str((row[splits[0]]["score"] or {}).get("n_images", tables.NONE))]
    p = None
    for split in splits:
        score, difference = row[split]["score"] or {}, row[split]["difference"] or {}
        p = difference.get("p_holm")  # of the last split
        cells += [show(score.get("value")), tables.interval(show, score.get("ci_low"), score.get("ci_high"))]
        cells.append(signed(difference["difference"]) if difference else tables.NONE)
        cells.append(tables.interval(signed, difference.get("ci_low"), difference.get("ci_high")))
    cells.append(tables.p_value(p))
    if len(splits) == 2:
        cells.append(signed(row["gap"]))
    return tuple(cells)
