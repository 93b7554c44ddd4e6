"""What the engine must know about a model, asked from the model itself.

``transformers`` answers most of it (``get_decoder``, ``config.image_token_id``); what it does not answer is looked for
by structure, and a missing fact is an :class:`~mmfix.errors.UnsupportedModel` that names it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from mmfix.errors import UnsupportedModel
from mmfix.segments import Markers


@dataclass(frozen=True, eq=False)
class Family:
    """One model, described.

    Args:
        model: the module that ``generate()`` drives.
        decoder: the language model's stack of layers.
        layers: decoder layers, in order.
        attentions: the self-attention module of each layer.
        image_token_id: id of the placeholder that marks image tokens in ``input_ids``.
        num_heads: query heads per layer.
        hidden_size: width of the residual stream.
        tower: the vision tower, or None when it cannot be found.
        tower_attentions: the attention module of each tower layer; empty when the tower computes attention itself.
        markers: token ids that open the sides of a conversation, where a processor told them.
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
    markers: Markers | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def fingerprint(self) -> tuple[str, str, int, int, int]:
        """(model type, text model type, hidden size, layers, vocabulary): what tells checkpoints' shapes apart."""
        text = self.decoder.config
        return (
            str(self.model.config.model_type),
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
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise UnsupportedModel(
            f"{name} is not a transformers model (no config, no get_decoder()); "
            "load it with AutoModelForImageTextToText.from_pretrained"
        )
    kind = getattr(config, "model_type", "?")
    image_token_id = getattr(config, "image_token_id", None)
    if image_token_id is None:
        image_token_id = getattr(config, "image_token_index", None)
    if image_token_id is None:
        raise UnsupportedModel(
            f"{name} (model type {kind!r}): config.image_token_id is missing, so image tokens cannot be found; "
            "use a model that takes images, or set config.image_token_id"
        )
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UnsupportedModel(
            f"{name} (model type {kind!r}): {type(decoder).__name__} has no list of layers called 'layers'; "
            "this architecture needs an entry in mmfix.families"
        )
    attentions = tuple(_attention(layer, name) for layer in layers)
    text = decoder.config
    heads, hidden = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    if heads is None or hidden is None:
        raise UnsupportedModel(f"{name}: {type(text).__name__} does not tell num_attention_heads and hidden_size")
    if not getattr(decoder, "_can_set_attn_implementation", lambda: False)():
        raise UnsupportedModel(
            f"{name}: {type(decoder).__name__} computes attention outside transformers' AttentionInterface; "
            "update transformers, or use a model whose attention can be replaced"
        )
    tower = model.get_encoder(modality="image") if hasattr(model, "get_encoder") else None
    tower = None if tower is model or tower is decoder else tower
    return Family(
        model,
        decoder,
        tuple(layers),
        attentions,
        int(image_token_id),
        int(heads),
        int(hidden),
        tower,
        _tower_attentions(tower),
    )


def _tower_attentions(tower: Any) -> tuple[nn.Module, ...]:
    """Attention modules of a vision tower, in the order in which they run."""
    if tower is None or not getattr(tower, "_can_set_attn_implementation", lambda: False)():
        return ()
    return tuple(
        module
        for module in tower.modules()
        if type(module).__name__.endswith("Attention") and hasattr(module, "config") and any(module.children())
    )


def _attention(layer: nn.Module, model_name: str) -> nn.Module:
    """The self-attention of one decoder layer: the module that knows its ``layer_idx`` and projects queries."""
    found = [
        module
        for module in layer.modules()
        if getattr(module, "layer_idx", None) is not None and "Attention" in type(module).__name__
    ]
    if not found:
        raise UnsupportedModel(
            f"{model_name}: no attention module with a layer_idx in {type(layer).__name__}; "
            "this architecture needs an entry in mmfix.families"
        )
    return found[0]
