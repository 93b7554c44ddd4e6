"""``@all`` and ``@KIND`` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

import mmfix
from mmfix_decoding import Decoder
from mmfix_evals import run
from mmfix_evals.arms import calibrated, choose, expand, members, resolve
from mmfix_evals.ask import ask
from mmfix_evals.errors import UsageError
from mmfix_evals.plan import RunConfig, plan
from mmfix_evals.worker import Worker


def test_all_is_greedy_and_every_method() -> None:
    assert members("@all") == ("greedy", "beam-3", "beam-5", *mmfix.methods())
    assert members("@search") == ("beam-3", "beam-5", "halc", "opera")


def test_a_kind_is_its_methods() -> None:
    masks = {name for name, info in mmfix.methods().items() if info.kind == "mask"}
    assert set(members("@mask")) == masks != set()
    assert "hgai" in members("@score-edit")


def test_an_unknown_group_is_refused_with_the_groups() -> None:
    with pytest.raises(UsageError, match=r"unknown group of methods '@masks': did you mean @mask\?"):
        members("@masks")


def test_a_method_named_twice_runs_once() -> None:
    found = expand(["greedy", "@contrast", "vcd"])
    assert next(iter(found)) == "greedy"
    assert found["vcd"]
    assert not found["icd"]


def test_members_that_cannot_run_are_left_out_with_the_reason() -> None:
    decoder = Decoder.from_pretrained("tiny", device="cpu")
    arms, left_out = choose(["@all"], decoder)
    assert "no default" in left_out["icd"]
    assert "leading" in left_out["lqcd"]
    assert "mmfix.scorers.register" in left_out["halc"]
    idle = {"beam-3"}  # the control of a method that is left out
    assert [arm.name for arm in arms] == [name for name in members("@all") if name not in {*left_out, *idle}]
    assert "vcd" not in left_out


def test_a_member_that_gets_what_it_lacks_is_not_left_out() -> None:
    """From parameters of its own, or from every task of the run."""
    decoder = Decoder.from_pretrained("tiny", device="cpu")
    arms, left_out = choose(["@contrast", "icd:instruction=Be confused."], decoder, supplied={"lqcd"})
    assert "icd" not in left_out
    assert "lqcd" not in left_out
    assert "lqcd" in [arm.name for arm in arms]
    assert [arm.name for arm in arms if arm.name.startswith("icd")] == ["icd:instruction=Be confused."]


def test_what_was_calibrated_for_the_model_is_known_of_every_arm() -> None:
    model = Decoder.from_pretrained("tiny", device="cpu").model
    known = mmfix.calibrated(model, "var")
    used = calibrated(resolve("vhr+var:move=0.4", model), model)
    assert used == {"var": {"values": {"sink_dims": list(known.sink_dims), "tau": known.tau}}}  # type: ignore[attr-defined]
    assert calibrated(resolve("var:sink_dims=[3],tau=2", model), model) == {}
    assert calibrated(resolve("greedy", model), model) == {}


def test_a_method_that_was_named_is_never_left_out() -> None:
    decoder = Decoder.from_pretrained("tiny", device="cpu")
    arms, left_out = choose(["greedy", "@contrast", "icd"], decoder)
    assert "icd" in [arm.name for arm in arms]
    assert "icd" not in left_out


def test_the_control_of_a_search_is_beam_search_of_its_width(tmp_path: Path) -> None:
    decoder = Decoder.from_pretrained("tiny", device="cpu")
    config = RunConfig("tiny", ("tinyworld-chair",), ("beam-4", "greedy"), tmp_path, limit=4, max_new_tokens=12)
    (one,) = plan(config, {})
    arms = choose(config.methods, decoder)[0]
    worker = Worker.build(decoder, arms)
    document = one.documents[3]
    picture = one.task.show(document)
    said = {}
    for arm in arms:
        lines, _ = ask(worker.decoders[arm.name], one, arm, [document])
        said[arm.name] = lines[0]["response"]
        width = 4 if arm.name == "beam-4" else 1
        assert said[arm.name] == decoder.generate(picture, document.prompt, max_new_tokens=12, num_beams=width).text
    assert said["beam-4"] != said["greedy"]
    assert one.key(arms[0], document) != one.key(resolve("beam-5", evaluated=True), document)


def test_which_beam_searches_there_are_and_where() -> None:
    assert resolve("beam", evaluated=True).generation == resolve("beam-5", evaluated=True).generation
    for text, told in (
        ("beam-1", "with one it is greedy"),
        ("beam-0", "2 to 1000"),
        ("opera+beam-5", "cannot be joined"),
    ):
        with pytest.raises(UsageError, match=told):
            resolve(text, evaluated=True)
    with pytest.raises(UsageError, match="num_beams=7"):
        resolve("beam-7")  # a server, say, which cannot give it


def test_a_search_without_its_control_is_remarked() -> None:
    said: list[str] = []

    class Listening:
        say = staticmethod(said.append)

    run._remark_controls([resolve("greedy"), resolve("opera")], Listening())
    assert any("add beam-5 to --methods" in line for line in said)
    said.clear()
    run._remark_controls([resolve("beam-5", evaluated=True), resolve("opera")], Listening())
    assert len(said) == 1
    assert "add greedy" in said[0]
