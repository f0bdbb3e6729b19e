"""Dumps that all ranks have copied, until their adapter is known to be what their keys name.

A rank has loaded the adapter by then. If the files on disk are still those of the keys' digest, it
computed with them; if they are others, or a look at them takes too long, nothing is committed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ucm.integration.engine.dumps import Dumps
from ucm.integration.engine.naming import Namer
from ucm.integration.engine.side_thread import Pending


@dataclass(frozen=True)
class _Proof:
    job_id: int
    lora_digest: bytes | None
    found: Pending[bytes]
    until_s: float


class Proofs:
    """Owned by the engine's thread. Holds at most as many as there are dumps under way."""

    def __init__(self, namer: Namer, dumps: Dumps, *, timeout_s: float) -> None:
        self._namer = namer
        self._dumps = dumps
        self._timeout_s = timeout_s
        self._waiting: list[_Proof] = []

    def dump_ended(self, job_id: int, *, failed: bool) -> None:
        """All ranks have copied. Without an adapter there is nothing to prove."""
        prompt = self._dumps.prompt_of(job_id)
        if prompt is None or prompt.lora_request is None or failed:
            self._dumps.ended(job_id, failed=failed)
        else:
            found = self._namer.adapter_now(prompt.lora_request)
            until_s = time.monotonic() + self._timeout_s
            self._waiting.append(_Proof(job_id, prompt.lora_digest, found, until_s))

    def settle(self) -> None:
        """In each step."""
        now_s, waiting = time.monotonic(), []
        for proof in self._waiting:
            if proof.found.is_ready:
                digest = proof.found.value
                is_same = digest is not None and digest == proof.lora_digest
                self._dumps.ended(proof.job_id, failed=not is_same)
            elif now_s > proof.until_s:
                self._dumps.ended(proof.job_id, failed=True)
            else:
                waiting.append(proof)
        self._waiting = waiting
