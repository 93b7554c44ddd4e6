"""``mmfix eval run``."""

from __future__ import annotations

import datetime
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mmfix_evals.cli.options import Device, Dtype, Model, Revision
from mmfix_evals.errors import UsageError
from mmfix_evals.stats import RESAMPLES

EXAMPLE = (
    "Example: mmfix eval run --model tiny --tasks tinyworld-pope,tinyworld-chair "
    "--methods greedy,var,var:move=0.4+vhr --split test --limit 200 --out runs/demo"
)


def run_command(
    model: Model = "tiny",
    tasks: Annotated[
        str, typer.Option(help="Tasks, separated by commas; see `mmfix eval list`.")
    ] = "tinyworld-pope,tinyworld-chair",
    methods: Annotated[
        str,
        typer.Option(
            help="Methods, separated by commas: greedy, a name, name:field=value,field=value, several joined by +, "
            "@all (every method that can run on the model), or those of a kind: @contrast, @mask, … "
            "beam-5 is plain beam search, the control of methods that search (opera); @all and @search bring it along. "
            "Differences and speeds are reported relative to greedy."
        ),
    ] = "greedy,var,vhr",
    split: Annotated[str, typer.Option(help="Data split of the tasks.")] = "test",
    limit: Annotated[
        int,
        typer.Option(
            help="Number of IMAGES per task, the first ones of the split; the same images for every task. "
            "POPE asks 18 questions about each."
        ),
    ] = 200,
    out: Annotated[
        Path | None, typer.Option(help="Run folder. Repeating a command in the same folder resumes it.")
    ] = None,
    batch_size: Annotated[
        str,
        typer.Option(
            "--batch-size",
            "--batch_size",
            help="Prompts per batch, or auto: as many as fit. Halved when memory runs out; no answer depends on it.",
        ),
    ] = "16",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with benchmark files, for tasks about real pictures; default: MMFIX_DATA."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling and of the bootstrap.")] = 0,
    world_seed: Annotated[int, typer.Option(help="Another value draws other TinyWorld pictures.")] = 0,
    device: Device = "auto",
    device_map: Annotated[
        str | None,
        typer.Option("--device-map", help="auto, balanced, …: spread a model over several devices (needs accelerate)."),
    ] = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens per answer; default: the task's (POPE 10, CHAIR 128).")
    ] = None,
    gen_kwargs: Annotated[
        str | None,
        typer.Option(
            "--gen-kwargs", "--gen_kwargs", help="More arguments of generate(), e.g. do_sample=true,temperature=0.7."
        ),
    ] = None,
    parser: Annotated[str | None, typer.Option(help="POPE parser of the reported scores; all are recorded.")] = None,
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples.")] = RESAMPLES,
    max_errors: Annotated[int, typer.Option(help="Failed answers to tolerate before stopping.")] = 0,
    shard: Annotated[
        str | None,
        typer.Option(
            help="i/n: answer part i (from 0) of n, into OUT/shard-i-of-n; default: RANK and WORLD_SIZE as set by "
            "torchrun and accelerate launch. Join the parts with `mmfix eval merge OUT --out OUT`."
        ),
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: an actor per device with a common queue.")] = "local",
    workers: Annotated[int, typer.Option(help="Actors of --engine ray; 0: one per GPU, or one without GPUs.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; warnings and results only.")] = False,
) -> None:
    """Answer every question with every method, score the answers, and print one table.

    Answers are kept as they come. After Ctrl-C, a kill or a full disk the same command goes on where it stopped.
    """
    from mmfix_evals import tables
    from mmfix_evals.arms import parse_arguments, split_methods
    from mmfix_evals.batching import parse_size
    from mmfix_evals.cli.quiet import hush
    from mmfix_evals.plan import RunConfig
    from mmfix_evals.progress import Reporter
    from mmfix_evals.run import run
    from mmfix_evals.shards import Shard

    part = Shard.find(shard, os.environ)
    if out is None and not part.is_whole:
        raise UsageError("a shard needs --out: all of them write below one folder")
    folder = out or Path("runs") / datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    config = RunConfig(
        model=model,
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
        methods=tuple(split_methods(methods)),
        out=folder,
        split=split,
        limit=limit,
        batch_size=parse_size(batch_size),
        seed=seed,
        world_seed=world_seed,
        device=device,
        dtype=dtype,
        revision=revision,
        max_new_tokens=max_new_tokens,
        gen_kwargs=parse_arguments(gen_kwargs),
        parser=parser,
        resamples=resamples,
        max_errors=max_errors,
        device_map=device_map,
        shard=part,
        engine=engine,
        workers=workers,
        data=data and data.resolve(),
    )
    config.check()  # before the seconds that importing torch takes
    hush(quiet)
    with Reporter(quiet) as reporter:
        results = run(config, ["mmfix", *sys.argv[1:]], reporter)
    if not part.is_whole:
        typer.echo(f"Shard {part} is complete: {config.folder}")
        typer.echo(f"When all {part.count} are: mmfix eval merge {folder} --out {folder}")
        return
    tables.print_results(results)
    typer.echo(f"\nRun folder: {folder}")
    typer.echo(f"Next: mmfix eval compare {folder}")
