"""Text of an answer as it may be sent: trimmed, and cut before the first stop string."""

from __future__ import annotations

from collections.abc import Sequence


class Text:
    """Takes the pieces of an answer and gives out what no further piece can change.

    Held back are white space at the end (the answer may end there) and the beginning of a possible stop string. The
    pieces given out join to the stripped answer, or to the answer up to the earliest stop string.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._text = ""
        self._sent = 0
        self.stopped = False

    def add(self, piece: str) -> str:
        """Take one more piece; the text that became certain. Pieces after a stop are ignored."""
        if self.stopped:
            return ""
        self._text = self._text + piece if self._text else piece.lstrip()
        # What was sent holds no stop string and no beginning of one, so that the search can start there.
        places = [place for stop in self._stops if (place := self._text.find(stop, self._sent)) >= 0]
        if places:
            self.stopped = True
            self._text = self._text[: min(places)]
            return self._send(len(self._text))
        return self._send(max(self._sent, self._certain()))

    def finish(self) -> str:
        """The text still held back: no further piece will come."""
        return "" if self.stopped else self._send(max(self._sent, len(self._text.rstrip())))

    def _certain(self) -> int:
        end = len(self._text.rstrip())
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._text) - self._sent), 0, -1):
                if self._text.endswith(stop[:length]):
                    end = min(end, len(self._text) - length)
                    break
        return end

    def _send(self, end: int) -> str:
        piece = self._text[self._sent : end]
        self._sent = end
        return piece
