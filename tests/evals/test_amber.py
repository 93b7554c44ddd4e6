"""AMBER: equal to the published script wherever the tagger is not needed, and the same rules by hand."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from mmfix_evals import files, stats
from mmfix_evals.errors import DataError, MissingDependency, UsageError
from mmfix_evals.metrics import amber, amber_text, nltk_data
from mmfix_evals.metrics.amber_metrics import official

HEADINGS = {"generative": "Generative Task", "discriminative": "Descriminative Task", "existence": "Exsitence"}

RELATION = {
    "sky": [],
    "grass": ["ground"],
    "ground": ["floor"],
    "person": ["people", "man"],
    "tree": ["forest", "bush"],
    "forest": ["tree", "bush"],
    "dog": ["puppy"],
    "cat": [],
    "light": [],
}
ITEMS = [
    {"id": 1, "type": "generative", "truth": ["grass", "forest", "tree"], "hallu": ["dog", "person"]},
    {"id": 2, "type": "generative", "truth": ["sky"], "hallu": []},
    {"id": 3, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 4, "type": "discriminative-attribute-state", "truth": "yes"},
    {"id": 5, "type": "discriminative-attribute-state", "truth": "no"},
    {"id": 6, "type": "discriminative-attribute-number", "truth": "no"},
    {"id": 7, "type": "discriminative-attribute-action", "truth": "yes"},
    {"id": 8, "type": "discriminative-relation", "truth": "yes"},
    {"id": 9, "type": "relation", "truth": "no"},
]
DATA = amber.Amber(ITEMS, RELATION, frozenset({"light"}))
ANSWERS = ["No", "Yes", "Yes", "No", "no", "Yes", "No"]  # to the items 3 to 9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    (data / "annotations.json.gz").write_bytes(gzip.compress(json.dumps(ITEMS).encode()))
    (data / "relation.json").write_text(json.dumps(RELATION))
    (data / "safe_words.txt").write_text("light\nrange")
    (data / "query_all.json").write_text(json.dumps([{"id": i, "image": f"{i % 2}.jpg"} for i in range(1, 10)]))
    return data


def answers(*texts: str, first: int = 3) -> list[dict]:
    return [{"id": i, "response": text} for i, text in enumerate(texts, first)]


def written(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("kind", ["d", "de", "dr"])
def test_questions_equal_the_published_script(shared: Path, tmp_path: Path, kind: str) -> None:
    oracle = files.read_json(shared / "evaldata/oracle/amber/amber_oracle.json")
    given = written(tmp_path / "r.json", oracle["inputs"]["d"])
    found = amber.score_files(given, shared / "evaldata/amber", kind)["splits"]
    printed = {HEADINGS.get(block, block.capitalize()): part["official"] for block, part in found.items()}
    assert printed == oracle["official"][kind]


def test_everything_together_equals_the_published_script(shared: Path) -> None:
    """Type a prints the seven blocks of d as well; the nouns are left empty here."""
    oracle = files.read_json(shared / "evaldata/oracle/amber/amber_oracle.json")
    data, _ = amber.read_folder(shared / "evaldata/amber")
    described = [{"id": row["id"], "nouns": []} for row in oracle["inputs"]["g"]]
    found = amber.score(data, described + oracle["inputs"]["d"])
    assert found["evaluation_type"] == "a"
    printed = {HEADINGS.get(block, block.capitalize()): part["official"] for block, part in found["splits"].items()}
    assert list(printed) == list(oracle["official"]["a"])
    del printed["Generative Task"], oracle["official"]["a"]["Generative Task"]
    assert printed == oracle["official"]["a"]


def test_descriptions_equal_the_published_script(shared: Path, tmp_path: Path) -> None:
    if amber_text.missing_resources():
        pytest.skip(f"NLTK data {', '.join(amber_text.missing_resources())} are not here")
    oracle = files.read_json(shared / "evaldata/oracle/amber/amber_oracle.json")
    given = written(tmp_path / "r.json", oracle["inputs"]["g"])
    found = amber.score_files(given, shared / "evaldata/amber", "g")["splits"]
    assert found["generative"]["official"] == oracle["official"]["g"]["Generative Task"]


def test_descriptions_from_given_nouns_come_close_without_the_tagger(shared: Path) -> None:
    """Every word behind an article is taken for a noun; lemmas from a table of WordNet's, else a final s cut off.

    The tagger and WordNet decide a handful of the 1,100 mentions differently, so that only "Cog" must be equal.
    """
    oracle = files.read_json(shared / "evaldata/oracle/amber/amber_oracle.json")
    tables = [
        files.read_json(shared / f"evaldata/oracle/chair/{name}singularize_table.json") for name in ("vocab_", "")
    ]
    lemmas = {word: row["wn_n"] for table in tables for word, row in table.items()}
    data, _ = amber.read_folder(shared / "evaldata/amber")
    given = []
    for row in oracle["inputs"]["g"]:
        words = re.findall(r"\b(?:a|the) (\w+)", row["response"])
        nouns = [lemmas.get(word, word if word in data.vocabulary else word.removesuffix("s")) for word in words]
        given.append({"id": row["id"], "nouns": nouns})
    found = amber.score(data, given)["splits"]["generative"]["official"]
    expected = oracle["official"]["g"]["Generative Task"]
    assert found["Cog"] == expected["Cog"]
    assert found["CHAIR"] == pytest.approx(expected["CHAIR"], abs=0.3)
    assert found["Cover"] == pytest.approx(expected["Cover"], abs=0.3)
    assert found["Hal"] == pytest.approx(expected["Hal"], abs=1.0)


@pytest.mark.parametrize(
    ("nouns", "expected"),
    [
        # (hallucinated, nouns, covered, hit)
        ([], (0, 0, 0, 0)),
        (["grass", "grass"], (0, 2, 1, 0)),
        (["floor"], (1, 1, 0, 0)),  # associations of associations do not count
        (["ground"], (0, 1, 1, 0)),
        (["tree"], (0, 1, 1, 0)),  # credited to "forest", whose associations come before the truth words
        (["tree", "forest"], (0, 2, 2, 0)),  # "forest" is an association of "tree"
        (["bush", "tree", "forest", "grass"], (0, 4, 3, 0)),
        (["light", "light"], (0, 2, 0, 0)),  # globally safe: only in the number of nouns
        (["dog", "puppy"], (2, 2, 0, 1)),
        (["man", "dog"], (2, 2, 0, 2)),
        (["cat"], (1, 1, 0, 0)),
        (["zebra", "Grass", "image"], (0, 0, 0, 0)),  # outside the vocabulary, which knows no capitals
    ],
)
def test_nouns_by_hand(nouns: list[str], expected: tuple[int, ...]) -> None:
    found = amber.noun_counts(nouns, ITEMS[0], DATA)
    assert tuple(found[key] for key in ("hallucinated", "nouns", "covered", "hit")) == expected
    assert (found["truth"], found["targets"], found["responses"]) == (3, 2, 1)
    assert found["hallucinated_response"] == (expected[0] > 0)


def test_tree_is_credited_to_the_first_owner() -> None:
    one = {"id": 1, "type": "generative", "truth": ["forest", "tree"], "hallu": []}
    assert amber.noun_counts(["tree", "tree"], one, DATA)["covered"] == 1
    other = {**one, "truth": ["tree", "sky"]}
    assert amber.noun_counts(["tree"], other, DATA)["covered"] == 1


def test_similar_words_hit_targets_and_may_still_be_fine() -> None:
    def similar(first: str, second: str) -> float:
        return 1.0 if first == second else {("cat", "dog"): 0.9, ("cat", "bush"): 0.81}.get((first, second), 0.8)

    found = amber.noun_counts(["cat"], ITEMS[0], DATA, similar)
    assert (found["hallucinated"], found["covered"], found["hit"]) == (0, 1, 1)
    found = amber.noun_counts(["cat"], ITEMS[0], DATA, similar, threshold=0.85)
    assert (found["hallucinated"], found["covered"], found["hit"]) == (1, 0, 1)


def test_scores_by_hand() -> None:
    described = [{"id": 1, "nouns": ["grass", "dog", "light"]}, {"id": 2, "nouns": ["sky"]}]
    found = amber.score(DATA, described + answers(*ANSWERS))
    part = found["splits"]["generative"]
    assert (part["chair"], part["cover"], part["hal"], part["cog"]) == (1 / 4, 2 / 4, 1 / 2, 1 / 2)
    assert part["official"] == {"CHAIR": 25.0, "Cover": 50.0, "Hal": 50.0, "Cog": 50.0}
    everything = found["splits"]["discriminative"]
    assert everything["counts"] == {
        "correct": 5,
        "n": 7,
        "right_no": 3,
        "answered_no": 3,
        "truth_no": 4,
        "unparsed": 1,
    }
    assert (everything["accuracy"], everything["precision"], everything["recall"]) == (5 / 7, 1.0, 3 / 4)
    assert everything["f1"] == pytest.approx(6 / 7)
    assert found["splits"]["attribute"]["accuracy"] == 2 / 4
    assert found["splits"]["relation"]["accuracy"] == 1.0
    assert found["amber_score"] == pytest.approx((3 / 4 + 6 / 7) / 2)
    assert found["positive_class"] == "no"
    assert (found["n"], found["n_unparsed"], found["nouns"]) == (9, 1, "given")
    assert any("1 of 7 answers are not exactly Yes or No" in warning for warning in found["warnings"])
    json.dumps(found, allow_nan=False)


def test_existence_precision_carries_its_remark() -> None:
    found = amber.score(DATA, answers("No"), "de")
    assert found["splits"]["existence"]["precision"] == 1.0
    assert "by construction" in found["splits"]["existence"]["remark"]
    assert any("existence" in remark and "by construction" in remark for remark in found["remarks"])
    assert any('"no"' in remark for remark in found["remarks"])
    assert not any("existence" in remark for remark in amber.score(DATA, answers("No", first=6), "da")["remarks"])


def test_f1_comes_from_rounded_values_and_existence_has_its_own_epsilon() -> None:
    counts = {"correct": 2, "n": 3, "right_no": 2, "answered_no": 2, "truth_no": 3, "unparsed": 0}
    assert official("existence", counts) == {"Accuracy": 66.6, "Precision": 100.0, "Recall": 66.6, "F1": 79.9}
    assert official("state", counts)["F1"] == 79.9
    many = {"correct": 8850, "n": 10000, "right_no": 8850, "answered_no": 8850, "truth_no": 10000, "unparsed": 0}
    assert official("state", many)["F1"] == 93.9
    assert official("existence", many)["F1"] == 93.8
    one = {"correct": 1, "n": 1, "right_no": 1, "answered_no": 1, "truth_no": 1, "unparsed": 0}
    # Each of three added denominators starts at 0.001.
    assert (official("attribute", one)["Accuracy"], official("state", one)["Accuracy"]) == (99.7, 99.9)


def test_the_parser_is_a_choice_that_is_named() -> None:
    given = answers("No.", "yes", first=3)
    assert amber.score(DATA, given)["splits"]["discriminative"]["accuracy"] == 0.0
    found = amber.score(DATA, given, parser="strict3way")
    assert (found["splits"]["discriminative"]["accuracy"], found["parser"]) == (1.0, "strict3way")


def test_only_what_was_asked_for_is_scored() -> None:
    given = [{"id": 1, "response": "needs a tagger"}, *answers(*ANSWERS)]
    assert list(amber.score(DATA, given, "da")["splits"]) == ["attribute", "state", "number", "action"]
    found = amber.score(DATA, answers("No"), "g")
    assert (found["n"], found["splits"]["generative"]["chair"], found["amber_score"]) == (0, None, None)
    assert any("generative: chair is undefined" in warning for warning in found["warnings"])
    assert any("generative: 0 of 2 items have a response" in warning for warning in found["warnings"])


def test_no_answer_no_leaves_precision_undefined() -> None:
    found = amber.score(DATA, answers("Yes"), "de")
    part = found["splits"]["existence"]
    assert (part["precision"], part["recall"], part["f1"]) == (None, 0.0, None)
    assert part["official"] == {"Accuracy": 0.0, "Precision": 0.0, "Recall": 0.0, "F1": 0.0}
    assert any("existence: precision is undefined" in warning for warning in found["warnings"])


def test_missing_nltk_data_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nltk.data.path", [])
    with pytest.raises(MissingDependency, match=r"punkt_tab, averaged_perceptron_tagger_eng, wordnet.*Run: python -m"):
        amber.score(DATA, [{"id": 1, "response": "A dog."}])
    assert amber.score(DATA, [{"id": 1, "nouns": ["dog"]}])["nouns"] == "given"


def test_nouns_are_tagged_in_their_own_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tokeniser, a tagger and a lemmatiser of the test's own."""

    class Lemmatizer:
        def lemmatize(self, word: str) -> str:
            return word.removesuffix("s")

    tags = {"Dogs": "NNP", "grass": "NN", "trees": "NNS", "run": "VB"}
    monkeypatch.setattr(nltk_data, "missing_resources", list)
    monkeypatch.setattr("nltk.word_tokenize", str.split)
    monkeypatch.setattr("nltk.pos_tag", lambda words: [(word, tags.get(word, "XX")) for word in words])
    monkeypatch.setattr("nltk.stem.WordNetLemmatizer", Lemmatizer)
    assert amber_text.nouns_of(["Dogs run through trees trees and grass"]) == [["Dog", "tree", "tree", "gras"]]
    found = amber.score(DATA, [{"id": 1, "response": "trees"}, {"id": 2, "nouns": []}])
    assert (found["nouns"], found["splits"]["generative"]["counts"]["nouns"]) == ("both", 1)


def test_vectors_from_a_file(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "v.txt.gz"
    path.write_bytes(gzip.compress(b"4 2\ncat 1 0\ndog 0.9 0.1\nzebra 5 5\nsky 0 1\n"))
    given = written(tmp_path / "r.json", [{"id": 1, "nouns": ["cat"]}])
    found = amber.score_files(given, folder, similarity="vectors", vectors=path)
    assert found["splits"]["generative"]["counts"]["hit"] == 1
    assert (found["similarity"], found["threshold"]) == ("vectors", 0.8)
    assert found["vectors_sha256"] == files.sha256(path)
    assert "grass" in found["words_without_vector"]
    assert amber.score_files(given, folder)["splits"]["generative"]["counts"]["hit"] == 0
    assert amber.score_files(given, folder)["similarity"] == "exact"
    similar = amber_text.read_vectors(path, {"cat", "dog", "sky"})
    assert (similar("cat", "cat"), similar("cat", "sky"), similar("fish", "cat")) == (1.0, 0.0, 0.0)
    assert similar("fish", "fish") == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat 1 0\ndog 1\n", r"line 2: 1 values, expected 2"),
        (b"cat 1 x\n", r"line 1: a value of 'cat' is not a number"),
        (b"cat 1 nan\n", r"line 1: a value of 'cat' is not finite"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"", "a vector for none of AMBER's words"),
        (b"\x1f\x8bbroken", "cannot be read"),
    ],
)
def test_broken_vectors_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "v.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        amber_text.read_vectors(tmp_path / "v.txt", {"cat", "dog"})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "contains no responses"),
        ([{"id": 10, "response": "No"}], r"r\.json, item 1: id is 10; it must be a whole number from 1 to 9"),
        ([{"id": "3", "response": "No"}], r"id is '3'"),
        ([{"id": 3, "response": "No"}] * 2, r"r\.json, item 2: id 3 occurs twice"),
        ([{"id": 3, "response": None}], r"r\.json, item 1: 'response' is NoneType"),
        ([{"id": 1, "nouns": "dog"}], r"r\.json, item 1: 'nouns' must be a list"),
    ],
)
def test_bad_responses_are_named(folder: Path, tmp_path: Path, rows: list[dict], message: str) -> None:
    with pytest.raises(DataError, match=message):
        amber.score_files(written(tmp_path / "r.json", rows), folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("relation.json", '{"sky": "blue"}', r"relation\.json: must be an object"),
        ("relation.json", '{"sky": []}', r"item 1: grass, forest, tree not among the words"),
        ("annotations.json", '[{"id": 2, "type": "relation", "truth": "no"}]', r"item 1: id is 2"),
        ("annotations.json", '[{"id": 1, "type": "relation", "truth": "maybe"}]', r"item 1: 'truth' is 'maybe'"),
        ("annotations.json", '[{"id": 1, "type": "odd", "truth": "no"}]', r"item 1: unknown type 'odd'"),
        ("annotations.json", '[{"id": 1, "type": "generative", "truth": "sky"}]', r"item 1: 'truth' and 'hallu' must"),
    ],
)
def test_bad_data_are_named(folder: Path, name: str, content: str, message: str) -> None:
    (folder / f"{name}.gz").unlink(missing_ok=True)
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=message):
        amber.read_folder(folder)


def test_options_are_checked(folder: Path, tmp_path: Path) -> None:
    given = written(tmp_path / "r.json", answers("No"))
    for options in ({"evaluation_type": "x"}, {"parser": "vcd"}, {"similarity": "spacy"}, {"similarity": "vectors"}):
        with pytest.raises(UsageError):
            amber.score_files(given, folder, **options)
    (folder / "safe_words.txt").unlink()
    with pytest.raises(DataError, match=r"holds no safe_words\.txt"):
        amber.score_files(given, folder)


def test_counts_per_picture_give_intervals(folder: Path) -> None:
    data, _ = amber.read_folder(folder)
    given = answers(*ANSWERS)
    rows = amber.per_image(data, given, "discriminative")
    assert sorted(rows) == ["0.jpg", "1.jpg"]
    _, matrix = stats.by_cluster(list(rows), [[row[key] for key in amber.COUNT_KEYS] for row in rows.values()])
    whole = amber.score(data, given)["splits"]["discriminative"]
    for name, metric in amber.METRICS.items():
        assert stats.bootstrap(matrix, metric, resamples=50).value == pytest.approx(whole[name])
    nouns = amber.per_image(DATA, [{"id": 1, "nouns": ["dog"]}], "generative")
    assert list(nouns) == ["item 1"]
    assert set(nouns["item 1"]) == set(amber.GENERATIVE_KEYS)
