"""How far the reader of a streamed answer is: told with each event, so that it can read on at any router.

Owns the form of these marks (`id:` of a server-sent event, `bookmark` of a gRPC message) and what of an answer, said
again from the start, its reader lacks. A mark counts tokens, not events: how tokens are bundled into events depends on
the moment, what the text of so many tokens is does not.

Form: places/created/worker/request, where places has one part per choice, joined by dots:

    (empty)   nothing was said of it        12t   that, and all the text at its end
    12        the text of 12 tokens was     12f   that, and why it ended
    u at the end of all: the usage was sent, too

It names the worker that spoke, so that nobody has to search, and is no secret: who sends it must also send the whole
question again, as the same tenant.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import quote, unquote

from baton.core.errors import InvalidRequest
from baton.core.messages import TokenChunk
from baton.core.request import MAX_CHOICES
from baton.router.output import Delta

_FORM = re.compile(r"([0-9tf.]{0,128})(u?)/([0-9]{1,12})/([^/\s]{0,256})/([^\r\n]{1,128})")
_PLACE = re.compile(r"(?:([0-9]{1,9})([tf]?))?")


@dataclass(slots=True)
class Place:
    """In one choice."""

    num_tokens: int = 0
    opened: bool = False
    """Something was said of it, be it only who speaks."""
    said: bool = False
    """All of its text was."""
    ended: bool = False
    """And why it ended."""

    def __str__(self) -> str:
        return f"{self.num_tokens}{'f' if self.ended else 't' if self.said else ''}" if self.opened else ""


class Bookmark:
    """Of one reader, moved on as events are made for it."""

    def __init__(self, request_id: str, created: int, places: list[Place]) -> None:
        self.request_id = request_id
        self.created = created
        """What the first event says of it, unix seconds: later ones say the same."""
        self.places = places
        self.has_usage = False
        self.worker = ""
        """That spoke last."""
        self.where: Callable[[], str] = lambda: ""
        """Asked for that; empty: still the same."""
        self._tail = ""
        """What stands behind the places, as long as the worker is the same: there is a mark for every token."""

    @classmethod
    def parse(cls, text: str, name: str) -> Bookmark:
        """Raises InvalidRequest; `name`: of the header or field it stood in."""
        form = _FORM.fullmatch(text)
        places = [_PLACE.fullmatch(part) for part in form[1].split(".")] if form else [None]
        if form is None or None in places or len(places) > MAX_CHOICES:
            raise InvalidRequest(f"{name} is no id of an event of ours. Send the last one that came, as it is.", name)
        mark = cls(form[5], int(form[3]), [_place(found) for found in places if found is not None])
        mark.has_usage, mark.worker = bool(form[2]), unquote(form[4])
        return mark

    def __str__(self) -> str:
        worker = self.where() or self.worker
        if worker != self.worker or not self._tail:
            self.worker = worker
            self._tail = f"/{self.created}/{quote(worker, safe='')}/{self.request_id}"
        return f"{'.'.join([str(place) for place in self.places])}{'u' if self.has_usage else ''}{self._tail}"


def _place(found: re.Match[str]) -> Place:
    return Place(int(found[1] or 0), found[1] is not None, found[2] in ("t", "f"), found[2] == "f")


class Unread:
    """What of an answer that comes from the start the reader of a bookmark lacks."""

    def __init__(self, bookmark: Bookmark) -> None:
        self._read = {index: dataclasses.replace(place) for index, place in enumerate(bookmark.places)}
        self._num_seen = dict.fromkeys(self._read, 0)

    def parts(self, chunk: TokenChunk) -> Iterator[TokenChunk]:
        """The chunk, cut where the reader is."""
        at = self._read[chunk.choice].num_tokens - chunk.first_index
        ends_behind = at < len(chunk.token_ids) or chunk.finish is not None
        if not (0 < at <= len(chunk.token_ids) and ends_behind):
            yield chunk
            return
        yield dataclasses.replace(chunk, token_ids=chunk.token_ids[:at], logprobs=chunk.logprobs[:at], finish=None)
        yield dataclasses.replace(chunk, first_index=chunk.first_index + at, token_ids=chunk.token_ids[at:],
                                  logprobs=chunk.logprobs[at:])

    def news(self, delta: Delta) -> Delta | None:
        """Of what such a part has become. The end of a choice is always told: who has it knows."""
        place = self._read[delta.choice]
        self._num_seen[delta.choice] += len(delta.token_ids)
        if delta.finish is None:
            return delta if self._num_seen[delta.choice] > place.num_tokens else None
        if place.said:
            return dataclasses.replace(delta, text="", token_ids=(), logprobs=(), shown=())
        return delta
