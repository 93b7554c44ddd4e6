"""Reports of finished runs: one self-contained page, Markdown and LaTeX tables, a model-index snippet.

Everything is made from run folders (``results.json`` and ``samples.jsonl``); no model is needed. Pictures are shown
where their task can find them.
"""

from mmfix_evals.report.latex import latex
from mmfix_evals.report.model_index import model_index
from mmfix_evals.report.page import html
from mmfix_evals.report.source import Reported, read

__all__ = ["Reported", "html", "latex", "model_index", "read"]
