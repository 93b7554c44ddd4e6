"""What a method is: a frozen dataclass of numbers with a few optional answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from mmfix.errors import MethodError
from mmfix_kernels import Edit, HeadScale

if TYPE_CHECKING:
    from mmfix.branches import Branch
    from mmfix.enhanced import Enhanced
    from mmfix.families import Family
    from mmfix.focal import Refocus
    from mmfix.hidden import HiddenScale
    from mmfix.mixing import Mix
    from mmfix.prompts import Rewrite
    from mmfix.readouts import Readout
    from mmfix.reorder import Reorder
    from mmfix.retracing import Retrace
    from mmfix.search import OverTrust
    from mmfix.segments import MaskEdit, Segments
    from mmfix.spans import TokenSpans
    from mmfix.steering import Blend, Steer

Kind = Literal[
    "score edit", "mass move", "map", "mask", "head scale", "hidden edit", "positions", "prompt", "contrast", "search"
]


@dataclass(frozen=True)
class Param:
    """One parameter of a method, for help texts and generated controls.

    Args:
        default: value when none is given.
        help: one line.
        low, high: the range worth trying.
        example: for a text of the user's own, what it may look like. A text without one (such as a file's name) is
            never asked of a visitor.
    """

    default: Any
    help: str = ""
    low: float | None = None
    high: float | None = None
    example: str | None = None


@dataclass(frozen=True)
class MethodInfo:
    """What is known of a method without running it.

    Args:
        name: registry name.
        title: the method's name in its paper.
        paper: citation key, such as ``arXiv:2503.03321``.
        kind: class in the edit vocabulary.
        passes: forward passes per generated token (1 = no extra pass).
        trained_in_paper: True when the paper trains with the change and training-free use is an extrapolation.
        params: parameter name → :class:`Param`.
        cls: the dataclass.
    """

    name: str
    title: str
    paper: str
    kind: Kind
    passes: float
    trained_in_paper: bool
    params: dict[str, Param]
    cls: type[Method]


@dataclass(frozen=True, eq=False)
class Site:
    """One attention layer, as a method sees it.

    Args:
        layer: 0-based layer number.
        num_layers, num_heads: of the language model.
        spans: token spans of the prompt at hand.
        segments: roles, images and turns of its tokens; for methods that answer :meth:`Method.mask`, else None.
        states: outputs of this layer at the last token of the prompt with and without its image, [B, hidden] each, from
            plain passes; for methods that set :attr:`Method.compares_states`, else None.
    """

    layer: int
    num_layers: int
    num_heads: int
    spans: TokenSpans
    segments: Segments | None = None
    states: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods: a frozen dataclass of numbers with a few optional answers.

    Answers return data; the engine does the work. A method that overrides none of them changes nothing.
    """

    info: ClassVar[MethodInfo]

    def prepare(self, family: Family) -> Method:
        """This method with every default resolved for a model; raise ``MethodError`` when that cannot be done."""
        return self

    def measured(self, family: Family) -> dict[str, Any] | None:
        """What the method reads from a file of its own that was measured on this model; None for nothing.

        ``{"values": {name: identity of the file}, "data": …, "data_sha256": …, "revision": …}``, what is known of it.
        """
        return None

    def edits(self, site: Site) -> Sequence[Edit]:
        """Edits of one layer, asked once per prompt and layer."""
        return ()

    def mask(self, site: Site) -> Sequence[MaskEdit]:
        """Pairs of prompt tokens that this layer opens or closes, asked once per prompt and layer."""
        return ()

    @property
    def masks(self) -> bool:
        """Whether the method answers :meth:`mask`."""
        return type(self).mask is not Method.mask

    def positions(self, spans: TokenSpans) -> Tensor:
        """Int64[B, T]: the position of every prompt token; generated ones count on from the largest."""
        raise NotImplementedError

    def counts_patches(self, family: Family) -> bool:
        """Whether it gives every patch of a picture a number of its own."""
        return bool(self.tower_layers(len(family.tower_attentions)))

    @property
    def tells_pictures_apart(self) -> bool:
        """Whether it must know which image tokens are one picture."""
        return False

    @property
    def rewrites_positions(self) -> bool:
        """Whether the method answers :meth:`positions`."""
        return type(self).positions is not Method.positions

    def reorder(self, site: Site) -> Reorder | None:
        """Segments of the prompt whose order is chosen per head and query, asked once per prompt and layer."""
        return None

    @property
    def reorders(self) -> bool:
        """Whether the method answers :meth:`reorder`."""
        return type(self).reorder is not Method.reorder

    @property
    def answer_marker(self) -> tuple[int, ...] | None:
        """Token ids that begin an answer, for a method that tells questions from answers; None has no say."""
        return None

    def wants_sinks(self, layer: int, num_layers: int) -> bool:
        """Whether :meth:`sinks` is asked at this layer."""
        return False

    def sinks(self, site: Site, hidden: Tensor) -> Tensor:
        """Bool[B, L]: prompt keys that are attention sinks at this layer, from its input ``hidden`` [B, L, hidden].

        L tokens are the whole prompt, or the newest piece of it.
        """
        raise NotImplementedError

    def wants_heads(self, layer: int, num_layers: int) -> bool:
        """Whether :meth:`head_scale` is asked at this layer; it costs a text-only prefill."""
        return False

    def head_scale(self, site: Site, heads: Tensor, text_only: Tensor) -> HeadScale:
        """Head factors from head outputs at the last prompt position with and without the image, both [B, H, D]."""
        raise NotImplementedError

    def wants_received(self, layer: int, num_layers: int) -> bool:
        """Whether :meth:`received` is asked at this layer; it costs a second look at the prompt's attention."""
        return False

    def received(self, site: Site, mass: Tensor) -> Sequence[Edit]:
        """Edits from what each prompt key receives: Float32[B, H, T], the mean attention of the rows that see it."""
        raise NotImplementedError

    def tower_layers(self, count: int) -> tuple[int, ...]:
        """Layers of the vision tower's `count` whose class token :meth:`patches` wants to see; none as a rule."""
        return ()

    def patches(self, maps: Mapping[int, Tensor]) -> Tensor:
        """Float32[P, N]: a number per patch, from the class token's attention Float32[P, H, N] per tower layer."""
        raise NotImplementedError

    def patch_edits(self, site: Site, values: Tensor) -> Sequence[Edit]:
        """Edits of one layer from the patches' numbers on the prompt's tokens, Float32[B, T]; 0 on other tokens."""
        raise NotImplementedError

    @property
    def scales_text_only(self) -> bool:
        """Whether the factors of :meth:`head_scale` act on the branch without the image too."""
        return True

    def hidden_scale(self, layer: int) -> HiddenScale | None:
        """Dimensions of this layer's input that are scaled for queries and keys alone; asked once, when it starts."""
        return None

    def steering(self, site: Site) -> Sequence[Steer]:
        """Changes of the hidden states of one layer, asked once per prompt with an image and layer."""
        return ()

    @property
    def steers(self) -> bool:
        """Whether the method answers :meth:`steering`."""
        return type(self).steering is not Method.steering

    @property
    def compares_states(self) -> bool:
        """Whether :meth:`steering` reads the states of the prompt with and without its image; two more prefills."""
        return False

    def blend(self) -> Blend | None:
        """What the language head reads besides the last layer's states; None for nothing."""
        return None

    def retrace(self) -> Retrace | None:
        """Where uncertain tokens look at the image again, asked once; None for nowhere."""
        return None

    def tower_steering(self, layer: int, num_layers: int) -> Sequence[Steer]:
        """Changes of the states of one layer of the vision tower, asked once."""
        return ()

    @property
    def steers_tower(self) -> bool:
        """Whether the method answers :meth:`tower_steering`."""
        return type(self).tower_steering is not Method.tower_steering

    def branches(self, family: Family) -> Sequence[Branch]:
        """Counterfactual rows beside every prompt row; each costs a forward pass per token, in the same batch."""
        return ()

    def rewrite(self) -> Rewrite | None:
        """What is made of every prompt before the model reads it, unseen by ``generate()``; None leaves prompts alone.

        One row per prompt and no extra pass; a longer prompt makes prefill and cache longer.
        """
        return None

    def prepends(self, layer: int) -> bool:
        """Whether the token before the first image takes the state of the prompt's last one at this layer's input."""
        return False

    @property
    def rewrites(self) -> bool:
        """Whether the method answers :meth:`rewrite`."""
        return type(self).rewrite is not Method.rewrite

    def readouts(self, family: Family) -> Sequence[Readout | Enhanced]:
        """Hidden states that are read out as logits beside the model's own; not together with branches."""
        return ()

    def mix(self) -> Mix | None:
        """How the logits of the branches, or of the readouts, combine; None when nothing is combined or cut."""
        return None

    def search(self) -> OverTrust | Refocus | None:
        """What ``generate()`` does in the place of its own search; None when nothing."""
        return None

    def check(self, name: str, low: float, high: float) -> None:
        """Raise ``MethodError`` unless ``low <= self.name <= high``."""
        value = getattr(self, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            label = getattr(getattr(self, "info", None), "name", type(self).__name__)
            raise MethodError(f"{label}.{name}={value!r}: give a number from {low:g} to {high:g}")


def layer_numbers(name: str, layers: Sequence[int], count: int) -> tuple[int, ...]:
    """Layer numbers from 0, those counted from the end resolved.

    Raises:
        MethodError: a number that a model of `count` layers does not have.
    """
    wrong = [n for n in layers if not -count <= n < count]
    if wrong:
        raise MethodError(f"{name}={tuple(layers)!r}: give layers from {-count} to {count - 1}")
    return tuple(sorted({n % count for n in layers}))


def chosen_layers(method: Method, default: Iterable[int], num_layers: int) -> tuple[int, ...]:
    """``method.layers``, negative ones counted from the end, or `default` where it is None; sorted.

    Raises:
        MethodError: a layer that the model does not have.
    """
    layers: tuple[int, ...] | None = method.layers  # type: ignore[attr-defined]
    if layers is None:
        return tuple(default)
    return layer_numbers(f"{method.info.name}.layers", layers, num_layers)


def in_proportion(first: int, end: int, num_layers: int, of: int = 32) -> range:
    """Layers first … end - 1 of a model with `of` layers, in proportion to `num_layers`; at least one."""
    start = min(round(first * num_layers / of), num_layers - 1)
    return range(start, max(start + 1, round(end * num_layers / of)))
