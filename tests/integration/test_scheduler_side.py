"""The scheduler side against a real node cache core, with vLLM's part played by the test."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.v1.request import RequestStatus

from ucm.config import Settings, StoreSettings
from ucm.errors import TierError
from ucm.integration.vllm.engine_facts import EngineFacts
from ucm.integration.vllm.metadata import RankReport, StepMetadata
from ucm.integration.vllm.scheduler import SchedulerSide
from ucm.integration.vllm.views import LayoutKind
from ucm.store.namespace import Manifest
from ucm.store.node import protocol as p
from ucm.store.node.core import NodeCore
from ucm.store.page import PageGeometry
from ucm.store.slots import SlotTable
from ucm.store.tier import MemoryTier

BLOCK = 16
GEOMETRY = PageGeometry(
    num_layers=1, num_kv_heads=1, block_tokens=BLOCK, k_size=64, v_size=64, item_bytes=2
)
MANIFEST = Manifest(
    block_tokens=BLOCK,
    model_dtype="float32",
    kv_dtype="float32",
    kv_scales="none",
    num_layers=1,
    num_kv_heads=1,
    k_size=64,
    v_size=64,
    layout="canonical",
    weights="w",
    model_shape={},
    epoch=0,
)


class InlinePool:
    """Storage that answers at once."""

    num_threads, depth, num_overdue, stalled = 1, 0, 0, False

    def submit(self, call: Callable[[], object], on_done, *, on_overdue=None, urgent=False) -> None:
        try:
            result = call()
        except TierError as error:
            result = error
        on_done(result)

    def tick(self) -> None:
        pass


class Loopback:
    """A node cache in this process, behind the interface of NodeLink. `mute` keeps its answers."""

    def __init__(self, num_slots: int = 64) -> None:
        self.generation, self.ranks_ready, self.mute = 0, 1, False
        self.tier = MemoryTier()
        self.num_slots = num_slots
        self.inbox: list[p.NodeMessage] = []
        self.start()

    def start(self) -> None:
        slots = SlotTable(self.num_slots * GEOMETRY.slot_bytes, extent_bytes=GEOMETRY.slot_bytes)
        memory = memoryview(bytearray(slots.capacity_bytes))
        self.core = NodeCore(
            slots=slots,
            tier=self.tier,
            reads=InlinePool(),
            writes=InlinePool(),
            page_of=lambda slot: memory[slot.offset : slot.offset + GEOMETRY.slot_bytes],
            populate=lambda offset, nbytes: None,
            max_write_pages=1000,
            clock=lambda: 0.0,
        )
        hello = p.Hello(version=p.VERSION, session="s", role="scheduler", pid=1)
        self.client = self.core.connect(hello, self.inbox.append)

    def restart(self) -> None:
        self.generation += 1
        self.inbox.clear()
        self.start()

    def poll(self, timeout_s: float = 0.0) -> list[p.NodeMessage]:
        if self.mute:
            return []
        messages, self.inbox[:] = list(self.inbox), []
        return messages

    def send(self, message: p.ClientMessage) -> bool:
        if isinstance(message, p.GetStatus):
            self.inbox.append(self.core.status(message.id, pid=1, arena=""))
        else:
            self.core.handle(self.client, message)
        return True


class Engine:
    """vLLM's scheduler as far as the connector sees it, with one rank."""

    def __init__(self, link: Loopback, *, timeout_ms=2000, layerwise=False, loads=True) -> None:
        self.link = link
        store = StoreSettings(socket_path="/nowhere")
        settings = Settings(
            block_tokens=BLOCK, store=store, lookup_timeout_ms=timeout_ms, use_layerwise=layerwise
        )
        facts = EngineFacts(
            engine_id="e",
            loads=loads,
            dumps=True,
            world_size=1,
            tp_size=1,
            pp_size=1,
            block_tokens=BLOCK,
            num_blocks=100,
            max_step_tokens=4 * BLOCK,
            layer_names=("layers.0",),
            layout=LayoutKind.PACKED,
            layout_name="",
            geometry=GEOMETRY,
        )
        self.side = SchedulerSide(settings, facts, MANIFEST, link)  # type: ignore[arg-type]
        self.requests: dict[str, SimpleNamespace] = {}
        self.dumping: list[int] = []
        self.step({})

    def add(self, name: str, num_tokens: int, *, salt: str | None = None) -> SimpleNamespace:
        request = SimpleNamespace(
            request_id=name,
            prompt_token_ids=list(range(num_tokens)),
            num_prompt_tokens=num_tokens,
            num_computed_tokens=0,
            prompt_embeds=None,
            resumable=False,
            mm_features=[],
            lora_request=None,
            cache_salt=salt,
            status=RequestStatus.WAITING,
        )
        self.requests[name] = request
        self.side.on_new_request(request)
        return request

    def blocks(self, request: SimpleNamespace) -> list[int]:
        return list(range(1, 1 + -(-request.num_prompt_tokens // BLOCK)))

    def admit(self, request: SimpleNamespace) -> int:
        """Asks for a hit until there is an answer, and allocates."""
        extra, _ = self.side.matched_tokens(request, 0)
        assert extra is not None
        self.side.allocated(request, self.blocks(request), extra)
        request.num_computed_tokens = extra
        request.status = RequestStatus.RUNNING
        return extra

    def step(self, scheduled: dict[str, int]) -> StepMetadata:
        def blocks_of(name: str) -> tuple[list[int], ...]:
            return (self.blocks(self.requests[name]),)

        metadata = self.side.step(
            SimpleNamespace(
                num_scheduled_tokens=scheduled,
                kv_connector_block_state=SimpleNamespace(get_block_ids=blocks_of),
            )
        )
        for name, count in scheduled.items():
            self.requests[name].num_computed_tokens += count
        self.dumping += [job.job_id for job in metadata.dumps]
        return metadata

    def take_dumping(self) -> list[int]:
        """The dump jobs that the ranks have been told of since the last call."""
        dumping, self.dumping = self.dumping, []
        return dumping

    def copied(self, *job_ids: int, failed: bool = False) -> None:
        ended = dict.fromkeys(job_ids, 1)
        self.side.ranks_reported(RankReport(ended=ended, failed=ended if failed else {}))

    def prefill(self, name: str, num_tokens: int) -> SimpleNamespace:
        """A request whose prompt ends up in the store."""
        request = self.add(name, num_tokens)
        self.admit(request)
        self.step({name: num_tokens})
        self.side.finished(request, self.blocks(request))
        self.step({})
        self.copied(*self.take_dumping())
        self.step({})
        return request

    def slots(self) -> dict[str, int]:
        return self.link.core.status(1, pid=1, arena="").slots


def test_a_prompt_that_was_prefilled_is_a_hit_and_its_pins_go_with_the_load():
    engine = Engine(Loopback())
    engine.prefill("a", 100)

    again = engine.add("b", 100)
    assert engine.admit(again) == 96
    (load,) = engine.step({}).loads
    assert engine.slots()["pins"] == 6

    engine.copied(load.job_id)

    assert engine.slots()["pins"] == 0


def test_layer_by_layer_one_token_is_left_to_compute():
    engine = Engine(Loopback(), layerwise=True)
    engine.prefill("a", 64)
    again = engine.add("b", 64)

    assert engine.admit(again) == 63
    assert len(engine.step({"b": 1}).step_loads) == 1


def test_blocks_are_committed_in_prompt_order_whatever_order_their_copies_end_in():
    engine = Engine(Loopback())
    request = engine.add("a", 64)
    engine.admit(request)
    for _ in range(4):
        engine.step({"a": BLOCK})
    jobs = engine.take_dumping()
    assert len(jobs) == 4

    engine.copied(*reversed(jobs[1:]))
    assert engine.slots()["ready"] == 0
    engine.copied(jobs[0])

    assert engine.slots()["ready"] == 4


def test_a_finished_request_is_held_until_its_copies_have_ended():
    engine = Engine(Loopback())
    request = engine.add("a", 64)
    engine.admit(request)
    engine.step({"a": 64})

    assert engine.side.finished(request, engine.blocks(request))
    jobs = engine.take_dumping()
    assert jobs
    assert engine.step({}).released == ()
    engine.copied(*jobs)

    assert engine.step({}).released == ("a",)
    assert engine.slots()["filling"] == 0


def test_a_failed_copy_is_never_committed():
    engine = Engine(Loopback())
    request = engine.add("a", 32)
    engine.admit(request)
    engine.step({"a": 32})
    jobs = engine.take_dumping()
    assert jobs

    engine.copied(*jobs, failed=True)

    assert engine.slots()["ready"] == engine.slots()["filling"] == 0


def test_preemption_fences_running_copies_and_gives_back_the_other_slots():
    engine = Engine(Loopback())
    request = engine.add("a", 128)
    engine.admit(request)
    for _ in range(3):
        engine.step({"a": BLOCK})
    jobs = engine.take_dumping()
    assert jobs
    request.status = RequestStatus.PREEMPTED

    fence = engine.step({}).fence

    assert set(fence) == set(jobs)
    engine.copied(*jobs)
    assert engine.slots()["filling"] == 0


def test_an_aborted_request_leaves_no_slot_and_no_pin():
    engine = Engine(Loopback())
    engine.prefill("a", 100)
    waiting = engine.add("b", 100)
    extra, _ = engine.side.matched_tokens(waiting, 0)
    assert extra == 96
    assert engine.slots()["pins"] == 6

    assert not engine.side.finished(waiting, [])

    assert engine.slots()["pins"] == 0


def test_when_the_memory_is_full_the_rest_of_a_prompt_is_not_dumped():
    engine = Engine(Loopback(num_slots=2))
    request = engine.add("a", 128)
    engine.admit(request)
    engine.step({"a": 128})
    engine.step({"a": 0})
    engine.copied(*engine.take_dumping())
    held = engine.side.finished(request, engine.blocks(request))

    assert not held
    assert engine.slots()["filling"] == 0


def test_a_new_node_cache_gets_what_the_old_one_lost():
    link = Loopback()
    engine = Engine(link)
    request = engine.add("a", 64)
    engine.admit(request)
    engine.step({"a": 64})

    link.restart()
    engine.step({})
    engine.copied(*engine.take_dumping())

    assert engine.slots()["ready"] == 0
    assert engine.prefill("b", 64) is not None
    assert engine.slots()["ready"] == 4


def test_a_node_cache_that_stops_answering_costs_one_request_its_wait_and_others_nothing():
    link = Loopback()
    engine = Engine(link, timeout_ms=1)
    link.mute = True
    first = engine.add("a", 64)
    answers = [engine.side.matched_tokens(first, 0)[0]]
    while answers[-1] is None:
        answers.append(engine.side.matched_tokens(first, 0)[0])
    assert answers[0] is None
    assert answers[-1] == 0

    second = engine.add("b", 64)
    assert engine.side.matched_tokens(second, 0) == (0, False)

    link.mute = False
    third = engine.add("c", 64)
    engine.step({})
    engine.side.matched_tokens(third, 0)
    assert engine.link.core.counters["lookups"] >= 2
