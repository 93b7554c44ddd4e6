"""Token Prepending: a token in front of the picture that knows the whole prompt."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from mmfix.errors import MethodError
from mmfix.families import Family
from mmfix.method import Method, in_proportion
from mmfix.prepending import before_image
from mmfix.prompts import Rewrite
from mmfix.registry import param, register


@register("token-prepending", title="Token Prepending", paper="arXiv:2412.11556", kind="prompt")
@dataclass(frozen=True, kw_only=True)
class TokenPrepending(Method):
    """Put a placeholder before the picture and give it, in early layers, the state of the prompt's last token.

    *Token Prepending: A Training-Free Approach for Eliciting Better Sentence Embeddings from LLMs* (ACL 2025,
    arXiv:2412.11556). With p the placeholder and T the prompt's last token, at the input of layers n = 1 … depth::

        h_n[p] <- h_n[T]

    so that the picture and the text after the placeholder attend to what the prompt as a whole has become so far,
    under the causal mask as it is. The paper reads sentence embeddings; here the technique is a cheap control for
    methods that open the mask. One pass per token, on a prompt one token longer, made inside ``generate()``; decoding
    changes nothing. Prompts without an image are left alone.

    The paper's placeholder is a token of its own before the sentence, and it exits early; here it is the token given,
    before the first image, and all layers run. The released code was not read. Prompts have to come at once, as ids;
    models that number image tokens along several axes, and caches of fixed size, are refused.

    Args:
        depth: layers whose input is changed, after the first one, from 0 on; 0 changes nothing and inserts nothing.
            None takes 7 of 32, in proportion.
        token: id of the placeholder; None takes the model's beginning-of-text token.

    Raises:
        MethodError: a value out of range, more layers than the model has, or no placeholder.
    """

    depth: int | None = param(None, "layers whose input is changed; empty = 7 of 32, in proportion", 0)
    token: int | None = param(None, "id of the placeholder; empty = the beginning-of-text token", 0)

    def __post_init__(self) -> None:
        for name in ("depth", "token"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 0):
                raise MethodError(f"token-prepending.{name}={value!r}: give a whole number from 0 on, or None")

    def prepare(self, family: Family) -> TokenPrepending:
        depth = in_proportion(0, 7, family.num_layers).stop if self.depth is None else self.depth
        if depth >= family.num_layers:
            raise MethodError(
                f"token-prepending.depth={depth}: this model has {family.num_layers - 1} layers after the first"
            )
        token = self.token
        if token is None:
            token = getattr(family.decoder.config, "bos_token_id", None)
        if not isinstance(token, int) or token == family.image_token_id:
            raise MethodError(
                f"token-prepending.token={token!r}: give the id of a text token; the model's configuration names no "
                "beginning-of-text token that could stand in"
            )
        return dataclasses.replace(self, depth=depth, token=token)

    def rewrite(self) -> Rewrite | None:
        return functools.partial(before_image, token=self.token or 0) if self.depth else None

    def prepends(self, layer: int) -> bool:
        return self.depth is not None and 1 <= layer <= self.depth
