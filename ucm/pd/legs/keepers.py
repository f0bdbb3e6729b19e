"""Which instance keeps what a request names: a response, or a session of SageMaker's.

An engine keeps such things in its own memory, and no other engine knows of them. So the proxy
remembers who has made them, the latest of them, and what it doesn't remember it has to look for:
proxies that stand side by side share no memory, and none outlives its proxy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
from yarl import URL

from ucm.pd.legs.delivery import Answer
from ucm.pd.legs.resume import Events
from ucm.pd.legs.usage import FoundCached
from ucm.pd.protocol import RESPONSES

SESSIONS = "/invocations"
_SESSION = "X-Amzn-SageMaker-Session-Id"
_NEW_SESSION = "X-Amzn-SageMaker-New-Session-Id"
# What clients may make up themselves has a bound. A longer one is looked for each time.
MAX_ID_CHARS = 256
# The id stands in a stream's first event. One that has none so far will have none.
_MAX_LOOKED_AT_BYTES = 8 << 20


@dataclass(frozen=True)
class Name:
    """Of something that one instance keeps."""

    kind: str
    id: str

    def __str__(self) -> str:
        return f"the {self.kind} {self.id[:MAX_ID_CHARS]!r}"


def named_by(
    method: str, path: str, headers: Mapping[str, str], fields: Mapping[str, Any]
) -> Name | None:
    """What a request is about, if only who keeps it can answer. Pure. `fields` are its body's,
    where it has any that count."""
    if path == SESSIONS and (session := headers.get(_SESSION)):
        return Name("session", session)
    if path == RESPONSES:
        before = fields.get("previous_response_id")
        return Name("response", before) if isinstance(before, str) else None
    if not path.startswith(f"{RESPONSES}/"):
        return None
    response, _, what = path[len(RESPONSES) + 1 :].partition("/")
    # POST /v1/responses/render and its like are about no response.
    is_one = bool(response) and (method != "POST" or bool(what))
    return Name("response", response) if is_one else None


class Keepers:
    """The latest `max_kept` names, each with its instance, and with what prefill had of its prompt
    if that is known. Owned by the event loop's thread."""

    def __init__(self, max_kept: int) -> None:
        self._max_kept = max_kept
        # Those that were asked for or made last are at the end.
        self._kept: dict[Name, tuple[URL, FoundCached | None]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, name: Name) -> URL | None:
        kept = self._kept.pop(name, None)
        if kept is None:
            return None
        self._kept[name] = kept
        return kept[0]

    def found(self, name: Name) -> FoundCached | None:
        return self._kept.get(name, (None, None))[1]

    def note(self, name: Name, url: URL, found: FoundCached | None = None) -> None:
        if not 0 < len(name.id) <= MAX_ID_CHARS:
            return
        self._kept.pop(name, None)
        self._kept[name] = url, found
        while len(self._kept) > self._max_kept:
            del self._kept[next(iter(self._kept))]

    def noting(
        self, answer: Answer, *, path: str, url: URL, found: FoundCached | None = None
    ) -> Answer:
        """The same answer to a request for `path`. What it says was made is noted before the client
        can ask for it."""
        if not 200 <= answer.upstream.status < 300:
            return answer
        session = answer.upstream.headers.get(_NEW_SESSION)
        if path == SESSIONS and session:
            self.note(Name("session", session.partition(";")[0].strip()), url)
        if path != RESPONSES:
            return answer
        if answer.is_whole:
            self.note(Name("response", _id_of(answer.first)), url, found)
            return answer
        looks = _NameReader(partial(self.note, url=url, found=found))
        return replace(answer, looks=looks) if answer.is_event_stream else answer


class _NameReader:
    """Reads a stream's beginning, up to the event that says what it is."""

    def __init__(self, note: Callable[[Name], None]) -> None:
        self._note = note
        self._events = Events()
        self._may_come_bytes = _MAX_LOOKED_AT_BYTES

    def __call__(self, piece: bytes) -> None:
        if self._may_come_bytes <= 0:
            return
        self._may_come_bytes -= len(piece)
        for line in self._events.feed(piece).splitlines():
            if line.startswith(b"data:") and (found := _id_of_event(line[len(b"data:") :])):
                self._note(Name("response", found))
                self._may_come_bytes = 0
                return


class _Response(msgspec.Struct):
    id: str = ""


class _KeptEvent(msgspec.Struct):
    response: _Response | None = None


_responses = msgspec.json.Decoder(_Response)
_events = msgspec.json.Decoder(_KeptEvent)


def _id_of(body: bytes) -> str:
    """Empty if it has none."""
    try:
        return _responses.decode(body).id
    except (msgspec.MsgspecError, RecursionError):
        return ""


def _id_of_event(data: bytes) -> str:
    try:
        response = _events.decode(data).response
    except (msgspec.MsgspecError, RecursionError):
        return ""
    return response.id if response is not None else ""
