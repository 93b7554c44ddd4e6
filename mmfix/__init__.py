"""mmfix: training-free hallucination mitigation inside a vision-language model's forward pass.

>>> import mmfix
>>> with mmfix.mitigate(model, "var"):
...     ids = model.generate(**inputs, max_new_tokens=64)
"""

import mmfix.methods  # noqa: F401 - first, so that importing the package later does not hide the function `methods`
from mmfix import calibration, errors, scorers
from mmfix.calibration import calibrated
from mmfix.engine import Mitigation, mitigate
from mmfix.families import Family, describe
from mmfix.method import Method, MethodInfo, Param, Site
from mmfix.registry import from_spec, method, methods, param, parse, register, spec
from mmfix.report import Report

__version__ = "0.1.0"

__all__ = [
    "Family",
    "Method",
    "MethodInfo",
    "Mitigation",
    "Param",
    "Report",
    "Site",
    "__version__",
    "calibrated",
    "calibration",
    "describe",
    "errors",
    "from_spec",
    "method",
    "methods",
    "mitigate",
    "param",
    "parse",
    "register",
    "scorers",
    "spec",
]
