"""Promises taken and given, and an account of what came of them."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from functools import partial
from typing import Any

from ucm import handoff as h
from ucm.errors import UcmError
from ucm.integration.engine.counts import Counts
from ucm.integration.engine.epoch import Epochs
from ucm.integration.engine.promise import promise_of, receipt_for
from ucm.integration.engine.prompt import RequestState
from ucm.outcome import Outcome, recomputed_as
from ucm.store.blocks.keys import Key
from ucm.store.blocks.namespace import differences, from_json
from ucm.store.client.session import NodeSession
from ucm.store.node import protocol as p
from ucm.store.node.notices import Notices

logger = logging.getLogger(__name__)

_MAX_REFUSED = 1000
_MAX_UNSAVED = 1 << 16


class PromiseBook:
    """Owned by the engine's thread."""

    def __init__(self, session: NodeSession, epochs: Epochs, stats: Counts) -> None:
        self._session = session
        self._epochs = epochs
        self._stats = stats
        self._unsaved: OrderedDict[bytes, None] = OrderedDict()
        self._refused: set[tuple[str, bytes]] = set()
        # Anybody who may ask an engine may send words of a hand-off.
        self._notices = Notices(time.monotonic)

    def heard(self, request: Any) -> h.Handoff | None:
        """What comes with a request. Its words may be anybody's: they are checked in `note`."""
        words = request.kv_transfer_params
        handoff = h.parse(words)
        if handoff is None and isinstance(words, dict) and h.NAME in words:
            self._stats.count("ucm_receipts", outcome="unreadable")
            shown = f"{words[h.NAME]!r:.200}"
            self._notices.warn("unreadable_receipt", f"{request.request_id}: {shown}")
        return handoff

    def note(self, state: RequestState, handoff: h.Handoff | None) -> None:
        """What is promised of a request that has just come."""
        state.promise = promise_of(
            handoff,
            keys=state.keys,
            num_prompt=state.num_prompt,
            rules=self._epochs.rules,
            now_s=time.monotonic(),
        )
        state.wants_receipt = isinstance(handoff, h.Wanted)
        if state.promise is None or not isinstance(handoff, h.Receipt):
            return
        if state.promise.void == Outcome.NAMESPACE:
            self._stats.count("ucm_receipts", outcome="refused_namespace")
            self._say_why_refused(handoff.namespace)
        else:
            self._stats.count("ucm_receipts", outcome="taken")

    def account(self, state: RequestState, had_tokens: int) -> None:
        """vLLM allocates for the first time, and computes everything behind `had_tokens`."""
        promise = state.promise
        if promise is None or state.is_accounted:
            return
        state.is_accounted = True
        # One token is left to compute in any case.
        owed = min(promise.tokens, state.num_prompt - 1)
        kept = min(had_tokens, owed)
        self._stats.count("ucm_handoff_promised_tokens", owed)
        self._stats.count("ucm_handoff_loaded_tokens", kept)
        if kept < owed:
            reason = promise.void or recomputed_as(state.end_reason)
            self._stats.count("ucm_handoff_recomputed_tokens", owed - kept, reason=reason)
            logger.info(
                "%s: computes %d promised tokens: %s", state.request_id, owed - kept, reason
            )

    def receipt(self, state: RequestState) -> dict[str, Any] | None:
        """The `kv_transfer_params` of a finished request that wanted one."""
        if not state.wants_receipt or not self._session.can_store:
            return None
        # What storage has refused, or will not get, is in this node's memory at best.
        refused = (i for i in range(state.kept_blocks) if state.keys[i] in self._unsaved)
        receipt = receipt_for(
            state.keys,
            next(refused, state.kept_blocks) if self._unsaved else state.kept_blocks,
            num_prompt=state.num_prompt,
            rules=self._epochs.rules,
            issued_s=time.time(),
        )
        if receipt is None:
            return None
        self._stats.count("ucm_receipts", outcome="issued")
        return h.params(receipt)

    # -- what is not saved -----------------------------------------------------------------

    def on_saving(self, news: p.SavingNews) -> None:
        """The node cache says of which pages it can't keep what a receipt would promise. It says so
        anew whenever this engine looks one of them up, so the oldest may be forgotten."""
        for key in news.saved:
            self._unsaved.pop(key, None)
        for key in news.refused:
            self._unsaved[key] = None
            self._unsaved.move_to_end(key)
        while len(self._unsaved) > _MAX_UNSAVED:
            self._unsaved.popitem(last=False)

    def on_slot(self, key: Key) -> None:
        """This engine dumps it (again): it is on its way."""
        self._unsaved.pop(key, None)

    def node_lost(self) -> None:
        """What the next node cache can't keep, it will say."""
        self._unsaved.clear()

    # -- another namespace -----------------------------------------------------------------

    def _say_why_refused(self, namespace: str) -> None:
        """Once for each pair of namespaces."""
        pair = (namespace, self._epochs.fingerprint)
        if pair in self._refused or not self._session.is_ready or len(self._refused) > _MAX_REFUSED:
            return
        self._refused.add(pair)
        self._session.ask(
            p.GetManifest(id=self._session.next_id(), fingerprint=bytes.fromhex(namespace)),
            partial(self._on_manifest, namespace),
        )

    def _on_manifest(self, namespace: str, found: p.ManifestFound) -> None:
        logger.warning(
            "receipts of namespace %s are refused, this engine is in %s: %s",
            namespace[:16],
            self._epochs.fingerprint.hex()[:16],
            self._difference(found),
        )

    def _difference(self, found: p.ManifestFound) -> str:
        if found.error:
            return f"its manifest can't be read: {found.error}"
        if not found.manifest:
            return "its manifest is not in this store: do both sides have the same one?"
        try:
            there = from_json(found.manifest)
        except UcmError as error:
            return str(error)
        here = self._epochs.manifest
        return "; ".join(differences(there, here, there_label="prefill", here_label="here"))
