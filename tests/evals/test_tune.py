"""``mmfix tune``: what is searched, resuming, the closed test split, the gap. A decoder whose quality is known."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fake_eval
import pytest

from mmfix_evals import run as run_module
from mmfix_evals.cli import main
from mmfix_evals.errors import EvalError, MissingDependency, UsageError
from mmfix_evals.plan import RunConfig
from mmfix_evals.progress import Reporter
from mmfix_evals.tasks import base
from mmfix_evals.tune import TuneConfig, tune
from mmfix_evals.tune_goal import objective
from mmfix_evals.tune_space import Dimension, space

BEST = 4.0  # the alpha at which Peaked always answers right
Call = Callable[..., tuple[int, str, str]]


@dataclass
class Peaked(fake_eval.FakeDecoder):
    """Answers right the more often, the nearer ``vhr.alpha`` is to BEST; what it gets wrong depends on the prompt."""

    def with_method(self, method: Any) -> Peaked:
        return Peaked(self.model_id, tuple(method or ()), self.calls, self.before)

    def _answer(self, content: str, prompt: str) -> fake_eval.FakeAnswer:
        alpha = self.methods[0].alpha if self.methods else 0.0
        seed = int.from_bytes(prompt.encode(), "big") % 97 / 97
        right = seed < 1 - abs(alpha - BEST) / 10
        return fake_eval.FakeAnswer("Yes" if right else "No", [1, 2], None)


class AllYes(fake_eval.FakePope):
    """Every answer is yes, so that accuracy is the share of right answers."""

    name = "fake-yes"

    def documents(self, data_split: str, limit: int, world_seed: int) -> list[base.Document]:
        found = super().documents(data_split, limit, world_seed)
        named = [replace(d, prompt=f"Is there a thing number {i} {data_split}?") for i, d in enumerate(found)]
        return [replace(d, target={"label": "yes"}) for d in named]


@pytest.fixture(autouse=True)
def _tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {"fake-yes": AllYes(), "fake-chair": fake_eval.FakeChair(), "fake-pope": fake_eval.FakePope()}
    monkeypatch.setattr(base, "_TASKS", {**base._TASKS, **extra})


@pytest.fixture
def config(tmp_path: Path) -> TuneConfig:
    run = RunConfig("fake", ("fake-yes",), (), tmp_path / "tune", split="dev", limit=12, batch_size=72, resamples=20)
    return TuneConfig(space("vhr", ["alpha"]), run, objective(base.get("fake-yes")), 9)


def start(config: TuneConfig, decoder: fake_eval.FakeDecoder | None = None) -> dict[str, Any]:
    return tune(config, ["mmfix", "tune"], Reporter(quiet=True), lambda _: decoder or Peaked())


def at(config: TuneConfig, folder: Path, **changes: Any) -> TuneConfig:
    base_changes = {name: changes.pop(name) for name in ("split", "limit", "seed") if name in changes}
    return replace(config, base=replace(config.base, out=folder, **base_changes), **changes)


def trials(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def test_the_search_finds_the_peak_and_asks_the_test_split_once(config: TuneConfig) -> None:
    decoder = Peaked()
    found = start(config, decoder)
    alpha = found["best"]["values"]["alpha"]
    assert abs(alpha - BEST) < 1.0 < abs(2.0 - BEST)
    listed = trials(config.base.out)
    assert [one["number"] for one in listed] == list(range(9))
    assert listed[0]["method"] == "vhr"
    assert listed[0]["values"] == {"alpha": 2.0}
    assert all(0.0 <= one["values"]["alpha"] <= 10.0 for one in listed)
    assert found["best"]["value"] == max(one["value"] for one in listed)
    on_test = [prompts for _, prompts in decoder.calls if "test?" in prompts[0] and len(prompts) == 72]
    searched = [prompts for _, prompts in decoder.calls if "dev?" in prompts[0] and len(prompts) == 72]
    assert (len(searched), len(on_test)) == (9 + 3, 3)  # each but for its warm-up, which is shorter
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == ["greedy", "vhr", found["best"]["method"]]
    best = rows[found["best"]["method"]]
    assert best["dev"]["score"]["value"] == found["best"]["value"]
    assert best["gap"] == best["dev"]["score"]["value"] - best["test"]["score"]["value"]
    for split in ("dev", "test"):
        score, change = best[split]["score"], best[split]["difference"]
        assert score["ci_low"] <= score["value"] <= score["ci_high"]
        assert change["difference"] == pytest.approx(score["value"] - rows["greedy"][split]["score"]["value"])
    assert json.loads((config.base.out / "tuned.json").read_text()) == found


@pytest.mark.parametrize("kept", [0, 3])
def test_an_interrupted_search_goes_on_as_it_would_have(config: TuneConfig, tmp_path: Path, kept: int) -> None:
    whole = at(config, tmp_path / "whole", trials=5)
    start(whole)
    cut = at(config, tmp_path / "cut", trials=5)
    calls = [0]

    def stop(label: str, prompts: Any) -> None:
        calls[0] += label == "vhr" and len(prompts) == 72
        if calls[0] > kept:
            raise KeyboardInterrupt

    with pytest.raises(EvalError, match="same command again"):
        start(cut, Peaked(before=stop))
    assert (len(trials(cut.base.out)) if kept else 0) == kept
    start(cut)
    assert trials(cut.base.out) == trials(whole.base.out)


def test_more_trials_go_on_until_the_test_split_was_seen(config: TuneConfig) -> None:
    first = start(replace(config, trials=3, test_split=None))
    assert (first["test_split"], first["rows"][0].keys()) == (None, {"method", "dev", "gap"})
    begun = trials(config.base.out)
    start(replace(config, trials=5))
    assert trials(config.base.out)[:3] == begun
    decoder = Peaked()
    again = start(replace(config, trials=5), decoder)
    assert decoder.calls == []
    assert again == json.loads((config.base.out / "tuned.json").read_text())
    with pytest.raises(UsageError, match=r"ended after 5 trials.*searching there"):
        start(replace(config, trials=6))


def test_another_search_in_the_same_folder_is_refused(config: TuneConfig) -> None:
    start(replace(config, trials=2))
    with pytest.raises(UsageError, match=r"another search.*limit"):
        start(at(config, config.base.out, limit=5, trials=2))
    with pytest.raises(UsageError, match="dimensions"):
        start(replace(config, trials=2, space=space("vhr")))


def test_another_seed_searches_other_values(config: TuneConfig, tmp_path: Path) -> None:
    for seed in (0, 1):
        start(at(config, tmp_path / str(seed), seed=seed, trials=4, test_split=None))
    one, other = (trials(tmp_path / str(seed)) for seed in (0, 1))
    assert one[0]["values"] == other[0]["values"]
    assert one[1]["values"] != other[1]["values"]


def test_a_value_that_the_method_refuses_is_no_trial_with_a_score(
    config: TuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = Dimension("alpha", "float", 2000.0, 9000.0)  # the method itself stops at 1000
    found = start(replace(config, trials=3, space=replace(config.space, dimensions=(wide,))))
    listed = trials(config.base.out)
    assert [one["value"] is None for one in listed] == [False, True, True]
    assert "alpha" in listed[1]["reason"]
    assert (found["without_value"], found["best"]["number"]) == (2, 0)


def test_the_test_split_is_never_searched(config: TuneConfig) -> None:
    for changed in (at(config, config.base.out, split="test"), replace(config, test_split="dev")):
        decoder = Peaked()
        with pytest.raises(UsageError, match="chosen on the test split"):
            start(changed, decoder)
        assert decoder.calls == []
    assert not config.base.out.exists()


def test_what_can_be_searched() -> None:
    found = {d.name: d for d in space("vcd").dimensions}
    assert found.keys() == {"alpha", "beta", "step"}  # not its seed
    assert (found["step"].kind, found["step"].low, found["step"].high) == ("int", 0, 999)
    var = {d.name: d for d in space("var:tau=4,move=0.3").dimensions}
    assert var["skip_last_layer"].choices == (False, True)
    assert var["variant"].choices == ("paper", "release")
    assert not {"tau", "move", "sink_dims"} & var.keys()
    vision = {d.name: d for d in space("causalmm", ["vision"]).dimensions}
    assert vision["vision"].choices == ("shuffled", "random", "uniform", "reversed", None)
    assert space("var:tau=4").method({"move": 0.5, "variant": "release"}) == 'var:tau=4,move=0.5,variant="release"'
    for text, only, told in (
        ("greedy", (), "absence"),
        ("var+vhr", (), "one method"),
        ("sofa", ["seed"], "unknown parameter"),
        ("plausibility:beta=0.2", (), "nothing to tune"),
    ):
        with pytest.raises(UsageError, match=told):
            space(text, only)


def test_objectives_have_a_direction_and_a_mean_over_splits() -> None:
    pope, chair = base.get("fake-pope"), base.get("fake-chair")
    assert str(objective(pope)) == "accuracy of fake-pope (mean over splits), higher is better"
    assert (objective(chair).metric.name, objective(chair, "chair_i").direction) == ("f1", "minimize")
    for task, metric in ((pope, "yes_ratio"), (pope, "precision"), (chair, "length")):
        with pytest.raises(UsageError, match="unknown objective"):
            objective(task, metric)


def test_without_optuna_the_way_to_get_it_is_named(config: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingDependency, match=r"pip install 'mmfix\[tune\]'"):
        start(config)


@pytest.fixture
def call(call: Call, monkeypatch: pytest.MonkeyPatch) -> Call:
    """The command on a model that is none."""
    monkeypatch.setattr(run_module, "load_decoder", lambda config: fake_eval.FakeDecoder())
    return call


def test_the_command_prints_objective_table_and_gap(call: Call, tmp_path: Path) -> None:
    words = ["tune", "vhr", "--task", "fake-chair", "--metric", "chair_i", "--trials", 3, "--limit", 6]
    words += ["--resamples", 20, "--only", "alpha", "--out", tmp_path / "a"]
    code, printed, errors = call(*words)
    assert code == 0, errors
    assert printed.startswith("Objective: chair_i of fake-chair, lower is better.\nSearched on dev: 3 trials.")
    header = next(line for line in printed.splitlines() if line.lstrip().startswith("method"))
    assert header.split()[:3] == ["method", "images", "dev"]
    assert header.split()[-4:] == ["p", "on", "test", "gap"]
    assert "the number to report is that on test" in printed
    assert "trial 3 of 3" in errors
    code, printed, _ = call(*words, "--json")
    assert json.loads(printed)["objective"]["direction"] == "minimize"
    code, printed, errors = call(*words, "--split", "test")
    assert (code, printed) == (2, "")
    assert "use --split dev" in errors
    assert call("tune", "vra")[0] == 2
    assert "Example: mmfix tune" in " ".join(call("tune", "--help")[1].split())


def test_a_tiny_model_is_tuned(tmp_path: Path) -> None:
    words = ["tune", "vhr", "--only", "alpha", "--model", "tiny", "--task", "tinyworld-chair", "--trials", "2"]
    words += ["--limit", "2", "--resamples", "20", "--max-new-tokens", "6", "--quiet", "--out", str(tmp_path / "a")]
    assert main(words) == 0
    found = json.loads((tmp_path / "a" / "tuned.json").read_text())
    assert [row["method"] for row in found["rows"]][:2] == ["greedy", "vhr"]
    assert found["rows"][1]["test"]["score"]["n"] == 2
    assert len({one["values"]["alpha"] for one in trials(tmp_path / "a")}) == 2
