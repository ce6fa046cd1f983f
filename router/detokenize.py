"""Tokens to text, one request at a time: the two detokenizers and the stop matcher.

Owns: the bytes of a character that is not complete yet, and the characters that may turn out to be a stop string.
Does not know: requests, HTTP, tokens' meaning. For any cut of the input the pieces joined equal the one-shot answer.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """Gives each character once, as soon as it can no longer change."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str:
        """What is still held, with U+FFFD for bytes that never became a character. Ends the detokenizer."""
        ...


class ByteDetokenizer:
    """For byte-level BPE: every token is a byte string, and the text is their UTF-8 reading. Linear, and exact even
    for bytes that are not UTF-8: both this decoder and `tokenizers` put one U+FFFD per maximal broken part."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For every other decoder (sentencepiece pieces, byte fallback): the text of a token depends on its neighbours,
    so decode a short window twice, with and without what is new, and give the difference.

    Held back: a tail of <0xNN> byte pieces, because the run's last byte decides how all of it reads.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], is_open: Callable[[int], bool]) -> None:
        self._decode = decode
        self._is_open = is_open
        self._context: list[int] = []
        """Tokens already given: only there so that the next ones decode as in the middle of a text."""
        self._new: list[int] = []

    def push(self, token_id: int) -> str:
        self._new.append(token_id)
        return "" if self._is_open(token_id) else self._take()

    def flush(self) -> str:
        return self._take()

    def _take(self) -> str:
        before, now = self._decode(self._context), self._decode([*self._context, *self._new])
        if len(now) > len(before):
            self._context, self._new = self._new, []
        return now[len(before):]


class StopMatcher:
    """Finds the stop string whose end comes first (of two that end together, the longer), across any cut of the text.

    `feed` gives the text that can no longer be part of a stop; once `stopped`, nothing more is given.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), f"an empty stop string matches everywhere: {stops!r}"
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        window = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := window.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return window[: min(found)[1]]
        keep = max(_overlap(window, stop) for stop in self._stops)
        self._held = window[len(window) - keep :]
        return window[: len(window) - keep]

    def flush(self) -> str:
        """The text ended: what was held is no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
