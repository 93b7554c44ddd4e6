"""The head of ``results.json``: what was run, with what, and on what; known before the first answer."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from mmfix_evals import machine, results
from mmfix_evals.plan import RunConfig, TaskPlan
from mmfix_evals.pool import Loaded


def head(config: RunConfig, argv: Sequence[str], plans: Sequence[TaskPlan], loaded: Loaded) -> results.Results:
    """Everything in ``results.json`` that is known before the first answer."""
    return {
        "schema_version": results.SCHEMA_VERSION,
        "status": "running",
        "argv": results.clean_argv(argv),
        "config": {
            "model": config.model,
            "tasks": list(config.tasks),
            "methods": list(config.methods),
            "split": config.split,
            "limit": config.limit,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "world_seed": config.world_seed,
            "device": config.device,
            "device_map": config.device_map,
            "dtype": config.dtype,
            "max_new_tokens": config.max_new_tokens,
            "gen_kwargs": results.clean_values(config.gen_kwargs),
            "parser": config.parser,
            "max_errors": config.max_errors,
        },
        "bootstrap": {"resamples": config.resamples, "seed": config.seed},
        "model": {**loaded.identity, "dtype": loaded.dtype, "device": loaded.device},
        "methods": [
            {
                "name": arm.name,
                "spec": list(arm.spec),
                "trained": any(m.info.trained_in_paper for m in arm.methods),
                "calibrated": loaded.calibrated.get(arm.name, {}),
                **({"generation": arm.generation} if arm.generation else {}),
            }
            for arm in loaded.arms
        ],
        "left_out": loaded.left_out,
        "tasks": {one.task.name: one.describe() for one in plans},
        "versions": machine.versions(),
        "git": machine.git(),
        "machine": loaded.machine,
        "timing": {"started": now()},
    }


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
