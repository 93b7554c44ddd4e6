"""Keeping the model library's own chatter off standard error."""

from __future__ import annotations

import sys


def hush(quiet: bool = False) -> None:
    """No warnings of transformers, and no loading bars where nobody watches them."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if quiet or not sys.stderr.isatty():
        logging.disable_progress_bar()
