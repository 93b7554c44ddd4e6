"""Logits read out of the middle of the language model, beside its own: layer contrast needs no second row.

The hidden state between two layers goes through the model's own final norm and output embeddings. States are taken
where a layer receives them, for the positions whose logits were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmfix.enhanced import Enhanced, Enhancing
from mmfix.errors import UnsupportedModel
from mmfix_kernels import AttentionCall, KeyGroups

if TYPE_CHECKING:
    from mmfix.families import Family
    from mmfix.session import Session

_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")


@dataclass(frozen=True, kw_only=True)
class Readout:
    """One hidden state, as logits.

    Args:
        layer: decoder layers that the state has passed, 0 (embeddings) to one less than the model has.
        norm: whether it goes through the final norm before the output embeddings.
    """

    layer: int
    norm: bool = True


class Readouts:
    """The readouts of a session: hooks that note states, and the logits made of them."""

    def __init__(self, family: Family, wanted: tuple[Readout | Enhanced, ...], session: Session) -> None:
        self.family, self.wanted, self.session = family, wanted, session
        self.enhancing = [Enhancing(family, one) for one in wanted if isinstance(one, Enhanced)]
        self.norm = final_norm(family)
        self.head = output_embeddings(family)
        self.keep: Any = 0  # logits_to_keep of the pass
        self._states: dict[int, Tensor] = {}  # layer → [B, L, hidden]; the number of layers → what leaves the last
        self._enhanced: list[Tensor] = []  # [B, L, hidden], of the enhanced readouts in order
        self._checked = False

    def hooks(self) -> Iterator[Any]:
        """Install, one by one; the handles that remove it again."""
        layers = self.family.layers
        for n in sorted({one.layer for one in self.wanted if isinstance(one, Readout)}):
            yield layers[n].register_forward_pre_hook(self._entering(n), with_kwargs=True)
        yield layers[-1].register_forward_hook(self._leaving, with_kwargs=True)

    @property
    def alone(self) -> bool:
        """Whether the last layer runs once more without its attention."""
        return any(one.alone for one in self.enhancing)

    def read(self, layer: int, call: AttentionCall, groups: Callable[[int], KeyGroups]) -> None:
        """At an attention call of the pass, for readouts that enter the last layer from another one."""
        for one in self.enhancing:
            one.read(layer, call, groups, self.keep)

    def _entering(self, layer: int) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.session.active and not self.session.aside:
                self._states[layer] = args[0] if args else kwargs["hidden_states"]

        return enter

    def _leaving(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self.session.active or self.session.aside:
            return
        if not self._checked:
            self._states[len(self.family.layers)] = output[0] if isinstance(output, tuple) else output
        self._enhanced = [one.leaving(module, args, kwargs) for one in self.enhancing]

    def logits(self, own: Tensor) -> Tensor:
        """[B, n, k, V]: the readouts at the positions of the model's `own` logits [B, k, V].

        Raises:
            UnsupportedModel: what the last layer gives does not read out as the model's own logits.
        """
        if not self._checked:
            self._check(own)
        enhanced = iter(self._enhanced)
        found = [
            self._read(self._states[one.layer], one.norm) if isinstance(one, Readout) else self._read(next(enhanced))
            for one in self.wanted
        ]
        return torch.stack(found, dim=1)

    def clear(self) -> None:
        """After a pass."""
        self._states, self._enhanced = {}, []

    def _read(self, state: Tensor, norm: bool = True) -> Tensor:
        """[B, k, V] of [B, L, hidden]."""
        chosen = slice(-self.keep, None) if isinstance(self.keep, int) else self.keep
        state = state[:, chosen]
        logits: Tensor = self.head(self.norm(state) if norm else state)
        return scaled(self.family, logits)

    def _check(self, own: Tensor) -> None:
        """Once: the way to logits is the model's, since it leads from the last state to the model's own."""
        last = self._states.pop(len(self.family.layers))
        fits = last.ndim == 3 and last.shape[-1] == self.family.hidden_size
        read = self._read(last) if fits else own.new_zeros(0)
        shown = own > torch.finfo(own.dtype).min / 2  # some models hide tokens that stand for pictures
        fits = fits and read.shape == own.shape
        error = float((read - own)[shown].abs().max()) if fits else float("inf")
        if error > 0.02 * float(own[shown].abs().max()):
            raise UnsupportedModel(
                f"{self.family.name}: final norm and output embeddings do not turn the last layer's state into the "
                "model's logits, so earlier states cannot be read out; use a method without readouts"
            )
        self._checked = True


def scaled(family: Family, logits: Tensor) -> Tensor:
    """What some models do to logits at the end."""
    config = family.decoder.config
    logits = logits * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def final_norm(family: Family) -> nn.Module:
    """The norm between the last layer and the output embeddings."""
    for name in _NORMS:
        found = getattr(family.decoder, name, None)
        if isinstance(found, nn.Module):
            return found
    raise UnsupportedModel(
        f"{family.name}: {type(family.decoder).__name__} has no final norm called {', '.join(_NORMS)}, so hidden "
        "states cannot be read out; use a method without readouts"
    )


def output_embeddings(family: Family) -> nn.Module:
    """The module that makes logits."""
    found = family.model.get_output_embeddings()
    if not isinstance(found, nn.Module):
        raise UnsupportedModel(
            f"{family.name} has no output embeddings, so hidden states cannot be read out; use a method without "
            "readouts"
        )
    return found


def tied(family: Family) -> bool:
    """Whether input and output embeddings are the same weights."""
    embedding, head = family.model.get_input_embeddings(), family.model.get_output_embeddings()
    return getattr(embedding, "weight", None) is getattr(head, "weight", embedding)
