"""OPERA against a plain-Python search with whole maps and no cache, and against transformers' beam search."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support import vlm
from torch import Tensor

import mmfix
from mmfix import search, searching
from mmfix.beams import Beams, Ending
from mmfix.errors import ConflictError, MethodError, UnsupportedModel, UsageError
from mmfix_decoding.options import Plan, refuse_unsettled

STEPS = 16
# Parameters with which a tiny model goes back often.
RESTLESS = {"beams": 2, "candidates": 3, "grace": 3, "threshold": 1, "sigma": 20.0, "weight": 2.0}


@dataclass
class State:
    """Beams of the oracle: what each said, its score and the places it trusted."""

    said: list[tuple[int, ...]]
    scores: list[float]
    places: list[list[int]]
    history: list[Any] = field(default_factory=list)


class Oracle:
    """The search as the paper's code has it: whole maps, products of numbers, a fresh pass for every question."""

    def __init__(self, model: Any, inputs: dict[str, Any], **params: Any) -> None:
        self.model = copy.deepcopy(model)
        self.model.set_attn_implementation("eager")
        self.inputs, self.p = inputs, mmfix.method("opera", **params)
        self.prompt = inputs["input_ids"][0].tolist()
        self.known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self.returns = 0

    def ask(self, said: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the next token, and the last layer's map: the largest over heads, rows of sum 1."""
        if said not in self.known:
            ids = torch.tensor([[*self.prompt, *said]])
            with torch.no_grad():
                out = self.model(
                    input_ids=ids, pixel_values=self.inputs["pixel_values"], use_cache=False, output_attentions=True
                )
            whole = out.attentions[-1][0].max(0).values.double()
            self.known[said] = out.logits[0, -1].double().log_softmax(-1), whole / whole.sum(-1, keepdim=True)
        return self.known[said]

    def penalty(self, said: tuple[int, ...]) -> tuple[float, int]:
        """phi and the most trusted place of an answer whose last token is the candidate."""
        start, n = len(self.prompt), len(said)
        whole = self.ask(said)[1]
        products = [math.prod(self.p.sigma * float(whole[start + i, start + j]) for i in range(j, n)) for j in range(n)]
        place = max(range(max(0, n - self.p.window), n), key=products.__getitem__)
        if n <= self.p.grace:
            return -sum(float(whole[-1, k]) for k, t in enumerate(self.prompt) if t == vlm.IMAGE_ID), place
        return 1e-7 * products[place], place

    def run(self, steps: int) -> tuple[list[int], float]:
        beams = self.p.beams
        state = State([()] * beams, [0.0] + [-1e9] * (beams - 1), [[] for _ in range(beams)])
        stack: list[tuple[State, set[Any]]] = []  # state before each choice, and what was chosen
        attempts: Counter[int] = Counter()
        rejected: set[Any] = set()
        again = False
        while len(state.said[0]) < steps:
            options, places = [], [list(p) for p in state.places]
            if again:
                for b, said in enumerate(state.said):
                    left = self.ask(said)[0].clone()
                    left[[t for s, t in rejected if s == said]] = -math.inf
                    options += [(state.scores[b] + float(v), b, t) for t, v in enumerate(left.log_softmax(-1))]
                again = False
            else:
                tries = self.p.candidates if state.said[0] else max(self.p.candidates, beams)
                for b, said in enumerate(state.said):
                    top = self.ask(said)[0].topk(tries)
                    found = [self.penalty((*said, t)) for t in top.indices.tolist()]
                    values = top.values - self.p.weight * torch.tensor([f[0] for f in found], dtype=torch.float64)
                    shares = values.log_softmax(-1).tolist()
                    options += [(state.scores[b] + v, b, t) for v, t in zip(shares, top.indices.tolist(), strict=True)]
                    places[b].append(mode([f[1] for f in found]))
                back = self.way_back(places, len(state.said[0]), attempts)
                if back is not None:
                    attempts[back] += 1
                    rejected |= stack[back][1]
                    state = stack[back][0]
                    del stack[back:]
                    self.returns += 1
                    again = True
                    continue
            options.sort(key=lambda o: -o[0])
            best = options[:beams]
            new = State(
                [(*state.said[b], t) for _, b, t in best],
                [v for v, _, _ in best],
                [list(places[b]) for _, b, _ in best],
            )
            stack.append((state, {(said[:-1], said[-1]) for said in new.said}))
            state = new
        return list(state.said[0]), state.scores[0] / steps

    def way_back(self, places: list[list[int]], length: int, attempts: Counter[int]) -> int | None:
        place = mode([p[-1] for p in places])
        if not self.p.rollback or place < self.p.grace or not all(p.count(place) > self.p.threshold for p in places):
            return None
        for kept in (place + 1, place):
            if 0 < kept < length and length - kept <= self.p.window and attempts[kept] < self.p.candidates:
                return kept
        return None


def mode(values: list[int]) -> int:
    counts = Counter(values)
    return min(v for v, c in counts.items() if c == max(counts.values()))


def until(tokens: list[int], ends: int | list[int]) -> list[int]:
    """An answer up to its end; what fills it up behind is not the same."""
    stops = [n for n, token in enumerate(tokens) if token in ([ends] if isinstance(ends, int) else ends)]
    return tokens[: stops[0] + 1] if stops else tokens


def generate(model: Any, inputs: dict[str, Any], steps: int = STEPS, **extra: Any) -> Any:
    options = {"max_new_tokens": steps, "return_dict_in_generate": True, "output_scores": True}
    return model.generate(**inputs, **{**options, **extra})


def answer(model: Any, inputs: dict[str, Any], found: Any) -> list[list[int]]:
    return found.sequences[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(
    "params",
    [
        {"beams": 3, "candidates": 4, "grace": 2, "weight": 300.0, "sigma": 30.0, "rollback": False},
        {"beams": 3, "candidates": 4, "grace": 2, "weight": 1e6, "sigma": 10.0, "rollback": False, "window": 3},
        {**RESTLESS, "candidates": 1, "beams": 3},
        {**RESTLESS, "beams": 1, "threshold": 2},
    ],
)
def test_the_search_is_that_of_whole_maps_without_a_cache(grouped: Any, params: dict[str, Any]) -> None:
    inputs = vlm.one()
    steps = 9
    oracle = Oracle(grouped, inputs, **params)
    tokens, score = oracle.run(steps)
    with mmfix.mitigate(grouped, "opera", **params) as fix:
        found = generate(grouped, inputs, steps)
        report = fix.report()
    assert answer(grouped, inputs, found) == [tokens]
    assert float(found.sequences_scores[0]) == pytest.approx(score, abs=1e-4)
    assert report.fired["opera"].considered >= steps
    assert report.passes_per_token == 1 + params["candidates"]


def test_prompts_of_a_batch_go_back_by_themselves(llava: Any) -> None:
    rows = [vlm.tokens(3, "image", after, seed=seed) for seed, after in ((0, 6), (3, 2), (5, 9))]
    pictures = [vlm.picture(n) for n in range(3)]
    returns = []
    single = []
    for row, pixels in zip(rows, pictures, strict=True):
        oracle = Oracle(llava, vlm.batch([row], pixels), **RESTLESS)
        single.append(oracle.run(STEPS)[0])
        returns.append(oracle.returns)
    assert len(set(returns)) > 1
    inputs = vlm.batch(rows, torch.cat(pictures))
    with mmfix.mitigate(llava, "opera", **RESTLESS):
        assert answer(llava, inputs, generate(llava, inputs)) == single


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eos_token_id": [65, 14]},
        {"eos_token_id": 65, "early_stopping": True, "length_penalty": 2.0},
        {"eos_token_id": 65, "early_stopping": "never", "num_return_sequences": 3},
        {"min_new_tokens": 4, "eos_token_id": 65, "repetition_penalty": 1.3, "renormalize_logits": True},
    ],
)
def test_without_penalty_over_the_whole_vocabulary_it_is_beam_search(
    llava: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    rows = [vlm.tokens(3, "image", 6), vlm.tokens(2, "image", 3, seed=4)]
    inputs = vlm.batch(rows, torch.cat([vlm.picture(0), vlm.picture(4)]))
    plain = generate(llava, inputs, num_beams=4, **options)
    monkeypatch.setattr(search.Searcher, "tries", 0)  # every token is chosen as after a return: freely
    with mmfix.mitigate(llava, "opera"):
        found = generate(llava, inputs, num_beams=4, **options)
    width, ends = inputs["input_ids"].shape[1], options.get("eos_token_id", [])
    for mine, theirs in zip(found.sequences[:, width:], plain.sequences[:, width:], strict=True):
        assert until(mine.tolist(), ends) == until(theirs.tolist(), ends)
    assert torch.allclose(found.sequences_scores, plain.sequences_scores, atol=1e-4)


def test_strength_zero_leaves_the_call_alone(llava: Any) -> None:
    inputs = vlm.one()
    options: list[dict[str, Any]] = [{}, {"num_beams": 3}]
    plain = [llava.generate(**inputs, max_new_tokens=6, **one) for one in options]
    with mmfix.mitigate(llava, "opera", weight=0.0, rollback=False) as fix:
        assert all(
            torch.equal(a, llava.generate(**inputs, max_new_tokens=6, **o)) for a, o in zip(plain, options, strict=True)
        )
        assert fix.report().passes_per_token == 1
    with mmfix.mitigate(llava, "opera", **RESTLESS):
        changed = llava.generate(**inputs, max_new_tokens=6)
        assert llava.generate(**inputs, max_new_tokens=2, num_beams=3, num_return_sequences=3).shape[0] == 3
        assert torch.equal(changed, llava.generate(**inputs, max_new_tokens=6))
    assert torch.equal(plain[0], llava.generate(**inputs, max_new_tokens=6))


@pytest.mark.parametrize("n", [1, 9, 10, 11, 40])
def test_column_products_are_sums_of_logarithms(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    weights = torch.rand(n, n, generator=generator, dtype=torch.float64).tril() * 0.2
    columns = torch.zeros(0, dtype=torch.float64)
    for i in range(n):
        columns = search.longer_columns(columns, weights[i, : i + 1], 50.0)
    direct = torch.stack([(50.0 * weights[j:, j]).prod() for j in range(n)])
    assert torch.allclose(columns, direct.log())
    phi, place = search.penalties(columns, torch.tensor(0.25), search.OverTrust())
    assert int(place) == int(direct.argmax())
    assert float(phi) == pytest.approx(-0.25 if n <= 10 else 1e-7 * float(direct.max()))


def test_nothing_overflows_or_vanishes_where_half_precision_does() -> None:
    rules = search.OverTrust()
    for weight, limit in ((1.0, math.inf), (0.004, 0.0)):
        column = torch.tensor([weight], dtype=torch.float64)
        half = torch.tensor(1.0, dtype=torch.float16)
        columns = torch.zeros(0, dtype=torch.float64)
        for i in range(400):
            row = torch.full((i + 1,), 1e-9, dtype=torch.float64)
            row[11 if i >= 11 else 0] = weight
            columns = search.longer_columns(columns, row, 50.0)
            half = half * (50.0 * column[0]).half()
        assert float(half) == limit
        phi, place = search.penalties(columns, torch.zeros(()), rules)
        assert math.isfinite(float(phi))
        if weight == 1.0:
            assert int(place) == 11
            mine = search.penalised(
                torch.tensor([[0.0, -1.0]]), torch.tensor([[0, 1]]), torch.stack([phi, phi / 2])[None], 1.0
            )
            assert mine.tolist() == [[-1e9, 0.0]]


def test_the_window_is_that_many_newest_columns() -> None:
    columns = torch.tensor([9.0, 5.0, 7.0, 6.0], dtype=torch.float64)
    found = {window: [int(x) for x in search.trusted(columns, window)] for window in (1, 2, 3, 4, 9)}
    assert found == {1: [6, 3], 2: [7, 2], 3: [7, 2], 4: [9, 0], 9: [9, 0]}


def searcher(**rules: Any) -> search.Searcher:
    """Two beams of six tokens; ``history[n]`` and ``choices[n]`` tell n apart."""
    beams = Beams(prompt=torch.tensor([1]), tokens=torch.arange(12).view(2, 6), scores=torch.zeros(2))
    found = search.Searcher(
        search.OverTrust(**{"threshold": 1, "grace": 2, "window": 4, "candidates": 2, **rules}),
        Ending(stopping=lambda ids: torch.zeros(len(ids), dtype=torch.bool)),
        search.Trail(beams, torch.zeros(2, 6), torch.zeros(2, 0)),
    )
    found.history = [search.Trail(beams, torch.full((2, n), float(n)), torch.zeros(2, n)) for n in range(6)]
    found.choices = [{((n,), n)} for n in range(6)]
    return found


@pytest.mark.parametrize(
    ("places", "trusted", "rules", "kept"),
    [
        ([[3, 3, 0], [0, 3, 3]], 3, {}, 4),  # the state after the place
        ([[3, 3, 0], [0, 3, 3]], 3, {"threshold": 2}, None),
        ([[3, 3, 0], [0, 0, 3]], 3, {}, None),  # every beam must agree
        ([[2, 2], [2, 2]], 2, {}, 3),  # the first that is not of the grace
        ([[1, 1], [1, 1]], 1, {}, None),
        ([[2, 2], [2, 2]], 2, {"window": 3}, 3),  # three tokens are taken back
        ([[2, 2], [2, 2]], 2, {"window": 2}, None),
        ([[5, 5], [5, 5]], 5, {}, 5),  # the newest place: one earlier, since nothing follows it
        ([[3, 3], [3, 3]], 3, {"rollback": False}, None),
    ],
)
def test_where_it_goes_back_to(places: list[list[int]], trusted: int, rules: dict[str, Any], kept: int | None) -> None:
    assert searcher(**rules)._way_back(torch.tensor(places), trusted) == kept


def test_a_place_is_returned_to_so_often_and_then_the_one_before() -> None:
    one = searcher()
    twice = torch.full((2, 2), 3)
    assert [one._way_back(twice, 3), one._return_to(4), one.attempts[4], one.attempts[3]] == [4, None, 1, 0]
    assert one.again
    assert one.rejected == {((4,), 4)}
    assert (len(one.history), len(one.choices)) == (4, 4)  # of the tokens that stay, and to be made anew
    assert one.trail.columns.tolist() == torch.full((2, 4), 4.0).tolist()
    one.attempts[4] = 2
    assert one._way_back(twice, 3) == 3
    one.attempts[3] = 2
    assert one._way_back(twice, 3) is None


def test_what_was_chosen_is_ruled_out_after_the_same_words_only() -> None:
    one = searcher()
    one.rejected = {(tuple(range(6)), 7), (tuple(range(6)), 2), ((9,), 5)}
    left = one._without_rejected(torch.zeros(2, 10).log_softmax(-1))
    assert left[0].isneginf().nonzero().flatten().tolist() == [2, 7]
    assert left[0].exp().sum() == pytest.approx(1.0)
    assert left[1].isfinite().all()


def test_other_ways_of_decoding_are_refused(llava: Any) -> None:
    inputs = vlm.one()
    with mmfix.mitigate(llava, "opera", **RESTLESS):
        for options, told in (
            ({"do_sample": True}, "do_sample=False"),
            ({"use_cache": False}, "use_cache"),
            ({"streamer": object()}, "streamer"),
            ({"output_logits": True}, "output_logits"),
            ({"custom_generate": lambda model: None}, "custom_generate"),
        ):
            with pytest.raises(UsageError, match=told):
                generate(llava, inputs, **options)
        with pytest.raises(UnsupportedModel, match="StaticLayer"):
            generate(llava, inputs, cache_implementation="static")
        assert generate(llava, inputs, steps=4).sequences.shape[1] == inputs["input_ids"].shape[1] + 4
    with pytest.raises(ConflictError, match=r"'opera' and 'vcd'"), mmfix.mitigate(llava, ["opera", "vcd"]):
        pass
    for wrong in ({"candidates": 0}, {"sigma": 0.0}, {"beams": -1}, {"window": 0}):
        with pytest.raises(MethodError, match="opera"):
            mmfix.method("opera", **wrong)


def test_a_stream_cannot_follow_it(llava: Any) -> None:
    plain = Plan.__new__(Plan)
    object.__setattr__(plain, "kwargs", {})
    for method in ("opera", ["vaf", mmfix.method("opera")]):
        with pytest.raises(UsageError, match=r"stream\(\) cannot follow opera"):
            refuse_unsettled(llava, plain, method)
    refuse_unsettled(llava, plain, [mmfix.method("opera", weight=0.0, rollback=False), "vaf"])


def test_an_error_while_trying_candidates_is_an_error(llava: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(searching, "column_mass", broken)
    with mmfix.mitigate(llava, "opera", **RESTLESS), pytest.raises(RuntimeError, match="out of memory"):
        generate(llava, vlm.one())
    with mmfix.mitigate(llava, "opera", **RESTLESS), pytest.raises(RuntimeError, match="out of memory"):
        generate(llava, vlm.one())


def test_it_composes_with_a_method_that_edits_attention(llava: Any) -> None:
    inputs = vlm.one()
    with mmfix.mitigate(llava, "opera", **RESTLESS):
        alone = generate(llava, inputs)
    with mmfix.mitigate(llava, [mmfix.method("opera", **RESTLESS), mmfix.method("vaf", image_gain=3.0)]):
        both = generate(llava, inputs)
    assert both.sequences_scores.tolist() != alone.sequences_scores.tolist()


@pytest.mark.filterwarnings("ignore::mmfix.errors.MmfixWarning")
@pytest.mark.parametrize("pictures", ["one each", "two and none"])
def test_beams_of_a_prompt_are_computed_once(llava: Any, pictures: str) -> None:
    """Not where their rows differ: pictures that are more than one to a prompt are not told apart by rows."""
    rows = [vlm.tokens(3, "image", 9, seed=1), vlm.tokens(2, "image", 4, seed=2)]
    if pictures != "one each":
        rows = [vlm.tokens(3, "image", 1, "image", 2, seed=1), vlm.tokens(12, seed=2)]
    inputs, lengths = vlm.batch(rows, vlm.picture(1, 2)), []
    with mmfix.mitigate(llava, mmfix.method("opera", **RESTLESS)):
        watched = llava.model.language_model.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(args[0].shape[0] if args else kwargs["hidden_states"].shape[0]),
            with_kwargs=True,
        )
        got = llava.generate(**inputs, max_new_tokens=4, do_sample=False)
        watched.remove()
    assert lengths[0] == (2 if pictures == "one each" else 4)
    assert set(lengths[1:]) == {4}
    for n, (ids, shown) in enumerate(zip(rows, (1, 1) if pictures == "one each" else (2, 0), strict=True)):
        first = n if pictures == "one each" else 0
        alone = vlm.batch([ids], vlm.picture(1, 2)[first : first + shown] if shown else None)
        with mmfix.mitigate(llava, mmfix.method("opera", **RESTLESS)):
            single = llava.generate(**alone, max_new_tokens=4, do_sample=False)
        assert torch.equal(got[n, -4:], single[0, -4:])
