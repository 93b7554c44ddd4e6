"""PositionalHidden: scaling one hidden dimension that carries position."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from mmfix.errors import MethodError
from mmfix.families import Family
from mmfix.hidden import HiddenScale
from mmfix.method import Method, chosen_layers, in_proportion
from mmfix.registry import param, register


class Known(NamedTuple):
    """A published dimension: shape of the language model that has it, and where it is scaled.

    `model_types` are those of the vision-language models around it; () means any. Layers `first` … `end` - 1.
    """

    model_types: tuple[str, ...]
    text_type: str
    hidden: int
    layers: int
    vocabulary: range
    dim: int
    factor: float
    first: int = 10
    end: int = 26


_LLAMA = range(32000, 32065)  # the vocabulary of Llama, Vicuna and Mistral, with a few tokens added
_VICUNA = ("llava", "llava_next", "llava_next_video", "video_llava", "vipllava", "instructblip", "instructblipvideo")
# As released with the paper. Llama-2 has the shapes of Vicuna and other dimensions (4283 in its 13B), so that what is
# built on it has to be told by the user; MPT-30B (6926) computes attention in one matrix. The layers of Mistral and
# Qwen1.5 were not published and are those of Vicuna-7B.
KNOWN = (
    Known(_VICUNA, "llama", 4096, 32, _LLAMA, 2393, 0.0),
    Known(_VICUNA, "llama", 5120, 40, _LLAMA, 4923, 0.0, 10, 35),
    Known((), "mistral", 4096, 32, _LLAMA, 213, 0.0),
    Known((), "qwen2", 4096, 32, range(151646, 152100), 1081, 0.0),
    Known((), "gemma", 3072, 28, range(256000, 257300), 1665, 0.0),
)


@register("positional-hidden", title="Positional Hidden States scaled", paper="arXiv:2406.02536", kind="hidden edit")
@dataclass(frozen=True, kw_only=True)
class PositionalHidden(Method):
    """Weaken the hidden dimension that carries position, for queries and keys alone.

    *Mitigate Position Bias in Large Language Models via Scaling a Single Dimension* (ACL 2025 Findings,
    arXiv:2406.02536). In the chosen layers, with h the attention's input (after its norm)::

        h'[t, dims] = factor * h[t, dims]   for tokens t >= skip
        q = W_q h'    k = W_k h'    v = W_v h

    for the last `last` rows of the prompt and every generated token, which attend with changed queries to changed keys.
    Earlier rows of the prompt attend as ever; in a further turn on a cache all new rows are changed. The cache keeps
    the changed keys and the values as they are. One pass; at the prompt these layers compute their attention twice.
    Prompts without an image are left alone.

    Dimensions of the released configurations are built in (Vicuna 7B and 13B, Mistral-7B-v0.2, Qwen1.5-7B, Gemma-7B);
    of another model they have to be found, by ``mmfix calibrate positional``, or given. The released code puts the
    forward pass of Llama into Mistral's and Qwen's classes; here hooks sit before the projections, whatever the class.
    Its example sets Llama-2-7B's factor to 0 and its configuration to -1.

    Args:
        dims: hidden dimensions; None takes the model's known ones.
        factor: on these dimensions, -10 to 10; 1 changes nothing. None takes the known one, or 0.
        layers: layers that are changed, negative ones counted from the end; None takes the known ones, or layers
            10 to 25 of 32, in proportion.
        last: rows at the end of the prompt that are changed, from 1 on.
        skip: tokens at the start of a prompt that are left alone, from 0 on.

    Raises:
        MethodError: a value out of range, or the model's dimensions are not known.
        UnsupportedModel: the model's attention has no separate projections of queries, keys and values.
        MmfixError: the prompt came in pieces.
    """

    dims: tuple[int, ...] | None = param(None, "hidden dimensions; empty = the model's known ones")
    factor: float | None = param(None, "factor on these dimensions; empty = the known one", -10.0, 10.0)
    layers: tuple[int, ...] | None = param(None, "layers that are changed; empty = the known ones")
    last: int = param(1, "rows at the end of the prompt that are changed", 1)
    skip: int = param(0, "tokens at the start that are left alone", 0)

    def __post_init__(self) -> None:
        if self.factor is not None:
            self.check("factor", -10.0, 10.0)
        self.check("last", 1, 1 << 30)
        self.check("skip", 0, 1 << 30)
        for name in ("dims", "layers"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(int(n) for n in value))
        if self.dims is not None and (len(set(self.dims)) < len(self.dims) or not self.dims):
            raise MethodError(f"positional-hidden.dims={self.dims!r}: give distinct dimensions, at least one, or None")

    def prepare(self, family: Family) -> PositionalHidden:
        known = known_for(family)
        dims = self.dims
        if dims is None and known is not None:
            dims = (known.dim,)
        if dims is None:
            name = getattr(family.whole, "name_or_path", "") or family.name
            raise MethodError(
                f"positional-hidden: the positional dimension of {name!r} is not known; run "
                f"`mmfix calibrate positional --model {name}`, or give dims=(…)"
            )
        if not all(0 <= d < family.hidden_size for d in dims):
            raise MethodError(
                f"positional-hidden.dims={dims!r}: this model has dimensions 0 to {family.hidden_size - 1}"
            )
        default = in_proportion(10, 26, family.num_layers) if known is None else range(known.first, known.end)
        factor = self.factor if self.factor is not None else known.factor if known is not None else 0.0
        layers = chosen_layers(self, default, family.num_layers)
        return dataclasses.replace(self, dims=dims, factor=factor, layers=layers)

    def hidden_scale(self, layer: int) -> HiddenScale | None:
        if self.factor is None or self.factor == 1.0 or self.dims is None or layer not in (self.layers or ()):
            return None
        return HiddenScale(dims=self.dims, factor=self.factor, last=self.last, skip=self.skip)


def known_for(family: Family) -> Known | None:
    """The published dimension of a model, or None."""
    kind, text, hidden, layers, vocabulary = family.fingerprint
    for known in KNOWN:
        shape = (known.text_type, known.hidden, known.layers) == (text, hidden, layers)
        if shape and vocabulary in known.vocabulary and (not known.model_types or kind in known.model_types):
            return known
    return None
