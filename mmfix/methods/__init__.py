"""The methods, one file each. Importing this package fills the registry."""

from mmfix.methods.causalmm import CausalMM, CausalMMLanguage, CausalMMVision
from mmfix.methods.cca import CCA
from mmfix.methods.lqcd import LQCD
from mmfix.methods.mas import MAS
from mmfix.methods.mma import MMA
from mmfix.methods.plausibility import Plausibility
from mmfix.methods.sofa import SoFA
from mmfix.methods.var import VAR
from mmfix.methods.vhr import VHR

__all__ = [
    "CCA",
    "LQCD",
    "MAS",
    "MMA",
    "VAR",
    "VHR",
    "CausalMM",
    "CausalMMLanguage",
    "CausalMMVision",
    "Plausibility",
    "SoFA",
]
