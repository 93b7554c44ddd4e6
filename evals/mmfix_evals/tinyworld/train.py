"""Train the TinyWorld model from scratch: ``python -m mmfix_evals.tinyworld.train --out FOLDER``.

Two CPU cores need about an hour for the ``small`` recipe. Progress is shown; a killed run goes on from its last
checkpoint when the same command is given again, with the same batches as if it had not been killed.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mmfix_evals.files import cache_dir
from mmfix_evals.tinyworld import checkpoint
from mmfix_evals.tinyworld.model import build_model, export, vocabulary
from mmfix_evals.tinyworld.pictures import data_hash, training_pictures
from mmfix_evals.tinyworld.recipe import RECIPES, Recipe, Stage
from mmfix_evals.tinyworld.stages import Lessons, Trainee, loss_of


def train(
    recipe: Recipe,
    out: Path,
    work: Path,
    *,
    device: str = "cpu",
    save_every: float = 60.0,
    stop_after: int | None = None,
) -> None:
    """Run every stage of a recipe and export the model after each.

    Args:
        out: model folder that is written.
        work: folder for the picture cache and checkpoints.
        save_every: seconds between checkpoints.
        stop_after: leave after this many steps in all, for tests of resuming.
    """
    words = vocabulary()
    pictures = training_pictures(recipe.pictures, work, os.cpu_count() or 1, _rendering)
    torch.manual_seed(recipe.seed)
    trainee = Trainee(build_model(words, recipe), recipe).to(device)
    # Forward and backward run on a bfloat16 copy: at these sizes moving activations costs more than multiplying them.
    worker = copy.deepcopy(trainee).to(torch.bfloat16)
    # On CPUs the backward pass of fused attention is several times slower than the plain one at these sizes.
    worker.model.set_attn_implementation("eager" if device == "cpu" else "sdpa")
    lessons = Lessons(recipe, words, pictures, device)
    saves = work / f"run-{recipe.name}-{recipe.digest}-{data_hash(16)[:8]}"
    state = checkpoint.read_state(saves)
    first_stage, first_step = (state["stage"], state["step"]) if state else (0, 0)
    done, budget = 0, stop_after if stop_after is not None else math.inf
    for number in range(first_stage, len(recipe.stages)):
        stage = recipe.stages[number]
        optimiser = _optimiser(trainee, stage)
        step = first_step if number == first_stage else 0
        if state and number == first_stage:
            checkpoint.load(saves, state, trainee, optimiser if step else None)
            print(f"resuming at stage {stage.name}, step {step} of {stage.steps}", file=sys.stderr)
        saved = began = time.monotonic()
        figures: list[dict[str, float]] = []
        while step < stage.steps:
            if done >= budget:
                checkpoint.save(saves, trainee, optimiser, {"stage": number, "step": step})
                return
            figures.append(_step(trainee, worker, lessons, stage, step, optimiser))
            step, done = step + 1, done + 1
            now = time.monotonic()
            if step % 50 == 0 or step == stage.steps:
                _progress(stage, step, now - began, figures[-50:])
            if now - saved > save_every:
                checkpoint.save(saves, trainee, optimiser, {"stage": number, "step": step})
                saved = now
        checkpoint.save(saves, trainee, None, {"stage": number + 1, "step": 0})
        if stage.name in ("answers", "mixed"):
            export(trainee.model, words, recipe, out)
    if first_stage == len(recipe.stages) and state:
        checkpoint.load(saves, state, trainee, None)
        export(trainee.model, words, recipe, out)
    print(f"model written to {out}", file=sys.stderr)


def _optimiser(trainee: Trainee, stage: Stage) -> torch.optim.Optimizer:
    groups = [
        {"params": trainee.other_parameters(), "lr": stage.rate, "peak": stage.rate},
        {"params": trainee.tower_parameters(), "lr": stage.rate, "peak": stage.rate * stage.tower},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05)


def _step(
    trainee: Trainee, worker: Trainee, lessons: Lessons, stage: Stage, step: int, optimiser: torch.optim.Optimizer
) -> dict[str, float]:
    """One optimiser step: gradients from the bfloat16 `worker`, weights in the float32 `trainee`."""
    warm = min(1.0, (step + 1) / stage.warmup)
    factor = warm * 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * factor
    pairs = list(zip(trainee.parameters(), worker.parameters(), strict=True))
    with torch.no_grad():
        for weight, working in pairs:
            working.copy_(weight)
            working.grad = None
    loss, figures = loss_of(worker, lessons, stage, step)
    loss.backward()  # type: ignore[no-untyped-call]
    for weight, working in pairs:
        weight.grad = None if working.grad is None else working.grad.float()
    torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
    optimiser.step()
    return figures


def _rendering(index: int, count: int) -> None:
    print(f"\rrendering pictures: {index} of {count}", end="", file=sys.stderr, flush=True)


def _progress(stage: Stage, step: int, seconds: float, figures: list[dict[str, float]]) -> None:
    names = sorted({name for f in figures for name in f})
    mean = {name: statistics.fmean(f[name] for f in figures if name in f) for name in names}
    shown = "  ".join(f"{name} {value:.4f}" for name, value in mean.items())
    print(f"{stage.name:8s} step {step:6d} of {stage.steps}  {seconds:6.0f} s  {shown}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Command line of the trainer."""
    parser = argparse.ArgumentParser(prog="python -m mmfix_evals.tinyworld.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("tinyworld-model"), help="model folder to write")
    parser.add_argument("--recipe", choices=sorted(RECIPES), help="default: small, or large with --gpu")
    parser.add_argument("--gpu", action="store_true", help="train on the CUDA device")
    parser.add_argument("--work", type=Path, default=None, help="picture cache and checkpoints (default: user cache)")
    args: Any = parser.parse_args(argv)
    if args.gpu and not torch.cuda.is_available():
        print("no CUDA device is usable; leave out --gpu", file=sys.stderr)
        return 2
    recipe = RECIPES[args.recipe or ("large" if args.gpu else "small")]
    work = args.work or cache_dir() / "tinyworld"
    try:
        train(recipe, args.out, work, device="cuda" if args.gpu else "cpu")
    except KeyboardInterrupt:
        print("\ninterrupted; give the same command again to go on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
