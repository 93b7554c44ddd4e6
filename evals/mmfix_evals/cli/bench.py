"""``mmfix bench``: speed of the attention backends and of whole models, beside their peers in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

KERNELS_EXAMPLE = "Example: mmfix bench kernels --quick --out runs/speed"
DECODE_EXAMPLE = "Example: mmfix bench decode --methods vanilla,empty,vhr --runs 3 --out runs/speed"
PLOT_EXAMPLE = "Example: mmfix bench plot runs/speed/kernels.jsonl --out runs/speed"
TABLE_EXAMPLE = "Example: mmfix bench table runs/speed"

app = typer.Typer(
    help="Measure speed beside peers; on a CPU only ratios mean something.", epilog=DECODE_EXAMPLE, no_args_is_help=True
)
Out = Annotated[Path, typer.Option("--out", help="Folder; records are appended to a file in it.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, …")]
Seed = Annotated[int, typer.Option(help="Seed of the random tensors or prompts.")]
Passed = Annotated[bool, typer.Option("--tests-passed", help="The kernel tests have just been run, all green.")]


@app.command("kernels", epilog=KERNELS_EXAMPLE)
def kernels_command(
    out: Out = Path("runs/speed"),
    device: Device = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="A few cases only.")] = False,
    budget: Annotated[float, typer.Option(help="Seconds of measuring per case and backend.", min=0.01)] = 0.4,
    seed: Seed = 0,
    tests_passed: Passed = False,
) -> None:
    """Attention backends beside SDPA, eager attention with maps, FlexAttention and FlashAttention where they exist.

    Nothing is reported while the kernel tests are red.
    """
    from mmfix_evals.errors import EvalError
    from mmfix_kernels.bench.measure import measure_kernels
    from mmfix_kernels.bench.record import RedTests

    try:
        path = measure_kernels(out, _device(device), quick, budget, seed, tests_passed)
    except RedTests as problem:
        raise EvalError(str(problem)) from None
    typer.echo(f"records: {path}")


@app.command("decode", epilog=DECODE_EXAMPLE)
def decode_command(
    out: Out = Path("runs/speed"),
    device: Device = "auto",
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: vanilla, empty, eager-maps, sequential, or methods; static/ before one decodes "
            "on a cache of fixed size, compiled on a GPU."
        ),
    ] = None,
    length: Annotated[list[int] | None, typer.Option(help="Prompt tokens, from 612 on; repeatable.", min=612)] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Rows per batch; repeatable.", min=1)] = None,
    tokens: Annotated[int, typer.Option(help="New tokens of the long answer.", min=2)] = 24,
    runs: Annotated[int, typer.Option(help="Rounds in which every arm takes its turn.", min=1)] = 5,
    layers: Annotated[int | None, typer.Option(help="Layers of the language model; default 8, on a GPU 32.")] = None,
    width: Annotated[int | None, typer.Option(help="Its width; default 512, on a GPU 4096.")] = None,
    seed: Seed = 0,
    tests_passed: Passed = False,
) -> None:
    """Prefill and decode of a random LLaVA with 576 image tokens: every arm beside plain greedy decoding, in turns.

    Nothing is reported while the kernel tests are red.
    """
    from dataclasses import replace

    import torch

    from mmfix_evals.bench import decode, model
    from mmfix_evals.cli.quiet import hush
    from mmfix_evals.errors import EvalError
    from mmfix_kernels.bench.record import RedTests

    hush()
    on = _device(device)
    shape = model.shape_for(torch.device(on), layers)
    shape = replace(shape, width=width or shape.width)
    arms = decode.DEFAULT_ARMS if methods is None else methods
    try:
        path = decode.measure_decode(
            out, on, arms, length or [640], batch or [1], tokens, runs, shape, seed, tests_passed
        )
    except RedTests as problem:
        raise EvalError(str(problem)) from None
    typer.echo(f"records: {path}")


@app.command("table", epilog=TABLE_EXAMPLE)
def table_command(
    records: Annotated[Path, typer.Argument(help="Folder with kernels.jsonl and decode.jsonl.")],
) -> None:
    """Print the records as a Markdown table."""
    from mmfix_evals.bench.table import speed_table

    typer.echo(speed_table(records))


@app.command("plot", epilog=PLOT_EXAMPLE)
def plot_command(
    records: Annotated[list[Path], typer.Argument(help="Files of records.")],
    out: Out = Path("runs/speed"),
) -> None:
    """Draw every case as bars, one SVG per file of records."""
    from mmfix_evals.bench.plot import write_plots

    for path in write_plots(records, out):
        typer.echo(f"picture: {path}")


def _device(name: str) -> str:
    from mmfix_kernels.bench.measure import default_device

    return default_device() if name == "auto" else name
