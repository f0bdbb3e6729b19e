"""Examines storage backends one by one, within a time: what hangs is said to hang."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Final

import msgspec

from ucm.config.settings import Settings, StoreSettings
from ucm.errors import UcmError
from ucm.store.blocks.namespace import Manifest, fingerprint
from ucm.store.inspect.bucket_model import model_in_bucket
from ucm.store.inspect.bucket_probe import BucketProbe
from ucm.store.inspect.given import GivenStore, given_place
from ucm.store.inspect.guesses import nearest_differences
from ucm.store.inspect.mount_probe import BackendFacts, largest_page_bytes, look_at_backend
from ucm.store.inspect.peer_probe import PeerFacts, look_from_peer
from ucm.store.inspect.remedies import remedy
from ucm.store.inspect.speed import NUM_THREADS, ProbeLoad
from ucm.store.inspect.strands_in_store import has_unknown_strands, like
from ucm.store.inspect.verdicts import (
    Finding,
    Wishes,
    backend_findings,
    model_findings,
    peer_findings,
)
from ucm.store.inspect.walk import NamespaceFolder, manifests_of, namespace_folders
from ucm.store.inspect.within import Trial, within
from ucm.store.tiers.posix import paths

_DEFAULT_PAGE_BYTES: Final = 4 << 20
# Of larger ones some are not written within the time; and a file may say that it is of any length.
_MAX_PAGE_BYTES: Final = 256 << 20
_QUICK_BYTES: Final = 32 << 20
_QUICK_FILES: Final = 32
_SLOW_BYTES: Final = 1 << 30
# Of quick ones, an absence that is remembered is seen to be, and no more.
_QUICK_S: Final = 1.0
_SLOW_S: Final = 70.0
_GIVEN_UP_S: Final = 20.0
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


class ExaminedPlace(msgspec.Struct, frozen=True, kw_only=True):
    """What was named: a file of settings, or a directory that is the only backend."""

    is_settings: bool
    backends: list[Examined]


@dataclass(frozen=True)
class Examination:
    """How it is done. `page_bytes`: 0 for the largest page of the store."""

    is_slow: bool = False
    page_bytes: int = 0
    prefill_tokens_per_s: float = 0.0

    def of(self, argument: str, peers: Sequence[str]) -> ExaminedPlace:
        """`peers` are second mounts of the first backends. Raises ConfigError, and nothing for what
        storage does."""
        try:
            given = _given(argument)
        except TimeoutError as error:
            return ExaminedPlace(is_settings=False, backends=[_unusable(argument, error)])
        return ExaminedPlace(
            is_settings=given.settings is not None,
            backends=[
                *(
                    self._examine(given, backend, peer)
                    for backend, peer in zip_longest(given.backends, peers[: len(given.backends)])
                ),
                *self._of_bucket(given),
            ],
        )

    def _of_bucket(self, given: GivenStore) -> list[Examined]:
        """Raises ConfigError."""
        bucket = given.bucket()
        if bucket is None:
            return []
        trial = Trial("reaching the bucket")
        page_bytes = min(self.page_bytes or _DEFAULT_PAGE_BYTES, _MAX_PAGE_BYTES)
        probe = BucketProbe(bucket, page_bytes, self._wishes(given.settings), trial)
        try:
            findings = within(_GIVEN_UP_S, probe.run, trial)
        except (UcmError, OSError) as error:
            return [_unusable(bucket.place, error)]
        return [Examined(backend=bucket.place, facts=None, peer=None, findings=findings)]

    def _examine(self, given: GivenStore, backend: str, peer: str | None) -> Examined:
        trial, wishes = Trial("listing the directory"), self._wishes(given.settings)
        try:
            load = self._load(backend, trial)
            look = partial(look_at_backend, backend, load, NUM_THREADS, trial)
            facts = within(_GIVEN_UP_S + (_SLOW_S if self.is_slow else 0), look, trial)
        except (UcmError, OSError) as error:
            return _unusable(backend, error)
        findings = backend_findings(facts, wishes)
        peer_facts = None
        if peer:
            try:
                peer_facts = self._look_from(peer, backend, trial)
                findings += peer_findings(peer_facts, facts.id, wishes)
            except (UcmError, OSError) as error:
                findings.append(_why_unusable(peer, error))
        return Examined(backend=backend, facts=facts, peer=peer_facts, findings=findings)

    def _look_from(self, peer: str, backend: str, trial: Trial) -> PeerFacts:
        trial.doing = f"looking from {peer}"
        limit_s = _SLOW_S if self.is_slow else _QUICK_S
        look = partial(look_from_peer, backend, peer, limit_s=limit_s, stop=trial.stop)
        return within(5 * limit_s + _GIVEN_UP_S, look, trial)

    def _load(self, backend: str, trial: Trial) -> ProbeLoad:
        """Raises TimeoutError."""
        return ProbeLoad(
            min(self.page_bytes or _page_bytes(backend, trial), _MAX_PAGE_BYTES),
            _SLOW_BYTES if self.is_slow else _QUICK_BYTES,
            5.0 if self.is_slow else 0.1,
            max_files=1 << 20 if self.is_slow else _QUICK_FILES,
            stop=trial.stop,
        )

    def _wishes(self, settings: Settings | None) -> Wishes:
        min_free_gb = settings.store.min_free_gb if settings is not None else None
        return Wishes(
            min_free_bytes=None if min_free_gb is None else int(min_free_gb * (1 << 30)),
            queue_pages=settings.store.write_queue_pages if settings is not None else 0,
            is_sealed=settings is not None and settings.store.page_key_file is not None,
            lookup_timeout_s=(settings or _DEFAULTS).lookup_timeout_ms / 1000,
            handoff_timeout_s=(settings or _DEFAULTS).handoff_timeout_ms / 1000,
            block_tokens=(settings or _DEFAULTS).block_tokens,
            prefill_tokens_per_s=self.prefill_tokens_per_s,
            read_threads=(settings or _DEFAULTS).store.read_threads,
        )


def examine_model(argument: str, model: str, manifest: Manifest) -> list[Finding]:
    """Raises TierError where a backend can't be listed."""
    try:
        given = _given(argument)
        trial = Trial("looking for the model")
        return within(_GIVEN_UP_S, partial(_examine_model, given, model, manifest), trial)
    except TimeoutError as error:
        return _unusable(argument, error).findings


def _examine_model(given: GivenStore, model: str, manifest: Manifest) -> list[Finding]:
    findings = _model_in_directories(given, model, manifest) if given.backends else []
    bucket = given.bucket()
    if bucket is not None:
        page_key = given.page_key()
        key_id = page_key.id if page_key is not None else b""
        findings += model_in_bucket(bucket, model, manifest, key_id)
    return findings


def _model_in_directories(given: GivenStore, model: str, manifest: Manifest) -> list[Finding]:
    folders = [folder for backend in given.backends for folder in namespace_folders(backend)]
    page_key = given.page_key()
    key_id = page_key.id if page_key is not None else b""
    name = fingerprint(manifest)
    own = {
        NamespaceFolder(backend, paths.namespace_dir("", name, key_id).lstrip("/"))
        for backend in given.backends
    }
    is_known = bool(own.intersection(folders))
    if has_unknown_strands(manifest):
        is_known = bool(
            like(manifest, manifests_of(each for each in folders if each.key_id == key_id))
        )
    return model_findings(model, is_known, nearest_differences(manifest, manifests_of(folders)))


def _given(argument: str) -> GivenStore:
    """Raises ConfigError, and TimeoutError."""
    trial = Trial("looking at what lies there")
    return within(_GIVEN_UP_S, partial(given_place, argument, may_be_bucket=True), trial)


def _page_bytes(backend: str, trial: Trial) -> int:
    """Raises TimeoutError."""
    try:
        found = within(_GIVEN_UP_S, partial(largest_page_bytes, (backend,)), trial)
    except TimeoutError:
        raise
    except (UcmError, OSError):
        found = 0
    return found or _DEFAULT_PAGE_BYTES


def _unusable(backend: str, error: UcmError | OSError) -> Examined:
    findings = [_why_unusable(backend, error)]
    return Examined(backend=backend, facts=None, peer=None, findings=findings)


def _why_unusable(backend: str, error: UcmError | OSError) -> Finding:
    found, fix = str(error), ""
    if isinstance(error, TimeoutError):
        found = error.strerror or str(error)
        fix = "look at its server and at the network; engines go on without it"
    elif isinstance(error, OSError):
        found = f"{error.filename or backend}: {error.strerror or error}"
    return Finding(check="storage", verdict="wrong", found=found, fix=fix or remedy(found))
