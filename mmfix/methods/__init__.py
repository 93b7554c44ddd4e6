"""The methods, one file each. Importing this package fills the registry."""

from mmfix.methods.agla import AGLA
from mmfix.methods.causalmm import CausalMM, CausalMMLanguage, CausalMMVision
from mmfix.methods.cca import CCA
from mmfix.methods.hgai import HGAI
from mmfix.methods.icd import ICD
from mmfix.methods.lqcd import LQCD
from mmfix.methods.m3id import M3ID
from mmfix.methods.mas import MAS
from mmfix.methods.mma import MMA
from mmfix.methods.opera import Opera
from mmfix.methods.pai import PAI
from mmfix.methods.plausibility import Plausibility
from mmfix.methods.sofa import SoFA
from mmfix.methods.spin import SPIN
from mmfix.methods.vaf import VAF
from mmfix.methods.var import VAR
from mmfix.methods.vcd import VCD
from mmfix.methods.vhr import VHR

__all__ = [
    "AGLA",
    "CCA",
    "HGAI",
    "ICD",
    "LQCD",
    "M3ID",
    "MAS",
    "MMA",
    "PAI",
    "SPIN",
    "VAF",
    "VAR",
    "VCD",
    "VHR",
    "CausalMM",
    "CausalMMLanguage",
    "CausalMMVision",
    "Opera",
    "Plausibility",
    "SoFA",
]
