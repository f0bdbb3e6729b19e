"""Which namespace an engine is in: its manifest, and what changes when the cache is reset.

vLLM calls a connector's reset_cache, without a word about why, for /pause (whose purpose is an
update of weights), /sleep from level 1 on (level 2 throws the weights away), the release of KV
memory, and /reset_prefix_cache?reset_external=true. The weights may be others after each of them.
So by default a reset begins an epoch that nobody else is in; who knows better says so by
`reset_epoch`, or by the number in `epoch_file`, which all engines of a deployment can be given.
"""

from __future__ import annotations

import logging
import secrets

import msgspec

from ucm.config.settings import PRIVATE_EPOCH, Settings, read_epoch
from ucm.errors import ConfigError
from ucm.integration.engine.facts import EngineFacts
from ucm.integration.engine.receipt import PromiseRules
from ucm.integration.engine.side_thread import SideThread
from ucm.store.blocks.namespace import Manifest, fingerprint, to_json
from ucm.store.node import protocol as p

logger = logging.getLogger(__name__)

# How long a reset waits for the disk that `epoch_file` is on.
_READ_S = 2.0


class Epochs:
    """Owned by the engine's thread. `manifest` and `fingerprint` are those of now."""

    def __init__(self, settings: Settings, manifest: Manifest) -> None:
        self.manifest = manifest
        self.fingerprint = fingerprint(manifest)
        self._settings = settings
        self._number = 1
        self._disk = SideThread("ucm-epoch", limit=1)

    def reset(self) -> bool:
        """vLLM has reset its caches. Whether a new epoch begins."""
        epoch = self._next()
        if epoch == self.manifest.epoch:
            logger.info("the prefix cache was reset: the store goes on in epoch %d", epoch)
            return False
        before, was_private = self.fingerprint, self.manifest.epoch >= PRIVATE_EPOCH
        self.manifest = msgspec.structs.replace(self.manifest, epoch=epoch)
        self.fingerprint = fingerprint(self.manifest)
        self._number += 1
        if epoch >= PRIVATE_EPOCH:
            logger.warning(
                "the prefix cache was reset: a new epoch of the store begins, which this engine "
                "shares with nobody, as its weights may be others now; to share on, set "
                "reset_epoch: keep if they never change, or give all engines the epoch_file "
                "(docs/configuration.md)"
            )
        else:
            logger.info("the prefix cache was reset: epoch %d of the store begins", epoch)
        if was_private:
            logger.info(
                "nobody will read namespace %s again: its folder in the store may be deleted",
                before.hex(),
            )
        self.log()
        return True

    def _next(self) -> int:
        """Weights that were updated in place have no name, and two engines that were both updated
        once need not have the same."""
        private = PRIVATE_EPOCH + secrets.randbelow(PRIVATE_EPOCH)
        path = self._settings.epoch_file
        if path is None:
            return self.manifest.epoch if self._settings.reset_epoch == "keep" else private
        answer = self._disk.ask(lambda: _read(path))
        if not answer.wait(_READ_S) or answer.value is None:
            logger.warning("epoch_file %s can't be read now: this engine shares with nobody", path)
            return private
        return answer.value

    def log(self) -> None:
        logger.info("UCM namespace %s: %s", self.fingerprint.hex()[:16], self.manifest)


class EngineEpochs(Epochs):
    """Of an engine that keeps its own promises and strands. `rules` are those of now."""

    def __init__(self, settings: Settings, facts: EngineFacts, manifest: Manifest) -> None:
        super().__init__(settings, manifest)
        self._facts = facts

    @property
    def rules(self) -> PromiseRules:
        settings = self._settings
        # Where a page's units are larger than a token, a tail would end inside of one.
        has_tails = all(each.geometry.unit_tokens == 1 for each in self._facts.strands)
        return PromiseRules(
            fingerprint=self.fingerprint,
            block_tokens=settings.block_tokens,
            keeps_tails=settings.store_tail and has_tails,
            handoff_timeout_s=settings.handoff_timeout_ms / 1000,
            expect_timeout_s=settings.expect_timeout_ms / 1000,
            has_states=self._facts.has_states,
        )

    def openings(self) -> list[p.OpenNamespace]:
        """One for each strand: all are one namespace, whose pages differ in size."""
        strands = self._facts.strands
        return [
            p.OpenNamespace(
                ns=self._number * len(strands) + number,
                fingerprint=self.fingerprint,
                page_bytes=strand.geometry.page_bytes,
                block_tokens=self._settings.block_tokens,
                manifest=to_json(self.manifest),
            )
            for number, strand in enumerate(strands)
        ]


def _read(path: str) -> int | None:
    try:
        return read_epoch(path)
    except ConfigError as error:
        logger.warning("%s", error)
        return None
