"""vLLM's own tiering manager with our tier in it, over a real node cache: what vLLM's scheduler
asks of it, without an engine around."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
from vllm.v1.kv_offload.tiering.manager import (
    CPUPrimaryTierOffloadingManager,
    TieringOffloadingManager,
)

from tests.integration.tiering.rows import ROW_BYTES, manifest
from tests.store.node.support import SOON_S, Place, wait_until
from ucm.handoff import Handoff, params
from ucm.integration.tiering import ucm_tier
from ucm.integration.tiering.engine import Engine, making
from ucm.integration.tiering.promises import WaitedGroup
from ucm.integration.tiering.ucm_tier import UcmTier

CHUNK_TOKENS = 4
GROUP = WaitedGroup(number=0, chunk_tokens=CHUNK_TOKENS, keeps_all=True)


class Tiering:
    """One engine's. A prompt is a list of names, one for each chunk."""

    def __init__(self, place: Place, node: str = "a", *, num_rows: int = 16, **top: Any) -> None:
        self._engine = Engine(SimpleNamespace(instance_id=uuid.uuid4().hex), None)
        spec = SimpleNamespace(
            config=SimpleNamespace(engine_id="e"),
            tokens_per_hash=CHUNK_TOKENS,
        )
        region = SharedOffloadRegion(
            engine_id=f"tiering-test-{uuid.uuid4().hex}",
            num_chunks=num_rows,
            rank=None,
            kv_bytes_per_chunk=ROW_BYTES,
            cpu_page_size=ROW_BYTES,
        )
        primary = CPUPrimaryTierOffloadingManager(num_chunks=num_rows, mmap_region=region)
        self.view = primary.get_kv_memoryview()
        with pytest.MonkeyPatch.context() as patch, making(self._engine):
            patch.setattr(ucm_tier, "waited_group", lambda engine, spec: GROUP)
            patch.setattr(ucm_tier, "row_manifest", lambda *_, **__: manifest())
            tier: Any = SecondaryTierFactory.create_secondary_tier(
                config_of(place, node, **top), self.view, spec
            )
        assert isinstance(tier, UcmTier)
        self.tier = tier
        self.manager = TieringOffloadingManager(primary_tier=primary, secondary_tiers=[tier])
        wait_until(lambda: tier._store.is_ready, "the node cache answers")

    def row(self, number: int) -> memoryview:
        """For a moment: vLLM gives the memory back at the end."""
        return self.view.cast("B")[number * ROW_BYTES : (number + 1) * ROW_BYTES]

    def step(self, contexts: Sequence[ReqContext] = ()) -> None:
        """The end of one of the scheduler's."""
        self.manager.on_schedule_end(ScheduleEndContext((), ()))

    def begin(self, prompt: Sequence[str], words: Handoff | None = None) -> Request:
        return Request(self, prompt, words)

    def settle(self) -> None:
        """Steps until nothing is under way."""

        def is_settled() -> bool:
            self.step()
            return not self.manager.has_pending_work()

        wait_until(is_settled, "all jobs have ended")

    def reset(self) -> None:
        """As vLLM's scheduler and our connector do it."""
        self.manager.reset_cache()
        if hasattr(self.manager, "on_reset_flushed"):  # vLLM 0.33 loads nothing before
            self.manager.on_reset_flushed()
        self.tier.begin_epoch()

    def close(self) -> None:
        self.manager.shutdown()


class Request:
    """Of one engine."""

    def __init__(self, tiering: Tiering, prompt: Sequence[str], words: Handoff | None) -> None:
        self._tiering, self._manager = tiering, tiering.manager
        self.context = ReqContext(uuid.uuid4().hex, params(words) if words is not None else None)
        self._manager.on_new_request(self.context)
        self.hashes = [
            sha256("/".join(prompt[: i + 1]).encode()).digest() for i in range(len(prompt))
        ]
        self.keys = [make_offload_key(each, 0) for each in self.hashes]
        for i, key in enumerate(self.keys):
            self.context.set_offload_key_position(key, (i + 1) * CHUNK_TOKENS)

    def store(self, start: int = 0, end: int | None = None) -> None:
        """As if these chunks had been computed: into host memory, and on from there."""
        keys = self.keys[start:end]
        output: Any = self._manager.prepare_store(keys, self.context)
        if output is None or not output.keys_to_store:
            return  # there is no room, or nothing to do
        for key, row in zip(output.keys_to_store, output.store_spec.chunk_ids, strict=True):
            self._tiering.row(int(row))[:] = content(key)
        self._manager.complete_store(set(output.keys_to_store), self.context)

    def look(self) -> int | None:
        """How many chunks lead; None as long as vLLM has to ask again. As vLLM's scheduler does."""
        found, is_later = 0, False
        for key in self.keys:
            match self._manager.lookup(key, self.context):
                case LookupResult.HIT:
                    found += 1
                case LookupResult.HIT_PENDING:
                    found, is_later = found + 1, True
                case LookupResult.RETRY:
                    is_later = True
                case LookupResult.MISS:
                    break
        self._tiering.step()
        return None if is_later else found

    def hit(self, *, within_s: float = SOON_S) -> int:
        """How many chunks lead, once that is known; what is in their rows is checked."""
        answers: list[int] = []

        def look() -> bool:
            answer = self.look()
            if answer is not None:
                answers.append(answer)
            return bool(answers)

        wait_until(look, "an answer", within_s=within_s)
        keys = self.keys[: answers[0]]
        if keys:
            spec: Any = self._manager.prepare_load(keys, self.context)
            for key, row in zip(keys, spec.chunk_ids, strict=True):
                assert bytes(self._tiering.row(int(row))) == content(key)
            self._manager.complete_load(keys, self.context)
        return answers[0]

    def finish(self) -> None:
        self._manager.on_request_finished(self.context)


def config_of(place: Place, node: str, **top: Any) -> dict[str, Any]:
    """As it stands in kv_connector_extra_config."""
    store = {
        "storage_backends": str(place.store),
        "cache_buffer_capacity_gb": 1 / 32,
        "min_free_gb": 0,
        "node_cache_socket": place.settings(node).socket_path,
    }
    patient = {"lookup_timeout_ms": int(SOON_S * 1000), "handoff_timeout_ms": int(SOON_S * 1000)}
    entry = {"ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": store}
    return {
        "type": "UcmTier",
        "module_path": "ucm.integration.tiering.ucm_tier",
        "ucm_connectors": [entry],
        **patient,
        **top,
    }


def content(key: bytes) -> bytes:
    return (sha256(key).digest() * (ROW_BYTES // 32 + 1))[:ROW_BYTES]
