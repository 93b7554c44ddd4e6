"""``--engine ray``: a worker killed in mid-run loses and doubles nothing; what the queue does with its batches."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_eval
import pytest

from mmfix_evals import ray_pool
from mmfix_evals import run as run_module
from mmfix_evals.cli import main
from mmfix_evals.errors import UsageError
from mmfix_evals.plan import RunConfig
from mmfix_evals.progress import Reporter
from mmfix_evals.ray_pool import WorkersLost
from mmfix_evals.results import without_times
from mmfix_evals.run import run

pytestmark = pytest.mark.usefixtures("fake_tasks")


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    methods = ("greedy", "var", "vhr")
    return RunConfig(
        "fake", ("fake-pope", "fake-chair"), methods, tmp_path / "run", limit=4, batch_size=3, resamples=20
    )


def start(config: RunConfig, decoder: Any = None, reporter: Reporter | None = None) -> dict[str, Any]:
    reporter = reporter or Reporter(quiet=True)
    return run(config, ["mmfix"], reporter, decoder or (lambda _: fake_eval.FakeDecoder()))


def lines(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.out / "samples.jsonl").read_text().splitlines()]


def same(one: RunConfig, other: RunConfig) -> None:
    """Two runs hold the same numbers and the same answers, each answer once."""
    texts = [json.dumps(without_times(json.loads((c.out / "results.json").read_text()))) for c in (one, other)]
    assert texts[0] == texts[1]
    found = [{line["key"]: line["response"] for line in lines(c)} for c in (one, other)]
    assert found[0] == found[1]
    assert len(lines(one)) == len(lines(other)) == len(found[0])


class Killer(Reporter):
    """Kills one of the workers, as a machine would, once some answers have come."""

    def __init__(self, pids: Path) -> None:
        super().__init__(quiet=True)
        self.pids, self.count, self.killed = pids, 0, 0

    def advance(self, count: int) -> None:
        self.count += count
        if self.count >= 18 and not self.killed:
            self.killed = int(sorted(path.name for path in self.pids.iterdir())[0])
            os.kill(self.killed, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_a_worker_killed_in_mid_run_loses_and_doubles_nothing(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    pids = tmp_path / "pids"
    pids.mkdir()
    killer = Killer(pids)
    ray.init(
        num_cpus=2,
        object_store_memory=80 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}},
    )
    try:
        parallel = replace(config, engine="ray", workers=2, limit=8)
        results = start(parallel, functools.partial(fake_eval.load_in_actor, str(pids)), killer)
    finally:
        ray.shutdown()
    assert killer.killed
    assert (results["timing"]["engine"], results["timing"]["workers_lost"]) == ("ray", 1)
    assert len(list(pids.iterdir())) >= 2
    assert results["status"] == "complete"
    assert not results["errors"]
    whole = replace(config, out=tmp_path / "whole", limit=8)
    start(whole)
    same(parallel, whole)


class ActorError(Exception):
    cause: Any = None


class TaskError(Exception):
    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Ray(SimpleNamespace):
    """As much of Ray as the pool uses, without processes: a call runs when its result is waited for.

    ``dies(actor number, method, arguments)`` says whether an actor dies of a call.
    """

    def __init__(self, dies: Any = lambda *_: False, **resources: int) -> None:
        super().__init__()
        self.exceptions = SimpleNamespace(RayActorError=ActorError, RayTaskError=TaskError)
        self.dies, self.resources, self.actors = dies, resources or {"CPU": 2}, list[Any]()
        self.options: dict[str, Any] = {}
        self.put = lambda value: value
        self.cluster_resources = lambda: self.resources
        self.is_initialized = lambda: True

    def remote(self, **options: Any) -> Any:
        self.options = options
        return lambda kind: SimpleNamespace(remote=lambda *given: self.make(kind, given))

    def make(self, kind: Any, given: Any) -> Any:
        number = len(self.actors)
        actor = SimpleNamespace(number=number, dead=False, inner=None, make=lambda: kind(*given))
        for name in ("describe", "find_batch_size", "answer"):
            call = functools.partial(self.call, actor, name)
            setattr(actor, name, SimpleNamespace(remote=lambda *words, c=call: Reference(lambda: c(*words))))
        self.actors.append(actor)
        return actor

    def call(self, actor: Any, name: str, *words: Any) -> Any:
        if actor.dead or self.dies(actor.number, name, words):
            actor.dead = True
            raise ActorError("The actor is dead because its process has died.")
        try:
            actor.inner = actor.inner or actor.make()
            return getattr(actor.inner, name)(*words)
        except Exception as problem:
            raise TaskError(problem) from None

    def wait(self, references: list[Any], num_returns: int) -> Any:
        return references[-1:], references[:-1]  # the youngest first: any order must do

    def get(self, reference: Any) -> Any:
        return reference.run()

    def kill(self, actor: Any) -> None:
        actor.dead = True


class Reference:
    def __init__(self, run: Any) -> None:
        self.run = run


def parallel(config: RunConfig, monkeypatch: pytest.MonkeyPatch, ray: Ray) -> RunConfig:
    monkeypatch.setattr(ray_pool, "require", lambda: ray)
    return replace(config, engine="ray", workers=2)


def test_batches_of_dead_workers_are_answered_by_others(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answered = dict.fromkeys(range(99), 0)

    def dies(actor: int, name: str, words: Any) -> bool:
        answered[actor] += name == "answer"
        return actor < 5 and answered[actor] == 4  # every one of the first five dies of its fourth answer

    ray = Ray(dies)
    results = start(parallel(config, monkeypatch, ray))
    assert results["timing"]["workers_lost"] == 5
    assert len(ray.actors) == 7
    assert all(actor.dead for actor in ray.actors)  # none is left behind
    whole = replace(config, out=tmp_path / "whole")
    start(whole)
    same(config, whole)


def test_a_batch_that_ends_every_worker_is_given_up_and_the_rest_goes_on(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(actor: int, name: str, words: Any) -> bool:
        return name == "answer" and words[1].name == "var" and any(d.doc_id == "popular/3" for d in words[2])

    config = replace(parallel(config, monkeypatch, Ray(dies)), max_errors=9)
    results = start(config)
    assert results["status"] == "complete"
    assert results["timing"]["workers_lost"] == ray_pool.ATTEMPTS
    failed = {(e["method"], e["doc_id"]) for e in results["errors"]}
    assert failed == {("var", "popular/1"), ("var", "popular/2"), ("var", "popular/3")}
    assert "3 workers died while they answered the batch of this document" in results["errors"][0]["error"]
    assert {e["n"] for e in results["metrics"] if (e["split"], e["method"]) == ("popular", "var")} == {5}


def test_when_no_worker_is_left_the_run_stops_and_keeps_what_it_has(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0

    def dies(actor: int, name: str, words: Any) -> bool:
        nonlocal count
        count += name == "answer"
        return count > 6

    with pytest.raises(WorkersLost, match=r"died 4 times in a row .*run the same command again"):
        start(parallel(replace(config, max_errors=99), monkeypatch, Ray(dies)))
    assert sum(line["error"] is None for line in lines(config)) == 18
    assert json.loads((config.out / "results.json").read_text())["status"] == "interrupted"


def test_what_a_worker_refuses_is_refused_here(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmfix.errors import UnsupportedModel

    def load(config: RunConfig) -> Any:
        raise UnsupportedModel("no such model")

    with pytest.raises(UnsupportedModel, match="no such model"):
        start(parallel(config, monkeypatch, Ray()), load)


def test_a_worker_that_dies_while_it_looks_for_a_batch_size(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ray = Ray(lambda actor, name, words: actor < 2 and name == "find_batch_size")
    results = start(parallel(replace(config, batch_size="auto"), monkeypatch, ray))
    assert results["timing"]["workers_lost"] == 2
    assert results["timing"]["batch_sizes"] == {"fake-pope": 16, "fake-chair": 16}


@pytest.mark.parametrize(
    ("resources", "options", "wanted"),
    [
        ({"CPU": 4, "GPU": 2}, {"workers": 0}, ({"num_cpus": 0, "num_gpus": 1}, 2)),
        ({"CPU": 4, "GPU": 8}, {"workers": 2, "device_map": "auto"}, ({"num_cpus": 0, "num_gpus": 4}, 2)),
        ({"CPU": 4, "GPU": 2}, {"workers": 3, "device": "cpu"}, ({"num_cpus": 1, "num_gpus": 0}, 3)),
        ({"CPU": 4}, {"workers": 0}, ({"num_cpus": 1, "num_gpus": 0}, 1)),
    ],
)
def test_an_actor_per_device(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, resources: Any, options: Any, wanted: Any
) -> None:
    ray = Ray(**resources)
    config = replace(parallel(config, monkeypatch, ray), **options)
    pool = ray_pool.RayPool(config, lambda _: fake_eval.FakeDecoder())
    assert ({name: ray.options[name] for name in wanted[0]}, len(pool.seats)) == wanted


def test_more_workers_than_devices_are_refused(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--workers 3: the Ray cluster has 2 CPUs; give 2 or fewer"):
        start(replace(parallel(config, monkeypatch, Ray()), workers=3))
    with pytest.raises(UsageError, match="--device cuda:1 with --engine ray: Ray chooses the devices"):
        start(replace(parallel(config, monkeypatch, Ray(GPU=2)), device="cuda:1"))


def test_without_ray_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_module, "load_decoder", lambda config: fake_eval.FakeDecoder())
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ["eval", "run", "--model", "fake", "--tasks", "fake-pope", "--methods", "greedy", "--engine", "ray"]
    assert main([*words, "--out", str(tmp_path / "a")]) == 1
    assert "pip install 'mmfix[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
