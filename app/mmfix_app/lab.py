"""A sweep: one parameter of a method from end to end, on one picture and one yes-or-no question."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

import mmfix
from mmfix import Method
from mmfix.errors import MmfixError, UsageError
from mmfix_app import charts, controls
from mmfix_app.controls import Control
from mmfix_app.markup import esc, percent
from mmfix_decoding import Decoder, prompts


@dataclass(frozen=True)
class Measured:
    """One value of the parameter.

    Args:
        value: of the parameter; None for the plain model.
        mass: attention of the last prompt position on the picture, mean over layers and heads.
        margin: ``log p("Yes") - log p("No")`` for the first word of the answer.
        fired: places the method changed.
    """

    value: float | None
    mass: float
    margin: float
    fired: int


def values(control: Control, low: float, high: float, points: int) -> list[float]:
    """`points` values from `low` to `high`; whole ones for a whole parameter.

    Raises:
        UsageError: an empty range, or one outside the parameter's own.
    """
    if control.low is None or control.high is None or not control.low <= low < high <= control.high:
        within = f"{control.low:g} to {control.high:g}"
        raise UsageError(f"{control.label}: sweep from a smaller to a larger number within {within}")
    found = [low + (high - low) * n / (points - 1) for n in range(points)]
    if control.kind == "whole":
        return [float(n) for n in sorted({round(v) for v in found})]
    return [round(v, 6) for v in found]


def answer_ids(tokenizer: Any, word: str) -> list[int]:
    """Ids with which an answer may begin when it says `word`: any case, with or without a space before it."""
    found = []
    for form in (word, word.lower(), f" {word}", f" {word.lower()}"):
        ids = tokenizer.encode(form, add_special_tokens=False)
        if ids and ids[0] != tokenizer.unk_token_id and ids[0] not in found and tokenizer.decode([ids[0]]).strip():
            found.append(ids[0])
    return found


def measure(decoder: Decoder, image: Image.Image, prompt: str, method: Method | None, value: float | None) -> Measured:
    """One forward pass of the question."""
    tokenizer = decoder.processor.tokenizer
    yes, no = answer_ids(tokenizer, "Yes"), answer_ids(tokenizer, "No")
    if not yes or not no or set(yes) & set(no):
        raise UsageError("this model's vocabulary does not tell Yes from No by the first token, so there is no margin")
    request = prompts.single(image, prompt).load()
    with decoder.exclusive(), torch.no_grad():
        inputs = prompts.encode([request], decoder.processor, decoder.model)
        with mmfix.mitigate(decoder.model, method, processor=decoder.processor, telemetry=True) as fix:
            logits = decoder.model(**inputs).logits[0, -1].float()
            masses = fix.masses() or {}
            fired = sum(found.fired for found in fix.report().fired.values())
    log = torch.log_softmax(logits, -1)
    # A plausibility cut may leave one of the two words no probability at all.
    margin = log[yes].logsumexp(0) - log[no].logsumexp(0)
    return Measured(value, float(masses["image"][0]), float(margin.clamp(-30.0, 30.0)), int(fired))


def sweep(
    decoder: Decoder, image: Image.Image, prompt: str, base: Method, control: Control, at: list[float],
    cancelled: threading.Event | None = None,
) -> Iterator[list[Measured]]:  # fmt: skip
    """The plain model first, then one value after the other; what is there so far, after each."""
    found = [measure(decoder, image, prompt, None, None)]
    given = {c.name: c.value for c in controls.of(base)}
    for value in at:
        if cancelled is not None and cancelled.is_set():
            return
        exact = int(value) if control.kind == "whole" else value
        try:
            method, _ = controls.build(decoder.model, base.info.name, {**given, control.name: exact})
        except MmfixError:
            continue  # an end of the range that the method itself refuses, such as a cut of exactly zero
        found.append(measure(decoder, image, prompt, method, value))
        yield list(found)


def render(found: list[Measured], control: Control, title: str, question: str) -> str:
    """Two charts, a sentence, and the numbers as a table."""
    plain, rest = found[0], found[1:]
    if not rest:
        return '<p class="verdict">No value could be measured.</p>'
    xs = [m.value for m in rest if m.value is not None]
    default = control.value if isinstance(control.value, (int, float)) else None
    mass = charts.line(
        "Attention on the picture",
        xs,
        [100 * m.mass for m in rest],
        control.label,
        "percent",
        100 * plain.mass,
        default,
    )
    margin = charts.line(
        "Yes/no margin", xs, [m.margin for m in rest], control.label, "log p(Yes) − log p(No)", plain.margin, default
    )
    rows = "".join(
        f"<tr><td>{charts.number(m.value or 0.0)}</td><td>{percent(m.mass)}</td><td>{m.margin:+.3f}</td>"
        f"<td>{m.fired:,}</td></tr>"
        for m in rest
    )
    return (
        f'<div class="lab"><p class="verdict">{_sentence(plain, rest, esc(title), esc(control.label))}</p>'
        f'<p class="question">{esc(question)}</p><div class="charts">{margin}{mass}</div>'
        f"<details><summary>Numbers</summary><table><thead><tr><th>{esc(control.label)}</th><th>on the picture</th>"
        f"<th>margin</th><th>changes made</th></tr></thead><tbody><tr><td>plain</td><td>{percent(plain.mass)}</td>"
        f"<td>{plain.margin:+.3f}</td><td></td></tr>{rows}</tbody></table></details></div>"
    )


def _sentence(plain: Measured, rest: list[Measured], title: str, label: str) -> str:
    if not any(m.fired for m in rest):
        return f"<strong>{title} never fired</strong> at any of these values, so nothing moves."
    margins = [m.margin for m in rest]
    span = max(margins) - min(margins)
    said = f"{label} moves the margin by {span:.2f}, between {min(margins):+.2f} and {max(margins):+.2f}"
    if plain.margin * min(margins) < 0 or plain.margin * max(margins) < 0:
        return f"<strong>The answer flips</strong>: {said}; the plain model stands at {plain.margin:+.2f}."
    word = "Yes" if plain.margin > 0 else "No"
    return f"<strong>The answer stays {word}.</strong> {said}; the plain model stands at {plain.margin:+.2f}."
