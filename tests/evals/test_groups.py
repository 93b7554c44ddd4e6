"""``@all`` and ``@KIND`` on the command line."""

from __future__ import annotations

import pytest

import mmfix
from mmfix_decoding import Decoder
from mmfix_evals.arms import calibrated, choose, expand, members, resolve
from mmfix_evals.errors import UsageError


def test_all_is_greedy_and_every_method() -> None:
    assert members("@all") == ("greedy", *mmfix.methods())


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
    assert [arm.name for arm in arms] == [name for name in members("@all") if name not in left_out]
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
