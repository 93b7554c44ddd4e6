"""Attention with edits on groups of keys. Tensors and plain data only: nothing here knows a model."""

from mmfix_kernels.attention import backends, forced_backend, grouped_attention
from mmfix_kernels.call import Attended, AttentionCall
from mmfix_kernels.edits import (
    Edit,
    Group,
    HeadScale,
    HeadSelect,
    KeyGroups,
    Label,
    MapReplacement,
    MassGate,
    MassMove,
    Rows,
    ScoreEdit,
    SplitSoftmax,
)
from mmfix_kernels.keyed import HeadMean, KeyGain, KeyMove
from mmfix_kernels.statistics import ColumnMass, Divergence, column_mass, head_divergence, row_weights

__all__ = [
    "Attended",
    "AttentionCall",
    "ColumnMass",
    "Divergence",
    "Edit",
    "Group",
    "HeadMean",
    "HeadScale",
    "HeadSelect",
    "KeyGain",
    "KeyGroups",
    "KeyMove",
    "Label",
    "MapReplacement",
    "MassGate",
    "MassMove",
    "Rows",
    "ScoreEdit",
    "SplitSoftmax",
    "backends",
    "column_mass",
    "forced_backend",
    "grouped_attention",
    "head_divergence",
    "row_weights",
]
