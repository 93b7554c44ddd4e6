"""HALC against a plain-Python search without a cache; words, refusals, failures of detectors, and plain beam search."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import vlm
from support.speech import STOPS, Speech, starts
from torch import Tensor

import mmfix
from mmfix import focal, scorers
from mmfix.errors import ConflictError, MethodError, MmfixError, UnsupportedModel, UsageError
from mmfix.words import Word, ended
from mmfix_decoding.options import Plan, refuse_unsettled

SPEECH = Speech()
STEPS = 5
Said = tuple[int, ...]
asked: list[tuple[str, float]] = []


def boxes(pixels: Tensor, word: str) -> list[tuple[float, float, float, float]] | None:
    """Every fifth word is none to look up, others have no box, one, or too many; the place depends on the picture."""
    asked.append((word, float(pixels.sum())))
    number = sum(map(ord, word))
    if number % 5 == 0:
        return None
    left = 0.1 if float(pixels.mean()) > 0 else 0.3
    found = [(left, 0.1, left + 0.4, 0.7), (0.0, 0.0, 1.0, 1.0), (0.2, 0.2, 0.9, 0.9), (0.0, 0.5, 1.0, 1.0)]
    return found[: number % 5 if number % 5 == 4 else number % 3]


def matches(pixels: Tensor, text: str) -> float:
    """A number that the text's letters and the picture decide."""
    return float(pixels.mean()) + sum((n + 3) * ord(letter) for n, letter in enumerate(text)) % 97


@pytest.fixture(autouse=True)
def _scorers() -> Iterator[None]:
    asked.clear()
    scorers.register("boxes", boxes, kind="boxes")
    scorers.register("never", lambda pixels, word: None, kind="boxes")
    scorers.register("matches", matches, kind="match")
    yield
    for name in ("boxes", "never", "matches", "mine"):
        scorers.unregister(name)


def generate(model: Any, inputs: dict[str, Any], **extra: Any) -> Any:
    options = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_scores": True, "do_sample": False}
    return model.generate(**inputs, **{**options, **extra})


def halc(model: Any, inputs: dict[str, Any], options: dict[str, Any] | None = None, **params: Any) -> Any:
    with mmfix.mitigate(model, "halc", processor=SPEECH, **{"detector": "boxes", **params}):
        return generate(model, inputs, **(options or {}))


class Oracle:
    """The search as its description has it: fresh passes without a cache, answers as tuples."""

    def __init__(self, model: Any, inputs: dict[str, Any], **params: Any) -> None:
        self.model, self.p = model, mmfix.method("halc", **{"detector": "boxes", **params})
        self.prompt, self.picture = inputs["input_ids"][0].tolist(), inputs["pixel_values"][0]
        self.known: dict[Said, Tensor] = {}
        self.views = 0

    def ask(self, said: Said, pictures: Tensor) -> Tensor:
        ids = torch.tensor([[*self.prompt, *said]] * len(pictures))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pictures}
        return vlm.logits(self.model, given)[:, -1]

    def shares(self, said: Said) -> Tensor:
        if said not in self.known:
            self.known[said] = self.ask(said, self.picture[None])[0].log_softmax(-1)
        return self.known[said]

    def score(self, said: Said) -> float:
        return float(sum(self.shares(said[:n])[token] for n, token in enumerate(said)))

    def start(self, said: Said, token: int) -> int | None:
        """Where the last word begins, if the token ends it."""
        if not said or said[-1] in STOPS or not (starts(token) or token in STOPS):
            return None
        start = len(said) - 1
        while start and not starts(said[start]) and said[start - 1] not in STOPS:
            start -= 1
        return start

    def again(self, said: Said, start: int) -> list[Said] | None:
        """Answers with another last word; None for a word that is left alone."""
        found = boxes(self.picture, SPEECH.decode(said[start:]))
        if found is None or len(found) > self.p.most:
            return None
        box = min(found, key=lambda b: (b[2] - b[0]) * (b[3] - b[1])) if found else (0.2, 0.2, 0.8, 0.8)
        views = focal.fields_of_view(box, self.p.ratio, self.p.views)
        crops = torch.stack([focal.crop(self.picture, view) for view in views])
        self.views += len(views)
        first = self.ask(said[:start], crops)
        answers = []
        for i, j in focal.directions(first, self.p.candidates, self.p.divergence):
            answer = said[:start]
            while len(answer) < len(said):
                logits = self.ask(answer, crops)
                answer += (int((logits[i] - self.p.weight * logits[j]).argmax()),)
            answers.append(answer)
        return answers

    def run(self, steps: int) -> tuple[list[int], float]:
        count = self.p.beams
        beams: list[tuple[Said, float]] = [((), 0.0)]
        looked: set[Said] = set()
        while len(beams[0][0]) < steps:
            options = [(score + float(v), (*said, t)) for said, score in beams for t, v in enumerate(self.shares(said))]
            best = sorted(options, key=lambda o: -o[0])[:count]
            found = {}
            for _, said in best:
                start = self.start(said[:-1], said[-1])
                if start is not None and said[:-1] not in looked and said[:-1] not in found:
                    found[said[:-1]] = start
            looked |= set(found)
            others = {said: new for said, start in found.items() if (new := self.again(said, start)) is not None}
            if not others:
                beams = [(said, score) for score, said in best]
                continue
            pool = list(dict.fromkeys(new for said, _ in beams for new in others.get(said, [said])))
            looked |= {answer for new in others.values() for answer in new}
            if self.p.scorer:
                pool = sorted(pool, key=lambda a: -matches(self.picture, SPEECH.decode(a)))[:count]
            beams = sorted(((a, self.score(a)) for a in pool), key=lambda b: -b[1])[:count]
        return list(beams[0][0]), beams[0][1] / steps


@pytest.mark.parametrize(
    ("params", "seed"),
    [
        ({"beams": 1, "weight": 0.4}, 5),
        ({"beams": 3, "divergence": "jensen-shannon", "weight": 0.6}, 6),
        ({"beams": 3, "scorer": "matches", "views": 3, "candidates": 6, "ratio": 1.5, "weight": 0.3}, 6),
        ({"beams": 1, "scorer": "matches", "weight": 0.9}, 4),
    ],
)
def test_the_search_is_that_without_a_cache(grouped: Any, params: dict[str, Any], seed: int) -> None:
    inputs = vlm.one(seed)
    oracle = Oracle(grouped, inputs, **params)
    tokens, score = oracle.run(STEPS)
    plain = generate(grouped, inputs, num_beams=params["beams"]).sequences
    with mmfix.mitigate(grouped, "halc", processor=SPEECH, detector="boxes", **params) as fix:
        found = generate(grouped, inputs)
        report = fix.report()
    assert found.sequences[0, -STEPS:].tolist() == tokens
    assert float(found.sequences_scores[0]) == pytest.approx(score, abs=1e-4)
    assert found.sequences.tolist() != plain.tolist()
    assert 0 < report.fired["halc"].fired <= report.fired["halc"].considered
    assert report.passes_per_token == pytest.approx(1 + oracle.views / (STEPS * params["beams"]))
    assert report.prompts == params["beams"]


def test_words_of_several_tokens_are_decoded_again_token_by_token(
    grouped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def even(token: int) -> bool:
        return token % 2 == 0 and token not in STOPS

    monkeypatch.setattr("support.speech.starts", even)
    monkeypatch.setitem(globals(), "starts", even)
    params = {"beams": 2, "weight": 0.4}
    found = halc(grouped, vlm.one(4), **params)
    assert max(word.count("x") for word, _ in asked) == 3
    tokens, score = Oracle(grouped, vlm.one(4), **params).run(STEPS)
    assert found.sequences[0, -STEPS:].tolist() == tokens
    assert float(found.sequences_scores[0]) == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 1},
        {"num_beams": 1, "eos_token_id": 65, "repetition_penalty": 1.7, "min_new_tokens": 3},
        {"num_beams": 3, "eos_token_id": [65, 14], "length_penalty": 2.0},
        {"num_beams": 3, "repetition_penalty": 1.3, "num_return_sequences": 2},
    ],
)
def test_without_a_word_to_look_up_it_is_plain_decoding(llava: Any, options: dict[str, Any]) -> None:
    rows = [vlm.tokens(3, "image", 6), vlm.tokens(2, "image", 3, seed=4)]
    inputs = vlm.batch(rows, torch.cat([vlm.picture(0), vlm.picture(4)]))
    plain = generate(llava, inputs, **options).sequences
    found = halc(llava, inputs, {**options}, detector="never").sequences
    width = inputs["input_ids"].shape[1]
    ends = torch.tensor(options.get("eos_token_id", [])).flatten().tolist()
    for mine, theirs in zip(found[:, width:].tolist(), plain[:, width:].tolist(), strict=True):
        assert until(mine, ends) == until(theirs, ends)


def until(tokens: list[int], ends: list[int]) -> list[int]:
    stops = [n for n, token in enumerate(tokens) if token in ends]
    return tokens[: stops[0] + 1] if stops else tokens


@pytest.mark.filterwarnings("ignore:no image tokens")
def test_prompts_of_a_batch_are_searched_by_themselves(llava: Any) -> None:
    rows = [vlm.tokens(3, "image", 6), vlm.tokens(4, 5, seed=3), vlm.tokens(2, "image", 3, seed=4)]
    pictures = [vlm.picture(0), None, vlm.picture(4)]
    options = {"eos_token_id": 82, "num_beams": 2}
    singles = []
    for row, pixels in zip(rows, pictures, strict=True):
        alone = halc(llava, vlm.batch([row], pixels), options)
        singles.append(until(alone.sequences[0, len(row) :].tolist(), [82]))
    inputs = vlm.batch(rows, torch.cat([p for p in pictures if p is not None]))
    found = halc(llava, inputs, options).sequences[:, inputs["input_ids"].shape[1] :].tolist()
    assert [until(row, [82]) for row in found] == singles
    assert len({len(one) for one in singles}) > 1  # one of them ended early


def test_a_word_is_asked_for_once_and_chance_has_no_part(llava: Any) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = halc(llava, vlm.one(1)).sequences
    assert torch.equal(torch.get_rng_state(), before)
    assert len(asked) == len(set(asked)) > 0
    assert torch.equal(first, halc(llava, vlm.one(1)).sequences)


def test_processors_have_a_say_in_words_decoded_again(llava: Any) -> None:
    inputs = vlm.one(2)
    width = inputs["input_ids"].shape[1]

    def said(**options: Any) -> list[int]:
        return halc(llava, inputs, {"num_beams": 1, **options}, weight=0.9).sequences[0, width:].tolist()

    free, plain = said(), generate(llava, inputs).sequences[0, width:].tolist()
    new = sorted(set(free) - set(plain))
    assert new
    assert not set(said(suppress_tokens=new)) & set(new)
    first = next(n for n, token in enumerate(free) if token in new)
    ending = said(eos_token_id=new)
    assert ending[:first] == free[:first]
    assert ending[first] != free[first]  # a word said anew is never the end of the answer


@pytest.mark.parametrize(
    ("said", "token", "last", "word"),
    [
        ((5, 12), 13, False, Word("w5x12", 0)),
        ((5, 12), 16, False, None),
        ((5, 6, 12, 16), 7, False, Word("w6x12x16", 1)),
        ((5, 7), 6, False, None),
        ((5, 7, 12), 6, False, Word("x12", 2)),
        ((), 6, False, None),
        ((5, 6), 2, True, Word("w6", 1)),
        ((5, 6), 2, False, None),
    ],
)
def test_which_word_a_token_ends(said: Said, token: int, last: bool, word: Word | None) -> None:
    assert ended(lambda ids: Speech([2]).decode(ids, True), said, token, last) == word


def test_what_is_missing_is_said(llava: Any) -> None:
    for given, told in (
        ({}, r"halc needs a model of your own.*kind='boxes'.*halc:detector=name"),
        ({"detector": "none-such"}, r"halc\.detector='none-such' is not registered"),
        ({"detector": "matches"}, "returns match, and halc needs boxes"),
        ({"detector": "boxes", "scorer": "boxes"}, r"halc\.scorer='boxes' returns boxes, and halc needs match"),
        ({"detector": "boxes", "candidates": 3}, "even"),
        ({"detector": "boxes", "views": 2}, "candidates"),
        ({"detector": "boxes", "divergence": "kl"}, "jensen-shannon"),
        ({"detector": "boxes", "ratio": 0.0}, "ratio"),
    ):
        with pytest.raises(MethodError, match=told):
            mmfix.mitigate(llava, "halc", processor=SPEECH, **given).__enter__()
    with pytest.raises(MethodError, match="pass processor="):
        mmfix.mitigate(llava, "halc", detector="boxes").__enter__()
    method = mmfix.parse("halc:detector=boxes,views=3")
    assert mmfix.from_spec(json.loads(json.dumps(mmfix.spec(method)))) == method
    for other in ("opera", "vcd", mmfix.method("jrt", until="prompt")):
        name = other if isinstance(other, str) else other.info.name
        named = rf"'halc'.*'{name}'|'{name}'.*'halc'"
        with pytest.raises(ConflictError, match=named):
            mmfix.mitigate(llava, [method, other], processor=SPEECH).__enter__()


def test_other_ways_of_decoding_are_refused(llava: Any) -> None:
    inputs = vlm.one()
    with mmfix.mitigate(llava, "halc", detector="boxes", processor=SPEECH):
        for options, told in (
            ({"do_sample": True}, "do_sample=False"),
            ({"use_cache": False}, "use_cache"),
            ({"streamer": object()}, "streamer"),
            ({"past_key_values": object()}, "past_key_values"),
            ({"output_logits": True}, "output_logits"),
        ):
            with pytest.raises(UsageError, match=told):
                generate(llava, inputs, **options)
        with pytest.raises(UsageError, match="input_ids"):
            llava.generate(inputs_embeds=torch.zeros(1, 3, vlm.HIDDEN))
        with pytest.raises(UnsupportedModel, match=r"\(1, 2, 3, 24, 24\), packed or in tiles"):
            generate(llava, {**inputs, "pixel_values": torch.zeros(1, 2, 3, 24, 24)})
        two = vlm.batch([vlm.tokens(3, "image", 2, "image", 2)], vlm.picture(0, 2))
        with pytest.raises(UnsupportedModel, match="2 pictures for 1 prompts"):
            generate(llava, two)
    plain = Plan.__new__(Plan)
    object.__setattr__(plain, "kwargs", {})
    with pytest.raises(UsageError, match=r"stream\(\) cannot follow halc"):
        refuse_unsettled(llava, plain, mmfix.method("halc", detector="boxes"))


def test_what_a_detector_or_scorer_does_wrong_is_an_error_and_the_next_call_is_right(llava: Any) -> None:
    def broken(pixels: Tensor, text: str) -> Any:
        raise ValueError("no weights")

    right = halc(llava, vlm.one(1), beams=1).sequences
    wrong: dict[str, list[tuple[Any, str]]] = {
        "boxes": [
            (broken, r"scorer 'mine' raised ValueError for '[wx]\d.*no weights"),
            (lambda pixels, word: [(0.1, 0.1, 1.5, 0.5)], "returned the box"),
            (lambda pixels, word: [(0.5, 0.1, 0.5, 0.5)], "left < right"),
            (lambda pixels, word: [0.5], "returned the box"),
        ],
        "match": [
            (broken, "raised ValueError"),
            (lambda pixels, text: float("nan"), "finite number"),
            (lambda pixels, text: "good", "finite number"),
        ],
    }
    for kind, cases in wrong.items():
        params: dict[str, Any] = {"detector": "mine"} if kind == "boxes" else {"detector": "boxes", "scorer": "mine"}
        params |= {"beams": 1}
        for function, told in cases:
            scorers.register("mine", function, kind=kind)
            with mmfix.mitigate(llava, "halc", processor=SPEECH, **params):
                with pytest.raises(MmfixError, match=told):
                    generate(llava, vlm.one(1))
                if function is cases[-1][0] and kind == "boxes":
                    scorers.register("mine", boxes, kind=kind)
                    assert torch.equal(generate(llava, vlm.one(1)).sequences, right)


def test_it_composes_with_methods_that_edit_attention_and_read_the_tower(llava: Any) -> None:
    """Also a word that is said again as it was leaves what those methods know of the picture as it was."""
    scorers.register("mine", lambda pixels, word: [(0.0, 0.0, 1.0, 1.0)], kind="boxes")
    one = mmfix.method("halc", detector="mine", ratio=1e-6, weight=0.0, beams=1)  # the views are the picture
    for other in (mmfix.method("vaf", image_gain=3.0), mmfix.method("paint")):
        with mmfix.mitigate(llava, other):
            alone = generate(llava, vlm.one(3), num_beams=1).sequences
        with mmfix.mitigate(llava, [other, one], processor=SPEECH) as fix:
            both = generate(llava, vlm.one(3)).sequences
            assert fix.report().fired["halc"].considered > 0
        assert torch.equal(alone, both), other
