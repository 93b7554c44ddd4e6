"""AMBER, generative part: the nouns of a description, and how alike two words are.

Noun extraction needs NLTK's tokeniser, part-of-speech tagger and WordNet lemmatiser with three data packages; scoring
from given nouns needs none of them. Similarity is exact equality, or the cosine of the user's word vectors; which
vectors were used belongs into the result, because other vectors give other numbers.
"""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmfix_evals.errors import DataError
from mmfix_evals.files import GZIP_MAGIC
from mmfix_evals.metrics import nltk_data
from mmfix_evals.metrics.nltk_data import missing_resources

Similarity = Callable[[str, str], float]

__all__ = ["Similarity", "Vectors", "exact", "missing_resources", "nouns_of", "read_vectors", "require_nouns"]


def require_nouns() -> None:
    """Raise MissingDependency, naming what is missing, unless `nouns_of` can work."""
    nltk_data.require("AMBER's generative part", "; or store the nouns of each response under 'nouns'")


def nouns_of(texts: Sequence[str]) -> list[list[str]]:
    """The nouns of each text in order, repeated ones too: tokens tagged NN…, lemmatised as nouns, not lower-cased.

    Raises MissingDependency naming the NLTK data that is missing; without texts nothing is needed.
    """
    if not texts:
        return []
    require_nouns()
    import nltk

    lemmatizer = nltk.stem.WordNetLemmatizer()
    tagged = [nltk.pos_tag(nltk.word_tokenize(text)) for text in texts]
    return [[str(lemmatizer.lemmatize(word)) for word, tag in one if tag.startswith("NN")] for one in tagged]


def exact(first: str, second: str) -> float:
    """1 for equal words, else 0."""
    return float(first == second)


class Vectors:
    """Cosine similarity of word vectors: 1 for equal words, 0 if a word has no vector.

    A word of several parts ("traffic light") has the mean of their vectors.

    Args:
        vectors: word → vector.

    Attributes:
        unknown: words asked for that have no vector.
    """

    def __init__(self, vectors: dict[str, NDArray[np.float64]]) -> None:
        self.vectors = vectors
        self.unknown: set[str] = set()

    def __call__(self, first: str, second: str) -> float:
        if first == second:
            return 1.0
        a, b = self._vector(first), self._vector(second)
        if a is None or b is None:
            return 0.0
        norm = math.sqrt(float(a @ a) * float(b @ b))
        return float(a @ b) / norm if norm else 0.0

    def _vector(self, word: str) -> NDArray[np.float64] | None:
        parts = [self.vectors[part] for part in word.split() if part in self.vectors]
        if len(parts) < len(word.split()) or not parts:
            self.unknown.add(word)
            return None
        found: NDArray[np.float64] = np.mean(parts, axis=0)
        return found


def read_vectors(path: str | os.PathLike[str], words: Set[str]) -> Vectors:
    """Word vectors from a text file `word x1 x2 …` (GloVe, fastText, word2vec with its header line; gzip allowed).

    Args:
        path: the file; it is read line by line.
        words: the words to keep.

    Raises:
        DataError: missing file, a line with another number of values or with something that is no finite number.
    """
    path, wanted = Path(path), {part for word in words for part in word.split()}
    found: dict[str, NDArray[np.float64]] = {}
    size = None
    for number, line in _lines(path):
        fields = line.rstrip().split(" ")
        if number == 1 and len(fields) == 2 and all(field.isdigit() for field in fields):
            continue  # word2vec's header: number of words, number of values
        size = size or len(fields)
        if len(fields) != size or size < 2:
            raise DataError(f"{path}, line {number}: {len(fields) - 1} values, expected {max(size - 1, 1)}")
        if fields[0] in wanted and fields[0] not in found:
            try:
                found[fields[0]] = np.array([float(field) for field in fields[1:]])
            except ValueError:
                raise DataError(f"{path}, line {number}: a value of {fields[0]!r} is not a number") from None
            if not np.isfinite(found[fields[0]]).all():
                raise DataError(f"{path}, line {number}: a value of {fields[0]!r} is not finite")
    if not found:
        raise DataError(f"{path}: holds a vector for none of AMBER's words; give a text file 'word x1 x2 …'")
    return Vectors(found)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with open(path, "rb") as start:
            packed = start.read(2) == GZIP_MAGIC
        with gzip.open(path, "rt", encoding="utf-8") if packed else open(path, encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text; give a text file 'word x1 x2 …'") from None
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}); check the path") from None
