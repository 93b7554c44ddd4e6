"""What a search tries next, from what it has tried: a function of the seed, the number and the table of trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmfix_evals.errors import MissingDependency
from mmfix_evals.tune_goal import Objective
from mmfix_evals.tune_space import Dimension


@dataclass(frozen=True)
class Trial:
    """One finished trial: a value, or why there is none."""

    number: int
    method: str
    values: dict[str, Any]
    value: float | None
    ci_low: float | None = None
    ci_high: float | None = None
    n: int | None = None
    reason: str | None = None


def suggest(
    dimensions: Sequence[Dimension], objective: Objective, seed: int, trials: Sequence[Trial], number: int
) -> dict[str, Any]:
    """Values of trial `number`, by Optuna's TPE sampler, rebuilt from the trials before it."""
    optuna = require()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=(seed * 1_000_003 + number) % 2**32)
    study = optuna.create_study(direction=objective.direction, sampler=sampler)
    distributions = {d.name: _distribution(optuna, d) for d in dimensions}
    for one in trials:
        inside = {d.name: one.values[d.name] for d in dimensions if d.holds(one.values[d.name])}
        state = optuna.trial.TrialState.COMPLETE if one.value is not None else optuna.trial.TrialState.FAIL
        study.add_trial(
            optuna.trial.create_trial(
                params=inside, distributions={n: distributions[n] for n in inside}, value=one.value, state=state
            )
        )
    asked = study.ask(distributions).params
    return {d.name: d.rounded(asked[d.name]) for d in dimensions}


def require() -> Any:
    """The module ``optuna``, or one sentence on how to get it."""
    try:
        import optuna
    except ImportError:
        raise MissingDependency("mmfix tune needs Optuna, which is not installed: pip install 'mmfix[tune]'") from None
    return optuna


def _distribution(optuna: Any, dimension: Dimension) -> Any:
    if dimension.kind == "choice":
        return optuna.distributions.CategoricalDistribution(dimension.choices)
    kind = "FloatDistribution" if dimension.kind == "float" else "IntDistribution"
    return getattr(optuna.distributions, kind)(dimension.low, dimension.high)
