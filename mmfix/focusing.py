"""Focal search (HALC): beam search that decodes the words it says again, from views of where their objects are.

The inputs of a call are kept, so that its prompts can be shown with other pictures. The loop is in
:mod:`mmfix.refocusing`, what it decides in :mod:`mmfix.focuser`, and the maths in :mod:`mmfix.focal`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmfix import focal
from mmfix.beams import Beams, Ending
from mmfix.errors import MethodError, UnsupportedModel, UsageError
from mmfix.focuser import Focuser
from mmfix.recalling import Call
from mmfix.refocusing import Run
from mmfix.searching import Searching

if TYPE_CHECKING:
    from mmfix.session import Session


class Focusing(Searching):
    """HALC's search.

    Attributes:
        steps: tokens that beams chose; views: pictures that were looked at besides the prompts' own.
    """

    def __init__(self, session: Session, rules: focal.Refocus, owner: int) -> None:
        super().__init__(session, rules, owner)
        if session.family.outer is not None:
            raise UnsupportedModel(
                f"{session.family.name}: its own generate() encodes the picture before the language model is asked, so "
                f"{rules.owner} cannot show it parts; use another method"
            )
        if session.family.decode is None:
            raise MethodError(
                f"{rules.owner} reads the words of an answer and the model's tokenizer is unknown; pass processor= to "
                "mitigate()"
            )
        self.rules, self.decode = rules, session.family.decode
        self.steps = self.views = 0
        self.call: Call | None = None

    @property
    def passes(self) -> float:
        return 1.0 + self.views / max(1, self.steps)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        new = super().arguments(args, kwargs)
        if kwargs.get("past_key_values") is not None:
            raise UsageError(f"{self.rules.owner} computes a prompt more than once; leave past_key_values out")
        self.call = Call.read(args, kwargs, self.session.family, self.rules.owner)
        return new

    def search(
        self, model: Any, input_ids: Tensor, processors: Any, config: Any, ending: Ending, given: dict[str, Any]
    ) -> Any:
        count = config.num_beams or 1
        if count == 1:
            ending = dataclasses.replace(ending, early_stopping=True)  # greedy decoding ends with its first end
        focusers = [Focuser(ending, Beams.begin(ids, count)) for ids in input_ids[::count]]
        try:
            return Run(self, model, input_ids, config, processors, given, focusers).run()
        finally:
            self.call = None
