"""The methods, one file each. Importing this package fills the registry."""

from mmfix.methods.act import ACT
from mmfix.methods.agla import AGLA
from mmfix.methods.avisc import AvisC
from mmfix.methods.causalmm import CausalMM, CausalMMLanguage, CausalMMVision
from mmfix.methods.cca import CCA
from mmfix.methods.damro import DAMRO
from mmfix.methods.deco import DeCo
from mmfix.methods.dola import DoLa
from mmfix.methods.frame_block import FrameBlock
from mmfix.methods.halc import HALC
from mmfix.methods.hgai import HGAI
from mmfix.methods.icd import ICD
from mmfix.methods.jrt import JRT
from mmfix.methods.lqcd import LQCD
from mmfix.methods.m3id import M3ID
from mmfix.methods.mas import MAS
from mmfix.methods.memvr import MemVR
from mmfix.methods.mma import MMA
from mmfix.methods.mmca import MMCA
from mmfix.methods.only import ONLY
from mmfix.methods.opera import Opera
from mmfix.methods.pai import PAI
from mmfix.methods.paint import PAINT
from mmfix.methods.pine import PINE
from mmfix.methods.plausibility import Plausibility
from mmfix.methods.positional_hidden import PositionalHidden
from mmfix.methods.retrieval_heads import RetrievalHeads
from mmfix.methods.sid import SID
from mmfix.methods.sofa import SoFA
from mmfix.methods.spin import SPIN
from mmfix.methods.token_prepending import TokenPrepending
from mmfix.methods.vaf import VAF
from mmfix.methods.var import VAR
from mmfix.methods.vcd import VCD
from mmfix.methods.vhr import VHR
from mmfix.methods.vista import VISTA
from mmfix.methods.vseam import VSEAM
from mmfix.methods.vti import VTI

__all__ = [
    "ACT",
    "AGLA",
    "CCA",
    "DAMRO",
    "HALC",
    "HGAI",
    "ICD",
    "JRT",
    "LQCD",
    "M3ID",
    "MAS",
    "MMA",
    "MMCA",
    "ONLY",
    "PAI",
    "PAINT",
    "PINE",
    "SID",
    "SPIN",
    "VAF",
    "VAR",
    "VCD",
    "VHR",
    "VISTA",
    "VSEAM",
    "VTI",
    "AvisC",
    "CausalMM",
    "CausalMMLanguage",
    "CausalMMVision",
    "DeCo",
    "DoLa",
    "FrameBlock",
    "MemVR",
    "Opera",
    "Plausibility",
    "PositionalHidden",
    "RetrievalHeads",
    "SoFA",
    "TokenPrepending",
]
