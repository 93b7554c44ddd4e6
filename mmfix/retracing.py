"""Another look at the image where the model is uncertain: image tokens as keys and values of one layer's MLP (MemVR).

The picture is remembered as it enters the first layer, row by row; nothing is written into the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmfix.errors import UnsupportedModel
from mmfix.inputs import rows_for
from mmfix.readouts import final_norm, output_embeddings, scaled
from mmfix.steering import mlp_of
from mmfix_kernels import Rows

if TYPE_CHECKING:
    from mmfix.session import Session


@dataclass(frozen=True, kw_only=True)
class Retrace:
    """What is done once per token and pass, after the first layer l of `layers` where it is uncertain enough.

    With p the probabilities of the `top` likeliest tokens among themselves, read from what layer l gives, uncertainty
    is ``-sum p log p / log(top)``, from 0 to 1. Where it exceeds `threshold`, the MLP of layer l + 1 gives for its
    input x, V [N, hidden] being the image tokens::

        (1 - ratio) MLP(x) + ratio s f(x V^T) V         s: such that mean |s f(x V^T) V| = mean |MLP(x)|

    Tokens of a prompt do what its last one does.

    Args:
        layers: where uncertainty is read; none is the model's last layer.
        activation: f is the model's own, else the identity.
    """

    layers: tuple[int, ...]
    threshold: float
    ratio: float
    top: int = 10
    activation: bool = False


class Retracing:
    """The hooks of one :class:`Retrace`, and what they remember of the prompts at hand.

    Attributes:
        memory: Float32[B, N, hidden], image tokens as they enter the first layer; zeros where a prompt has fewer.
    """

    def __init__(self, session: Session, owner: int, wanted: Retrace) -> None:
        self.session, self.owner, self.wanted = session, owner, wanted
        self.norm, self.head = final_norm(session.family), output_embeddings(session.family)
        self.memory: Tensor | None = None
        self.spent: Tensor | None = None  # Bool[B, D]: tokens that had their look in this pass
        self.now: Tensor | None = None  # Bool[B, D]: tokens whose look is in the next layer

    def hooks(self) -> Iterator[Any]:
        """Install, one handle after the other; the handles that remove it again."""
        layers = self.session.family.layers
        yield layers[0].register_forward_pre_hook(self._remember, with_kwargs=True)
        for number in self.wanted.layers:
            mlp = mlp_of(layers[number + 1])
            if isinstance(mlp, nn.Linear):
                raise UnsupportedModel(
                    f"{self.session.family.name}: the MLP of {type(layers[number + 1]).__name__} is no module, so "
                    f"{self.session.methods[self.owner].info.name} cannot reach its input; use another method"
                )
            yield layers[number].register_forward_hook(self._deciding(number))
            yield mlp.register_forward_hook(self._looking(number + 1))

    def close(self) -> None:
        self.memory = self.spent = self.now = None

    @property
    def _acting(self) -> bool:
        return self.session.active and not self.session.aside

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The image tokens of a prompt, or of a further piece of one, before the first layer."""
        session, current = self.session, self.session.current
        if not self._acting or not current.prefill or session.spans is None:
            return
        hidden = (args[0] if args else kwargs["hidden_states"])[:, : current.length].detach().float()
        image = session.spans.image[:, current.past : current.past + current.length].to(hidden.device)
        order = torch.argsort((~image).int(), dim=-1, stable=True)[:, : int(image.sum(-1).amax())]
        found = hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))
        found = found.masked_fill(~image.gather(1, order)[..., None], 0.0)
        if current.past and self.memory is not None:
            found = torch.cat([rows_for(self.memory, len(found)), found], dim=1)
        self.memory = found

    def _deciding(self, number: int) -> Callable[..., None]:
        first = number == min(self.wanted.layers)

        def decide(module: nn.Module, args: Any, output: Any) -> None:
            if not self._acting or self.memory is None or not self.memory.shape[1]:
                self.now = None
                return
            states = self._deciders(output[0] if isinstance(output, tuple) else output)
            logits = scaled(self.session.family, self.head.forward(self.norm.forward(states))).float()
            likely = logits.topk(self.wanted.top, dim=-1).values.log_softmax(-1)
            uncertain = -(likely.exp() * likely).sum(-1) / math.log(self.wanted.top) > self.wanted.threshold
            assert self.session.spans is not None
            uncertain = uncertain & rows_for(self.session.spans.has_image, len(states)).to(uncertain.device)[:, None]
            self.now = uncertain if first or self.spent is None else uncertain & ~self.spent
            self.spent = self.now if first or self.spent is None else self.spent | self.now

        return decide

    @property
    def _prompt(self) -> int:
        """Tokens of this pass that are the prompt's."""
        session, current = self.session, self.session.current
        assert session.spans is not None
        return current.length if current.prefill else session.spans.length if not current.past else 0

    def _deciders(self, states: Tensor) -> Tensor:
        """[B, D, hidden]: the states of the prompt's last token, and of every token after it."""
        prompt = self._prompt
        if not prompt:
            return states
        assert self.session.spans is not None
        last = rows_for(self.session.spans.last, len(states)).to(states.device) - self.session.current.past
        newest = states[torch.arange(len(states), device=states.device), last]
        return torch.cat([newest[:, None], states[:, prompt:]], dim=1)

    def _looking(self, number: int) -> Callable[..., Any]:
        def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not self._acting or self.now is None or self.memory is None:
                return None
            plain = output[0] if isinstance(output, tuple) else output
            now, self.now = self.now.to(plain.device), None
            prompt = self._prompt
            if prompt:
                now = torch.cat([now[:, :1].expand(-1, prompt), now[:, 1:]], dim=1)
                rows = self.session.current.rows[Rows.ALL]
                now = now if rows is None else now & rows.to(now.device)
            session = self.session
            counters = session.layers[number]._counters(now.device)
            counters[self.owner] += torch.stack([now.sum(), now.new_tensor(now.numel(), dtype=torch.int64)])
            changed = torch.where(now[..., None], self._retraced(module, args[0], plain), plain)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return look

    def _retraced(self, module: nn.Module, x: Tensor, plain: Tensor) -> Tensor:
        """The MLP's output [B, L, hidden] blended with what the image gives for its input x."""
        assert self.memory is not None
        memory = rows_for(self.memory, len(x)).to(x.device)
        match = x.float() @ memory.transpose(1, 2)
        if self.wanted.activation:
            match = getattr(module, "act_fn", torch.nn.functional.silu)(match)
        seen, own = match @ memory, plain.float()
        scale = own.abs().mean(-1, keepdim=True) / seen.abs().mean(-1, keepdim=True).clamp(min=1e-12)
        return (own + self.wanted.ratio * (scale * seen - own)).to(plain.dtype)
