"""Brings the pages of one prompt after the other into a node cache's memory, and counts them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Final, TypeVar

import msgspec

from ucm.errors import NodeUnavailable
from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key, TailKey
from ucm.store.blocks.strands import ALL
from ucm.store.client.connection import NodeClient
from ucm.store.inspect.asked_prompt import AskedPrompt
from ucm.store.inspect.node_client import most_keys, most_open_keys
from ucm.store.inspect.signs_of_life import ASKED
from ucm.store.node import protocol as p

# A node cache says something within so long if it is asked, whatever storage does.
_ANSWER_S: Final = 10.0
_LISTEN_S: Final = 1.0
# Each question has all its time.
_MOST_FOUND: Final = 1 << 12
_WHY: Final = {
    Outcome.NO_ROOM: "no_room",
    Outcome.CORRUPT: "damaged",
    Outcome.TIMEOUT: "timed_out",
    Outcome.NEVER_STORED: "missing",
    Outcome.EVICTED: "missing",
    Outcome.NAMESPACE: "missing",
}
_Answer = TypeVar("_Answer", bound=p.NodeMessage)


class Warmed(msgspec.Struct, frozen=True, kw_only=True):
    """Pages of whole blocks: those that were `in_memory` or on their way there, that were `read`
    into it, and that were not brought: the first of a prompt with a reason, and all behind it. They
    are not stored (`missing`), have `no_room` in memory, are `damaged`, storage has `failed`, or
    has not answered in time (`timed_out`); of `unasked_prompts` nothing was asked for then.
    `memory_bytes` is what the node cache has, `warm_bytes` are those of the first two. It
    `is_used`: an engine is connected."""

    num_prompts: int = 0
    in_memory: int = 0
    read: int = 0
    missing: int = 0
    no_room: int = 0
    damaged: int = 0
    failed: int = 0
    timed_out: int = 0
    unasked_prompts: int = 0
    warm_bytes: int = 0
    memory_bytes: int = 0
    is_used: bool = False

    def __add__(self, more: Warmed) -> Warmed:
        """Of counts."""
        mine, other = msgspec.structs.asdict(self), msgspec.structs.asdict(more)
        total = Warmed(**{name: mine[name] + other[name] for name in mine})
        memory_bytes = max(self.memory_bytes, more.memory_bytes)
        return msgspec.structs.replace(total, memory_bytes=memory_bytes, is_used=self.is_used)

    @property
    def storage_hangs(self) -> bool:
        return self.timed_out > 0 or self.unasked_prompts > 0


def not_brought(reason: Outcome, num_pages: int) -> Warmed:
    """Pure."""
    return msgspec.structs.replace(Warmed(), **{_WHY.get(reason, "failed"): num_pages})


class Warmer:
    """By one connection, whose namespaces are open. Storage that has not answered for `timeout_s`,
    however many prompts were asked for meanwhile, is given up."""

    def __init__(self, client: NodeClient, page_bytes: Sequence[int], *, timeout_s: float) -> None:
        self._client = client
        self._page_bytes = page_bytes
        self._timeout_s = self._left_s = timeout_s
        self._most_keys = most_keys(client.welcome)
        self._most_open = most_open_keys(client.welcome)
        self._ids = count(1)

    @property
    def has_given_up(self) -> bool:
        return self._left_s <= 0

    def warm(self, prompt: AskedPrompt) -> Warmed:
        """Raises NodeUnavailable or ProtocolError."""
        found = Warmed(num_prompts=1)
        by_strand = zip(prompt.strands(), prompt.keys_by_strand(), strict=True)
        for number, (strand, keys) in enumerate(by_strand):
            keys = [key for key in keys if not isinstance(key, TailKey)]
            runs = [keys]
            # Of a strand that needs every block what lies behind a hole is of no use.
            if strand.reach != ALL:
                runs, unknown = self._stored_runs(number, keys)
                found += unknown
            for run in runs:
                found += self._read(number, run)
        return found

    def _read(self, number: int, keys: Sequence[Key]) -> Warmed:
        """In as few questions as the node cache takes. What the first ones have brought is held, or
        the last ones could push it out."""
        found = Warmed()
        held: list[int] = []
        num_held = 0
        for start in range(0, len(keys), self._most_keys):
            part = keys[start : start + self._most_keys]
            if num_held + len(part) >= self._most_open:
                self._release(held)
                held, num_held = [], 0
            reply = self._look_up(number, part)
            held.append(reply.id)
            num_held += len(part) + 1
            had = len(reply.offsets)
            found += Warmed(
                in_memory=had - reply.brought,
                read=reply.brought,
                warm_bytes=had * self._page_bytes[number],
            )
            if had < len(part):
                found += not_brought(reply.reason, len(keys) - start - had)
                break
        self._release(held)
        return found

    def _release(self, lookups: Sequence[int]) -> None:
        """The head of a prompt is to go last."""
        if lookups:
            self._client.send(p.Release(lookups=[*reversed(lookups)]))

    def _look_up(self, number: int, keys: Sequence[Key]) -> p.LookupReply:
        began_s = time.monotonic()
        lookup = p.Lookup(
            id=next(self._ids),
            ns=number,
            keys=[*keys],
            read_from=0,
            load=True,
            timeout_ms=self._left_ms(),
            renewed=True,
        )
        self._client.send(lookup)
        reply = answer_of_busy(self._client, p.LookupReply)
        self._note(began_s, is_late=reply.reason is Outcome.TIMEOUT and not reply.brought)
        return reply

    def _stored_runs(self, number: int, keys: Sequence[Key]) -> tuple[list[list[Key]], Warmed]:
        """Of a window, or states, some blocks are kept: the stretches of them. And those that
        storage could not tell of."""
        places = bytearray()
        unknown = Warmed()
        most = min(self._most_keys, _MOST_FOUND)
        for start in range(0, len(keys), most):
            began_s = time.monotonic()
            asked: list[bytes] = [*keys[start : start + most]]
            find = p.Find(
                id=next(self._ids), ns=number, keys=asked, storage=True, timeout_ms=self._left_ms()
            )
            self._client.send(find)
            found = answer_of_busy(self._client, p.Found)
            self._note(began_s, is_late=found.reason is Outcome.TIMEOUT)
            if found.reason:
                unknown += not_brought(found.reason, found.places.count(0))
            places += found.places
        return list(runs_of(keys, places)), unknown

    def _left_ms(self) -> int:
        return max(0, int(self._left_s * 1000))

    def _note(self, began_s: float, *, is_late: bool) -> None:
        """What was asked at `began_s` has ended; `is_late`: with nothing from storage."""
        if is_late:
            self._left_s -= time.monotonic() - began_s
        else:
            self._left_s = self._timeout_s


def answer_of_busy(client: NodeClient, kind: type[_Answer]) -> _Answer:
    """The next message of this kind, however long storage takes. Raises NodeUnavailable where the
    node cache answers nothing at all, and is asked how it is."""
    # What is imported looks into directories, and who watches this process believes that it does.
    sys.audit(ASKED)
    heard_s = time.monotonic()
    has_asked = False
    while True:
        for message in client.poll(_LISTEN_S):
            heard_s, has_asked = time.monotonic(), False
            if isinstance(message, kind):
                return message
        silent_s = time.monotonic() - heard_s
        if silent_s > 2 * _ANSWER_S:
            raise NodeUnavailable(f"the node cache (pid {client.welcome.pid}) does not answer")
        if silent_s > _ANSWER_S and not has_asked:
            client.send(p.GetStatus(id=0))
            has_asked = True


def runs_of(keys: Sequence[Key], places: bytes | bytearray) -> Iterator[list[Key]]:
    """The stretches of keys that are anywhere. Pure."""
    run: list[Key] = []
    for key, place in zip(keys, places, strict=True):
        if place:
            run.append(key)
        elif run:
            yield run
            run = []
    if run:
        yield run
