"""What cannot be done when a prompt comes in pieces, and with what words it is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmfix.errors import MmfixError
from mmfix.layers import tells_rows_apart
from mmfix_kernels import Rows

if TYPE_CHECKING:
    from mmfix.session import Session

_AT_ONCE = "give it at once (no prefill_chunk_size)"


def check(session: Session, past: int) -> None:
    """Refuse a further piece, which begins after `past` keys, where a method needs what it does not tell.

    Raises:
        MmfixError: names the methods and the reason.
    """
    talk = session.talk
    assert talk is not None
    every = " and ".join(m.info.name for m in session.methods)
    if any(m.reorders for m in session.methods):
        _refuse(every, "segments see each other whole, and the prompt came in pieces")
    if talk.steps:  # a further turn: each is whole by itself
        _check_heads(session, past)
        return
    if any(getattr(e, "rows", None) is Rows.LAST for s in session.layers for e in s.edits):
        _refuse(every, "edits act on the last row of the prompt, and it came in pieces, each of which has a last row")
    if session.scales_hidden:
        _refuse(every, "only the last rows of a prompt are changed, and the prompt came in pieces")
    if session.received_layers:
        _refuse(every, "what each key receives is known of whole prompts, and this one came in pieces")
    if session.branching is not None and session.branching.chooses:
        owner = session.methods[session.mix_owner].info.name
        _refuse(owner, "a branch depends on where the prompt's last row looks, and the prompt came in pieces")
    if session.head_layers:
        _refuse(_head_methods(session), "whole prompts are compared, and this one came in pieces")


def check_late_image(session: Session) -> None:
    """Refuse a first image after the first piece, where a method leaves prompts without an image alone."""
    edits = any(tells_rows_apart(edit) for state in session.layers for edit in state.edits)
    if edits or any(state.masks_apart for state in session.layers):
        every = " and ".join(m.info.name for m in session.methods)
        _refuse(every, "the prompt's first image came after its first piece, which ran as a prompt without one")


def check_late_turn(session: Session) -> None:
    """Refuse a first image in a later turn, where a method has made its choice of the first turn's attention."""
    if session.received_layers:
        every = " and ".join(m.info.name for m in session.methods)
        raise MmfixError(
            f"{every}: the conversation's first image came in a later turn, and what each key receives was asked in "
            "the first one; give the whole conversation at once, with a fresh cache"
        )


def _check_heads(session: Session, past: int) -> None:
    assert session.talk is not None
    if session.head_layers and session.talk.all_ids(past) is None:
        raise MmfixError(
            f"{_head_methods(session)} needs the ids of every token in the cache, and these are unknown (beams, or "
            "inputs_embeds); give the whole conversation with a fresh cache"
        )


def _head_methods(session: Session) -> str:
    asking = (m.info.name for m in session.methods if any(m.wants_heads(n, 10**6) for n in session.head_layers))
    return ", ".join(asking) or "a head method"


def _refuse(who: str, why: str) -> None:
    raise MmfixError(f"{who}: {why}; {_AT_ONCE}")
