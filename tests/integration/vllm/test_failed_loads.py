"""How a rank tells vLLM that a load has failed: by its blocks, or as a whole."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("vllm")

from tests.integration.rank_parts import facts_of
from ucm.config.settings import Settings, StoreSettings
from ucm.integration.copies.jobs import CopyJob, PagePart
from ucm.integration.vllm.stats import UcmStats
from ucm.integration.vllm.worker import WorkerSide
from ucm.store.blocks.strands import ALL, Reach, ReachKind


@pytest.mark.parametrize("reach", [ALL, Reach(ReachKind.WINDOW, 33)], ids=str)
def test_with_windows_a_failed_load_is_not_told_by_blocks(reach: Reach) -> None:
    """vLLM would go on behind the last block that is there, whose window has none before it."""
    facts = facts_of()
    (strand,) = facts.strands
    settings = Settings(store=StoreSettings(socket_path="/nowhere"))
    rank = WorkerSide(
        settings,
        replace(facts, strands=(replace(strand, reach=reach),)),
        tp_rank=0,
        stats=UcmStats(),
    )
    part = PagePart(slot_offset=0, first_token=0, block_ids=(7, 8))
    rank._loads[1] = CopyJob(1, "r", 0, (part,))
    rank._failed(1)
    by_blocks = reach == ALL
    assert rank.take_bad_blocks() == ({7, 8} if by_blocks else set())
    assert rank.take_failed_requests() == (set() if by_blocks else {"r"})
