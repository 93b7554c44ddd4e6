"""The edit vocabulary: plain data that says what changes inside one attention call.

A key carries one int8 :class:`Label`; an edit names sets of labels (:class:`Group`) and a kind of query row
(:class:`Rows`). Nothing here touches a tensor in the hot path: the backends read the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum, IntFlag
from typing import Literal

import torch
from torch import Tensor

from mmfix_kernels.keyed import HeadMean, KeyGain, KeyMove


class Label(IntEnum):
    """Label of one key, stored as int8. At most eight exist, so a set of labels is one byte."""

    TEXT = 0  # prompt text after (or without) an image
    IMAGE = 1
    TEXT_SINK = 2  # a text key that collects attention without carrying meaning (BOS, as a rule)
    IMAGE_SINK = 3
    SYSTEM = 4  # prompt text before the first image
    GENERATED = 5
    MARKED = 6  # free for a method's own class of keys
    PADDING = 7


NUM_LABELS = len(Label)


class Group(IntFlag):
    """A set of labels; an edit acts on every key whose label is in the set."""

    TEXT = 1 << Label.TEXT | 1 << Label.TEXT_SINK | 1 << Label.SYSTEM | 1 << Label.GENERATED
    IMAGE = 1 << Label.IMAGE | 1 << Label.IMAGE_SINK
    SINK = 1 << Label.TEXT_SINK | 1 << Label.IMAGE_SINK
    TEXT_SINK = 1 << Label.TEXT_SINK
    IMAGE_SINK = 1 << Label.IMAGE_SINK
    IMAGE_NONSINK = 1 << Label.IMAGE
    SYSTEM = 1 << Label.SYSTEM
    GENERATED = 1 << Label.GENERATED
    MARKED = 1 << Label.MARKED

    def labels(self) -> tuple[int, ...]:
        """The label numbers in this set, ascending."""
        return tuple(n for n in range(NUM_LABELS) if int(self) >> n & 1)


class Rows(Enum):
    """Which query rows an edit touches. Padding rows are never touched."""

    ALL = "all"
    AFTER_IMAGE = "after_image"  # text after the last image of the prompt, and every generated token
    LAST = "last"  # the last row of the prompt, and every generated token
    GENERATED = "generated"  # generated tokens alone, once they are in the cache


def _check_heads(heads: tuple[int, ...] | None) -> None:
    if heads is not None and (not heads or min(heads) < 0 or len(set(heads)) != len(heads)):
        raise ValueError(f"heads={heads!r}: give distinct head numbers from 0 on, or None for all heads")


@dataclass(frozen=True, kw_only=True)
class ScoreEdit:
    """Change scores before the softmax, on the keys of `group`.

    ``s' = gain*s + abs_gain*|s| + mean_abs_gain*mean_h|s_h| + bias``, the mean over all query heads h of the layer.

    Args:
        group: keys whose scores change.
        rows: query rows that are touched.
        heads: query heads, or None for all.
        gain: factor on the signed score (1 leaves it).
        abs_gain: share of the score's magnitude added (PAI and PAINT: alpha).
        bias: constant added, in nats; ``-inf`` hides the group.
        mean_abs_gain: share of the heads' mean magnitude added, the same for every head (HGAI: alpha).
        batch: Bool[B], the batch rows that are touched; None means all. Contrast branches select theirs by it.
    """

    group: Group
    rows: Rows = Rows.ALL
    heads: tuple[int, ...] | None = None
    gain: float = 1.0
    abs_gain: float = 0.0
    bias: float = 0.0
    batch: Tensor | None = field(default=None, compare=False)
    mean_abs_gain: float = 0.0

    def __post_init__(self) -> None:
        _check_heads(self.heads)

    def __call__(self, scores: Tensor) -> Tensor:
        """[B, H, L, S] → the same shape: every score changed, whatever its group."""
        edited = self.gain * scores + self.abs_gain * scores.abs() + self.bias
        if self.mean_abs_gain:
            edited = edited + self.mean_abs_gain * scores.abs().mean(1, keepdim=True)
        return edited

    def keys(self, groups: KeyGroups) -> Tensor:
        """Bool[B, 1, 1, S]: the keys whose scores change."""
        return groups.member(self.group)[:, None, None, :]


@dataclass(frozen=True, kw_only=True)
class MassGate:
    """Opens a mass move per row and head, from attention masses alone.

    Open iff ``mass(group) >= min_mass`` and ``mass(part) / (mass(group) + slack*n) <= max_share`` and the row sees a
    key of `part`; n is the number of keys of `group`. `slack` reproduces releases that add ``n*1e-6``.
    """

    group: Group
    min_mass: float
    part: Group
    max_share: float
    slack: float = 0.0

    def __post_init__(self) -> None:
        for name in ("min_mass", "max_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"MassGate.{name}={getattr(self, name)}: a share of attention lies in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class MassMove:
    """After the softmax, move `share` of the mass of `source` to `target`, in proportion to the target's own weights.

    ``w_j <- (1 - share)*w_j`` on source keys and ``w_j <- w_j*(1 + share*W_source/W_target)`` on target keys; every
    row still sums to one. A row whose target has no mass is left as it is.
    """

    source: Group
    target: Group
    share: float
    rows: Rows = Rows.ALL
    heads: tuple[int, ...] | None = None
    gate: MassGate | None = None
    batch: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _check_heads(self.heads)
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"MassMove.share={self.share}: a share of attention lies in [0, 1]")
        if self.source & self.target:
            raise ValueError("MassMove: source and target share keys; make the two groups disjoint")


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadScale:
    """Multiply head outputs, after ``A·V`` and before the output projection.

    Args:
        scale: Float[H] or Float[B, H], one factor per query head (query heads, also under GQA).
    """

    scale: Tensor


@dataclass(frozen=True, kw_only=True)
class HeadSelect:
    """Multiply by `factor` the outputs of all heads but the `keep` that look most at `group`, row by row.

    A head's rank is the mass of its weights on the group, or the sum of its scores there (before the softmax, over the
    keys that the row sees). Of equal heads the first is kept. Rows that see no key of the group are left as they are.

    Args:
        group: keys that are looked at.
        keep: query heads that are kept, from 0 on; as many as there are, or more, keeps all.
        factor: on the outputs of the others.
        by: what ranks the heads.
        rows: query rows that are touched.
        batch: Bool[B], the batch rows that are touched; None means all.
    """

    group: Group
    keep: int
    factor: float
    by: Literal["mass", "scores"] = "mass"
    rows: Rows = Rows.ALL
    batch: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.keep < 0:
            raise ValueError(f"HeadSelect.keep={self.keep}: give a number of heads, from 0 on")
        if self.by not in ("mass", "scores"):
            raise ValueError(f"HeadSelect.by={self.by!r}: choose 'mass' or 'scores'")

    def factors(self, scores: Tensor, weights: Tensor, seen: Tensor) -> Tensor:
        """Float32[B, H, L, 1] from scores and weights [B, H, L, S]; `seen` are the keys of the group, broadcastable."""
        looks = torch.where(seen, weights if self.by == "mass" else scores, 0.0).sum(-1, keepdim=True)
        # Equal masses (of a map that is the same in all heads) differ by rounding: a little less for every later head.
        order = torch.arange(looks.shape[1], device=looks.device)[:, None, None]
        looks = looks - 1e-6 * order * looks.abs().amax(1, keepdim=True)
        kept = looks.argsort(dim=1, descending=True, stable=True)[:, : self.keep]
        factors = torch.full_like(looks, self.factor).scatter(1, kept, 1.0)
        return torch.where(seen.any(-1, keepdim=True), factors, 1.0)


MapKind = Literal["uniform", "random", "reversed", "shuffled"]
MAP_KINDS: tuple[str, ...] = ("uniform", "random", "reversed", "shuffled")


@dataclass(frozen=True, kw_only=True, eq=False)
class MapReplacement:
    """Replace the attention map of a row after the softmax; the values stay.

    With n allowed keys in the row, K keys in all, w the row's softmax and Mx its largest entry::

        uniform     1/n                        (not normalised: 1/K)
        random      r_j / sum_allowed r        (not normalised: r_j / sum_all r), r uniform on (0, 1)
        reversed    (Mx - w_j) / (n*Mx - 1)    (not normalised: Mx - w_j)
        shuffled    w with its keys permuted; bidirectional attention only

    r and the permutation depend on `seed`, head and the places of row and key among the tokens that are not padding,
    never on the batch. A reversed row whose mass is zero (one key, or equal scores) keeps its own map.

    Args:
        kind: which map.
        normalise: rows sum to one over the allowed keys; False gives the released code's maps.
        seed: of the random map and the permutation.
        rows: query rows whose map is replaced.
        heads: query heads, or None for all.
        batch: Bool[B], the batch rows whose map is replaced; None means all.
    """

    kind: MapKind
    normalise: bool = True
    seed: int = 0
    rows: Rows = Rows.ALL
    heads: tuple[int, ...] | None = None
    batch: Tensor | None = None

    def __post_init__(self) -> None:
        _check_heads(self.heads)
        if self.kind not in MAP_KINDS:
            raise ValueError(f"MapReplacement.kind={self.kind!r}: choose one of {', '.join(MAP_KINDS)}")


@dataclass(frozen=True, kw_only=True)
class SplitSoftmax:
    """Give the keys of `group` and all other keys a softmax each, in place of one over all, and add the two.

    ``w_j = exp(s_j) / sum_{same part} exp(s)``. A row that sees keys of one part only is left as it is. It takes the
    place of the softmax, after the score edits and before mass moves and replaced maps.

    Args:
        group: keys of the one part.
        mass: "sum" leaves both parts whole, so that a row's weights add up to two; "mean" halves them.
        rows: query rows that are touched.
        heads: query heads, or None for all.
        batch: Bool[B], the batch rows that are touched; None means all.
    """

    group: Group
    mass: Literal["sum", "mean"] = "sum"
    rows: Rows = Rows.ALL
    heads: tuple[int, ...] | None = None
    batch: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _check_heads(self.heads)
        if self.mass not in ("sum", "mean"):
            raise ValueError(f"SplitSoftmax.mass={self.mass!r}: choose 'sum' or 'mean'")


Edit = ScoreEdit | KeyGain | SplitSoftmax | MassMove | KeyMove | MapReplacement | HeadSelect | HeadMean | HeadScale


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyGroups:
    """What the backends know about keys and rows of one call.

    Args:
        labels: Int8[B, S], one :class:`Label` per key; or Int8[B, H, S], where query heads see the keys differently
            (:mod:`mmfix_kernels.perhead`).
        rows: for each kind of :class:`Rows`, Bool[B, L] of the touched query rows; None means all rows.
        first: for each kind, the first row index at which any batch item is touched (L when none is).
        offset: key index of the first query row; None means the rows are the last of the keys.
        columns: gives :func:`membership` of these labels, for a caller that keeps it from step to step; or None.
        before: Int64[B], keys (not padding) that a sliding window has already dropped; None for none.
    """

    labels: Tensor
    rows: Mapping[Rows, Tensor | None]
    first: Mapping[Rows, int]
    offset: int | None = None
    columns: Callable[[tuple[Group, ...]], Tensor] | None = None
    before: Tensor | None = None

    def member(self, group: Group) -> Tensor:
        """Bool[B, S]: which keys belong to `group`."""
        return lookup(group, self.labels.device)[self.labels.long()]

    @staticmethod
    def plain(labels: Tensor) -> KeyGroups:
        """Groups in which every kind of row means all rows."""
        return KeyGroups(labels=labels, rows=dict.fromkeys(Rows), first=dict.fromkeys(Rows, 0))


def membership(labels: Tensor, groups: tuple[Group, ...]) -> Tensor:
    """Float32[B, S, n]: 1 where a key belongs to the group, for n groups."""
    table = torch.stack([lookup(group, labels.device) for group in groups], dim=-1).float()
    return table[labels.long()]


_TABLES: dict[tuple[int, torch.device], Tensor] = {}


def lookup(group: Group, device: torch.device) -> Tensor:
    """Bool[8]: membership of each label in `group`, kept per device."""
    key = (int(group), device)
    if key not in _TABLES:
        bits = [bool(int(group) >> n & 1) for n in range(NUM_LABELS)]
        with torch.inference_mode(False):  # the table outlives the caller's mode
            _TABLES[key] = torch.tensor(bits, device=device)
    return _TABLES[key]


def head_mask(heads: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """Bool[count]: the chosen query heads; ``ValueError`` for a head that the layer does not have."""
    if max(heads) >= count:
        raise ValueError(f"heads={heads}: this layer has query heads 0..{count - 1}")
    chosen = torch.zeros(count, dtype=torch.bool, device=device)
    chosen[list(heads)] = True
    return chosen
