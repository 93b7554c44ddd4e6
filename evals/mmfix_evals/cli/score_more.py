"""Scorers of further benchmarks: ``mmfix eval score mme | vlind | amber | hallusionbench | mmhal``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmfix_evals.cli.score import JSON, app, known, show


@app.command("mme", epilog="Example: mmfix eval score mme results/ --variant official --json")
def mme_command(
    folder: Annotated[
        Path, typer.Argument(help="Folder with one result file per task (image, question, truth, answer).")
    ],
    variant: Annotated[str, typer.Option(help="official, clean, lmms or vlmeval.")] = "official",
    as_json: JSON = False,
) -> None:
    """MME: accuracy, accuracy+ and task scores, perception and cognition totals."""
    from mmfix_evals.metrics import mme

    known("--variant", variant, ("official", "clean", "lmms", "vlmeval"))
    show(mme.score_files(folder, variant=variant), as_json)


@app.command("vlind", epilog="Example: mmfix eval score vlind --data data.json --answers answers.jsonl --json")
def vlind_command(
    data: Annotated[Path, typer.Option(help="VLind-Bench data.json, or an upstream result file.")],
    answers: Annotated[Path | None, typer.Option(help="Answers (JSON Lines: global_id, question, answer).")] = None,
    style: Annotated[str, typer.Option(help="all, photorealistic, illustration or cartoon.")] = "all",
    votes: Annotated[int, typer.Option(help="Votes that make an image good.")] = 2,
    as_json: JSON = False,
) -> None:
    """VLind-Bench: S_CK, S_VP, S_CB, S_LP and the two accuracies."""
    from mmfix_evals.metrics import vlind

    known("--style", style, ("all", "photorealistic", "illustration", "cartoon"))
    show(vlind.score_files(data, answers, style=style, votes=votes), as_json)


@app.command("amber", epilog="Example: mmfix eval score amber --responses responses.json --data amber/data --type d")
def amber_command(
    responses: Annotated[Path, typer.Option(help="JSON list of {id, response}.")],
    data: Annotated[Path, typer.Option(help="AMBER's data folder (annotations.json, relation.json, safe_words.txt).")],
    kind: Annotated[
        str | None, typer.Option("--type", help="a, g, d, de, da or dr; default: what the data allow.")
    ] = None,
    similarity: Annotated[str, typer.Option(help="exact, or vectors (give --vectors).")] = "exact",
    vectors: Annotated[Path | None, typer.Option(help="Word vectors, for --similarity vectors.")] = None,
    as_json: JSON = False,
) -> None:
    """AMBER: CHAIR, Cover, Hal, Cog; accuracy, precision, recall and F1 with "no" as the positive class."""
    from mmfix_evals.metrics import amber

    known("--similarity", similarity, ("exact", "vectors"))
    show(amber.score_files(responses, data, kind, similarity=similarity, vectors=vectors), as_json)


@app.command("hallusionbench", epilog="Example: mmfix eval score hallusionbench --responses answers.json --json")
def hallusionbench_command(
    responses: Annotated[Path, typer.Option(help="HallusionBench rows with the model's answers.")],
    variant: Annotated[str, typer.Option(help="exact, vlmeval, or judge (give --verdicts).")] = "exact",
    verdicts: Annotated[Path | None, typer.Option(help="Judge's verdicts, for --variant judge.")] = None,
    same: Annotated[Path | None, typer.Option(help="Judge's same/different verdicts, for the error analysis.")] = None,
    as_json: JSON = False,
) -> None:
    """HallusionBench: aAcc, qAcc, fAcc, easy, hard, consistency and the error analysis."""
    from mmfix_evals.metrics import hallusionbench

    known("--variant", variant, ("exact", "vlmeval", "judge"))
    show(hallusionbench.score_files(responses, variant=variant, verdicts=verdicts, same=same), as_json)


@app.command("mmhal", epilog="Example: mmfix eval score mmhal --responses answers.json --replies judge.jsonl --json")
def mmhal_command(
    responses: Annotated[Path, typer.Option(help="MMHal-Bench rows with the model's answers.")],
    replies: Annotated[Path | None, typer.Option(help="The judge's replies, where the rows do not hold them.")] = None,
    rule: Annotated[
        str, typer.Option(help="official, or strict (a reply without one rating is no rating).")
    ] = "official",
    as_json: JSON = False,
) -> None:
    """MMHal-Bench: mean rating 0-6, hallucination rate, ratings per question type."""
    from mmfix_evals.metrics import mmhal

    known("--rule", rule, ("official", "strict"))
    show(mmhal.score_files(responses, replies, rule=rule), as_json)
