"""Parsers: the published verdicts, and what the strict one must not do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfix_evals.errors import UsageError
from mmfix_evals.metrics import pope
from mmfix_evals.metrics.parsers import PARSERS, parse

UNRELATED = ["", "  ", "否", "ja", "I don't know.", "There is a snowboard.", "another", "Notebook", "know", "not sure"]


@pytest.fixture(scope="module")
def per_answer(shared: Path) -> list[dict]:
    return json.loads((shared / "evaldata/oracle/pope/pope_oracle.json").read_text("utf-8"))["per_answer"]


@pytest.mark.parametrize(("parser", "column"), [("official", "official"), ("opera", "opera_pai")])
def test_equals_the_published_script(per_answer: list[dict], parser: str, column: str) -> None:
    assert len(per_answer) == 104
    assert [parse(row["answer"], parser) for row in per_answer] == [row[column] for row in per_answer]


@pytest.mark.parametrize("label", ["yes", "no"])
def test_vcd_equals_the_published_script(per_answer: list[dict], label: str) -> None:
    expected = [row["vcd"][f"if_label_{label}"] for row in per_answer]
    assert [parse(row["answer"], "vcd", label) for row in per_answer] == expected


def test_lmms_equals_the_published_script(per_answer: list[dict]) -> None:
    expected = [row["lmms_eval"] if row["lmms_eval"] in ("yes", "no") else "unparsed" for row in per_answer]
    assert [parse(row["answer"], "lmms") for row in per_answer] == expected


def test_vlmeval_equals_the_published_script(per_answer: list[dict]) -> None:
    names = {"Yes": "yes", "No": "no", "Unknown": "unparsed"}
    assert [parse(row["answer"], "vlmeval") for row in per_answer] == [names[row["vlmevalkit"]] for row in per_answer]


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("answer", ["yes", "no"])
def test_clean_answers_mean_the_same_everywhere(parser: str, answer: str) -> None:
    for label in ("yes", "no"):
        assert parse(answer, parser, label) == answer


@pytest.mark.parametrize(
    ("text", "official", "opera", "vlmeval", "strict"),
    [
        ("NO", "yes", "no", "no", "no"),
        ("3.5 no", "yes", "no", "no", "no"),
        ("yes, but not clearly", "no", "no", "yes", "yes"),
        ("no\nyes", "yes", "yes", "unparsed", "unparsed"),
        ("There isn't one", "yes", "no", "unparsed", "unparsed"),
        ("no." * 33, "no", "yes", "unparsed", "no"),
        ("a1,2b no!x", "yes", "yes", "unparsed", "no"),  # digit,digit: "!" is deleted, not blanked
        ("a -it-no", "yes", "yes", "unparsed", "no"),  # a space before one "-": all are deleted, not blanked
        ("it-no- a", "yes", "yes", "unparsed", "no"),  # a space after one "-": the same
        ("it-no", "yes", "yes", "no", "no"),
        ("No.", "no", "no", "no", "no"),
        ("Yes!", "yes", "yes", "yes", "yes"),
        ("don’t know", "yes", "yes", "unparsed", "unparsed"),
        ("no’s", "yes", "yes", "unparsed", "unparsed"),
        ("\N{LATIN CAPITAL LETTER N}O_1", "yes", "yes", "no", "no"),
    ],
)
def test_rules_in_words(text: str, official: str, opera: str, vlmeval: str, strict: str) -> None:
    assert parse(text, "official") == official
    assert parse(text, "opera") == opera
    assert parse(text, "vlmeval") == vlmeval
    assert parse(text, "strict3way") == strict


def test_vlmeval_deletes_at_most_32_periods() -> None:
    assert parse(". " * 32 + "no.", "vlmeval") == "unparsed"
    assert parse(". " * 31 + "no.", "vlmeval") == "no"


@pytest.mark.parametrize("text", UNRELATED)
def test_strict_never_takes_an_unrelated_answer_for_a_verdict(text: str) -> None:
    assert parse(text, "strict3way") == "unparsed"


@pytest.mark.parametrize("parser", ["official", "opera", "vcd"])
@pytest.mark.parametrize("text", UNRELATED)
def test_silent_verdicts_are_counted_as_unparsed(parser: str, text: str) -> None:
    assert pope.counts("no", text, parser)["n_unparsed"] == 1


@pytest.mark.parametrize("text", ["Yes.", "Yes, there is a dog in the picture, and it wears a hat."])
def test_long_winded_answers_are_right_except_under_lmms(text: str) -> None:
    right = {name for name in PARSERS if pope.counts("yes", text, name)["correct"]}
    assert right == set(PARSERS) - {"lmms"}


@given(st.text(max_size=40), st.sampled_from(sorted(PARSERS)), st.sampled_from(["yes", "no"]))
def test_every_text_has_one_verdict_and_consistent_counts(text: str, parser: str, label: str) -> None:
    verdict = parse(text, parser, label)
    counts = pope.counts(label, text, parser)
    assert verdict in ("yes", "no", "unparsed")
    assert verdict != "unparsed" or parser in ("lmms", "vlmeval", "strict3way")
    assert counts["tp"] + counts["fp"] + counts["tn"] + counts["fn"] <= counts["n"] == 1
    assert counts["correct"] == counts["tp"] + counts["tn"] == (verdict == label)
    assert counts["n_yes"] == counts["tp"] + counts["fp"]


def test_verdicts_hold_every_parser() -> None:
    assert pope.verdicts("Yes.", "no").keys() == PARSERS.keys()


def test_unknown_parser_and_missing_label_are_refused_with_the_choices() -> None:
    with pytest.raises(UsageError, match=r"'regex'; choose one of official, opera, vcd, lmms, vlmeval, strict3way"):
        parse("yes", "regex")
    with pytest.raises(UsageError, match="needs the label"):
        parse("yes", "vcd")
