"""Opening namespaces, and reading the manifests of others: what a client waits for at its start.

None of it may wait behind pages. It has threads of its own, and who asks has an answer after
`timeout_s` at the latest, with the true reason: pages can be had from memory while storage hangs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ucm.errors import TierError
from ucm.store.node import protocol as p
from ucm.store.node.lanes import Lanes
from ucm.store.node.notices import Notices
from ucm.store.node.promises import CallLater
from ucm.store.node.state import Connection, OpenedNamespace
from ucm.store.page import padded_bytes
from ucm.store.slots import SlotTable
from ucm.store.tier import Tier, TierNamespace


class Openings:
    """Owned by the event loop's thread."""

    def __init__(
        self,
        *,
        slots: SlotTable,
        tier: Tier | None,
        lanes: Lanes,
        notices: Notices,
        call_later: CallLater,
        timeout_s: float,
    ) -> None:
        self._slots = slots
        self._tier = tier
        self._lanes = lanes
        self._notices = notices
        self._call_later = call_later
        self._timeout_s = timeout_s

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
            num_rows=message.num_rows,
        )

        def answer(result: object) -> None:
            error = str(result) if isinstance(result, Exception) else ""
            if error:
                self._notices.warn("opening_failed", error)
            connection.send(p.NamespaceOpened(ns=message.ns, error=error, refused=False))

        self._ask(lambda tier: tier.open_namespace(namespace), answer, "no manifest written")

    def find_manifest(self, connection: Connection, message: p.GetManifest) -> None:
        def answer(result: object) -> None:
            manifest = result if isinstance(result, bytes) else b""
            error = str(result) if isinstance(result, Exception) else ""
            connection.send(p.ManifestFound(id=message.id, manifest=manifest, error=error))

        self._ask(lambda tier: tier.read_manifest(message.fingerprint), answer, "no manifest read")

    def _ask(
        self, call: Callable[[Tier], object], answer: Callable[[object], None], without: str
    ) -> None:
        tier = self._tier
        if tier is None:
            answer(None)
            return
        is_answered = False

        def once(result: object) -> None:
            nonlocal is_answered
            if not is_answered:
                is_answered = True
                answer(result)

        self._lanes.pools[0].submit(partial(call, tier), once)
        if not is_answered:
            late = f"storage has not answered for {self._timeout_s:g} s ({without}): is it mounted?"
            self._call_later(self._timeout_s, partial(once, TierError(late, reason="timeout")))
