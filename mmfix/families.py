"""What the engine must know about a model, asked from the model itself.

``transformers`` answers most of it (``get_decoder``, ``config.image_token_id``); what it does not answer is looked for
by structure, and a missing fact is an :class:`~mmfix.errors.UnsupportedModel` that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmfix import selection, watch
from mmfix.enhanced import Enhanced
from mmfix.errors import UnsupportedModel
from mmfix.method import Method
from mmfix.segments import Markers

_RESAMPLERS = ("QFormerModel", "PerceiverResampler")


@dataclass(frozen=True, eq=False)
class Family:
    """One model, described.

    Args:
        model: the module whose forward pass runs once per token.
        decoder: the language model's stack of layers.
        layers: decoder layers, in order.
        attentions: the attention module of each layer.
        image_token_id: id of the placeholder that marks image tokens in ``input_ids``.
        num_heads: query heads per layer.
        hidden_size: width of the residual stream.
        tower: the vision tower, or None when it cannot be found.
        tower_attentions: the attention module of each tower layer; empty when the tower computes attention itself.
        outer: the model as the user has it, when its own ``generate()`` encodes the picture and then drives `model`
            with embeddings (BLIP-2, InstructBLIP); None when it is `model`.
        cross_layers: layers that attend to the picture instead of the prompt (Llama 3.2 Vision).
        resampler: the Q-Former or perceiver between tower and language model, or None.
        resampler_attentions: its attention modules, in order.
        markers: token ids that open the sides of a conversation, where a processor told them.
        encode: token ids of a text without special tokens, where there is a processor; decode: the way back.
        around_image: ids of tokens that open and close a picture in the prompt, where model or processor name them.
        special: ids that the tokenizer calls special, but for the one that begins a text; empty without a processor.
    """

    model: Any
    decoder: Any
    layers: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    image_token_id: int
    num_heads: int
    hidden_size: int
    tower: Any = None
    tower_attentions: tuple[nn.Module, ...] = ()
    outer: Any = None
    cross_layers: frozenset[int] = frozenset()
    markers: Markers | None = None
    resampler: Any = None
    resampler_attentions: tuple[nn.Module, ...] = ()
    encode: Callable[[str], Sequence[int]] | None = None
    decode: Callable[[Sequence[int]], str] | None = None
    around_image: tuple[int, ...] = ()
    special: tuple[int, ...] = ()

    def looking(self, part: str) -> tuple[nn.Module, ...]:
        """Attention modules of a part that looks at the picture: "tower" or "resampler"."""
        return self.tower_attentions if part == "tower" else self.resampler_attentions

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def pictures_whole(self) -> bool:
        """Whether image tokens see all of their picture, also what follows them (Gemma 3)."""
        return _kind(self.whole) in ("gemma3", "gemma3n")

    @property
    def splits_pictures(self) -> bool:
        """Whether one picture may be several runs of image tokens, or one run hold several tiles of a picture."""
        config = self.whole.config
        tiles = getattr(config, "image_grid_pinpoints", None) is not None
        rows = getattr(getattr(config, "vision_config", None), "model_type", "") == "pixtral"
        return tiles or rows or _kind(self.whole) in _SPLITTING

    @property
    def bidirectional(self) -> bool:
        """Whether every token of a prompt attends to the whole prompt (PaliGemma)."""
        return bool(getattr(self.decoder.config, "use_bidirectional_attention", None))

    @property
    def whole(self) -> Any:
        """The model as the user has it."""
        return self.model if self.outer is None else self.outer

    @property
    def name(self) -> str:
        """Class name of the model, for messages."""
        return type(self.whole).__name__

    @property
    def fingerprint(self) -> tuple[str, str, int, int, int]:
        """(model type, text model type, hidden size, layers, vocabulary): what tells checkpoints' shapes apart."""
        text = self.decoder.config
        return (
            str(self.whole.config.model_type),
            str(text.model_type),
            self.hidden_size,
            self.num_layers,
            int(text.vocab_size),
        )


def describe(model: Any) -> Family:
    """Describe a ``transformers`` vision-language model.

    Raises:
        UnsupportedModel: names the fact that could not be found.
    """
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModel(
            f"{name}: the model was given to torch.compile, around which mmfix cannot reach; pass the model itself and "
            "let generate() compile its decoding (cache_implementation='static')"
        )
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise UnsupportedModel(
            f"{name} is not a transformers model (no config, no get_decoder()); "
            "load it with AutoModelForImageTextToText.from_pretrained"
        )
    image_token_id = getattr(config, "image_token_id", None)
    if image_token_id is None:
        image_token_id = getattr(config, "image_token_index", None)
    if image_token_id is None:
        raise UnsupportedModel(
            f"{name} (model type {_kind(model)!r}): config.image_token_id is missing, so image tokens cannot be found; "
            "use a model that takes images, or set config.image_token_id"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{name} (model type {_kind(model)!r}) is an encoder-decoder: image tokens are keys of its encoder, not of "
            "the decoder that generates; use a decoder-only model"
        )
    driven = _driven(model)
    decoder = _decoder(driven, name, _kind(model))
    attentions = tuple(_attention(layer, name) for layer in decoder.layers)
    text = decoder.config
    heads, hidden = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    if heads is None or hidden is None:
        raise UnsupportedModel(f"{name}: {type(text).__name__} does not tell num_attention_heads and hidden_size")
    tower = model.get_encoder(modality="image") if hasattr(model, "get_encoder") else None
    tower = None if tower is model or tower is decoder else tower
    resampler = next((m for m in model.modules() if type(m).__name__.endswith(_RESAMPLERS)), None)
    return Family(
        driven,
        decoder,
        tuple(decoder.layers),
        attentions,
        int(image_token_id),
        int(heads),
        int(hidden),
        tower,
        _tower_attentions(tower),
        None if driven is model else model,
        frozenset(n for n, module in enumerate(attentions) if "CrossAttention" in type(module).__name__),
        resampler=resampler,
        resampler_attentions=_projecting(resampler),
    )


# Model types whose processors cut a picture into tiles: with tokens between them, or all of them in one run.
_SPLITTING = ("idefics2", "idefics3", "smolvlm", "internvl", "aya_vision", "cohere2_vision", "mllama")


def why_not(family: Family, method: Method) -> str:
    """Why a method means nothing in this family; "" when it applies.

    Where the picture is no part of the prompt, self-attention has no image keys: what a method does to them, or by
    leaving them out, has no meaning there. Replaced maps and changed looks at the picture do.
    """
    if (method.masks or method.reorders) and family.bidirectional:
        return "every token of the prompt already attends to the whole prompt"
    branches = method.branches(family)
    parts = {branch.vision.part for branch in branches if branch.vision is not None}
    if ("tower" in parts or method.steers_tower) and not family.tower_attentions:
        return f"the vision tower ({type(family.tower).__name__}) computes attention outside the AttentionInterface"
    if "resampler" in parts and not family.resampler_attentions:
        return "there is no Q-Former or perceiver whose attention can be replaced"
    if method.tells_pictures_apart and family.splits_pictures:
        return (
            "it cuts pictures into rows or tiles, as several runs of image tokens or several tiles in one run, so "
            "which of them are one picture is not known"
        )
    reasons = [selection.why_not(family, branch.select) for branch in branches if branch.select is not None]
    if method.tower_layers(len(family.tower_attentions)):
        reasons.append(watch.why_not(family))
    reason = next((reason for reason in reasons if reason), "")
    if reason or not family.cross_layers:
        return reason
    touches_keys = method.masks or method.reorders or type(method).edits is not Method.edits
    drops_image = any(not branch.image for branch in branches)
    reads_keys = any(isinstance(one, Enhanced) for one in method.readouts(family))
    reads_heads = any(method.wants_heads(n, family.num_layers) for n in range(family.num_layers))
    receives = any(method.wants_received(n, family.num_layers) for n in range(family.num_layers))
    reads_keys = reads_keys or receives or bool(method.tower_layers(len(family.tower_attentions)))
    reads_states = method.compares_states or method.retrace() is not None
    if touches_keys or drops_image or reads_heads or reads_keys or reads_states or method.rewrites:
        return "image keys live in its cross-attention layers only, none in self-attention"
    return ""


def _kind(model: Any) -> str:
    return str(getattr(model.config, "model_type", "?"))


def _driven(model: Any) -> Any:
    """The module that runs once per token: the model, or its language model when ``generate()`` is its own."""
    from transformers import GenerationMixin

    inner = getattr(model, "language_model", None)
    own = getattr(type(model), "generate", None)
    if own is None or own is GenerationMixin.generate or not isinstance(inner, GenerationMixin):
        return model
    if getattr(inner.config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{type(model).__name__} (model type {_kind(model)!r}): its language model {type(inner).__name__} is an "
            "encoder-decoder, whose image tokens are not keys of the decoder; use a checkpoint with a decoder-only "
            "language model"
        )
    return inner


def _decoder(model: Any, name: str, kind: str) -> Any:
    """The module with the list of layers, below however many wrappers."""
    decoder = model.get_decoder()
    for _ in range(3):
        layers = getattr(decoder, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers):
            break
        inner = decoder.get_decoder() if hasattr(decoder, "get_decoder") else decoder
        if inner is decoder:
            raise UnsupportedModel(
                f"{name} (model type {kind!r}): {type(decoder).__name__} has no list of layers called 'layers'; "
                "this architecture needs an entry in mmfix.families"
            )
        decoder = inner
    if not getattr(decoder, "_can_set_attn_implementation", lambda: False)():
        raise UnsupportedModel(
            f"{name}: {type(decoder).__name__} computes attention outside transformers' AttentionInterface; "
            "update transformers, or use a model whose attention can be replaced"
        )
    return decoder


def _tower_attentions(tower: Any) -> tuple[nn.Module, ...]:
    """Attention modules of a vision tower, in the order in which they run."""
    if tower is None or not getattr(tower, "_can_set_attn_implementation", lambda: False)():
        return ()
    return tuple(
        module
        for module in tower.modules()
        if type(module).__name__.endswith("Attention") and hasattr(module, "config") and any(module.children())
    )


def _projecting(resampler: Any) -> tuple[nn.Module, ...]:
    """Attention modules of a resampler: those that project queries themselves."""
    if resampler is None or not getattr(resampler, "_can_set_attn_implementation", lambda: False)():
        return ()
    return tuple(
        m for m in resampler.modules() if hasattr(m, "config") and (hasattr(m, "q_proj") or hasattr(m, "query"))
    )


def _attention(layer: nn.Module, model_name: str) -> nn.Module:
    """The attention of one decoder layer: the module below it that knows its ``layer_idx`` and projects queries."""
    found = [
        module
        for module in layer.modules()
        if module is not layer
        and getattr(module, "layer_idx", None) is not None
        and "Attention" in type(module).__name__
    ]
    if not found:
        raise UnsupportedModel(
            f"{model_name}: no attention module with a layer_idx in {type(layer).__name__}; "
            "this architecture needs an entry in mmfix.families"
        )
    return found[0]
