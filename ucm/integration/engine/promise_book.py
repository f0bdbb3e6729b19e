"""Promises taken and given, and an account of what came of them."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ucm import handoff as h
from ucm.errors import UcmError
from ucm.integration.engine.counts import Counts
from ucm.integration.engine.dump_state import DumpEnd
from ucm.integration.engine.epoch import EngineEpochs
from ucm.integration.engine.prompt import Prompt
from ucm.integration.engine.receipt import Promise, promise_of, receipt_for, wants_tail
from ucm.outcome import Outcome, recomputed_as
from ucm.store.blocks.keys import Key
from ucm.store.blocks.namespace import differences, from_json
from ucm.store.client.session import NodeSession
from ucm.store.node import protocol as p
from ucm.store.node.notices import Notices

logger = logging.getLogger(__name__)

_MAX_REFUSED = 1000
_MAX_UNSAVED = 1 << 16


@dataclass(eq=False)
class _Account:
    """What was said with one request: `promise`, once its prompt is named, and whether it has been
    counted what came of it. Of its prompt `had_tokens` were not computed for it."""

    handoff: h.Handoff
    promise: Promise | None = None
    is_closed: bool = False
    had_tokens: int | None = None


class PromiseBook:
    """Owned by the engine's thread."""

    def __init__(self, session: NodeSession, epochs: EngineEpochs, stats: Counts) -> None:
        self._session = session
        self._epochs = epochs
        self._stats = stats
        self._accounts: dict[str, _Account] = {}
        self._unsaved: OrderedDict[bytes, None] = OrderedDict()
        self._refused: set[tuple[str, bytes]] = set()
        # Anybody who may ask an engine may send words of a hand-off.
        self._notices = Notices(time.monotonic)

    def begin(self, request: Any) -> None:
        """A request has come. Its words may be anybody's: they are checked in `named`."""
        words = request.kv_transfer_params
        handoff = h.parse(words)
        if handoff is not None:
            self._accounts[request.request_id] = _Account(handoff)
        elif isinstance(words, dict) and h.NAME in words:
            self._stats.count("ucm_receipts", outcome="unreadable")
            shown = f"{words[h.NAME]!r:.200}"
            self._notices.warn("unreadable_receipt", f"{request.request_id}: {shown}")

    def wants_tail(self, request_id: str) -> bool:
        """Whether the request's keys have one for the tail."""
        account = self._accounts.get(request_id)
        return account is not None and wants_tail(account.handoff, self._epochs.rules)

    def named(self, prompt: Prompt) -> None:
        """What is promised of a prompt is known when its keys are."""
        account = self._accounts.get(prompt.request_id)
        if account is None:
            return
        promise = account.promise = promise_of(
            account.handoff,
            keys=prompt.keys,
            num_prompt=prompt.num_tokens,
            rules=self._epochs.rules,
            now_s=time.monotonic(),
        )
        if promise is None or not isinstance(account.handoff, h.Receipt):
            return
        if promise.void is Outcome.NAMESPACE:
            self._stats.count("ucm_receipts", outcome="refused_namespace")
            self._say_why_refused(account.handoff.namespace)
        else:
            self._stats.count("ucm_receipts", outcome="taken")

    def promise(self, request_id: str) -> Promise | None:
        account = self._accounts.get(request_id)
        return None if account is None else account.promise

    def left_s(self, request_id: str, now_s: float) -> float:
        """How long the request's promise is waited for from now on; 0 without one."""
        promise = self.promise(request_id)
        return 0.0 if promise is None else promise.left_s(now_s)

    def crowded_out(self, request_id: str) -> None:
        """It is waited for no more."""
        account = self._accounts.get(request_id)
        if account is not None and account.promise is not None:
            account.promise = replace(account.promise, void=Outcome.CROWDED)

    def close(self, prompt: Prompt, had_tokens: int, reason: Outcome) -> None:
        """vLLM allocates, for the first time if this is to be counted, and computes everything
        behind `had_tokens`. `reason`: why the last lookup has brought no more."""
        account = self._accounts.get(prompt.request_id)
        if account is not None and account.had_tokens is None:
            account.had_tokens = had_tokens
        if account is None or account.promise is None or account.is_closed:
            return
        account.is_closed = True
        # One token is left to compute in any case.
        owed = min(account.promise.tokens, prompt.num_tokens - 1)
        kept = min(had_tokens, owed)
        self._stats.count("ucm_handoff_promised_tokens", owed)
        self._stats.count("ucm_handoff_loaded_tokens", kept)
        if kept < owed:
            why = account.promise.void or recomputed_as(reason)
            self._stats.count("ucm_handoff_recomputed_tokens", owed - kept, reason=why)
            logger.info("%s: computes %d promised tokens: %s", prompt.request_id, owed - kept, why)

    def receipt(self, prompt: Prompt, grown: Prompt, ended: DumpEnd) -> dict[str, Any] | None:
        """The `kv_transfer_params` of a finished request: one that wanted a receipt has it for its
        prompt, one that had a promise for what it has `grown` to with its answer, and one that
        wanted it with that for as much of both as is kept."""
        account = self._accounts.get(prompt.request_id)
        if account is None or not self._session.can_store:
            return None
        named, num_blocks = grown, ended.kept_with_answer
        if h.wants_prompt_alone(account.handoff):
            named, num_blocks = prompt, ended.kept_blocks
        elif isinstance(account.handoff, h.Wanted):
            # Without a tail the prompt's blocks have the same names in what it has grown to.
            num_blocks = num_blocks or ended.kept_blocks
        receipt = receipt_for(
            named.keys,
            num_blocks,
            num_prompt=named.num_tokens,
            rules=self._epochs.rules,
            issued_s=time.time(),
            found_tokens=account.had_tokens or 0,
        )
        if receipt is None:
            return None
        self._stats.count("ucm_receipts", outcome="issued")
        return h.params(receipt)

    def forget(self, request_id: str) -> None:
        """The request is no more."""
        self._accounts.pop(request_id, None)

    # -- what is not saved -----------------------------------------------------------------

    @property
    def unsaved(self) -> Collection[bytes]:
        """The keys of what storage has refused, or will not get: in this node's memory at best."""
        return self._unsaved.keys()

    def on_saving(self, news: p.SavingNews) -> None:
        """The node cache says of which pages it can't keep what a receipt would promise. It says so
        anew whenever this engine looks one of them up, so the oldest may be forgotten."""
        for key in news.saved:
            self._unsaved.pop(key, None)
        for key in news.refused:
            self._note_unsaved(key)

    def on_slot(self, key: Key, is_doubted: bool) -> None:
        """This engine dumps it (again): it is on its way, unless storage is likely to refuse it."""
        if is_doubted:
            self._note_unsaved(key)
        else:
            self._unsaved.pop(key, None)

    def _note_unsaved(self, key: bytes) -> None:
        self._unsaved[key] = None
        self._unsaved.move_to_end(key)
        if len(self._unsaved) > _MAX_UNSAVED:
            self._unsaved.popitem(last=False)

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
