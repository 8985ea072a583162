"""Bytes of tokens to text that can be shown: whole characters, and never a part of a stop string."""

import codecs


class TextStream:
    """Assembles one answer.

    `push` returns the text that is now certain: characters whose bytes are all there, less a tail that may
    yet turn out to be the beginning of a stop string.
    """

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self.stopped_by: str | None = None
        """The stop string that ended the answer; what follows it is dropped, and so is it."""
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, piece: bytes) -> str:
        """Add a token's bytes."""
        return self._release(self._decoder.decode(piece))

    def finish(self) -> str:
        """The rest, at the end of the answer; an incomplete character becomes U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True))
        if self.stopped_by is None:
            text, self._held = text + self._held, ""
        return text

    def _release(self, new: str) -> str:
        if self.stopped_by is not None:
            return ""
        if not self._stop:
            return new
        text = self._held + new
        # the one complete first, however the text came in pieces; of two that end together, the longer
        found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            _, start, self.stopped_by = min(found)
            self._held = ""
            return text[:start]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
