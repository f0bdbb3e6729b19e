"""From a request to its keys, without keeping the engine's thread waiting.

Tokens alone are named at once. Pictures are digested and adapters looked at in threads of their
own; until they have answered, vLLM is told to ask again, for at most the time of a lookup. Then the
request goes without the store.

An adapter's files are looked at again before a lookup that is asked later, and before each commit:
what a rank has computed with, it has loaded by then.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from ucm.integration.engine.adapters import AdapterNames
from ucm.integration.engine.counts import Counts
from ucm.integration.engine.prompt import NamedItems, RequestState
from ucm.integration.engine.side_thread import Answer, Lane

logger = logging.getLogger(__name__)

# As old as a look at an adapter's files may be when a lookup is asked.
_FRESH_S = 1.0


class ItemNames(ABC):
    """Names what a model is given beside tokens. For one thread."""

    @abstractmethod
    def of_request(self, request: Any) -> NamedItems:
        """A request as the engine has it."""

    @abstractmethod
    def forget(self) -> None:
        """The engine has emptied its caches."""


class RequestNaming:
    """What of one request is being named."""

    def __init__(self, request: Any, items: Answer[NamedItems]) -> None:
        self.request = request
        self.items = items
        self.adapter: Answer[bytes] | None = None
        self.looked_s = 0.0
        self.since_s = 0.0
        self.is_named = False


class Namer:
    """Owned by the engine's thread. `on_named` makes a request's keys, once, with the items that
    can be named; the digest of its adapter is in its state by then."""

    def __init__(
        self,
        on_named: Callable[[RequestState, NamedItems], None],
        stats: Counts,
        item_names: ItemNames,
        *,
        timeout_s: float,
        adapter_rules: str = "",
    ) -> None:
        self._on_named = on_named
        self._stats = stats
        self._timeout_s = timeout_s
        self._item_names = item_names
        self._adapter_names = AdapterNames(adapter_rules)
        self._item_lane = Lane("ucm-items")
        self._adapter_lane = Lane("ucm-adapters")

    def begin(self, state: RequestState) -> None:
        """A request has come."""
        request = state.request
        if request.prompt_embeds is None and not request.mm_features:
            items: Answer[NamedItems] = Answer(is_ready=True, value=NamedItems())
        else:
            items = self._item_lane.ask(lambda: self._item_names.of_request(request))
        state.naming = RequestNaming(request, items)
        if request.lora_request is None and items.is_ready:
            self._finish(state, state.naming)

    def is_ready(self, state: RequestState) -> bool:
        """Whether a lookup may be asked now; False asks vLLM to ask again."""
        naming = state.naming
        if naming is None:
            return True
        now_s = time.monotonic()
        naming.since_s = naming.since_s or now_s
        if naming.request.lora_request is not None and not self._look(state, naming, now_s):
            is_ready = False
        else:
            is_ready = naming.items.is_ready
        if is_ready:
            naming.since_s = 0.0
            if not naming.is_named:
                self._finish(state, naming)
        elif now_s - naming.since_s > self._timeout_s:
            logger.warning(
                "%s bypasses the store: what shapes its KV was not named within %.1f s (a picture"
                " to digest, or the disk of a LoRA adapter)",
                state.request_id,
                self._timeout_s,
            )
            self._bypass(state, "timeout")
            is_ready = True
        return is_ready

    def adapter_now(self, state: RequestState) -> Answer[bytes] | None:
        """The digest of its adapter if that is on disk as it was; None without an adapter."""
        lora = state.request.lora_request
        if lora is None:
            return None
        return self._adapter_lane.ask(lambda: self._adapter_names.digest(lora))

    def forget(self, state: RequestState) -> None:
        """The request goes without the store from here on."""
        state.naming = None

    def reset(self) -> None:
        """vLLM has emptied its caches, that of its encoder among them."""
        self._item_lane.ask(self._item_names.forget)

    def close(self) -> None:
        self._item_lane.close()
        self._adapter_lane.close()

    def _look(self, state: RequestState, naming: RequestNaming, now_s: float) -> bool:
        """True when the last look at the adapter is answered, and new enough."""
        if naming.adapter is None or (
            naming.adapter.is_ready and now_s - naming.looked_s > _FRESH_S
        ):
            naming.looked_s = now_s
            naming.adapter = self.adapter_now(state)
        assert naming.adapter is not None
        if not naming.adapter.is_ready:
            return False
        digest = naming.adapter.value
        if digest is None or (naming.is_named and digest != state.lora_digest):
            self._bypass(state, "adapter")
        else:
            state.lora_digest = digest
        return True

    def _finish(self, state: RequestState, naming: RequestNaming) -> None:
        naming.is_named = True
        if naming.request.lora_request is None:
            state.naming = None
        # An answer without a value: it could not be digested at all.
        items = naming.items.value or NamedItems(end=0)
        if naming.request.resumable:
            self._stats.count("ucm_unnamed_requests", what="streamed")
        elif items.end is not None:
            self._stats.count("ucm_unnamed_requests", what="item")
        self._on_named(state, items)

    def _bypass(self, state: RequestState, what: str) -> None:
        self._stats.count("ucm_unnamed_requests", what=what)
        naming, state.naming = state.naming, None
        if naming is not None and not naming.is_named:
            naming.is_named = True
            self._on_named(state, NamedItems(end=0))
        state.keys, state.no_loads = [], True
