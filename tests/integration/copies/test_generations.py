"""How long a rank keeps a node cache's memory, and with it the slots that it copies from and to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import torch

from ucm.integration.copies.generations import Memories
from ucm.integration.copies.jobs import CopyJob
from ucm.store.node import protocol as p

CAPACITY_BYTES = 1 << 20
JOB = CopyJob(job_id=7, request_id="a", generation=0, parts=())


@contextmanager
def memory(name: str) -> Iterator[tuple[int, p.Welcome]]:
    fd = os.memfd_create(name)
    os.ftruncate(fd, CAPACITY_BYTES)
    welcome = p.Welcome(
        version=p.VERSION,
        arena=name,
        capacity_bytes=CAPACITY_BYTES,
        pid=1,
    )
    yield fd, welcome
    os.close(fd)


@pytest.fixture
def memories() -> Iterator[Memories]:
    memories = Memories(torch.device("cpu"))
    for generation in range(2):
        with memory(f"node cache {generation}") as (fd, welcome):
            memories.memory_arrived(generation, fd, welcome)
    yield memories
    memories.close()


def test_a_generation_is_used_until_the_scheduler_side_and_the_jobs_have_left_it(
    memories: Memories,
) -> None:
    assert memories.begin(JOB) is not None
    memories.planned_from(1)
    assert memories.is_used(0)

    memories.ended([JOB.job_id])

    assert not memories.is_used(0)
    assert memories.begin(JOB) is None
    assert memories.is_used(1)


def test_a_generation_without_jobs_is_not_used_any_more_once_the_scheduler_side_has_left_it(
    memories: Memories,
) -> None:
    memories.planned_from(1)
    assert not memories.is_used(0)


def test_a_second_connection_to_the_same_node_cache_does_not_touch_running_copies(
    memories: Memories,
) -> None:
    before = memories.begin(JOB)
    with memory("node cache 0") as (fd, welcome):
        memories.memory_arrived(0, fd, welcome)
    assert memories.begin(JOB) is before

    with memory("another") as (fd, welcome):
        memories.memory_arrived(0, fd, welcome)
    assert memories.begin(JOB) is not before


def test_after_closing_only_running_jobs_use_anything(memories: Memories) -> None:
    memories.begin(JOB)
    memories.close()
    assert memories.is_used(0)
    assert not memories.is_used(1)

    memories.ended([JOB.job_id])

    assert not memories.is_used(0)


def test_prompts_are_in_no_core_dump_of_a_rank(memories: Memories) -> None:
    smaps = Path("/proc/self/smaps").read_text()
    for generation in range(2):
        (after,) = smaps.split(f"memfd:node cache {generation} ")[1:]
        flags = next(line for line in after.splitlines() if line.startswith("VmFlags:"))
        assert "dd" in flags.split()
