"""Prefill and decode speed of a whole model: each arm beside plain greedy decoding, in turns.

Every round generates a short and a long answer with every arm, one arm after the other, so that a machine that slows
down slows all of them. Prefill is the time to the first token; decode is the difference of the two answers per token,
so that prefill cancels; ratios are taken inside a round, and percentiles over rounds. Compile time and warm-up are not
in it. The weights are random: this says nothing about quality.

``python -m mmfix_evals.bench.decode --out FOLDER`` is the same as ``mmfix bench decode``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from mmfix_evals.arms import split_methods
from mmfix_evals.bench import model as models
from mmfix_kernels.bench.measure import default_device
from mmfix_kernels.bench.record import append, command_line, exit_code, provenance, require_green
from mmfix_kernels.bench.timing import percentiles

DEFAULT_ARMS = ",".join(
    (models.VANILLA, models.EMPTY, models.EAGER, models.SEQUENTIAL, models.OPEN_VAR, "vhr", "causalmm-language")
)

Pair = tuple[float, float]  # seconds to the first token, and per token after it


def measure_decode(
    out: Path,
    device: str = "cpu",
    arms: str = DEFAULT_ARMS,
    lengths: Sequence[int] = (640,),
    batches: Sequence[int] = (1,),
    tokens: int = 24,
    runs: int = 5,
    shape: models.Shape | None = None,
    seed: int = 0,
    tests_passed: bool = False,
    limit: float | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> Path:
    """Measure all arms at every length and batch, and append the records to ``out/decode.jsonl``.

    Args:
        out: folder, made where it does not exist.
        device: "cpu", "cuda", …
        arms: comma-separated; see :func:`mmfix_evals.bench.model.arm`. Plain greedy is always the first.
        lengths: prompt tokens, at least 612.
        batches: rows per batch.
        tokens: new tokens of the long answer; the short one has a single token.
        runs: rounds.
        shape: of the model; default 7B on a GPU, 8 layers of width 512 on a CPU.
        seed: of the prompts.
        tests_passed: the caller has just seen the kernel tests green.
        limit: seconds after which no further length, batch or round is begun.
        sizes: pairs of length and batch, instead of every length at every batch.

    Raises:
        RedTests: the kernel tests fail.
    """
    until = time.monotonic() + (limit or float("inf"))
    on = torch.device(device)
    checked = require_green(on, tests_passed)
    shape = shape or models.shape_for(on)
    model = models.build(on, shape)
    names = split_methods(arms)
    names = [models.VANILLA, *(name for name in names if name != models.VANILLA)]
    shared = provenance(on, seed, checked) | {"layers": shape.layers, "width": shape.width, "new_tokens": tokens}
    out.mkdir(parents=True, exist_ok=True)
    for length, batch in sizes or [(length, batch) for length in lengths for batch in batches]:
        case = models.case_name(shape, length, batch)
        if time.monotonic() > until:
            print(f"not measured, {limit:g} s have passed: {case}")
            continue
        inputs = models.prompt(model, length, batch, seed)
        for record in rounds([models.arm(model, name) for name in names], inputs, tokens, runs, until):
            append(out / "decode.jsonl", {"case": case, "length": length, "batch": batch} | record | shared)
            print(line(case, record), flush=True)
    return out / "decode.jsonl"


def line(case: str, record: dict[str, Any]) -> str:
    """One record for a person."""
    told = record.get("unmeasured") or (
        f"decode {record['tokens_per_s']:7.1f} tok/s, {record['decode_speed']:.3f} of vanilla; "
        f"prefill {record['prefill_p50'] * 1e3:7.1f} ms, {record['prefill_time']:.3f} x vanilla"
    )
    return f"{case:44} {record['arm']:24.24} {told}"


def rounds(
    arms: list[models.Arm], inputs: dict[str, Any], tokens: int, runs: int, until: float = float("inf")
) -> list[dict[str, Any]]:
    """The numbers of every arm; the first is the one that the others are compared with.

    `until` is the time after which no further round is begun: fewer than `runs` count then, but one at least.
    """
    found: dict[str, dict[int, Pair]] = {arm.name: {} for arm in arms}
    broken: dict[str, str] = {}
    memory: dict[str, int] = {}
    done = 0
    for count in range(-1, runs):  # the first round warms up
        if count > 0 and time.monotonic() > until:
            break
        done = count + 1
        for arm in arms:
            if arm.name in broken:
                continue
            try:
                pair = once(arm, inputs, tokens, memory)
            except Exception as error:  # one arm that cannot run does not end the others
                broken[arm.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                error.__traceback__ = None  # its frames hold tensors
                if inputs["input_ids"].is_cuda:
                    torch.cuda.empty_cache()
                continue
            if count >= 0 and pair[1] > 0:  # else the machine paused: the longer answer took less time
                found[arm.name][count] = pair
    plain = found[arms[0].name]
    records = []
    for arm in arms:
        record: dict[str, Any] = {"arm": arm.name, "backend": arm.backend or "default"}
        both = [count for count in found[arm.name] if count in plain]
        if arm.name in broken:
            record["unmeasured"] = broken[arm.name]
        elif 2 * len(both) <= done:
            record["unmeasured"] = "the machine was too busy: give more tokens or more runs"
        else:
            record |= numbers([plain[n] for n in both], [found[arm.name][n] for n in both])
            record["tokens_per_s"] = inputs["input_ids"].shape[0] / record["p50"]
            record["peak_bytes"] = memory.get(arm.name)
        records.append(record)
    return records


def numbers(plain: list[Pair], own: list[Pair]) -> dict[str, float]:
    """Percentiles of one arm's rounds, and of its ratios to the plain ones of the same rounds."""
    prefill, step = (percentiles([pair[n] for pair in own]) for n in (0, 1))
    speeds = percentiles([base[1] / pair[1] for base, pair in zip(plain, own, strict=True)])
    times = percentiles([pair[0] / base[0] for base, pair in zip(plain, own, strict=True)])
    return {
        "p20": step[0], "p50": step[1], "p80": step[2], "runs": len(own),
        "prefill_p20": prefill[0], "prefill_p50": prefill[1], "prefill_p80": prefill[2],
        "decode_speed": speeds[1], "decode_speed_p20": speeds[0], "decode_speed_p80": speeds[2],
        "prefill_time": times[1], "prefill_time_p20": times[0], "prefill_time_p80": times[2],
    }  # fmt: skip


def once(arm: models.Arm, inputs: dict[str, Any], tokens: int, memory: dict[str, int]) -> Pair:
    """One answer of one token and one of `tokens`."""
    device = inputs["input_ids"].device
    with torch.no_grad(), ExitStack() as stack:  # as `generate` does
        stack.enter_context(arm.enter())
        if arm.compiles:
            arm.run(inputs, tokens)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        short = seconds(arm, inputs, 1)
        long = seconds(arm, inputs, tokens)
        if device.type == "cuda":
            memory[arm.name] = torch.cuda.max_memory_allocated(device) - before
    return short, (long - short) / (tokens - 1)


def seconds(arm: models.Arm, inputs: dict[str, Any], tokens: int) -> float:
    """Wall clock of one answer of exactly `tokens` tokens."""
    gpu = inputs["input_ids"].is_cuda
    if gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    arm.run(inputs, tokens)
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__, "decode.jsonl", default_device())
    parser.add_argument(
        "--methods", default=DEFAULT_ARMS, help="vanilla, empty, eager-maps, sequential, or methods; static/ARM"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[640])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--sizes", nargs="+", metavar="LENGTHxBATCH", help="instead of every length at every batch")
    parser.add_argument("--layers", type=int, help="of the language model; default 32 on a GPU, 8 on a CPU")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args(argv)
    shape = models.shape_for(torch.device(args.device), args.layers)
    given = (args.lengths, args.batches, args.tokens, args.runs, shape)
    sizes = args.sizes and [(int(length), int(batch)) for length, batch in (one.split("x") for one in args.sizes)]
    options = {"limit": args.limit, "sizes": sizes, "tests_passed": args.tests_passed}
    return exit_code(lambda: measure_decode(args.out, args.device, args.methods, *given, **options))


if __name__ == "__main__":
    raise SystemExit(main())
