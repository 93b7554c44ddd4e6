"""Yes/no answers that are scored two by two: the same question asked in two ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmfix_evals import stats
from mmfix_evals.metrics import pope
from mmfix_evals.metrics.parsers import is_unparsed
from mmfix_evals.tasks.base import Counts, Document, Metric, Task

PARTNER = "partner_response"


def share(columns: Sequence[str], above: str, below: str, factor: float = 1.0) -> Callable[[Counts], Counts]:
    """The metric ``above / (factor * below)`` of two columns."""
    top, bottom = columns.index(above), columns.index(below)
    return lambda c: stats.ratio(c[..., top], factor * c[..., bottom])


def unparsed(columns: Sequence[str]) -> Metric:
    """The number of answers without a verdict, as POPE counts them."""
    place = columns.index("n_unparsed")
    return Metric("n_unparsed", lambda c: c[..., place], percent=False, integer=True, better="lower")


class PairTask(Task):
    """Documents come in pairs ``STEM/FIRST`` and ``STEM/SECOND``; the second is scored together with the first.

    A pair of which one answer is missing counts nowhere.
    """

    first: str
    second: str
    flavours = tuple(pope.PARSERS)
    flavour_field = "parser"
    max_new_tokens = 10
    prompt_is_data = True
    unit = "questions"

    def verdicts(self, document: Document, response: str) -> dict[str, Any]:
        return {"verdicts": pope.verdicts(response, document.target["label"])}

    def join(self, samples: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        joined = {}
        for split, found in samples.items():
            joined[split] = dict(found)
            for doc_id, sample in found.items():
                stem, _, variant = doc_id.rpartition("/")
                other = found.get(f"{stem}/{self.first}")
                if variant == self.second and other is not None:
                    joined[split][doc_id] = {**sample, PARTNER: other["response"]}
        return joined

    def counts(self, sample: Mapping[str, Any], flavour: str) -> Mapping[str, float]:
        if PARTNER not in sample:
            return dict.fromkeys(self.columns, 0)
        label = sample["label"]
        before = pope.parse(sample[PARTNER], flavour, label)
        after = pope.parse(sample["response"], flavour, label)
        texts = ((sample[PARTNER], before), (sample["response"], after))
        unparsed = sum(is_unparsed(text, flavour, verdict) for text, verdict in texts)
        return {**self.pair_counts(sample, before, after), "n_unparsed": unparsed}

    def pair_counts(self, sample: Mapping[str, Any], first: str, second: str) -> Mapping[str, float]:
        """The columns of one pair from the two verdicts (``yes``, ``no`` or ``unparsed``)."""
        raise NotImplementedError
