"""Sentences, tokens and singular forms of flavour "pattern", and where each token stands in the caption."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfix_evals import files
from mmfix_evals.errors import MissingDependency
from mmfix_evals.metrics import chair_text
from mmfix_evals.metrics.abbreviations import ABBREVIATIONS
from mmfix_evals.metrics.chair_text import sentence_tokens, sentences, singular, tokens

AWKWARD = st.text(alphabet="ab't\"`.,?!-()[] \n“”’«:;%…İΣ3", max_size=30)
WORDS = ["a", "dogs", "cannot", "wanna", "hot-dogs", "it's", "3.5", "mr.", "cats,", "2", '"car"', "end.", "gonna-be"]
CAPTIONS = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one dog. two cats? three! four", ["one dog.", "two cats?", "three!", "four"]),
        ("mr. smith and dr. jones et al. left", ["mr. smith and dr. jones et al.", "left"]),
        ("the u.s. flag. j. doe has 3.5. and 4. dogs...", ["the u.s. flag.", "j. doe has 3.5. and 4. dogs..."]),
        ('he said "dog." then left', ['he said "dog."', "then left"]),
        ("a dog.cat  runs .\n\n- a cup", ["a dog.cat  runs .", "- a cup"]),
        ("(mr. x) r-calif. is. (so?!) end..", ["(mr. x) r-calif. is.", "(so?!)", "end.."]),
        ("what?. yes", ["what?.", "yes"]),
        ("dogs... and cats.. too. left", ["dogs... and cats.. too.", "left"]),  # dots that go on close nothing
        ("really?.. yes", ["really?..", "yes"]),  # unless a question or exclamation mark stands among them
        ("  ", []),
        ("", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert [text[start:end] for start, end in sentences(text)] == expected


def test_abbreviations_are_those_of_the_splitter(shared: Path) -> None:
    listed = files.read_text(shared / "evaldata/chair/punkt_english_abbrev_types.txt").split("\n")
    assert len(listed) == 156
    assert {entry for entry in listed if " " not in entry} == ABBREVIATIONS
    assert "" not in ABBREVIATIONS
    assert not {"etc", "e.g", "i.e", "al"} & ABBREVIATIONS


def test_tokens_equal_the_published_ones(shared: Path) -> None:
    oracle = files.read_json(shared / "evaldata/oracle/chair/chair_oracle.json")
    for record, expected in zip(oracle["captions"], oracle["tokens_nltk_word_tokenize"], strict=True):
        text = record["caption"].lower()
        found = [t[0] for start, end in sentences(text) for t in sentence_tokens(text[start:end])]
        assert found == expected


@pytest.mark.parametrize("name", ["singularize_table.json", "vocab_singularize_table.json"])
def test_singular_equals_pattern(shared: Path, name: str) -> None:
    table = files.read_json(shared / "evaldata/oracle/chair" / name)
    assert {word: singular(word) for word in table} == {word: row["pattern"] for word, row in table.items()}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("dogs", "dog"),
        ("buses", "bus"),
        ("bus", "bu"),
        ("minibuses", "minibus"),
        ("collies", "collies"),
        ("as", "as"),
        ("glass", "glas"),
        ("tennis", "tenni"),
        ("'", "'s"),
        ("s", "s"),
    ],
)
def test_singular_by_hand(word: str, expected: str) -> None:
    assert singular(word) == expected


@pytest.mark.parametrize("caption", ['A "dog" (cat)', "İİ dogs İ, a CAT's ΣΑΣ hat", "``x'' \"y\" '' z", "hot\ndogs"])
def test_tokens_slice_back(caption: str) -> None:
    for word, start, end in tokens(caption):
        assert word in (singular(caption[start:end].lower()), "``", "'s's")


@given(AWKWARD | CAPTIONS | st.text(max_size=20))
@settings(max_examples=300, deadline=None)
def test_tokens_cover_the_caption_in_order(caption: str) -> None:
    found = tokens(caption)
    covered = set()
    point = 0
    for _, start, end in found:
        assert point <= start < end <= len(caption) or caption[start : start + 1] == "İ"  # one letter, two lower ones
        covered.update(range(start, end))
        point = end
    assert {i for i, character in enumerate(caption) if not character.isspace()} <= covered


@given(CAPTIONS | st.from_regex(r"([a-z]{1,6}[-,]? ){0,6}[a-z]{1,4}[.,]?", fullmatch=True))
@settings(max_examples=300, deadline=None)
def test_the_short_way_equals_the_library(sentence: str) -> None:
    assert list(sentence_tokens(sentence)) == list(chair_text._library_tokens(sentence))


ENDS = ["", "n't", "'s", "'t", "'re", "'d", "'ll", "'ve", "'m", "'n", "'s,", "n't;", ",", ";", "'", "n't's"]
CONTRACTED = st.lists(
    st.tuples(st.sampled_from(["is", "a", "n", "can", "an-", "t-a", "d", "gonna"]), st.sampled_from(ENDS))
)


@given(CONTRACTED.map(lambda pairs: " ".join(map("".join, pairs))), st.sampled_from(["", "."]))
@settings(max_examples=300, deadline=None)
def test_contractions_the_short_way_equal_the_library(words: str, end: str) -> None:
    sentence = words + end
    library = list(chair_text._library_tokens(sentence))
    assert list(sentence_tokens(sentence)) == library
    assert chair_text.sentence_words(sentence) == [word for word, _, _ in library]


def test_a_token_is_part_of_one_double_word_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chair_text, "DOUBLE_WORDS", {"a b": "ab", "b a": "ba"})
    monkeypatch.setattr(chair_text, "FIRST_WORDS", {"a", "b"})
    assert list(chair_text.merge_words(["a", "b", "a", "b", "a"])) == ["ab", "ab", "a"]


def test_contractions_go_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chair_text, "_library_tokens", lambda sentence: pytest.fail("the slow way"))
    found = sentence_tokens("one isn't in the man's view; they're hot-dogs, i'd say.")
    expected = "one is n't in the man 's view ; they 're hot-dogs , i 'd say ."
    assert [word for word, _, _ in found] == expected.split()


@given(
    AWKWARD
    | CAPTIONS
    | st.lists(st.sampled_from(["hot dog", "dog", "teddy", "bear", "baby", "bear dog"])).map(" ".join)
)
@settings(max_examples=200, deadline=None)
def test_words_are_those_of_the_tokens(caption: str) -> None:
    found = tokens(caption)
    assert list(chair_text.words(caption)) == [token.word for token in found]
    merged = chair_text.merge_double_words(found)
    assert list(chair_text.merge_words(chair_text.words(caption))) == [token.word for token in merged]


def test_the_short_way_equals_the_library_on_real_captions(shared: Path) -> None:
    rows = files.read_rows(shared / "evaldata/chair/opera_logs/llava-1.5.greedy.jsonl")
    plain = 0
    for row in rows[:120]:
        text = row["caption"].lower()
        for start, end in sentences(text):
            plain += chair_text._token_pattern(text[start:end]) is not None
            expected = list(chair_text._library_tokens(text[start:end]))
            assert list(sentence_tokens(text[start:end])) == expected
    assert plain > 500


@pytest.mark.parametrize(("missing", "line"), [("nltk", "nltk>=3.9"), ("textblob", "textblob>=0.19")])
def test_a_missing_library_is_one_sentence_with_the_pip_line(
    monkeypatch: pytest.MonkeyPatch, missing: str, line: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == missing] + [missing]:
        monkeypatch.setitem(sys.modules, name, None)
    for cached in (tokens, singular, chair_text._tokenizer, chair_text._singularize):
        cached.cache_clear()
    with pytest.raises(MissingDependency, match=rf"pip install '{line}'"):
        tokens('It is "two" unusual words')


def test_time_grows_with_the_length_only() -> None:
    """No pattern goes back over what it has read: a hundred thousand characters are a matter of seconds."""
    for caption in ("a" * 100_000, "a-" * 50_000, "." * 100_000, "a " * 50_000, "'" * 20_000, "a, " * 30_000 + "!"):
        list(sentences(caption))
        chair_text.PLAIN_SENTENCE.fullmatch(caption)
        chair_text.CONTRACTED_SENTENCE.fullmatch(caption)
