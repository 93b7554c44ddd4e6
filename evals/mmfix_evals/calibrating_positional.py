"""The hidden dimension that PositionalHidden scales: found in random text, chosen on held-out questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mmfix
from mmfix import positional_search
from mmfix.methods import PositionalHidden
from mmfix_evals import calibrating, headdata
from mmfix_evals.calibrating import Found, Partial, Progress, identity
from mmfix_evals.errors import DataError
from mmfix_evals.headdata import Asked


def positional(
    decoder: Any,
    asked: Sequence[Asked],
    factors: Sequence[float] = (0.0, -1.0),
    texts: int = 32,
    tokens: int = 256,
    top: int = 10,
    progress: Progress = lambda done: None,
    batch_size: int = 8,
) -> Found:
    """The dimension and factor that make the right answers likeliest.

    The plain model is one of the settings: where none does better, the factor is 1 and the method changes nothing.

    Args:
        asked: questions with answers.
        factors: tried on every candidate.
        texts, tokens: random texts, and tokens of each, in which positional dimensions are looked for.
        top: candidates that are tried.
        progress: told the settings done.

    Raises:
        DataError: no questions.
        MmfixError: no dimension carries position.
    """
    if not asked:
        raise DataError("no questions to calibrate on; give at least one")
    family = mmfix.describe(decoder.model)
    tokenizer = decoder.processor.tokenizer
    known = {answer: headdata.beginnings(tokenizer, answer) for answer in {one.answer for one in asked}}
    made = [
        (inputs, [known[one.answer] for one in part]) for inputs, part in headdata.batches(decoder, asked, batch_size)
    ]
    longest = getattr(family.decoder.config, "max_position_embeddings", None) or tokens
    tokens = min(tokens, longest)
    data = headdata.digest(asked)
    key = {**identity(decoder), "data": data, "texts": texts, "tokens": tokens, "top": top}
    partial = Partial("positional-hidden", key)
    special = {family.image_token_id, *tokenizer.all_special_ids}
    usual = [n for n in range(min(len(tokenizer), family.decoder.config.vocab_size)) if n not in special]

    def looked() -> dict[str, Any]:
        states = positional_search.mean_states(family, positional_search.random_texts(usual, texts, tokens))
        return {"dims": positional_search.candidates(states, top)}

    with decoder.exclusive():
        dims = partial.get("candidates", looked)["dims"]
        progress(1)
        plain = partial.get("plain", lambda: calibrating._answers(decoder.model, made, None))
        progress(1)
        rows = []
        for dim in dims:
            for factor in factors:
                method = PositionalHidden(dims=(dim,), factor=factor)
                found = partial.get(f"{dim},{factor:g}", lambda m=method: calibrating._answers(decoder.model, made, m))
                rows.append({"dim": dim, "factor": factor, "p_right": found["p_right"], "right": found["right"]})
                progress(1)
    partial.done()
    best = max(rows, key=lambda row: row["p_right"])
    helps = best["p_right"] > plain["p_right"]
    values = {"dims": [best["dim"]], "factor": best["factor"] if helps else 1.0}
    scores = {"plain": {name: plain[name] for name in ("p_right", "right")}, "tried": rows}
    record = {**identity(decoder), "data_sha256": data, "questions": len(asked), "scores": scores}
    return Found(values, record)
