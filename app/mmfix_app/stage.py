"""The two answers side by side: coloured objects, the picture with a heat map per token, group masses."""

from __future__ import annotations

import bisect

from mmfix_app import objects
from mmfix_app.gallery import listed
from mmfix_app.markup import esc, packed, percent
from mmfix_app.pictures import data_uri
from mmfix_app.service import Run, Token

_MARKS = {"supported": "✓", "contradicted": "✗", "unknown": "?"}
_GROUPS = (("text", "text"), ("sink", "sinks"), ("image", "picture"))


def render(run: Run) -> str:
    """The whole stage."""
    title = short(run)
    shown = data_uri(run.request.image, 384)
    pixelated = " crisp" if max(run.request.image.size) <= 256 else ""
    sides = "".join(
        _side(run, name, heading, shown, pixelated)
        for name, heading in (("plain", "Plain model"), ("method", f"With {title}"))
    )
    focus = _focus(run)
    return (
        f'<div class="stage" data-state="{run.state}" data-focus="{focus[1]}" data-focus-side="{focus[0]}">'
        f'<p class="verdict" role="status">{verdict(run)}</p>'
        f'<div class="sides">{sides}</div>{_legend(run)}</div>'
    )


def empty(known: str = "") -> str:
    """What stands there before the first run."""
    return (
        '<div class="stage empty" data-state="empty"><p class="verdict">Choose a picture and press '
        "<strong>Compare</strong>. The same model answers twice at once: as it is, and with a method in its "
        "attention.</p></div>"
    )


def short(run: Run) -> str:
    """The method's registry name as people write it: an acronym in capitals."""
    name = run.request.method.info.name
    return name.upper() if len(name) <= 4 else name


def verdict(run: Run) -> str:
    """In a sentence or two: what the method changed, and no more than is known."""
    title = esc(short(run))
    if run.state == "running":
        return "Both answers are being written, token by token, in one batch …"
    notes = {"stopped": "Stopped. ", "timeout": "Stopped at the time limit. "}.get(run.state, "")
    plain, method = run.text("plain"), run.text("method")
    if run.report is not None and not run.fired:
        return (
            f"{notes}<strong>{title} never fired here</strong>: of all the places it looked at it changed none, so "
            "both answers are the plain model's. That says nothing about the method on another model."
        )
    if plain == method:
        return f"{notes}<strong>The same answer twice.</strong> {title} acted {run.fired:,} times and changed no word."
    return f"{notes}{_difference(run, title, plain, method)}"


def _difference(run: Run, title: str, plain: str, method: str) -> str:
    contents = run.request.contents
    before, after = objects.by_verdict(plain, contents), objects.by_verdict(method, contents)

    def only(left: dict[str, list[str]], right: dict[str, list[str]], kind: str) -> str:
        names = [name for name in left[kind] if name not in right[kind]]
        return esc(listed(names)) if names else ""

    if contents is None:
        gone, new = only(before, after, "unknown"), only(after, before, "unknown")
        parts = [f"no longer names {gone}" if gone else "", f"newly names {new}" if new else ""]
        said = " and ".join(part for part in parts if part) or "names the same objects in other words"
        return (
            f"<strong>With {title} the answer {said}.</strong> What this picture shows is not known to the app, so "
            "nothing is marked right or wrong."
        )
    sentences = []
    if gone := only(before, after, "contradicted"):
        sentences.append(f"<strong>With {title} the answer no longer names {gone}</strong>, not in the picture.")
    if new := only(after, before, "contradicted"):
        sentences.append(f"<strong>With {title} it names {new}</strong>, not in the picture.")
    if lost := only(before, after, "supported"):
        sentences.append(f"It leaves out {lost}, which the picture shows.")
    if found := only(after, before, "supported"):
        sentences.append(f"It adds {found}, which the picture shows.")
    kept = [name for name in before["contradicted"] if name in after["contradicted"]]
    if kept:
        sentences.append(f"Both name {esc(listed(kept))}, not in the picture.")
    if not sentences:
        sentences.append(f"<strong>{title} changed the wording</strong>; the objects named are the same.")
    return " ".join(sentences)


def _side(run: Run, name: str, heading: str, shown: str, pixelated: str) -> str:
    tokens, text = run.side(name), run.text(name)
    counts = objects.by_verdict(text, run.request.contents)
    badge = ""
    if run.request.contents is not None and tokens:
        wrong = len(counts["contradicted"])
        words = f"{wrong} object{'' if wrong == 1 else 's'} not in the picture"
        badge = f'<span class="badge {"bad" if wrong else "good"}">{words}</span>'
    alt = "The picture. The light falls where the chosen token looks."
    look = "" if run.mapped else "No map: this model's patch layout is not known."
    return (
        f'<section class="side" data-side="{name}" aria-label="{esc(heading)}"><h3>{esc(heading)} {badge}</h3>'
        f'<figure><div class="pic{pixelated}"><img src="{shown}" alt="{alt}"><canvas aria-hidden="true"></canvas></div>'
        f'<figcaption class="look" aria-live="polite">{look}</figcaption></figure>'
        f'<div class="answer" role="group" aria-label="{esc(heading)}, word by word; arrow keys move">'
        f'{_words(tokens, run, name)}</div><div class="bars">{_strip(tokens, heading)}</div></section>'
    )


def _words(tokens: tuple[Token, ...], run: Run, name: str) -> str:
    whole = "".join(token.text for token in tokens)
    marks = objects.named(whole, run.request.contents)
    starts = [one.start for one in marks]
    found, place = [], 0
    for n, token in enumerate(tokens):
        start, place = place, place + len(token.text)
        word = token.text.strip()
        if not word:
            found.append(esc(token.text))
            continue
        first = start + token.text.index(word)
        at = bisect.bisect_right(starts, first) - 1
        mark = marks[at] if at >= 0 and first < marks[at].end else None
        kind = f" {mark.verdict}" if mark else ""
        said = f", {objects.WORDS[mark.verdict]}" if mark else ""
        sign = ""
        if mark and place >= mark.end:
            sign = f'<sup aria-hidden="true">{_MARKS[mark.verdict]}</sup>'
        weights = packed(token.weights) if token.weights is not None else ""
        share = "" if token.share is None else f'data-share="{percent(token.share)}" '
        found.append(
            f'{esc(token.text[: token.text.index(word)])}<span class="tok{kind}" role="button" tabindex="-1" '
            f'data-i="{n}" {share}{weights} aria-label="{esc(word)}{said}" '
            f'title="{esc(word)}{said}">{esc(word)}{sign}</span>'
        )
    return "".join(found)


def _strip(tokens: tuple[Token, ...], heading: str) -> str:
    """Stacked bars along the tokens: how attention divides between picture, sinks and text."""
    if not tokens or not tokens[0].masses:
        return ""
    mean = {key: sum(token.masses.get(key, 0.0) for token in tokens) / len(tokens) for key, _ in _GROUPS}
    bars = "".join(
        f'<i class="bar" data-i="{n}">'
        + "".join(f'<b class="{key}" style="flex-grow:{token.masses.get(key, 0.0):.4f}"></b>' for key, _ in _GROUPS)
        + "</i>"
        for n, token in enumerate(tokens)
    )
    told = [group for group in reversed(_GROUPS) if mean[group[0]] > 0]
    words = ", ".join(f"{label} {percent(mean[key])}" for key, label in told)
    return (
        f'<div class="strip" role="img" aria-label="Attention of {esc(heading)} by group, mean over tokens: {words}">'
        f'{bars}</div><p class="means">Attention, mean over the answer: {words}</p>'
    )


def _focus(run: Run) -> tuple[str, int]:
    """The token whose map is shown first: an object that one side names and the other does not, a wrong one if any."""
    if run.state == "running":
        return "both", -1
    found = []
    for name, other in (("plain", "method"), ("method", "plain")):
        whole, place = "".join(token.text for token in run.side(name)), 0
        theirs = {mark.name for mark in objects.named(run.text(other), run.request.contents)}
        marks = objects.named(whole, run.request.contents)
        for n, token in enumerate(run.side(name)):
            place += len(token.text)
            while marks and marks[0].end <= place:
                mark = marks.pop(0)
                found.append((mark.name in theirs, mark.verdict != "contradicted", name != "plain", n, name))
    if not found:
        return "plain", max(len(run.plain) - 1, 0)
    *_, n, name = min(found)
    return name, n


def _legend(run: Run) -> str:
    if run.request.contents is not None:
        known = f"This picture is known to show {esc(listed(run.request.contents))}; words are checked against that."
        keys = ("supported", "contradicted")
    else:
        known = "Nothing is known about this picture, so objects are only marked, not judged."
        keys = ("unknown",)
    chips = "".join(
        f'<span class="key tok {key}">object<sup aria-hidden="true">{_MARKS[key]}</sup></span> '
        f"{esc(objects.WORDS[key].partition(':')[0])} "
        for key in keys
    )
    groups = "".join(
        f'<span class="key"><b class="swatch {key}"></b>{label}</span>' for key, label in reversed(_GROUPS)
    )
    return (
        f'<div class="legend"><p>{chips}</p><p class="groups">Attention on {groups}</p><p>{known} Objects are found as '
        "CHAIR finds them, among COCO's 80. Sinks are told apart only where a method looks for them.</p></div>"
    )
