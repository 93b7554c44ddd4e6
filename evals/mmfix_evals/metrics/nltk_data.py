"""NLTK's data packages: looked for in local folders only (``NLTK_DATA`` is honoured), never downloaded."""

from __future__ import annotations

from mmfix_evals.errors import MissingDependency

RESOURCES = {
    "punkt_tab": "tokenizers/punkt_tab/english",
    "averaged_perceptron_tagger_eng": "taggers/averaged_perceptron_tagger_eng",
    "wordnet": "corpora/wordnet",
}
"""NLTK data package → where it lies below a folder of `nltk.data.path`."""


def missing_resources() -> list[str]:
    """The packages of :data:`RESOURCES` that are not there."""
    return [name for name, path in RESOURCES.items() if not (_found(path) or _found(f"{path}.zip"))]


def _found(path: str) -> bool:
    import nltk

    try:
        nltk.data.find(path)
    except LookupError:
        return False
    return True


def require(what: str, otherwise: str = "") -> None:
    """Raise MissingDependency unless all of :data:`RESOURCES` are there.

    Args:
        what: who needs them, as the subject of the message.
        otherwise: how to do without, as the end of the message.
    """
    try:
        missing = missing_resources()
    except ImportError:
        raise MissingDependency(f"{what} needs NLTK; run: pip install nltk") from None
    if missing:
        raise MissingDependency(
            f"{what} needs the NLTK data {', '.join(RESOURCES)}; missing: {', '.join(missing)}. Run: python -m "
            f"nltk.downloader {' '.join(missing)}, or set NLTK_DATA to a folder that has them{otherwise}"
        )
