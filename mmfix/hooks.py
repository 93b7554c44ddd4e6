"""The attention function that transformers calls, and the state it finds on each attention module.

State lives on the modules (one attribute): context variables are lost in streamer threads, and ``generate()`` refuses
unknown keyword arguments. The name is registered together with a mask function: without one, transformers would
pass no mask at all and causality and padding would be lost silently.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mmfix.errors import UnsupportedModel
from mmfix.restore import ATTRIBUTE
from mmfix_kernels import AttentionCall, grouped_attention

if TYPE_CHECKING:
    from mmfix.layers import LayerState
    from mmfix.vision import TowerState

NAME = "mmfix"
_UNSUPPORTED = ("position_bias", "s_aux", "head_mask")


def register_attention() -> None:
    """Enter the name ``mmfix`` into transformers' attention and mask tables; the one global effect of mmfix."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


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
        The output [B, L, H, D], and None: there are no maps to hand out (``output_attentions`` gives none).
    """
    unknown = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if unknown:
        raise UnsupportedModel(
            f"{type(module).__name__} gives its attention {' and '.join(unknown)}, which mmfix would drop; "
            "use a model without it"
        )
    state: LayerState | TowerState | None = getattr(module, ATTRIBUTE, None)
    prefix = None if state is None else state.prefix()
    q_len, s_len = query.shape[2], key.shape[2] + (0 if prefix is None else prefix[0].shape[2])
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
    if prefix is not None:
        call["prefix_key"], call["prefix_value"] = prefix
    if state is None:
        attended = grouped_attention(AttentionCall(**call))
        return attended.output.transpose(1, 2).contiguous(), None
    window = sliding_window if sliding_window is not None else getattr(module, "sliding_window", None)
    return state.attend(call, window)
