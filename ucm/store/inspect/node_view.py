"""What a node cache does at the moment: two of its statuses, made into numbers that people read."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from ucm.config.node_socket import default_socket_path
from ucm.config.settings import PIPELINES, StoreSettings, load_settings_file
from ucm.errors import ConfigError, NodeUnavailable
from ucm.metrics import FAR
from ucm.outcome import MISSED, UNWRITTEN, Outcome
from ucm.store.inspect.given import check_no_url
from ucm.store.inspect.node_client import connect_tool, first_answer
from ucm.store.node import protocol as p

_CONNECT_S: Final = 5.0
_ANSWER_S: Final = 10.0


@dataclass(frozen=True)
class StatusSample:
    """A status, and when it came (time.monotonic())."""

    status: p.Status
    at_s: float


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Per second, over `seconds`. Of blocks that lookups asked for, `hit_memory` were in memory and
    `hit_files` were read from storage."""

    seconds: float
    lookups: float
    blocks_asked: float
    hit_memory: float
    hit_files: float
    pages_dumped: float
    pages_read: float
    pages_written: float
    bytes_read: float
    bytes_written: float
    evictions: float


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """`slots` are by state, `queues` by what waits there. `missed` and `unwritten` count blocks and
    pages by reason, since the node cache was started; without those that never occurred.
    `read_ms` and `write_ms` are what a page took lately (near, of two tiers); None: none was."""

    socket: str
    pid: int
    backends: list[str]
    capacity_bytes: int
    num_clients: int
    slots: dict[str, int]
    pins: int
    queues: dict[str, int]
    stalled: dict[str, int]
    missed: dict[str, int]
    unwritten: dict[str, int]
    rates: Rates
    read_ms: float | None
    write_ms: float | None


def settings_to_ask(argument: str) -> StoreSettings:
    """Of the node cache that is meant by a settings file, a storage backend's directory (as this
    user's engines have it by default) or a socket. Raises ConfigError."""
    check_no_url(argument)
    try:
        mode = os.stat(argument).st_mode
    except OSError as error:
        raise ConfigError(
            f"{argument}: {error.strerror}: name a settings file, a storage backend or the socket "
            f"of a node cache"
        ) from error
    path = os.path.abspath(argument)
    if stat.S_ISSOCK(mode):
        return StoreSettings(socket_path=path)
    if stat.S_ISDIR(mode):
        pipeline = tuple(PIPELINES[0].split("|"))
        return StoreSettings(
            storage_backends=(path,), socket_path=default_socket_path(pipeline, (path,))
        )
    return load_settings_file(argument).store


class NodeWatch:
    """A connection that only asks. It keeps the node cache from leaving because it is idle."""

    def __init__(self, settings: StoreSettings) -> None:
        """Raises NodeUnavailable, ConfigError or ProtocolError."""
        self._socket = settings.socket_path
        try:
            self._client = connect_tool(settings, timeout_s=_CONNECT_S)
        except NodeUnavailable as error:
            if not isinstance(error.__cause__, (FileNotFoundError, ConnectionRefusedError)):
                raise
            raise NodeUnavailable(
                f"no node cache runs: nobody is at {self._socket}. The first engine starts one, or "
                f"ucm node-cache --config FILE; where a node_cache_socket is set, name the "
                f"settings file"
            ) from error
        self._asked = 0

    def sample(self) -> StatusSample:
        """Raises NodeUnavailable."""
        self._asked += 1
        self._client.send(p.GetStatus(id=self._asked))
        status = first_answer(self._client, self._is_asked_for, timeout_s=_ANSWER_S)
        if not isinstance(status, p.Status):
            raise NodeUnavailable(
                f"the node cache at {self._socket} has not answered for {_ANSWER_S:.0f} s: it may "
                f"be stopped, or have too little CPU"
            )
        return StatusSample(status, time.monotonic())

    def _is_asked_for(self, message: p.NodeMessage) -> bool:
        return isinstance(message, p.Status) and message.id == self._asked

    def view(self, before: StatusSample, after: StatusSample) -> NodeView:
        welcome = self._client.welcome
        backends = welcome.settings.get("storage_backends") or ()
        return node_view(
            before,
            after,
            socket=self._socket,
            backends=[str(each) for each in backends],
        )

    def close(self) -> None:
        self._client.close()


def node_view(
    before: StatusSample, after: StatusSample, *, socket: str, backends: list[str]
) -> NodeView:
    """Pure."""
    status = after.status
    slots, counters = status.slots, status.counters
    change = _Change(before, after)
    own = 1  # whoever asks
    return NodeView(
        socket=socket,
        pid=status.pid,
        backends=backends,
        capacity_bytes=slots["capacity_bytes"],
        num_clients=sum(each["connections"] for each in status.sessions.values()) - own,
        slots={state: slots[state] for state in ("free", "filling", "ready", "aside")},
        pins=slots["pins"],
        queues=dict(status.queues),
        stalled={op: slots[f"{op}_stalled"] for op in ("reads", "writes")},
        missed=_those({reason: counters.get(f"lookup_ended_{reason}", 0) for reason in MISSED}),
        unwritten=_those({reason: status.unwritten(reason) for reason in UNWRITTEN}),
        rates=change.rates(),
        read_ms=change.ms_for_each("tier_read"),
        write_ms=change.ms_for_each("tier_write"),
    )


def _those(numbers: Mapping[Outcome, int]) -> dict[str, int]:
    """Without those that never occurred."""
    return {str(reason): number for reason, number in numbers.items() if number}


class _Change:
    """Between two statuses."""

    def __init__(self, before: StatusSample, after: StatusSample) -> None:
        self._before, self._after = before.status, after.status
        self._seconds = max(1e-3, after.at_s - before.at_s)

    def of(self, counter: str) -> int:
        is_same = self._before.arena == self._after.arena
        earlier = self._before.counters.get(counter, 0) if is_same else 0
        return max(0, self._after.counters.get(counter, 0) - earlier)

    def per_s(self, counter: str) -> float:
        return round(self.of(counter) / self._seconds, 3)

    def of_tiers_per_s(self, counter: str) -> float:
        return round(self.per_s(counter) + self.per_s(FAR + counter), 3)

    def ms_for_each(self, kind: str) -> float | None:
        pages = self.of(f"{kind}_pages")
        return round(self.of(f"{kind}_us") / pages / 1000, 3) if pages else None

    def rates(self) -> Rates:
        hits, from_files = self.per_s("lookup_blocks_hit"), self.of_tiers_per_s("read_hit")
        evicted = self._after.slots["evictions"] - self._before.slots["evictions"]
        return Rates(
            seconds=round(self._seconds, 3),
            lookups=self.per_s("lookups"),
            blocks_asked=self.per_s("lookup_blocks_asked"),
            # What was read ahead may be asked for later.
            hit_memory=max(0.0, round(hits - from_files, 3)),
            hit_files=min(hits, from_files),
            pages_dumped=self.per_s("dump_committed"),
            pages_read=self.of_tiers_per_s("tier_read_pages"),
            pages_written=self.of_tiers_per_s("tier_write_pages"),
            bytes_read=self.of_tiers_per_s("tier_read_bytes"),
            bytes_written=self.of_tiers_per_s("tier_write_bytes"),
            evictions=round(max(0, evicted) / self._seconds, 3),
        )
