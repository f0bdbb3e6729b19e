"""Which namespace an engine is in: its manifest, and what changes when the cache is reset."""

from __future__ import annotations

import logging
import secrets

import msgspec

from ucm.config import Settings
from ucm.integration.vllm.engine_facts import EngineFacts
from ucm.integration.vllm.promises import PromiseRules
from ucm.store.namespace import Manifest, fingerprint, to_json
from ucm.store.node import protocol as p

logger = logging.getLogger(__name__)

_EPOCH_BITS = 62


class Epochs:
    """Owned by the engine's thread. `rules` and `fingerprint` are those of now."""

    def __init__(self, settings: Settings, facts: EngineFacts, manifest: Manifest) -> None:
        self.manifest = manifest
        self.fingerprint = fingerprint(manifest)
        self._settings = settings
        self._facts = facts
        self._number = 1

    @property
    def rules(self) -> PromiseRules:
        settings = self._settings
        return PromiseRules(
            fingerprint=self.fingerprint,
            block_tokens=settings.block_tokens,
            keeps_tails=settings.store_tail and self._facts.geometry.num_rows > 0,
            handoff_timeout_s=settings.handoff_timeout_ms / 1000,
            expect_timeout_s=settings.expect_timeout_ms / 1000,
        )

    def opening(self) -> p.OpenNamespace:
        return p.OpenNamespace(
            ns=self._number,
            fingerprint=self.fingerprint,
            page_bytes=self._facts.geometry.page_bytes,
            block_tokens=self._settings.block_tokens,
            num_rows=self._facts.geometry.num_rows,
            manifest=to_json(self.manifest),
        )

    def next(self) -> None:
        """Weights that were updated in place have no name, and two engines that were both updated
        once need not have the same: so nobody else is in the new epoch."""
        epoch = 1 + secrets.randbits(_EPOCH_BITS)
        self.manifest = msgspec.structs.replace(self.manifest, epoch=epoch)
        self.fingerprint = fingerprint(self.manifest)
        self._number += 1
        logger.warning(
            "the prefix cache was reset: a new epoch of the store begins, which this engine shares "
            "with nobody; to share again, restart its engines with the new weights, or with the "
            "same `epoch` in their configuration"
        )
        self.log()

    def log(self) -> None:
        logger.info("UCM namespace %s: %s", self.fingerprint.hex()[:16], self.manifest)
