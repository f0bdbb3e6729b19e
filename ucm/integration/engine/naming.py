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
from dataclasses import dataclass
from typing import Any, Protocol

from ucm.integration.engine.adapters import AdapterNames
from ucm.integration.engine.counts import Counts
from ucm.integration.engine.prompt import NamedItems
from ucm.integration.engine.side_thread import Pending, SideThread

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


@dataclass(eq=False)
class _Naming:
    """What of one request is being named. Without an adapter it is over when the request is named;
    with one it is looked at again before each lookup. `since_s`: 0 while nothing is waited for."""

    request: Any
    items: Pending[NamedItems]
    adapter: Pending[bytes] | None = None
    looked_s: float = 0.0
    since_s: float = 0.0
    is_named: bool = False
    lora_digest: bytes | None = None


class OnNamed(Protocol):
    """Makes a request's keys, once, with the items that can be named."""

    def __call__(self, request: Any, items: NamedItems, lora_digest: bytes | None, /) -> None: ...


class Namer:
    """Owned by the engine's thread. `on_bypass` is told of the requests, by their ids, that go
    without the store from then on, named or not."""

    def __init__(
        self,
        on_named: OnNamed,
        on_bypass: Callable[[str], None],
        stats: Counts,
        item_names: ItemNames,
        *,
        timeout_s: float,
        adapter_rules: str = "",
    ) -> None:
        self._on_named = on_named
        self._on_bypass = on_bypass
        self._stats = stats
        self._timeout_s = timeout_s
        self._item_names = item_names
        self._adapter_names = AdapterNames(adapter_rules)
        self._item_thread = SideThread("ucm-items")
        self._adapter_thread = SideThread("ucm-adapters")
        self._namings: dict[str, _Naming] = {}

    def begin(self, request: Any) -> None:
        """A request has come."""
        if request.prompt_embeds is None and not request.mm_features:
            items: Pending[NamedItems] = Pending(is_ready=True, value=NamedItems())
        else:
            items = self._item_thread.ask(lambda: self._item_names.of_request(request))
        naming = self._namings[request.request_id] = _Naming(request, items)
        if request.lora_request is None and items.is_ready:
            self._finish(naming)

    def is_ready(self, request_id: str) -> bool:
        """Whether a lookup may be asked now; False asks vLLM to ask again."""
        naming = self._namings.get(request_id)
        if naming is None:
            return True
        now_s = time.monotonic()
        naming.since_s = naming.since_s or now_s
        if naming.request.lora_request is not None and not self._look(naming, now_s):
            is_ready = False
        else:
            is_ready = naming.items.is_ready
        if is_ready:
            naming.since_s = 0.0
            if not naming.is_named:
                self._finish(naming)
        elif now_s - naming.since_s > self._timeout_s:
            logger.warning(
                "%s bypasses the store: what shapes its KV was not named within %.1f s (a picture"
                " to digest, or the disk of a LoRA adapter)",
                request_id,
                self._timeout_s,
            )
            self._bypass(naming, "timeout")
            is_ready = True
        return is_ready

    def adapter_now(self, lora_request: Any) -> Pending[bytes]:
        """The digest of an adapter if that is on disk as it was."""
        return self._adapter_thread.ask(lambda: self._adapter_names.digest(lora_request))

    def forget(self, request_id: str) -> None:
        """The request is no more, or goes without the store from here on."""
        self._namings.pop(request_id, None)

    def reset(self) -> None:
        """vLLM has emptied its caches, that of its encoder among them."""
        self._item_thread.ask(self._item_names.forget)

    def close(self) -> None:
        self._item_thread.close()
        self._adapter_thread.close()

    def _look(self, naming: _Naming, now_s: float) -> bool:
        """True when the last look at the adapter is answered, and new enough."""
        if naming.adapter is None or (
            naming.adapter.is_ready and now_s - naming.looked_s > _FRESH_S
        ):
            naming.looked_s = now_s
            naming.adapter = self.adapter_now(naming.request.lora_request)
        if not naming.adapter.is_ready:
            return False
        digest = naming.adapter.value
        if digest is None or (naming.is_named and digest != naming.lora_digest):
            self._bypass(naming, "adapter")
        else:
            naming.lora_digest = digest
        return True

    def _finish(self, naming: _Naming) -> None:
        request = naming.request
        naming.is_named = True
        if request.lora_request is None:
            self.forget(request.request_id)
        # An answer without a value: it could not be digested at all.
        items = naming.items.value or NamedItems(end=0)
        if request.resumable:
            self._stats.count("ucm_unnamed_requests", what="streamed")
        elif items.end is not None:
            self._stats.count("ucm_unnamed_requests", what="item")
        self._on_named(request, items, naming.lora_digest)

    def _bypass(self, naming: _Naming, what: str) -> None:
        request = naming.request
        self._stats.count("ucm_unnamed_requests", what=what)
        self.forget(request.request_id)
        if not naming.is_named:
            naming.is_named = True
            self._on_named(request, NamedItems(end=0), None)
        self._on_bypass(request.request_id)
