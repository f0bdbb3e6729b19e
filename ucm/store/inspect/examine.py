"""Examines storage backends one by one, within a time: what hangs is said to hang."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import Final, TypeVar

import msgspec

from ucm.config.settings import Settings, StoreSettings
from ucm.errors import UcmError
from ucm.store.blocks.namespace import Manifest, fingerprint
from ucm.store.inspect.explain import nearest_differences
from ucm.store.inspect.given import GivenStore
from ucm.store.inspect.mount_probe import BackendFacts, largest_page_bytes, look_at_backend
from ucm.store.inspect.peer_probe import PeerFacts, look_from_peer
from ucm.store.inspect.speed import NUM_THREADS, ProbeLoad
from ucm.store.inspect.verdicts import (
    Finding,
    Wishes,
    backend_findings,
    model_findings,
    peer_findings,
)
from ucm.store.inspect.walk import NamespaceFolder, namespace_folders
from ucm.store.tiers.posix import paths

_T = TypeVar("_T")
_DEFAULT_PAGE_BYTES: Final = 4 << 20
_QUICK_BYTES: Final = 32 << 20
_QUICK_FILES: Final = 32
_SLOW_BYTES: Final = 1 << 30
# Of quick ones, an absence that is remembered is seen to be, and no more.
_QUICK_S: Final = 1.0
_SLOW_S: Final = 70.0
_GIVEN_UP_S: Final = 20.0
_CLEAR_UP_S: Final = 10.0
_DEFAULTS: Final = Settings(store=StoreSettings(socket_path=""))


class Examined(msgspec.Struct, frozen=True, kw_only=True):
    """Of one backend; `facts` is None where it could not be looked at."""

    backend: str
    facts: BackendFacts | None
    peer: PeerFacts | None
    findings: list[Finding]


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """`model` is about the model that was asked for, if one was."""

    backends: list[Examined]
    model: list[Finding]


@dataclass(frozen=True)
class Examination:
    """How it is done. `page_bytes`: 0 for the largest page of the store."""

    given: GivenStore
    is_slow: bool = False
    page_bytes: int = 0
    prefill_tokens_per_s: float = 0.0

    def of(self, backend: str, peer: str) -> Examined:
        """Never raises for what storage does. `peer` is empty without a second mount."""
        load = ProbeLoad(
            self.page_bytes or self._page_bytes(backend),
            _SLOW_BYTES if self.is_slow else _QUICK_BYTES,
            5.0 if self.is_slow else 0.1,
            max_files=1 << 20 if self.is_slow else _QUICK_FILES,
        )
        facts = peer_facts = None
        wishes = self._wishes()
        try:
            within_s = _GIVEN_UP_S + (_SLOW_S if self.is_slow else 0)
            look = partial(look_at_backend, backend, load, NUM_THREADS)
            facts = _within(within_s, look, load.stop)
            findings = backend_findings(facts, wishes)
            if peer:
                limit_s = _SLOW_S if self.is_slow else _QUICK_S
                look_again = partial(look_from_peer, backend, peer, limit_s=limit_s, stop=load.stop)
                peer_facts = _within(5 * limit_s + _GIVEN_UP_S, look_again, load.stop)
                findings += peer_findings(peer_facts, facts.id, wishes)
        except (UcmError, OSError) as error:
            findings = [_unusable(backend, error)]
        return Examined(backend=backend, facts=facts, peer=peer_facts, findings=findings)

    def _page_bytes(self, backend: str) -> int:
        try:
            found = _within(_GIVEN_UP_S, lambda: largest_page_bytes((backend,)), Event())
        except (UcmError, OSError):
            found = 0
        return found or _DEFAULT_PAGE_BYTES

    def _wishes(self) -> Wishes:
        settings = self.given.settings
        min_free_gb = settings.store.min_free_gb if settings is not None else None
        return Wishes(
            min_free_bytes=None if min_free_gb is None else int(min_free_gb * (1 << 30)),
            queue_pages=settings.store.write_queue_pages if settings is not None else 0,
            is_sealed=settings is not None and settings.store.page_key_file is not None,
            lookup_timeout_s=(settings or _DEFAULTS).lookup_timeout_ms / 1000,
            handoff_timeout_s=(settings or _DEFAULTS).handoff_timeout_ms / 1000,
            block_tokens=(settings or _DEFAULTS).block_tokens,
            prefill_tokens_per_s=self.prefill_tokens_per_s,
        )


def examine_model(given: GivenStore, model: str, manifest: Manifest) -> list[Finding]:
    """Raises TierError where a backend can't be listed."""
    folders = [folder for backend in given.backends for folder in namespace_folders(backend)]
    page_key = given.page_key()
    key_id = page_key.id if page_key is not None else b""
    name = fingerprint(manifest)
    own = {
        NamespaceFolder(backend, paths.namespace_dir("", name, key_id).lstrip("/"))
        for backend in given.backends
    }
    is_known = bool(own.intersection(folders))
    return model_findings(model, is_known, nearest_differences(manifest, folders))


def _unusable(backend: str, error: UcmError | OSError) -> Finding:
    found, fix = str(error), f"mount it, or make it with `ucm init {backend}`"
    if isinstance(error, TimeoutError):
        found = error.strerror or str(error)
        fix = "look at its server and at the network; engines go on without it"
    elif isinstance(error, OSError):
        found = f"{error.filename or backend}: {error.strerror or error}"
    return Finding(check="storage", verdict="wrong", found=found, fix=fix)


def _within(seconds: float, act: Callable[[], _T], stop: Event) -> _T:
    """Raises TimeoutError if storage hangs; the thread that hangs in it is left behind. What is
    interrupted is stopped, and has a moment to clear up."""
    values: list[_T] = []
    raised: list[UcmError | OSError] = []
    # Not the thread's own end: a join that was interrupted takes it for ended (Python 3.11).
    has_ended = Event()

    def run() -> None:
        try:
            values.append(act())
        except (UcmError, OSError) as error:
            raised.append(error)
        finally:
            has_ended.set()

    threading.Thread(target=run, daemon=True).start()
    try:
        has_ended.wait(seconds)
    except KeyboardInterrupt:
        stop.set()
        has_ended.wait(_CLEAR_UP_S)
        raise
    if raised:
        raise raised[0]
    if not values:
        raise TimeoutError(0, f"storage has not answered for {seconds:.0f} s: it hangs")
    return values[0]
