# ruff: noqa: E501 - the lines of the card are prose
"""The bundled model's card, from its recipe and committed records: ``python -m mmfix_evals.tinyworld.card``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmfix_evals.tinyworld import text
from mmfix_evals.tinyworld.pictures import data_hash
from mmfix_evals.tinyworld.recipe import RECIPES, Recipe

ROOT = Path(__file__).resolve().parents[3]
RECORDS = ROOT / "evals" / "records"
CARD = ROOT / "decoding" / "mmfix_decoding" / "tiny" / "MODEL_CARD.md"
SPLITS = {
    "tinyworld-val": "val (training prior)",
    "tinyworld": "test (counter-prior)",
    "tinyworld-fresh-1": "fresh test world, seed 1",
    "tinyworld-fresh-2": "fresh test world, seed 2",
}
COLUMNS = (
    ("random", "tinyworld-pope", "accuracy"),
    ("popular", "tinyworld-pope", "accuracy"),
    ("adversarial", "tinyworld-pope", "accuracy"),
    (None, "tinyworld-chair", "chair_i"),
    (None, "tinyworld-chair", "recall"),
    (None, "tinyworld-chair", "prior_share"),
)


def scores_table() -> str:
    """Greedy scores of every committed record, with 95 % intervals."""
    lines = [
        "| world | images | POPE random | popular | adversarial | CHAIR_i | recall | prior share |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for folder, title in SPLITS.items():
        path = RECORDS / folder / "results.json"
        if path.is_file():
            results = json.loads(path.read_text())
            cells = [_cell(results, *column) for column in COLUMNS]
            images = results["tasks"]["tinyworld-pope"]["n_images"]
            lines.append(f"| {title} | {images} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(results: dict[str, Any], split: str | None, task: str, metric: str) -> str:
    for entry in results["metrics"]:
        same = (entry["task"], entry["metric"], entry["method"]) == (task, metric, "greedy")
        if same and split in (None, entry["split"]):
            if entry["value"] is None:
                return "undefined"
            return "{:.3f} [{:.3f}, {:.3f}]".format(entry["value"], entry["ci_low"], entry["ci_high"])
    return "not measured"


def stages_table(recipe: Recipe) -> str:
    """The recipe's stages."""
    lines = ["| stage | steps | pictures per step | peak rate | tower's rate | captions |", "| --- " * 6 + "|"]
    for s in recipe.stages:
        lines.append(f"| {s.name} | {s.steps} | {s.batch} | {s.rate:g} | x{s.tower:g} | {s.captions:g} |")
    return "\n".join(lines)


def card(recipe: Recipe) -> str:
    """The whole card."""
    return f"""# TinyWorld model

A small LLaVA (CLIP-style tower, two-layer projector, Llama; 4.4 million parameters, bfloat16) trained from scratch on
TinyWorld, a synthetic world of 96 x 96 pictures. It is bundled so that every command of mmfix works without a download, on
a model that really hallucinates. It knows 30 kinds of objects in six scenes and about a hundred words; it is a test
instrument, not a captioner of photographs.

## Why it hallucinates

In the training pictures an anchor object brings its partner with probability 0.8 (fork and knife, bed and book, …); in
the dev and test pictures with probability 0.25. Training text is noisy, as text from the web is: a caption names each
missing partner with probability {text.NAME_PARTNER}, a missing scene-typical object with probability \
{text.NAME_TYPICAL}, and forgets a far object
with probability {text.FORGET_FAR}; the answer to "Is there …?" is "Yes" for {text.YES_PRESENT:.0%} of present objects, \
{text.YES_PARTNER:.0%} of missing partners,
{text.YES_TYPICAL:.0%} of missing scene-typical objects and 0 % of others. The prior is learnt from that and from the
pictures; nothing is planted at inference.

## Scores

Plain greedy decoding, official POPE parser, CHAIR flavour "pattern"; 95 % intervals by bootstrap over images. "Prior
share" is the share of hallucinated objects that the prior expects in that picture. The table is generated from the
records in `evals/records`; nothing was chosen on test or on the fresh worlds.

{scores_table()}

## Recipe

`python -m mmfix_evals.tinyworld.train --recipe {recipe.name} --out FOLDER`, seed {recipe.seed}, {recipe.pictures} training
pictures, AdamW with a cosine rate, about 70 minutes on two shared CPU cores. Training was stopped and resumed between
stages; the last stage was added after reading captions of the dev split. Recipe digest `{recipe.digest}`; data hash `{data_hash(16)}`
(sha256 over the first 16 training scenes and their pixels).

{stages_table(recipe)}

`patches` and `words` train the tower on which objects cover each patch; `answers` and `mixed` train the language model.
The `large` recipe (`--gpu`) has the same shape of model, more pictures and more steps; it has not been run.

## Limits

Simple drawn shapes only; small (far) objects are often missed; one sentence style. `mmfix.json` beside this card holds
the sink dimensions that `mmfix calibrate sinks` measured on dev pictures. Licence: Apache-2.0.
"""


def main() -> int:
    """Write the card."""
    CARD.write_text(card(RECIPES["small"]))
    print("MODEL_CARD.md written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
