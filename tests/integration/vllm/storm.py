"""vLLM's own scheduler with UCM's connector, and everything around them played badly.

The scheduler, its KV cache manager and its requests are vLLM's; the connector is UCM's, scheduler
side; the node cache's core is real (`storm_node.py`); the ranks are played (`storm_device.py`).
Clients come and leave at any step, blocks are too few, storage is slow and forgets.
"""

from __future__ import annotations

import random
from collections import deque
from itertools import product
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from tests.integration.scheduler_parts import MANIFEST
from tests.integration.vllm.storm_device import UNIT, Rank, kv_in_group, kv_of, kv_of_prompt
from tests.integration.vllm.storm_engine import VOCABULARY, Weather, make_scheduler
from tests.integration.vllm.storm_facts import storm_facts
from tests.integration.vllm.storm_node import Clock, StormNode
from ucm import handoff as h
from ucm.config.settings import Settings, StoreSettings
from ucm.integration.engine.prompt import Prompt
from ucm.integration.vllm.scheduler import SchedulerSide
from ucm.integration.vllm.stats import UcmStats
from ucm.integration.vllm.ucm_connector import UCMConnector
from ucm.store.blocks.page_layout import PageGeometry
from ucm.store.blocks.strands import STATE


class StormConnector(UCMConnector):
    """The real one, with a node cache and facts that the storm has made."""

    made_by: Storm

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super(UCMConnector, self).__init__(vllm_config, role, kv_cache_config)
        self._stats = UcmStats()
        self._worker = None
        self._scheduler = StormConnector.made_by.make_side(self._stats)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        held, params = super().request_finished_all_groups(request, block_ids)
        if (receipt := h.parse(params)) is not None:
            StormConnector.made_by.receipts.append(receipt)
        return held, params


class Storm:
    def __init__(self, folder: Path, weather: Weather, *, seed: int, clock: Clock) -> None:
        self.weather, self.rng, self.clock = weather, random.Random(seed), clock
        self.geometry = PageGeometry(
            num_layers=1,
            num_kv_heads=1,
            block_tokens=weather.block_tokens,
            k_size=64,
            v_size=64,
            item_bytes=2,
        )
        self.node = StormNode(
            clock,
            self.rng,
            self.geometry,
            num_slots=weather.num_slots,
            num_ranks=weather.world_size,
            keeps_unpinned=weather.keeps_unpinned,
        )
        self.ranks = [
            Rank(
                number,
                num_blocks=weather.num_blocks,
                block_tokens=weather.block_tokens,
                memory_of=self.node.memory_of,
                rng=self.rng,
                failing=weather.failing,
                reaches=weather.reaches,
                checkpoints=weather.checkpoints,
            )
            for number in range(weather.world_size)
        ]
        StormConnector.made_by = self
        init_none_hash(sha256)
        self.scheduler = make_scheduler(folder, weather, connector_module=__name__)
        self._aggregator = KVOutputAggregator(expected_finished_count=weather.world_size)
        self._hasher = get_request_block_hasher(UNIT, sha256)
        self._truth: dict[str, list[int]] = {}
        self._heads = [self._tokens(length) for length in (1, 31, 48, 100, 160)]
        self._count = 0
        self._prompts: dict[str, Prompt] = {}
        self.receipts: deque[h.Handoff] = deque(maxlen=4)
        self.answered = 0

    def make_side(self, stats: UcmStats) -> SchedulerSide:
        weather = self.weather
        settings = Settings(
            block_tokens=weather.block_tokens,
            store=StoreSettings(socket_path="/nowhere"),
            use_layerwise=weather.layerwise,
            lookup_timeout_ms=100,
            max_lookups=4,
            max_handoffs=3,
            dump_timeout_ms=300,
            handoff_timeout_ms=300,
            expect_timeout_ms=500,
            store_generated=self.rng.choice((True, True, "end", False)),
            window_interval=None if weather.is_plain else self.rng.choice((0, 3 * UNIT)),
        )
        facts = storm_facts(weather, self.geometry)
        manifest = MANIFEST.__class__(
            **{
                **{name: getattr(MANIFEST, name) for name in MANIFEST.__struct_fields__},
                "block_tokens": weather.block_tokens,
            }
        )
        self.side = SchedulerSide(settings, facts, manifest, self.node, stats=stats)  # type: ignore[arg-type]
        return self.side

    # -- clients -------------------------------------------------------------------------------

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(VOCABULARY) for _ in range(count)]

    def come(self) -> None:
        rng = self.rng
        head = rng.choice(self._heads)
        head = head[: rng.randint(1, len(head))] if rng.random() < 0.3 else head
        tokens = head + self._tokens(rng.choice((0, 0, 1, 16, 40)))
        if rng.random() < 0.3:
            self._heads[rng.randrange(1, len(self._heads))] = tokens[:176]
        says = rng.choice((None, None, h.Wanted(), h.Expected()))
        if says is None and rng.random() < 0.3:
            says = self._receipt()
        self._count += 1
        request = Request(
            request_id=f"r{self._count}",
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(
                max_tokens=rng.choice((1, 2, 8, 40)),
                ignore_eos=True,
                extra_args=None if says is None else {"kv_transfer_params": h.params(says)},
            ),
            pooling_params=None,
            block_hasher=self._hasher,
        )
        self._truth[request.request_id] = kv_of_prompt(tokens)
        self.scheduler.add_request(request)
        self._expect_pages(request)

    def _receipt(self) -> h.Handoff | None:
        """What one of the last requests was given."""
        return self.rng.choice(self.receipts) if self.receipts else None

    def _expect_pages(self, request: Request) -> None:
        prompt = self.side._states[request.request_id].prompt
        self._prompts[request.request_id] = prompt
        self.node.heads.update(prompt.keys[:2])
        self._expect(prompt)

    def _expect(self, prompt: Prompt) -> None:
        """The content that its pages have, if there are any."""
        truth = self._truth[prompt.request_id][: prompt.num_tokens]
        size = self.weather.block_tokens
        for i, group in product(range(len(prompt.keys)), range(len(self.weather.reaches))):
            values = [kv_in_group(value, group) for value in truth[i * size : (i + 1) * size]]
            if self.weather.reaches[group] == STATE:
                values = values[-1:] * size
            # Behind a tail there is nothing.
            self.node.expected[prompt.key_of(i, group)] = values + [0] * (size - len(values))

    def leave(self) -> None:
        there = [each for each in self.scheduler.requests.values() if not each.is_finished()]
        loading = [each for each in there if each.status == RequestStatus.WAITING_FOR_REMOTE_KVS]
        if loading and self.rng.random() < 0.5:
            there = loading
        if there:
            self._abort(self.rng.choice(there).request_id)

    def _abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def everybody_leaves(self) -> None:
        self.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)

    def reset(self) -> None:
        waits = {RequestStatus.WAITING_FOR_REMOTE_KVS}
        running = not any(each.status in waits for each in self.scheduler.requests.values())
        try:
            self.scheduler.reset_prefix_cache(
                reset_running_requests=running and self.rng.random() < 0.7,
                reset_connector=self.rng.random() < 0.3,
            )
        except RuntimeError as error:
            # Finished requests are being copied from: vLLM refuses, and goes on.
            if "Failed to reset KV cache" not in str(error):
                raise
        for request in self.scheduler.requests.values():
            if request.request_id in self.side._states:
                self._expect_pages(request)

    # -- a step --------------------------------------------------------------------------------

    def step(self) -> None:
        self.clock.now_s += self.rng.choice((0.0, 0.001, 0.01))
        output = self.scheduler.schedule()
        step = output.kv_connector_metadata
        for rank in self.ranks:
            rank.fence(step)
        self._nobody_copies_what_others_have()
        for rank in self.ranks:
            rank.load_in_step(step)
        sampled = self._forward(output)
        for rank in self.ranks:
            rank.submit(step)
            rank.run_some()
        self._update(output, sampled)
        for rank in self.ranks:
            rank.run_some()
        self.node.tick(self._used_generations())
        self.side._ledger.check()

    def _forward(self, output: Any) -> dict[str, list[int]]:
        manager = self.scheduler.kv_cache_manager
        sampled = {}
        for name, count in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            # vLLM has counted them already.
            end = request.num_computed_tokens
            blocks = manager.get_block_ids(name)
            values = {
                rank.compute(request._all_token_ids, blocks, end - count, end)
                for rank in self.ranks
            }
            sampled[name] = (
                [_sampled(min(values))] if end == request.num_tokens and len(values) == 1 else []
            )
            if end == request.num_tokens and len(values) > 1:
                sampled[name] = [-1]
        return sampled

    def _update(self, output: Any, sampled: dict[str, list[int]]) -> None:
        step = output.kv_connector_metadata
        self._end(
            output,
            sampled,
            [rank.report(step, all_of_them=self.node.calm) for rank in self.ranks],
        )

    def _end(
        self, output: Any, sampled: dict[str, list[int]], of_ranks: list[KVConnectorOutput]
    ) -> None:
        names = list(sampled)
        reports = [
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: i for i, name in enumerate(names)},
                sampled_token_ids=list(sampled.values()),
                kv_connector_output=of_rank,
            )
            for of_rank in of_ranks
        ]
        requests = self.scheduler.requests
        known = {name: requests[name] for name in names if name in requests}
        had = {name: request.num_output_tokens for name, request in known.items()}
        self.scheduler.update_from_output(output, self._aggregator.aggregate(reports))
        for name, request in known.items():
            self._check_answer(request, had[name])

    def _check_answer(self, request: Request, had: int) -> None:
        truth = self._truth[request.request_id]
        for token in request.output_token_ids[had:]:
            assert token == _sampled(truth[-1]), f"{request.request_id}: a wrong token"
            truth.append(kv_of(truth[-1], token))
            self.answered += 1
        prompt = self._prompts[request.request_id]
        if prompt.chain is not None:
            first_token = prompt.full_blocks * prompt.block_tokens
            grown = prompt.grown(request.all_token_ids[first_token:])
            if len(grown.keys) > len(prompt.keys) - bool(prompt.tail_tokens):
                self._expect(grown)
                self._prompts[request.request_id] = grown

    # -- what must hold ------------------------------------------------------------------------

    def _nobody_copies_what_others_have(self) -> None:
        """Before this step writes anything: each copy under way is of a request that has all the
        blocks it touches."""
        for rank in self.ranks:
            for copy in rank.copies.values():
                name = copy.job.request_id
                assert name in self.scheduler.requests, f"{name} is gone, and is still copied"
                held = set().union(*self.scheduler.kv_cache_manager.get_block_ids(name)) - {0}
                kind = "load" if copy.is_load else "dump"
                assert copy.blocks <= held, f"{name}: a {kind} touches blocks of others"

    def _used_generations(self) -> set[int]:
        return {copy.job.generation for rank in self.ranks for copy in rank.copies.values()}

    def calm_down(self) -> None:
        """All who stayed are answered; then nothing is left of anybody."""
        self.node.calm = True
        for rank in self.ranks:
            rank._failing = 0.0
        for _ in range(3000):
            if not self.scheduler.has_requests():
                break
            self.step()
            self.clock.now_s += 0.005
        left = {name: each.status.name for name, each in self.scheduler.requests.items()}
        assert not left, f"requests that nobody ends: {left}"
        for quiet_after in range(200):
            self.step()
            self.node.poll()
            # A page may be written whose predecessor has just been.
            if quiet_after >= 5 and not self.node.is_writing:
                break
        self.side._session.poll()
        assert not self.side._states and not len(self.side._ledger)
        assert not self.side._hits._hits and not self.side._loads._loading
        assert not self.side._dumps._dumps and not self.side._ends
        slots = self.node.core.slots.counts()
        assert (slots.pins, slots.filling) == (0, 0), slots
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == self.weather.num_blocks - 1, "device blocks leaked"
        self.node.check()


def _sampled(kv: int) -> int:
    return kv % VOCABULARY
