"""Opening namespaces, and reading the manifests of others: what a client waits for at its start.

None of it may wait behind pages. It has threads of its own, and who asks has an answer after
`timeout_s` at the latest, with the true reason: pages can be had from memory while storage hangs,
and from the lanes of storage that are there while another one isn't. A lane that was never reached
is looked for once a second from the first opening on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from ucm.errors import TierError
from ucm.outcome import Outcome
from ucm.store.blocks.page_layout import padded_bytes
from ucm.store.node import protocol as p
from ucm.store.node.io_threads import LanePool
from ucm.store.node.parts import NodeParts
from ucm.store.node.sessions import Connection, OpenedNamespace
from ucm.store.node.storing import Storing
from ucm.store.tiers.tier import Tier, TierNamespace

_logger = logging.getLogger(__name__)
_LOOK_EVERY_S = 1.0


class Openings:
    """Owned by the event loop's thread."""

    def __init__(self, parts: NodeParts, storing: Storing) -> None:
        self._slots = parts.slots
        self._tier = parts.tier
        self._lanes = parts.control
        near, *farther = [
            [(each.tier, lane, pool) for lane, pool in enumerate(each.control.pools)]
            for each in parts.tiers
        ]
        # Far, a page that is written brings the manifest: nobody's start waits for that.
        self._near, self._all = near, sum(farther, near)
        self._tiers = parts.tiers
        self._storing = storing
        self._notices = parts.notices
        self._call_later = parts.call_later
        self._timeout_s = parts.limits.open_timeout_s
        self._clock = parts.clock
        # When to look next for lanes that were never reached; None before the first opening.
        self._look_s: float | None = None
        self._looking: set[int] = set()

    def tick(self) -> None:
        """Called many times a second."""
        if self._look_s is None or self._clock() < self._look_s:
            return
        self._look_s = self._clock() + _LOOK_EVERY_S
        for lane in set(self._tier.unknown_lanes()) - self._looking:
            self._looking.add(lane)
            self._lanes.pools[lane].submit(
                partial(self._tier.look_for_lane, lane), partial(self._on_looked, lane)
            )

    def _on_looked(self, lane: int, result: object) -> None:
        tier = self._tier
        self._looking.discard(lane)
        if isinstance(result, Exception):
            self._notices.warn("storage_backend_not_found", result, of=tier.lanes[lane])
        elif lane not in tier.unknown_lanes():
            _logger.info("%s: is there now", tier.lanes[lane])

    def open(self, connection: Connection, message: p.OpenNamespace) -> None:
        """The namespace can be used from now on, whatever storage says of it."""
        slot_bytes = padded_bytes(message.page_bytes)
        if not self._slots.fits(slot_bytes):
            error = (
                f"one page takes {slot_bytes} bytes and the node cache has "
                f"{self._slots.capacity_bytes}: raise cache_buffer_capacity_gb"
            )
            connection.send(p.NamespaceOpened(ns=message.ns, error=error, refused=True))
            return
        namespace = TierNamespace(
            fingerprint=message.fingerprint,
            page_bytes=message.page_bytes,
            manifest_json=message.manifest,
        )
        connection.namespaces[message.ns] = OpenedNamespace(
            tier=namespace,
            slot_bytes=slot_bytes,
            block_tokens=message.block_tokens,
        )

        def answer(results: Sequence[object]) -> None:
            error = _errors(results)
            if error:
                self._notices.warn("opening_failed", error)
            connection.send(p.NamespaceOpened(ns=message.ns, error=error, refused=False))

        if self._look_s is None:
            self._look_s = self._clock() + _LOOK_EVERY_S
        self._ask(
            self._near,
            lambda tier, lane: tier.open_lane(namespace, lane),
            answer,
            "no manifest written",
        )
        self._check_room(namespace)

    def _check_room(self, namespace: TierNamespace) -> None:
        """Nobody waits for it: the first page is dumped when a prompt has been computed."""
        for number, each in enumerate(self._tiers):
            for lane, pool in enumerate(each.control.pools):
                pool.submit(
                    partial(each.tier.check_room, namespace, lane),
                    partial(self._on_room, number, lane),
                )

    def _on_room(self, tier: int, lane: int, result: object) -> None:
        if isinstance(result, TierError):
            if result.reason is Outcome.FULL:  # of rights the tier itself has said what is wrong
                self._notices.warn(f"write_failed_{result.reason}", result)
            self._storing.has_no_room(tier, lane, result.reason)

    def find_manifest(self, connection: Connection, message: p.GetManifest) -> None:
        def answer(results: Sequence[object]) -> None:
            # All are the same: the first that is found will do.
            manifest = next((each for each in results if isinstance(each, bytes)), b"")
            error = "" if manifest else _errors(results)
            connection.send(p.ManifestFound(id=message.id, manifest=manifest, error=error))

        self._ask(
            self._all,
            lambda tier, lane: tier.read_manifest_in(lane, message.fingerprint),
            answer,
            "no manifest read",
            is_enough=lambda result: isinstance(result, bytes),
        )

    def _ask(
        self,
        lanes: Sequence[tuple[Tier, int, LanePool]],
        call: Callable[[Tier, int], object],
        answer: Callable[[Sequence[object]], None],
        without: str,
        *,
        is_enough: Callable[[object], bool] = lambda result: False,
    ) -> None:
        """Calls in these lanes. Answers once: when all have ended, or one is enough, or in time
        with an error for each that is late."""
        names = [tier.lanes[lane] for tier, lane, _ in lanes]
        results: dict[int, object] = {}
        is_answered = False

        def end() -> None:
            nonlocal is_answered
            if not is_answered:
                is_answered = True
                late = [self._late(name, without, of=len(names)) for name in names]
                answer([results.get(i, late[i]) for i in range(len(names))])

        def on_done(i: int, result: object) -> None:
            results[i] = result
            if len(results) == len(names) or is_enough(result):
                end()

        for i, (tier, lane, pool) in enumerate(lanes):
            pool.submit(partial(call, tier, lane), partial(on_done, i))
        if not lanes:
            end()
        elif not is_answered:
            self._call_later(self._timeout_s, end)

    def _late(self, name: str, without: str, *, of: int) -> TierError:
        late = f"storage has not answered for {self._timeout_s:g} s ({without}): is it mounted?"
        return TierError(f"{name}: {late}" if of > 1 else late, reason=Outcome.TIMEOUT)


def _errors(results: Sequence[object]) -> str:
    return "; ".join(str(each) for each in results if isinstance(each, Exception))
