"""Which names the server answers to, and which methods a request may choose."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from mmfix.errors import MmfixError
from mmfix_evals.arms import BASELINE, Arm, resolve
from mmfix_evals.errors import EvalError, UsageError
from mmfix_evals.serve.errors import ApiError

_ANY = ":*"
_LONGEST = 500  # characters of a method given in a request


class Catalogue:
    """Names and methods of one server.

    ``NAME`` is the model with the server's method, ``NAME:METHOD`` with a method of the list. A request may also say
    ``"mmfix": {"method": …, "params": {…}}``. Nothing that is not on the list is ever run.

    Args:
        name: the model's served name.
        default: the server's method, such as ``"vhr"``, ``"var:move=0.4+vhr"`` or ``"greedy"``.
        allowed: further methods; ``"vhr:*"`` allows a method with any parameters.
        model: the loaded model, whose calibrated parameters count; None for the defaults of the methods.

    Raises:
        MethodError, UsageError: a method that does not exist or cannot be built.
    """

    def __init__(self, name: str, default: str, allowed: Sequence[str] = (), model: Any = None) -> None:
        self.name = name
        self._model = model
        self.default = resolve(default, model)
        self._open = {text.removesuffix(_ANY) for text in allowed if text.endswith(_ANY)}
        for one in self._open:
            if resolve(one, model).methods == ():
                raise UsageError(f"--allow {one}{_ANY}: {BASELINE} has no parameters; write --allow {BASELINE}")
        texts = dict.fromkeys([default, *(text for text in allowed if not text.endswith(_ANY)), *sorted(self._open)])
        self._arms = {text: self.default if text == default else resolve(text, model) for text in texts}
        self._specs = {_canonical(arm): arm for arm in reversed(self._arms.values())}

    def names(self) -> list[str]:
        """Every model name that can be asked for; the first is the server's default."""
        return [self.name, *(f"{self.name}:{text}" for text in self._arms)]

    def methods(self) -> list[str]:
        """The list as it is shown in messages."""
        return [*self._arms, *(f"{one}{_ANY}" for one in sorted(self._open))]

    def label(self, arm: Arm) -> str:
        """A name for counters; there are only as many of them as methods on the list."""
        return arm.name if arm.name in self._arms else "+".join(one.info.name for one in arm.methods) + _ANY

    def choose(self, model: str, extra: Any) -> Arm:
        """The method of one request.

        Args:
            model: the request's ``model``.
            extra: the request's ``mmfix`` object, or None.

        Raises:
            ApiError: 404 for a model that is not served, 403 for a method that is not on the list, 400 for one that
                cannot be built.
        """
        text = self._from_name(model)
        wanted = _from_extra(extra)
        if wanted is None:
            return self.default if text is None else self._arms[text]
        if text is not None and text != wanted:
            raise ApiError(
                400, f"model names method {text!r} and mmfix.method {wanted!r}; give one of them", "invalid_value",
                param="mmfix",
            )  # fmt: skip
        return self._arms.get(wanted) or self._built(wanted)

    def _from_name(self, model: str) -> str | None:
        if model == self.name:
            return None
        text = model.removeprefix(f"{self.name}:")
        if text != model and text in self._arms:
            return text
        raise ApiError(
            404, f"model {model[:_LONGEST]!r} is not served here; choose one of: {', '.join(self.names())}",
            "model_not_found", param="model",
        )  # fmt: skip

    def _built(self, text: str) -> Arm:
        try:
            arm = resolve(text, self._model)
        except (MmfixError, EvalError) as error:
            raise ApiError(400, str(error), "invalid_method", param="mmfix.method") from error
        listed = self._specs.get(_canonical(arm))
        if listed is not None:
            return listed
        if arm.methods and all(method.info.name in self._open for method in arm.methods):
            return arm
        raise ApiError(
            403, f"method {text!r} is not on this server's list; choose one of: {', '.join(self.methods())}",
            "method_not_allowed", param="mmfix.method",
        )  # fmt: skip


def _canonical(arm: Arm) -> str:
    return json.dumps(arm.spec, sort_keys=True)


def _from_extra(extra: Any) -> str | None:
    """The method of an ``mmfix`` object as text; None where it names none."""
    if extra is None:
        return None
    if not isinstance(extra, dict) or not set(extra) <= {"method", "params"}:
        raise ApiError(
            400, 'mmfix must be {"method": "name"} or {"method": "name", "params": {…}}', "invalid_value", param="mmfix"
        )
    text, params = extra.get("method"), extra.get("params")
    if text is None and not params:
        return None
    if not isinstance(text, str) or not text or len(text) > _LONGEST:
        raise ApiError(400, "mmfix.method must be the name of a method", "invalid_value", param="mmfix.method")
    if not params:
        return text
    if not isinstance(params, dict) or not all(re.fullmatch(r"[A-Za-z_]\w*", name) for name in params) or ":" in text:
        raise ApiError(
            400, "mmfix.params must map parameters of the one method named to values", "invalid_value",
            param="mmfix.params",
        )  # fmt: skip
    joined = ",".join(f"{name}={json.dumps(value)}" for name, value in params.items())
    if len(joined) > _LONGEST:
        raise ApiError(400, "mmfix.params is too long", "invalid_value", param="mmfix.params")
    return f"{text}:{joined}"
