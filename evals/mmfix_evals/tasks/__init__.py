"""Tasks: what is asked of a model, and how an answer turns into numbers.

A task is one class in one file: it subclasses :class:`~mmfix_evals.tasks.base.Task` (or a scoring family such as
:class:`~mmfix_evals.tasks.pope.PopeTask`), says where its documents come from, and is decorated with
:func:`register`. Importing this package imports no torch.
"""

from mmfix_evals.tasks.base import Document, Metric, Task, get, names, register, tasks
from mmfix_evals.tasks.chair_coco import ChairCoco
from mmfix_evals.tasks.grounding_data import GroundingCoco, TinyWorldGrounding
from mmfix_evals.tasks.mucr import MucrCue, MucrEffect
from mmfix_evals.tasks.pope_chat import PopeCocoChat
from mmfix_evals.tasks.pope_files import PopeAokvqa, PopeCoco, PopeGqa
from mmfix_evals.tasks.tinyworld_chair import TinyWorldChair
from mmfix_evals.tasks.tinyworld_pope import TinyWorldPope
from mmfix_evals.tasks.tinyworld_position import TinyWorldPosition
from mmfix_evals.tasks.tinyworld_sycophancy import TinyWorldSycophancy

__all__ = [
    "ChairCoco",
    "Document",
    "GroundingCoco",
    "Metric",
    "MucrCue",
    "MucrEffect",
    "PopeAokvqa",
    "PopeCoco",
    "PopeCocoChat",
    "PopeGqa",
    "Task",
    "TinyWorldChair",
    "TinyWorldGrounding",
    "TinyWorldPope",
    "TinyWorldPosition",
    "TinyWorldSycophancy",
    "get",
    "names",
    "register",
    "tasks",
]
