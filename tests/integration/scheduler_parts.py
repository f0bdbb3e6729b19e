"""vLLM's part and the link's, played around a scheduler side and a real node cache core."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from vllm.v1.request import RequestStatus

from tests.integration.strand_parts import BLOCK as BLOCK
from tests.integration.strand_parts import GEOMETRY, with_indexer, with_states, with_windows
from tests.parts.node import node_parts
from tests.parts.pools import InlinePool, Timers
from tests.store.tiers.memory_tier import MemoryTier
from ucm import handoff as h
from ucm.config.settings import Settings, StoreSettings
from ucm.integration.copies.layout_kind import LayoutKind
from ucm.integration.engine.facts import EngineFacts
from ucm.integration.vllm.metadata import RankReport, StepMetadata
from ucm.integration.vllm.scheduler import SchedulerSide
from ucm.integration.vllm.stats import UcmStats
from ucm.metrics import series_key
from ucm.store.blocks.namespace import Manifest
from ucm.store.client.answers import Answers
from ucm.store.node import protocol as p
from ucm.store.node.core import NodeCore
from ucm.store.node.lanes import Lanes
from ucm.store.node.slots import SlotTable

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


class Loopback:
    """A node cache in this process, behind the interface of NodeLink. `mute` keeps its answers."""

    def __init__(self, num_slots: int = 64, tier: MemoryTier | None = None) -> None:
        self.generation, self.ranks_ready, self.mute = 0, 1, False
        self.tier = tier or MemoryTier()
        self.now_s = 0.0
        self.num_slots = num_slots
        self.timers = Timers()
        self.inbox: list[p.NodeMessage] = []
        # How long each poll would have waited.
        self.waits_s: list[float] = []
        self.start()

    def start(self) -> None:
        slots = SlotTable(self.num_slots * GEOMETRY.slot_bytes, extent_bytes=GEOMETRY.slot_bytes)
        memory = memoryview(bytearray(slots.capacity_bytes))
        lanes = Lanes([InlinePool()], self.tier)
        parts = node_parts(
            slots,
            memory,
            tier=self.tier,
            reads=lanes,
            writes=lanes,
            clock=lambda: self.now_s,
            call_later=self.timers,
        )
        self.core = NodeCore(parts)
        self.answers = Answers(slots.capacity_bytes)
        hello = p.Hello(version=p.VERSION, session="s", role="scheduler", pid=1)
        self.client = self.core.connect(hello, self.inbox.append)

    def restart(self) -> None:
        self.generation += 1
        self.inbox.clear()
        self.start()

    def poll(self, timeout_s: float = 0.0) -> list[p.NodeMessage]:
        if timeout_s > 0:
            self.waits_s.append(timeout_s)
        if self.mute:
            return []
        messages, self.inbox[:] = list(self.inbox), []
        for message in messages:
            self.answers.check(message)
        return messages

    def send(self, message: p.ClientMessage) -> bool:
        self.answers.asked(message)
        # As it arrives, after its way over a socket.
        (body,) = p.FrameBuffer().feed(p.encode(message))
        message = p.decode_client(body)
        if isinstance(message, p.GetStatus):
            self.inbox.append(self.core.status(message.id, pid=1, arena="", check=False))
        else:
            self.core.handle(self.client, message)
        return True


class Engine:
    """vLLM's scheduler as far as the connector sees it, with one rank."""

    def __init__(
        self,
        link: Loopback,
        *,
        timeout_ms=2000,
        layerwise=False,
        loads=True,
        dumps=True,
        manifest: Manifest = MANIFEST,
        window: int | None = None,
        base_window: int | None = None,
        states: bool = False,
        indexer: bool = False,
        **more: Any,
    ) -> None:
        """With a `window` it has two strands, and vLLM two groups. With a `base_window` that of the
        first has one as well. With `states` vLLM has two groups of them beside the first. With an
        `indexer` there are two strands in one group."""
        self.link, self.layerwise, self.window = link, layerwise, window
        self.base_window, self.states = base_window, states
        # In the next step, by request, as vLLM offers states: group, block, after how many tokens.
        self.offers: dict[str, list[tuple[int, int, int]]] = {}
        if states or indexer:
            strands = with_states() if states else with_indexer()
        else:
            strands = with_windows(window, base_window)
        store = StoreSettings(socket_path="/nowhere")
        settings = Settings(
            block_tokens=BLOCK,
            store=store,
            lookup_timeout_ms=timeout_ms,
            use_layerwise=layerwise,
            **more,
        )
        facts = EngineFacts(
            engine_id="e",
            loads=loads,
            dumps=dumps,
            world_size=1,
            tp_size=1,
            pp_size=1,
            block_tokens=BLOCK,
            num_blocks=100,
            max_step_tokens=4 * BLOCK,
            layer_names=("layers.0",),
            layout=LayoutKind.AS_SHAPED,
            layout_name="",
            geometry=GEOMETRY,
            **strands,
        )
        self.stats = UcmStats()
        self.side = SchedulerSide(
            settings,
            facts,
            manifest,
            link,  # type: ignore[arg-type]
            stats=self.stats,
        )
        self.requests: dict[str, SimpleNamespace] = {}
        self.dumping: list[int] = []
        # What `blocks` says of a request is this, where a test gives it.
        self.blocks_of: dict[str, tuple[list[int], ...]] = {}
        self.step({})

    def add(
        self,
        name: str,
        num_tokens: int,
        *,
        salt: str | None = None,
        says: h.Handoff | None = None,
        features: Sequence[Any] = (),
        lora: Any = None,
        embeds: Any = None,
        is_token: list[bool] | None = None,
        resumable: bool = False,
    ) -> SimpleNamespace:
        request = SimpleNamespace(
            request_id=name,
            prompt_token_ids=list(range(num_tokens)) if embeds is None else None,
            prompt_is_token_ids=is_token,
            num_prompt_tokens=num_tokens,
            num_computed_tokens=0,
            all_token_ids=list(range(num_tokens)),
            num_tokens=num_tokens,
            prompt_embeds=embeds,
            resumable=resumable,
            mm_features=list(features),
            lora_request=lora,
            skip_reading_prefix_cache=False,
            cache_salt=salt,
            kv_transfer_params=None if says is None else h.params(says),
            status=RequestStatus.WAITING,
        )
        self.requests[name] = request
        self.side.on_new_request(request)
        return request

    def blocks(self, request: SimpleNamespace) -> tuple[list[int], ...]:
        """Of each of vLLM's groups. Of one with a window vLLM has nothing that lies before what the
        next token needs."""
        if request.request_id in self.blocks_of:
            return self.blocks_of[request.request_id]
        num_blocks = -(-request.num_tokens // BLOCK)

        def with_nulls(window: int | None, first: int) -> list[int]:
            skipped = max(0, request.num_computed_tokens - (window or 1 << 30) + 1) // BLOCK
            return [0] * skipped + list(range(first + skipped, first + num_blocks))

        base = with_nulls(self.base_window, 1)
        if self.states:
            return base, with_nulls(None, 201), with_nulls(None, 301)
        return (base,) if self.window is None else (base, with_nulls(self.window, 101))

    def admit(self, request: SimpleNamespace) -> int:
        """Asks for a hit until there is an answer, and allocates."""
        extra, _ = self.side.matched_tokens(request, 0)
        for _ in range(10):
            if extra is not None:
                break
            self.step({})
            extra, _ = self.side.matched_tokens(request, 0)
        assert extra is not None
        self.side.allocated(request, self.blocks(request), extra)
        request.num_computed_tokens = extra
        request.status = RequestStatus.RUNNING
        return extra

    def step(self, scheduled: dict[str, int]) -> StepMetadata:
        def blocks_of(name: str) -> tuple[list[int], ...]:
            return self.blocks(self.requests[name])

        metadata = self.side.step(
            SimpleNamespace(
                num_scheduled_tokens=scheduled,
                kv_connector_block_state=SimpleNamespace(
                    get_block_ids=blocks_of, boundary_state_offloads=self.offers
                ),
            )
        )
        self.offers = {}
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

    def prefill(
        self, name: str, num_tokens: int, *, says: h.Handoff | None = None
    ) -> SimpleNamespace:
        """A request whose prompt ends up in the store. Its `receipt` is vLLM's to send."""
        request = self.add(name, num_tokens, says=says)
        extra = self.admit(request)
        if extra and not self.layerwise:
            # vLLM computes nothing of a request before its load has arrived.
            self.copied(*(job.job_id for job in self.step({}).loads))
        self.step({name: num_tokens - extra})
        request.receipt = self.end(request)
        return request

    def answer(self, request: SimpleNamespace, num_tokens: int) -> None:
        """As many steps, in each of which a token is computed and the next one sampled. The ranks
        copy as they are told."""
        for _ in range(num_tokens):
            request.all_token_ids.append(1000 + request.num_tokens)
            request.num_tokens += 1
            self.step({request.request_id: 1})
            self.copied(*self.take_dumping())

    def end(self, request: SimpleNamespace) -> dict[str, Any] | None:
        """What is left of it is copied. Returns what is vLLM's to send."""
        _, receipt = self.side.finished(request, self.blocks(request))
        self.step({})
        self.copied(*self.take_dumping())
        self.step({})
        return receipt

    def counted(self, name: str, **labels: str) -> float:
        counters: dict[str, float] = self.stats.data["counters"]
        return counters.get(series_key(name, "counter", labels), 0)

    def slots(self) -> dict[str, int]:
        return self.link.core.status(1, pid=1, arena="", check=True).slots
