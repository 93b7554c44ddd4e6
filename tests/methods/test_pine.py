"""PINE against keys rotated anew for every head and query, and under permutations of the pictures."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support import vlm
from torch import Tensor
from transformers.models.llama import modeling_llama

import mmfix
from mmfix.errors import ConflictError, MethodError, MmfixError
from mmfix.methods import PINE

STEPS = 3
N = vlm.IMAGE_TOKENS
HEAD, TAIL = vlm.tokens(3, seed=1), vlm.tokens(5, seed=2)[1:]
THREE = [*HEAD, *[vlm.IMAGE_ID] * (3 * N), *TAIL]
TWO = [1, *[vlm.IMAGE_ID] * N, 17, 18, *[vlm.IMAGE_ID] * N, 21, 22]  # text between them belongs to the first
ONE = vlm.tokens(4, "image", 3, seed=4)
BOUNDS = {3: [(len(HEAD) + n * N, len(HEAD) + (n + 1) * N) for n in range(3)], 2: [(1, N + 3), (N + 3, 2 * N + 3)]}


def turn(x: Tensor, positions: list[int]) -> Tensor:
    """Vectors [T, D] at positions, each pair of numbers a complex one."""
    half = x.shape[-1] // 2
    angles = torch.tensor(positions)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def row(q: Tensor, k: Tensor, t: int, own: int | None, bounds: list[tuple[int, int]], agreed: list[float]) -> Tensor:
    """Weights [T] of query t of one head over all keys, from bare q [D] and k [T, D]; `agreed` ranks the segments."""
    end = bounds[-1][1]
    order = sorted(range(len(bounds)), key=lambda n: -agreed[n])
    place = list(range(len(k)))
    back = 0
    for n in order:
        start, stop = bounds[n]
        for offset in range(stop - start):
            place[start + offset] = end - (stop - start) + offset - back
        back += stop - start
    inside = [any(a <= s < b for a, b in bounds) for s in range(len(k))]
    scores = turn(k, place) @ turn(q[None], place[t : t + 1])[0] * len(q) ** -0.5
    hidden = [place[s] > place[t] if own is not None and inside[s] else s > t for s in range(len(k))]
    return scores.masked_fill(torch.tensor(hidden), -torch.inf).softmax(-1)


def importances(q: Tensor, k: Tensor, own: int | None, bounds: list[tuple[int, int]]) -> list[float]:
    scores = k @ q * len(q) ** -0.5
    open_ = torch.zeros(len(k), dtype=torch.bool)
    for n, (start, stop) in enumerate(bounds):
        open_[start:stop] = n != own
    weights = scores.masked_fill(~open_, -torch.inf).softmax(-1)
    return [float(weights[start:stop].mean()) for start, stop in bounds]


def expected(model: Any, ids: list[int], pictures: Tensor | None, bounds: list[tuple[int, int]]) -> Tensor:
    """Logits [V] of the last token of one prompt."""

    def forward(self: Any, hidden_states: Tensor, position_embeddings: Any, **_: Any) -> Any:
        length = hidden_states.shape[1]
        heads = [p(hidden_states)[0].view(length, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj)]
        q, k, v = heads[0], *(x.repeat_interleave(self.num_key_value_groups, 1) for x in heads[1:])
        out = torch.zeros_like(q)
        for h in range(q.shape[1]):
            sums: dict[int, Tensor] = {}
            for n, (start, stop) in enumerate(bounds):
                found = torch.tensor([importances(q[t, h], k[:, h], n, bounds) for t in range(start, stop)]).sum(0)
                found[n] = torch.inf
                sums[n] = found
            for t in range(length):
                own = next((n for n, (start, stop) in enumerate(bounds) if start <= t < stop), None)
                ranks = importances(q[t, h], k[:, h], None, bounds) if own is None else sums[own].tolist()
                out[t, h] = row(q[t, h], k[:, h], t, own, bounds, ranks) @ v[:, h]
        return self.o_proj(out.reshape(1, length, -1)), None

    patch = pytest.MonkeyPatch()
    patch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    try:
        return vlm.logits(model, vlm.batch([ids], pictures))[0, -1]
    finally:
        patch.undo()


@pytest.fixture(scope="module")
def shallow() -> Any:
    """Two layers and four heads that share two: an oracle of loops takes its time."""
    model = vlm.build("llava-gqa")
    model.model.language_model.layers = model.model.language_model.layers[:2]
    model.config.text_config.num_hidden_layers = 2
    return model


def test_it_is_the_definition(shallow: Any) -> None:
    """Two pictures with text between them, at the prompt and after a decoding step on a cache."""
    pictures = vlm.picture(0, 2)
    with mmfix.mitigate(shallow, "pine") as fix:
        got = vlm.greedy(shallow, vlm.batch([TWO], pictures), 2)
        assert fix.report().layers[0].backend == "reference"
    token = int(got.sequences[0, -2])
    for step, ids in enumerate((TWO, [*TWO, token])):
        want = expected(shallow, ids, pictures, BOUNDS[2])
        torch.testing.assert_close(got.logits[step][0], want, atol=1e-4, rtol=0)
    assert (got.logits[0] - vlm.logits(shallow, vlm.batch([TWO], pictures))[:, -1]).abs().max() > 1e-2


def test_three_pictures_are_the_definition(shallow: Any) -> None:
    """Here the ranking decides where the second and third one lie."""
    pictures = vlm.picture(3, 3)
    with mmfix.mitigate(shallow, "pine"):
        got = vlm.logits(shallow, vlm.batch([THREE], pictures))[0, -1]
    torch.testing.assert_close(got, expected(shallow, THREE, pictures, BOUNDS[3]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 2},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["greedy", "beams", "no cache", "static", "sampling"],
)
def test_permutations_give_the_same_answer(grouped: Any, options: dict[str, Any]) -> None:
    """PINE-1, in a padded batch whose other prompts have two pictures, one and none."""
    model, rows = grouped, [THREE, TWO, ONE, vlm.tokens(6, seed=6)]
    others = vlm.picture(7, 3)
    found = []
    with mmfix.mitigate(model, "pine"):
        for order in [*itertools.permutations(range(3))][:: 1 if not options else 3]:
            torch.manual_seed(0)
            inputs = vlm.batch(rows, torch.cat([vlm.picture(0, 3)[list(order)], others]))
            found.append(vlm.greedy(model, inputs, STEPS, suppress_tokens=[vlm.IMAGE_ID], **options))
    torch.manual_seed(0)
    plain = vlm.greedy(model, inputs, STEPS, suppress_tokens=[vlm.IMAGE_ID], **options)
    for out in found[1:]:
        assert torch.equal(out.sequences, found[0].sequences)
        for a, b in zip(out.logits, found[0].logits, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    first = len(found[0].logits[0]) // 4
    assert (out.logits[0] - plain.logits[0])[: 2 * first].abs().amax(-1).min() > 1e-2
    torch.testing.assert_close(out.logits[0][2 * first :], plain.logits[0][2 * first :], atol=1e-4, rtol=0)


DOCUMENTS = [[31, 32, 33, 34], [35, 36], [37, 38, 39]]
SEPARATOR = [61, 62]


def documents(order: Sequence[int], head: list[int], tail: list[int]) -> list[int]:
    return [*head, *(n for one in order for n in [*SEPARATOR, *DOCUMENTS[one]]), *SEPARATOR, *tail]


def test_documents_are_segments_and_their_order_is_none(shallow: Any) -> None:
    """With pictures in the prefix and without; as the definition has it, and the same for every permutation."""
    method = PINE(separator=tuple(SEPARATOR))
    ids = documents(range(3), HEAD, TAIL)
    starts = [len(HEAD), len(HEAD) + 6, len(HEAD) + 10, len(HEAD) + 15]
    with mmfix.mitigate(shallow, method) as fix:
        got = vlm.logits(shallow, vlm.batch([ids]))[0, -1]
        assert fix.report().fired["pine"].fired > 0
    want = expected(shallow, ids, None, list(itertools.pairwise(starts)))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    found, plain = [], []
    for order in itertools.permutations(range(3)):
        rows = [documents(order, HEAD, TAIL), documents(order, [*TWO[:-2], 8], [5, 6])]
        inputs = vlm.batch(rows, vlm.picture(0, 2))
        plain.append(vlm.logits(shallow, inputs)[:, -1])
        with mmfix.mitigate(shallow, method):
            found.append(vlm.greedy(shallow, inputs, 2))
    for out in found[1:]:
        assert torch.equal(out.sequences[:, -2:], found[0].sequences[:, -2:])
        torch.testing.assert_close(out.logits[1], found[0].logits[1], atol=1e-4, rtol=0)
    assert min(float((one - plain[0]).abs().amax(-1).min()) for one in plain[1:]) > 1e-3


def test_a_separator_is_text_or_ids(llava: Any) -> None:
    family = dataclasses.replace(mmfix.describe(llava), encode=lambda text: [len(text), 7])
    assert PINE(separator="###").prepare(family).separator == (3, 7)
    with pytest.raises(MethodError, match="pass processor="), mmfix.mitigate(llava, PINE(separator="###")):
        pass
    with pytest.raises(MethodError, match="is empty"):
        PINE(separator=())
    embeds = llava.get_input_embeddings()(torch.tensor([[5, 6, 7]]))
    with mmfix.mitigate(llava, PINE(separator=(5,))) as fix:
        fix.image_mask = torch.zeros(1, 3, dtype=torch.bool)
        with pytest.raises(MmfixError, match="pass input_ids"):
            llava(inputs_embeds=embeds)


def test_the_plain_model_does_depend_on_the_order(llava: Any) -> None:
    a, b = (vlm.logits(llava, vlm.batch([THREE], vlm.picture(0, 3)[order]))[:, -1] for order in ([0, 1, 2], [2, 1, 0]))
    assert (a - b).abs().max() > 1e-2


def test_batch_rows_equal_single_runs(grouped: Any) -> None:
    rows = [(THREE, vlm.picture(0, 3)), (TWO, vlm.picture(1, 2)), (ONE, vlm.picture(2))]
    with mmfix.mitigate(grouped, "pine"):
        together = vlm.greedy(grouped, vlm.batch([r for r, _ in rows], torch.cat([p for _, p in rows])), STEPS)
        for n, (ids, pictures) in enumerate(rows):
            alone = vlm.greedy(grouped, vlm.batch([ids], pictures), STEPS)
            for a, b in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(a[n], b[0], atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore::mmfix.errors.MmfixWarning")
@pytest.mark.parametrize("inputs", [vlm.one(), vlm.batch([vlm.tokens(9)])], ids=["one picture", "no picture"])
def test_with_fewer_than_two_pictures_nothing_changes(llava: Any, inputs: dict[str, Any]) -> None:
    plain = vlm.greedy(llava, inputs, STEPS)
    with mmfix.mitigate(llava, "pine"):
        got = vlm.greedy(llava, inputs, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, plain.logits, strict=True))


def test_half_precision_and_what_is_refused(llava: Any) -> None:
    inputs = vlm.batch([TWO], vlm.picture(0, 2))
    with mmfix.mitigate(llava, "pine"), pytest.raises(MmfixError, match="pieces"):
        vlm.greedy(llava, inputs, prefill_chunk_size=14)
    with pytest.raises(ConflictError, match=r"'pine'.*'vhr' would not act"), mmfix.mitigate(llava, ["vhr", "pine"]):
        pass
    with pytest.raises(MethodError, match="pine"):
        mmfix.method("pine", tokens=0)
    half = vlm.build("llava").to(torch.bfloat16)
    with mmfix.mitigate(half, "pine"):
        got = vlm.logits(half, {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()})
    assert got.dtype == torch.bfloat16
    assert got.isfinite().all()
