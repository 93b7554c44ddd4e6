"""The attention function that transformers calls, and the state it finds on each attention module.

State lives on the modules (one attribute): context variables are lost in streamer threads, and ``generate()`` refuses
unknown keyword arguments. The name is registered together with a mask function: without one, transformers would
pass no mask at all and causality and padding would be lost silently.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmfix.errors import UnsupportedModel
from mmfix_kernels import AttentionCall, Edit, grouped_attention

if TYPE_CHECKING:
    from mmfix.session import Session
    from mmfix.vision import TowerState

NAME = "mmfix"
ATTRIBUTE = "_mmfix"
_UNSUPPORTED = ("position_bias", "s_aux", "head_mask")


def register_attention() -> None:
    """Enter the name ``mmfix`` into transformers' attention and mask tables; the one global effect of mmfix."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


class LayerState:
    """What one attention module needs during a mitigation.

    Args:
        layer: 0-based layer number.
        session: the mitigation's session, shared by all layers.
    """

    def __init__(self, layer: int, session: Session) -> None:
        self.layer = layer
        self.session = session
        self.labels: Tensor | None = None  # Int8[B, capacity]; this layer's own once sinks were found
        self.edits: list[Edit] = []
        self.edit_owners: list[int | None] = []  # position of the method that gave each edit
        self.fired: Tensor | None = None  # Int64[methods, 2]
        self.calls = 0
        self.backend = ""
        self.reason = ""

    def count(self, fired: Tensor) -> None:
        """Add an attention call's fired counts to the methods that own its edits."""
        if self.fired is None:
            self.fired = torch.zeros(len(self.session.methods), 2, dtype=torch.int64, device=fired.device)
        for n, owner in enumerate(self.edit_owners):
            if owner is not None:
                self.fired[owner] += fired[n]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the edits of the running mitigation.

    Args:
        module: the attention module; carries its :class:`LayerState`.
        query: [B, H, L, D]; key and value: [B, H_kv, S, D].
        attention_mask: Bool or additive [B, 1, L, S], or None for plain causal (or full) attention.

    Returns:
        The output [B, L, H, D], and the group masses [B, H, L, 8] when ``output_attentions`` asks for them.
    """
    unknown = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if unknown:
        raise UnsupportedModel(
            f"{type(module).__name__} gives its attention {' and '.join(unknown)}, which mmfix would drop; "
            "use a model without it"
        )
    q_len, s_len = query.shape[2], key.shape[2]
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    if attention_mask is None and causal and 1 < q_len < s_len:
        key, value = key[:, :, :q_len], value[:, :, :q_len]  # a static cache at prefill, aligned top-left
    elif attention_mask is not None and attention_mask.shape[-1] > s_len:
        attention_mask = attention_mask[..., :s_len]
    call: dict[str, Any] = {
        "query": query,
        "key": key,
        "value": value,
        "mask": attention_mask,
        "is_causal": causal and attention_mask is None and q_len > 1,
        "scale": scaling,
        "softcap": softcap,
    }
    state: LayerState | TowerState | None = getattr(module, ATTRIBUTE, None)
    if state is None:
        attended = grouped_attention(AttentionCall(**call))
        return attended.output.transpose(1, 2).contiguous(), None
    if isinstance(state, LayerState):
        return state.session.attend(state, call)
    return state.vision.attend(state, call)
