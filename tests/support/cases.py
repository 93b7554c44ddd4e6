"""Which parameters make a method act on the tiny models, and which make it do nothing.

A registered method that is not listed is tested with its defaults; one line here covers a method that needs more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from support import steered

from mmfix import scorers
from mmfix.method import Method
from mmfix.registry import method, methods


@dataclass(frozen=True)
class Case:
    """Parameters of one method on the tiny models of :mod:`support.vlm`.

    Args:
        active: with these it changes the logits of every prompt with an image.
        identity: with these it changes nothing, bit for bit; None when a method has no strength of zero.
        whole_pictures: a mask that stays within a picture, so that pieces of prompt with whole pictures are fine.
        any_pieces: how a prompt is cut makes no difference, as long as its first piece holds an image.
        ahead: what it does to a row depends on the whole prompt, which must then come in one piece.
        sees_pictures: it reads the vision tower, so that embeddings made elsewhere are refused.
        other_prompt: it puts other tokens into the prompt of a row, which needs left-padded ids in one piece.
        longer_prompt: and makes it longer, which a cache of fixed size does not hold.
    """

    active: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] | None = None
    whole_pictures: bool = False
    other_prompt: bool = False
    any_pieces: bool = False
    ahead: bool = False
    sees_pictures: bool = False
    longer_prompt: bool = False


_VAR = {"sink_dims": (3, 7), "tau": 1.6, "min_image_mass": 0.1, "max_sink_share": 0.9, "move": 0.9}
HEAD_SCALES = tuple(name for name, info in methods().items() if info.kind == "head scale")
scorers.register("brightness", lambda pixels, question: pixels.mean(0))
scorers.register("lower-half", lambda pixels, word: [(0.2, 0.5, 0.8, 1.0)], kind="boxes")
CASES: dict[str, Case] = {
    "agla": Case(active={"scorer": "brightness", "beta": 1e-9}, identity={"alpha": 0.0, "beta": 1e-9}),
    "var": Case(active=_VAR, identity={**_VAR, "move": 0.0}),
    "vhr": Case(identity={"alpha": 1.0}),
    "act": Case(active={"heads": "all", "threshold": 0.06}, identity={"heads": "all", "keep": 1.0}, ahead=True),
    "paint": Case(identity={"alpha": 0.0, "beta": 0.0}, sees_pictures=True),
    "vseam": Case(
        active={"heads": ((0, 3, 0.7), (1, 2, 0.6), (2, 0, -0.8), (3, 1, 0.9), (3, 3, -1.0))},
        identity={"heads": ((1, 2, 0.6), (2, 0, -0.8)), "strength": 0.0},
        any_pieces=True,
    ),
    "retrieval-heads": Case(active={"heads": ((0, 1), (1, 2), (2, 0), (3, 1), (3, 2))}, any_pieces=True),
    "mma": Case(active={"until": "prompt"}, identity={"until": "prompt", "layers": ()}),
    "cca": Case(whole_pictures=True),
    "frame-block": Case(identity={"layers": ()}, whole_pictures=True),
    "mas": Case(active={"until": "prompt"}, identity={"until": "prompt", "layers": ()}),
    "jrt": Case(active={"until": "prompt"}, identity={"times": 1}, other_prompt=True, longer_prompt=True),
    "lqcd": Case(
        active={"leading": (11, 12, 13, 14), "beta": 1e-9},
        identity={"alpha": 0.0, "beta": 1e-9},
        other_prompt=True,
    ),
    "causalmm": Case(active={"epsilon": 1e-9}, identity={"gamma": 0.0, "epsilon": 1e-9}),
    "causalmm-vision": Case(active={"epsilon": 1e-9}, identity={"gamma": 0.0, "epsilon": 1e-9}),
    "causalmm-language": Case(active={"epsilon": 1e-9}, identity={"gamma": 0.0, "epsilon": 1e-9}),
    "avisc": Case(active={"deviations": 0.5, "beta": 1e-9}, identity={"alpha": 0.0, "beta": 1e-9}, ahead=True),
    "damro": Case(active={"count": 3, "beta": 1e-9}, identity={"alpha": 0.0, "beta": 1e-9}),
    "deco": Case(
        active={"top_p": 1.0, "top_k": 1000},
        identity={"alpha": 0.0, "top_p": 1.0, "top_k": 1000},
    ),
    "dola": Case(active={"layers": (1, 3), "beta": 1e-9}, identity={"alpha": 0.0, "beta": 1e-9}),
    "halc": Case(
        active={"detector": "lower-half", "beams": 1, "views": 2, "candidates": 2}
    ),  # and a processor that decodes
    "hgai": Case(active={"layers": (1, 2, 3)}, identity={"alpha": 0.0}),
    "icd": Case(
        active={"tokens": (12,), "at": "question", "beta": 1e-9},
        identity={"alpha": 0.0, "beta": 1e-9},
        other_prompt=True,
    ),
    "m3id": Case(active={"decay": 0.2, "start": 5, "beta": 1e-9}, identity={"decay": 0.0, "beta": 1e-9}),
    "mmca": Case(active={"mass": "mean", "layers": (0, 1, 2)}, identity={"layers": ()}),
    "only": Case(active={"beta": 1e-9}, identity={"plus": 0.0, "minus": 0.0, "beta": 1e-9}),
    "pai": Case(active={"beta": 1e-9}, identity={"alpha": 0.0, "gamma": 1.0}),
    "positional-hidden": Case(
        active={"dims": (3, 7, 12), "factor": -4.0, "layers": (1, 2, 3)}, identity={"dims": (3,), "factor": 1.0}
    ),
    "sid": Case(active={"count": 3, "beta": 1e-9}, identity={"alpha": 0.0, "beta": 1e-9}, ahead=True),
    "spin": Case(active={"keep": 0.7}, identity={"factor": 1.0}),
    "token-prepending": Case(active={"depth": 3}, identity={"depth": 0}, other_prompt=True, longer_prompt=True),
    "vaf": Case(active={"image_gain": 2.0}, identity={"image_gain": 1.0, "system_gain": 1.0}),
    "memvr": Case(active={"ratio": 0.9, "threshold": 0.1, "layers": (0, 1, 2)}, identity={"ratio": 0.0}, ahead=True),
    "vista": Case(active={"strength": 0.5}, identity={"strength": 0.0, "gamma": 0.0}, ahead=True),
    "vti": Case(
        active={"directions": steered.FOLDER, "alpha_text": 3.0, "alpha_image": 3.0},
        identity={"alpha_text": 0.0, "alpha_image": 0.0},
    ),
    "vcd": Case(active={"beta": 1e-9}, identity={"alpha": 0.0, "beta": 1e-9}),
}
# Not held to what every method must do: the plausibility cut alone is a control that leaves attention and the kept
# logits as they are (tests/contract/test_branches.py), and SoFA and PINE change nothing in a prompt with a single
# image (tests/methods/test_sofa.py, test_pine.py). A search changes no forward pass, only what generate() makes of it:
# its tests are its own.
SPECIAL = ("pine", "plausibility", "sofa")
NAMES = tuple(name for name, info in methods().items() if name not in SPECIAL and info.kind != "search")
# Methods that edit, or choose by, the last row of a prompt, so that they must know which one it is.
NEWEST_ROW = ("avisc", "hgai", "memvr", "pai", "paint", "positional-hidden", "sid", "spin", "vista")
# Methods that combine logits: at most one of them at a time.
CONTRASTS = tuple(name for name in NAMES if methods()[name].kind in ("contrast", "prompt"))
TOGETHER = tuple(name for name in NAMES if name not in CONTRASTS[1:])


def active(name: str) -> Method:
    """The method with parameters that make it act on tiny models."""
    return method(name, **CASES.get(name, Case()).active)


def case_of(chosen: Method) -> Case:
    """What is known of a method's behaviour on tiny models."""
    return CASES.get(chosen.info.name, Case())
