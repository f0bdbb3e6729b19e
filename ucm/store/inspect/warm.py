"""Brings the pages of prompts from storage into a node cache's memory, before anybody wants them.

They stay there as all others do: as long as there is room.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import msgspec

from ucm.config.settings import StoreSettings
from ucm.errors import ConfigError, NodeUnavailable
from ucm.store.blocks.namespace import Manifest, fingerprint, to_json
from ucm.store.client.connection import NodeClient
from ucm.store.client.start import connect_or_start
from ucm.store.inspect.asked_prompt import AskedPrompt
from ucm.store.inspect.node_client import is_tool, tool_session
from ucm.store.inspect.signs_of_life import ASKED, LOOKED
from ucm.store.inspect.warm_pages import Warmed, Warmer, answer_of_busy
from ucm.store.node import protocol as p

_CONNECT_S: Final = 30.0
_LOOK_EVERY_S: Final = 0.5


def warm(
    settings: StoreSettings,
    prompts: Sequence[AskedPrompt],
    page_bytes: Sequence[int],
    *,
    timeout_s: float = 60.0,
    hold_s: float = 0.0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_warmed: Callable[[Warmed], None] = lambda warmed: None,
    on_lost: Callable[[str], None] = lambda problem: None,
) -> Warmed:
    """One after the other, each with all threads that the node cache has; it is started if nobody
    serves. `page_bytes` are those of each strand. A node cache that nobody uses leaves after a
    while: when all is read it is kept from that until somebody uses it, for `hold_s` at most.
    Storage that brings nothing for `timeout_s` is given up. If the node cache ends meanwhile
    `on_lost` is told, and all begins again, once. Raises ConfigError, ProtocolError or
    NodeUnavailable."""
    look_at(settings.storage_backends)
    warming = _Warming(settings, prompts, page_bytes, timeout_s, on_progress, on_warmed)
    try:
        return warming.run(hold_s)
    except _Lost as lost:
        on_lost(str(lost))
        return warming.run(hold_s)


def look_at(backends: Sequence[str]) -> None:
    """Hangs where storage does: whoever watches this process sees that, and where. From then on the
    node cache is asked, which answers in time."""
    for backend in backends:
        sys.audit(LOOKED, os.path.abspath(backend))
        # What is wrong with it the node cache says.
        with suppress(OSError), os.scandir(backend) as folder:
            next(folder, None)
    sys.audit(ASKED)


class _Lost(NodeUnavailable):
    """The node cache has gone, and its memory with it."""


class _Warming:
    """All prompts, by one connection."""

    def __init__(
        self,
        settings: StoreSettings,
        prompts: Sequence[AskedPrompt],
        page_bytes: Sequence[int],
        timeout_s: float,
        on_progress: Callable[[int, int], None],
        on_warmed: Callable[[Warmed], None],
    ) -> None:
        self._settings = settings
        self._prompts = prompts
        self._page_bytes = page_bytes
        self._timeout_s = timeout_s
        self._on_progress = on_progress
        self._on_warmed = on_warmed
        self._warmed = Warmed()

    def run(self, hold_s: float) -> Warmed:
        """From the beginning. Raises _Lost if the connection ends before all is done."""
        self._warmed = Warmed()
        with connect_or_start(
            self._settings, session=tool_session(), role="tool", timeout_s=_CONNECT_S
        ) as client:
            try:
                self._warm_all(client)
                self._hold(client, hold_s)
            except NodeUnavailable as error:
                done = f"{error}, after {self._so_far()}"
                if client.is_lost:
                    raise _Lost(f"{done}: what was in its memory is gone with it") from error
                raise NodeUnavailable(done) from error
        return self._warmed

    def _warm_all(self, client: NodeClient) -> None:
        self._warmed += Warmed(memory_bytes=client.welcome.capacity_bytes)
        warmer = Warmer(client, self._page_bytes, timeout_s=self._timeout_s)
        if self._prompts:
            _open(client, self._prompts[0].manifest, self._page_bytes)
        for done, prompt in enumerate(self._prompts, 1):
            self._warmed += warmer.warm(prompt)
            self._on_progress(done, len(self._prompts))
            if warmer.has_given_up:
                self._warmed += Warmed(unasked_prompts=len(self._prompts) - done)
                break
        self._look_for_users(client)
        self._on_warmed(self._warmed)

    def _hold(self, client: NodeClient, hold_s: float) -> None:
        until_s = time.monotonic() + (0.0 if self._warmed.storage_hangs else hold_s)
        while not self._warmed.is_used and (left_s := until_s - time.monotonic()) > 0:
            time.sleep(min(left_s, _LOOK_EVERY_S))
            self._look_for_users(client)

    def _look_for_users(self, client: NodeClient) -> None:
        """Whether anybody but tools is connected."""
        client.send(p.GetStatus(id=1))
        sessions = answer_of_busy(client, p.Status).sessions
        is_used = not all(map(is_tool, sessions))
        self._warmed = msgspec.structs.replace(self._warmed, is_used=is_used)

    def _so_far(self) -> str:
        """For people."""
        warmed = self._warmed
        return (
            f"{warmed.num_prompts:,} of {len(self._prompts):,} prompts, of which "
            f"{warmed.read:,} pages were read and {warmed.in_memory:,} were in memory before"
        )


def _open(client: NodeClient, manifest: Manifest, page_bytes: Sequence[int]) -> None:
    """The namespace, once for each size of a page: as engines do, by the number of the strand."""
    for number, nbytes in enumerate(page_bytes):
        namespace = p.OpenNamespace(
            ns=number,
            fingerprint=fingerprint(manifest),
            page_bytes=nbytes,
            block_tokens=manifest.block_tokens,
            manifest=to_json(manifest),
        )
        client.send(namespace)
        opened = answer_of_busy(client, p.NamespaceOpened)
        if opened.refused:
            raise ConfigError(f"the node cache refuses the namespace: {opened.error}")
