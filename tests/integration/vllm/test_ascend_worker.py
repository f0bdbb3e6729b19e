"""A rank of vllm-ascend: its hooks in the order of its runner, through its own connector."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from torch import Tensor

from tests.integration.copies.kv_layouts import page_at
from tests.integration.rank_parts import FakeLink
from tests.integration.vllm.ascend_stand_in import (
    AscendMLAAttentionSpec,
    UCMConnectorV1,
    on_npu,
)
from tests.integration.vllm.strand_engine import FULL, config, grouped, name
from ucm.config.settings import Settings, StoreSettings
from ucm.integration.copies.jobs import CopyJob, PagePart
from ucm.integration.engine.facts import EngineFacts
from ucm.integration.vllm import worker as worker_module
from ucm.integration.vllm.engine_facts import engine_facts
from ucm.integration.vllm.metadata import RankReport, StepMetadata
from ucm.integration.vllm.stats import UcmStats
from ucm.integration.vllm.ucm_connector import UCMConnector
from ucm.integration.vllm.worker import WorkerSide
from ucm.store.node import protocol as p

NUMBERS, BLOCKS = range(2), 4
MLA = AscendMLAAttentionSpec(block_size=64, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
NUM_SLOTS = 2


class LinkOfLargePages(FakeLink):
    def start(self) -> None:
        capacity_bytes = NUM_SLOTS << 20
        fd = os.memfd_create("slots")
        os.ftruncate(fd, capacity_bytes)
        welcome = p.Welcome(version=p.VERSION, arena="a", capacity_bytes=capacity_bytes, pid=1)
        self._on_memory.memory_arrived(0, fd, welcome)
        os.close(fd)


class Rank:
    """`caches`: what its runner registers, of each layer a tuple."""

    def __init__(self, facts: EngineFacts, settings: Settings, caches: dict[str, Any]) -> None:
        self.facts, self.caches = facts, caches
        side = WorkerSide(settings, facts, tp_rank=0, stats=UcmStats())
        ours = object.__new__(UCMConnector)
        ours._worker, ours._scheduler, ours._stats = side, None, UcmStats()
        ours._connector_metadata = None
        self.connector = object.__new__(UCMConnectorV1)
        self.connector._ucm_engine = ours
        self.side = side
        self.connector.register_kv_caches(caches)

    def step(self, metadata: StepMetadata) -> list[RankReport]:
        """As NPUModelRunner has it from vLLM's mixin; its connector does not hand on
        handle_preemptions."""
        connector = self.connector
        connector.handle_preemptions(metadata)
        connector.bind_connector_metadata(metadata)
        connector.start_load_kv(None)
        for layer, kv in self.caches.items():
            connector.wait_for_layer_load(layer)
            connector.save_kv_layer(layer, list(kv), None)
        connector.wait_for_save()
        connector.get_finished(set())
        assert connector.get_block_ids_with_load_errors() == set()
        report = connector.build_connector_worker_meta()
        connector.clear_connector_metadata()
        return [] if report is None else [report]

    def until_ended(self, job_id: int, metadata: StepMetadata) -> None:
        reports = self.step(metadata)
        for _ in range(1000):
            if any(job_id in report.ended for report in reports):
                assert not any(report.failed for report in reports)
                return
            self.side._copying.wait_for_news(0.01)
            reports += self.step(StepMetadata())
        raise AssertionError(f"job {job_id} has not ended")

    def page(self, slot: int) -> Tensor:
        assert self.side._memories is not None
        arena = self.side._memories._arenas[0]
        return page_at(arena.bytes, self.facts.geometry, slot << 20)

    def close(self) -> None:
        self.side.close()


def rank_of(kind: str, *, layerwise: bool) -> Rank:
    settings = Settings(
        store=StoreSettings(socket_path="/nowhere"), block_tokens=128, use_layerwise=layerwise
    )
    spec, sizes = (MLA, (512, 64)) if kind == "MLA" else (FULL, (64, 64))
    heads = spec.num_kv_heads
    blocks = BLOCKS * 128 // spec.block_size
    with on_npu():
        cache = replace(grouped((spec, NUMBERS)), num_blocks=blocks)
        facts = engine_facts(config(), cache, settings)
    caches = {
        name(number): tuple(
            torch.randn(blocks, spec.block_size, heads, size).bfloat16() for size in sizes
        )
        for number in NUMBERS
    }
    return Rank(facts, settings, caches)


@pytest.fixture(
    params=[("GQA", False), ("GQA", True), ("MLA", False)],
    ids=["GQA", "GQA layer by layer", "MLA"],
)
def rank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rank]:
    monkeypatch.setattr(worker_module, "RankLink", LinkOfLargePages)
    kind, layerwise = request.param
    made = rank_of(kind, layerwise=layerwise)
    yield made
    made.close()


def canonical(rank: Rank, block_ids: tuple[int, ...]) -> Tensor:
    """[layer, head, token, content], by formulas of this test's own."""
    layers = []
    for first, second in rank.caches.values():
        last = second[list(block_ids)]
        if first.shape[3] != second.shape[3]:
            last = torch.stack((last[..., :32], last[..., 32:]), dim=-1).flatten(-2)
        content = torch.cat([first[list(block_ids)], last], dim=-1)
        layers.append(content.flatten(0, 1).transpose(0, 1))
    return torch.stack(layers)


def test_its_hooks_store_canonical_pages_and_load_them_back(rank: Rank) -> None:
    per_page = 128 // rank.facts.targets[0].block_tokens
    here, there = tuple(range(per_page)), tuple(range(2 * per_page, 3 * per_page))
    expected = canonical(rank, here)
    part, other = (PagePart(1 << 20, 0, blocks) for blocks in (here, there))
    rank.until_ended(1, StepMetadata(dumps=(CopyJob(1, "a", 0, (part,)),)))
    assert torch.equal(expected.view(torch.int16), rank.page(1))

    assert not torch.equal(expected, canonical(rank, there))
    job = CopyJob(2, "b", 0, (other,))
    layerwise = rank.side._settings.use_layerwise
    rank.until_ended(2, StepMetadata(**{"step_loads" if layerwise else "loads": (job,)}))
    assert torch.equal(expected, canonical(rank, there))
