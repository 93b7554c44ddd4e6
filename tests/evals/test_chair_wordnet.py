"""CHAIR flavour "wordnet": equal to OPERA's and PAI's scripts, word for word.

The tagger and WordNet need data that no package carries. Where they are absent, the lemmas that they gave are taken
from the recorded output; everything around them (tokens, places, double words, nodes, scores) is ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mmfix_evals import files
from mmfix_evals.errors import MissingDependency, UsageError
from mmfix_evals.metrics import chair, chair_text, chair_wordnet, nltk_data
from mmfix_evals.metrics.chair import Chair
from mmfix_evals.metrics.coco_words import DOUBLE_WORDS
from mmfix_evals.metrics.nltk_data import RESOURCES, missing_resources


def nltk_tokens(text: str) -> list[str]:
    """As word_tokenize gives them (checked against the published tokens elsewhere), without its data."""
    found = []
    for start, end in chair_text.sentences(text):
        found += [word for word, _, _ in chair_text.sentence_tokens(text[start:end])]
    return found


def lemmas_of(tokens: Sequence[str], merged: Sequence[str]) -> Iterator[str]:
    """The lemma of every token, from the recorded words, in which some pairs are one word."""
    place = 0
    for word in merged:
        keys = [key for key, value in DOUBLE_WORDS.items() if value == word and _alike(key, tokens[place:])]
        pair = keys[0].split(" ") if keys else None
        yield from pair or [word]
        place += len(pair or [word])


def _alike(pair: str, tokens: Sequence[str]) -> bool:
    return len(tokens) > 1 and all(
        word[:3] == token[:3] for word, token in zip(pair.split(" "), tokens[:2], strict=True)
    )


@pytest.fixture
def oracle(shared: Path) -> dict:
    return files.read_json(shared / "evaldata/oracle/chair/chair_oracle.json")


@pytest.fixture
def recorded(oracle: dict, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tagger and the lemmatiser answer from the record."""
    rows = oracle["variants"]["opera_wordnet"]["caption_to_words"]
    table = {}
    for tokens, row in zip(oracle["tokens_nltk_word_tokenize"], rows, strict=True):
        table[tuple(tokens)] = list(lemmas_of(tokens, row["double_words"]))
    tools = chair_wordnet.Toolkit(nltk_tokens, lambda words: table[tuple(words)] if words else [])
    monkeypatch.setattr(chair_wordnet, "toolkit", lambda: tools)
    chair_wordnet.tokens.cache_clear()
    yield
    chair_wordnet.tokens.cache_clear()


@pytest.mark.parametrize("variant", ["opera_wordnet", "pai_wordnet"])
def test_captions_equal_the_published_scripts(recorded: None, oracle: dict, variant: str) -> None:
    published = oracle["variants"][variant]
    scorer = Chair(flavour="wordnet")
    rows = zip(oracle["captions"], published["caption_to_words"], published["sentences"], strict=True)
    for record, words, sentence in rows:
        merged, found = scorer.analyse(record["caption"])
        assert [token.word for token in merged] == words["double_words"]
        assert [mention.node for mention in found] == words["node_words"]
        truth = set(published["imid_to_objects"].get(str(record["image_id"]), ()))
        wrong = [[mention.word, mention.node] for mention in found if mention.node not in truth]
        assert wrong == sentence["mscoco_hallucinated_words"]
        for mention in found:
            text = record["caption"][mention.start : mention.end].lower()
            assert text[0] == mention.word[0] or text.split()[-1][0] == mention.word[0]


def test_the_corpus_equals_the_published_scripts(recorded: None, oracle: dict) -> None:
    for variant in ("opera_wordnet", "pai_wordnet"):
        published = oracle["variants"][variant]
        truth = {image: set(words) for image, words in published["imid_to_objects"].items()}
        score = Chair(flavour="wordnet").score(oracle["captions"], truth, unknown_image="empty")
        found = {
            "CHAIRs": score.chair_s,
            "CHAIRi": score.chair_i,
            "Recall": score.recall,
            "Precision": score.precision,
            "F1": score.f1,
            "Len": score.len_upstream,
        }
        assert {name: found[name] for name in published["overall"]} == published["overall"]
        assert score.flavour == "wordnet"


def test_verbs_count_and_the_flavours_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seated person is a chair in this flavour, and in this one only."""
    table = {"seated": "seat", "is": "be"}
    tools = chair_wordnet.Toolkit(nltk_tokens, lambda words: [table.get(word, word) for word in words])
    monkeypatch.setattr(chair_wordnet, "toolkit", lambda: tools)
    chair_wordnet.tokens.cache_clear()
    text = 'A man is SEATED. "Nice", he says, on a bus.'
    found = Chair(flavour="wordnet").mentions(text)
    assert [(m.node, text[m.start : m.end]) for m in found] == [("person", "man"), ("chair", "SEATED"), ("bus", "bus")]
    assert [m.node for m in Chair().mentions(text)] == ["person"]
    chair_wordnet.tokens.cache_clear()


def test_the_tag_decides_the_part_of_speech(monkeypatch: pytest.MonkeyPatch) -> None:
    """NLTK's own steps, with a tagger and a lemmatiser of the test's own."""

    class Lemmatizer:
        def lemmatize(self, word: str, part: str) -> str:
            return f"{word}/{part}"

    tags = {"seated": "VBN", "dogs": "NNS", "red": "JJ", "slowly": "RB", "the": "DT"}
    monkeypatch.setattr(nltk_data, "missing_resources", list)
    monkeypatch.setattr("nltk.pos_tag", lambda words: [(word, tags[word]) for word in words])
    monkeypatch.setattr("nltk.stem.WordNetLemmatizer", Lemmatizer)
    chair_wordnet.toolkit.cache_clear()
    lemmas = chair_wordnet.toolkit().lemmas(list(tags))
    chair_wordnet.toolkit.cache_clear()
    assert lemmas == ["seated/v", "dogs/n", "red/a", "slowly/r", "the/n"]


def test_missing_data_is_named_completely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    chair_wordnet.toolkit.cache_clear()
    chair_wordnet.tokens.cache_clear()
    captions, truth = tmp_path / "c.jsonl", tmp_path / "gt.json"
    captions.write_text('{"image_id": 1, "caption": "A seated man."}\n')
    truth.write_text('{"1": ["person"]}')
    with pytest.raises(MissingDependency) as problem:
        chair.score_files(captions, truth, flavour="wordnet")
    for name in RESOURCES:
        assert name in str(problem.value)
    assert "python -m nltk.downloader" in str(problem.value)
    with pytest.raises(UsageError, match="pattern, wordnet"):
        Chair(flavour="spacy")


def test_ground_truth_is_cached_by_flavour(recorded: None, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        chair.chair_truth, "from_coco", lambda folder, nodes, mentions, flavour: seen.append(flavour) or {}
    )
    for flavour in chair.FLAVOURS:
        chair.ground_truth_from_coco(shared, Chair(flavour=flavour))
    assert seen == ["pattern", "wordnet"]


@pytest.mark.parametrize("name", ["opera_logs", "pope_captions"])
def test_corpora_equal_the_published_scores(shared: Path, name: str) -> None:
    """The complete flavour, tagger and all, on every published log."""
    if missing_resources():
        pytest.skip(f"NLTK data {', '.join(missing_resources())} are not here")
    truth = chair.read_ground_truth(shared / "evaldata/chair/chair_gt_subset.json")
    for file, expected in json.loads((shared / f"evaldata/chair/{name}_scores.json").read_text()).items():
        captions = files.read_rows(shared / "evaldata/chair" / name / file)
        score = Chair(flavour="wordnet").score(captions, truth)
        found = {"CHAIRs": score.chair_s, "CHAIRi": score.chair_i, "Recall": score.recall, "Len": score.len_upstream}
        assert found == expected["chair_opera"]
        if "chair_pai" in expected:
            assert {"Precision": score.precision, "F1": score.f1, **found} == expected["chair_pai"]
