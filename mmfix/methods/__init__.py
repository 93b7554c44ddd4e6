"""The methods, one file each. Importing this package fills the registry."""

from mmfix.methods.causalmm import CausalMM, CausalMMLanguage, CausalMMVision
from mmfix.methods.cca import CCA
from mmfix.methods.frame_block import FrameBlock
from mmfix.methods.hgai import HGAI
from mmfix.methods.icd import ICD
from mmfix.methods.jrt import JRT
from mmfix.methods.lqcd import LQCD
from mmfix.methods.m3id import M3ID
from mmfix.methods.mas import MAS
from mmfix.methods.mma import MMA
from mmfix.methods.mmca import MMCA
from mmfix.methods.pai import PAI
from mmfix.methods.pine import PINE
from mmfix.methods.plausibility import Plausibility
from mmfix.methods.positional_hidden import PositionalHidden
from mmfix.methods.sofa import SoFA
from mmfix.methods.spin import SPIN
from mmfix.methods.vaf import VAF
from mmfix.methods.var import VAR
from mmfix.methods.vcd import VCD
from mmfix.methods.vhr import VHR

__all__ = [
    "CCA",
    "HGAI",
    "ICD",
    "JRT",
    "LQCD",
    "M3ID",
    "MAS",
    "MMA",
    "MMCA",
    "PAI",
    "PINE",
    "SPIN",
    "VAF",
    "VAR",
    "VCD",
    "VHR",
    "CausalMM",
    "CausalMMLanguage",
    "CausalMMVision",
    "FrameBlock",
    "Plausibility",
    "PositionalHidden",
    "SoFA",
]
