"""The methods, one file each. Importing this package fills the registry."""

from mmfix.methods.avisc import AvisC
from mmfix.methods.causalmm import CausalMM, CausalMMLanguage, CausalMMVision
from mmfix.methods.cca import CCA
from mmfix.methods.damro import DAMRO
from mmfix.methods.deco import DeCo
from mmfix.methods.dola import DoLa
from mmfix.methods.hgai import HGAI
from mmfix.methods.icd import ICD
from mmfix.methods.lqcd import LQCD
from mmfix.methods.m3id import M3ID
from mmfix.methods.mas import MAS
from mmfix.methods.memvr import MemVR
from mmfix.methods.mma import MMA
from mmfix.methods.only import ONLY
from mmfix.methods.pai import PAI
from mmfix.methods.plausibility import Plausibility
from mmfix.methods.sid import SID
from mmfix.methods.sofa import SoFA
from mmfix.methods.spin import SPIN
from mmfix.methods.vaf import VAF
from mmfix.methods.var import VAR
from mmfix.methods.vcd import VCD
from mmfix.methods.vhr import VHR
from mmfix.methods.vista import VISTA
from mmfix.methods.vti import VTI

__all__ = [
    "CCA",
    "DAMRO",
    "HGAI",
    "ICD",
    "LQCD",
    "M3ID",
    "MAS",
    "MMA",
    "ONLY",
    "PAI",
    "SID",
    "SPIN",
    "VAF",
    "VAR",
    "VCD",
    "VHR",
    "VISTA",
    "VTI",
    "AvisC",
    "CausalMM",
    "CausalMMLanguage",
    "CausalMMVision",
    "DeCo",
    "DoLa",
    "MemVR",
    "Plausibility",
    "SoFA",
]
