"""The scheduler side: answers vLLM's scheduler and plans the copies of each step.

Runs in the engine's process, on the engine's thread, and is the node cache's only client there. It
does no I/O but messages to the node cache, and waits for those about a millisecond per step, a few
while nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from vllm.v1.request import RequestStatus

from ucm.config.settings import Settings
from ucm.integration.engine.device_blocks import BlockLedger
from ucm.integration.engine.dump_state import DeviceBlocks, DumpEnd
from ucm.integration.engine.dumps import Dumps
from ucm.integration.engine.epoch import EngineEpochs
from ucm.integration.engine.facts import EngineFacts
from ucm.integration.engine.gauges import NodeGauges
from ucm.integration.engine.hits import Hits
from ucm.integration.engine.job_ends import JobEnds
from ucm.integration.engine.load_policy import LoadPolicy
from ucm.integration.engine.loads import Loads
from ucm.integration.engine.naming import Namer
from ucm.integration.engine.promise_book import PromiseBook
from ucm.integration.engine.prompt import NamedItems, named_prompt, unnamed_prompt
from ucm.integration.engine.proofs import Proofs
from ucm.integration.engine.state_dumps import offered_states
from ucm.integration.engine.step_waits import STEP_WAIT_S, StepWaits
from ucm.integration.vllm.engine_versions import BlockTables, boundary_offers, writes_before_hooks
from ucm.integration.vllm.items import VllmItems
from ucm.integration.vllm.metadata import RankReport, StepMetadata
from ucm.integration.vllm.request_state import RequestState
from ucm.integration.vllm.stats import UcmStats
from ucm.store.blocks.namespace import Manifest
from ucm.store.client.link import NodeLink
from ucm.store.client.session import NodeSession
from ucm.store.client.start import log_path


class SchedulerSide:
    """One engine's. Not thread-safe: vLLM calls everything from one thread."""

    def __init__(
        self,
        settings: Settings,
        facts: EngineFacts,
        manifest: Manifest,
        link: NodeLink,
        *,
        stats: UcmStats,
    ) -> None:
        self._settings = settings
        self._facts = facts
        self._stats = stats
        self._namer = Namer(
            self._named,
            self._bypassed,
            stats,
            VllmItems(settings.block_tokens, facts.encoder_rules),
            timeout_s=settings.lookup_timeout_ms / 1000,
            adapter_rules=facts.adapter_rules,
        )
        self._states: dict[str, RequestState] = {}
        self._ledger = BlockLedger()
        self._tables = BlockTables()
        self._ends = JobEnds(facts.world_size)
        # Without states nothing of it is of use, and an engine keeps none of what it answers.
        self._stores_answers = bool(settings.store_generated) and not facts.has_states
        self._waits = StepWaits()
        self._epochs = EngineEpochs(settings, facts, manifest)
        self._session = NodeSession(
            link,
            *self._epochs.openings(),
            world_size=facts.world_size,
            dump_timeout_s=settings.dump_timeout_ms / 1000,
            log_path=log_path(settings.store),
        )
        self._promises = PromiseBook(self._session, self._epochs, stats)
        self._gauges = NodeGauges(self._session, stats)
        self._policy = LoadPolicy(
            is_auto=settings.load_policy == "auto",
            block_tokens=settings.block_tokens,
            max_step_tokens=facts.max_step_tokens,
            stats=stats,
        )
        self._hits = Hits(
            self._session,
            facts,
            settings,
            promises=self._promises,
            policy=self._policy,
            stats=stats,
        )
        self._loads = Loads(
            self._session,
            facts,
            self._hits,
            self._ledger,
            layerwise=settings.use_layerwise,
            stats=stats,
        )
        self._dumps = Dumps(self._session, facts, settings, self._ledger)
        self._proofs = Proofs(self._namer, self._dumps, timeout_s=settings.dump_timeout_ms / 1000)
        self._session.on_status = self._gauges.on_status
        self._dumps.on_slot = self._promises.on_slot
        self._session.on_saving = self._promises.on_saving
        self._session.on_lost = self._node_lost
        self._epochs.log()

    # -- hooks of vLLM's scheduler, in the order of a request's life -------------------------

    def on_new_request(self, request: Any) -> None:
        self._state_of(request)

    def matched_tokens(self, request: Any, num_computed: int) -> tuple[int | None, bool]:
        if RequestStatus.is_finished(request.status):
            return 0, False
        state = self._state_of(request)
        self._session.poll()
        name = state.prompt.request_id
        if not self._namer.is_ready(name):
            return None, False
        if self._dumps.is_planned(name):
            # vLLM asks anew because it has preempted the request.
            self._dumps.taken_back(name)
        state.local_tokens = num_computed
        # vLLM asks of requests that may read no cache as well, and drops the answer.
        may_load = not request.skip_reading_prefix_cache
        return self._hits.matched_tokens(state.prompt, num_computed, may_load=may_load)

    def allocated(self, request: Any, device_blocks: DeviceBlocks, num_external: int) -> None:
        """`device_blocks` of each of vLLM's groups, here and below."""
        if RequestStatus.is_finished(request.status):
            return
        state = self._state_of(request)
        prompt = state.prompt
        if num_external > 0 and state.is_computed:
            self._dumps.taken_back(prompt.request_id)  # what a load writes nobody reads
        state.is_computed = False
        reason = self._hits.reason(prompt.request_id)
        self._promises.close(prompt, state.local_tokens + num_external, reason)
        self._plan_dump(state, num_external)
        self._dumps.allocated(prompt.request_id, device_blocks)
        if num_external > 0:
            self._loads.allocated(prompt, device_blocks, state.local_tokens, num_external)
        elif self._facts.loads:
            self._hits.drop(prompt.request_id)

    def step(self, output: Any) -> StepMetadata:
        """Plans the copies of the step that vLLM has just scheduled."""
        self._session.poll()
        self._gauges.step()
        self._find_preempted()
        self._proofs.settle()
        blocks_of = self._tables.of_step(output)
        prompt_tokens, offers = 0, {}
        if self._facts.has_states and (offers := boundary_offers(output)):
            self._session.wait_at_least(STEP_WAIT_S)
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            state = self._states.get(request_id)
            if state is None or self._ledger.is_loading(request_id):
                continue
            state.is_computed = True
            prompt_tokens += state.prompt_tokens(num_tokens)
            # What vLLM has of states in this step it need not have in the next.
            self._plan_dump(state, is_last=self._facts.has_states)
            if not self._dumps.is_planned(request_id):
                continue
            if self._settings.store_generated is True:
                self._answered(state, partial(blocks_of, request_id))
            states = offered_states(offers.get(request_id, ()), state.prompt)
            tokens = state.next_tokens(num_tokens)
            self._dumps.computed(request_id, tokens, partial(blocks_of, request_id), states)
        released = self._dumps.drain()
        for request_id in released:
            self._forget(request_id)
        loads = self._loads.take_planned()
        idle = not output.num_scheduled_tokens
        # For what vLLM asks before its next step.
        news = self._session.take_news() or self._dumps.is_draining
        # The ranks wait for a load themselves. Nobody else has anything to do in an idle step.
        holds_up = not idle or self._loads.is_loading
        self._session.may_wait(self._waits.next_s(holds_up=holds_up, expects_news=news))
        layerwise = self._settings.use_layerwise
        return StepMetadata(
            generation=self._session.generation,
            idle=idle,
            loads=() if layerwise else loads,
            step_loads=loads if layerwise else (),
            dumps=self._dumps.take_planned(),
            at_once=self._dumps.take_at_once(),
            fence=self._dumps.take_fence(),
            writes_before_fence=writes_before_hooks(output),
            released=released,
            measured=self._policy.prefill.begin(prompt_tokens),
        )

    def blocks_invalid(self, device_blocks: set[int]) -> None:
        """A load into these has failed, perhaps another connector's, and a step may have computed
        with them. Told before the ranks' reports of that step."""
        self._dumps.spoiled(device_blocks - self._loads.awaited_blocks)

    def ranks_reported(self, report: RankReport) -> None:
        """A job has ended when every rank has ended it."""
        if report.measured:
            self._policy.step_ended(report.measured)
        for job_id, took_s in report.took_s.items():
            self._loads.took(job_id, took_s)
        for job_id in report.failed:
            if self._is_under_way(job_id):
                self._ends.failed(job_id)
                # Before anything is committed that was computed with it in the same step.
                self._dumps.spoiled(self._loads.failed(job_id))
        for job_id, failed in self._ends.ended(report.ended, self._is_under_way):
            if self._loads.is_under_way(job_id):
                self._load_ended(job_id)
            else:
                self._proofs.dump_ended(job_id, failed=failed)

    def _load_ended(self, job_id: int) -> None:
        load = self._loads.ended(job_id)
        if load is not None and load.took_s:
            self._policy.copied(load.num_tokens, load.took_s)

    def _is_under_way(self, job_id: int) -> bool:
        return self._loads.is_under_way(job_id) or self._dumps.is_under_way(job_id)

    def finished(
        self, request: Any, device_blocks: DeviceBlocks
    ) -> tuple[bool, dict[str, Any] | None]:
        """Whether vLLM must keep the device blocks until the ranks report the request; and what its
        response carries as kv_transfer_params."""
        state = self._states.get(request.request_id)
        if state is None:
            return False, None
        prompt = state.prompt
        name = prompt.request_id
        if self._ledger.is_held(name):
            return True, None  # said twice: it is told once
        if not state.is_computed or not any(device_blocks):
            # vLLM hears of the load, and frees then; or it has preempted the request before.
            self._dumps.taken_back(name)
            ended = DumpEnd()
        else:
            self._plan_dump(state, is_last=True)
            self._answered(state, lambda: device_blocks)
            ended = self._dumps.finished(
                name,
                state.request.num_computed_tokens,
                device_blocks,
                unsaved=self._promises.unsaved,
            )
        self._hits.drop(name)
        receipt = self._promises.receipt(prompt, state.grown or prompt, ended)
        if not ended.is_copying:
            self._forget(name)
        return ended.is_copying, receipt

    def reset(self) -> None:
        """vLLM has thrown its caches away. If the weights may be others now, nothing that was
        stored before is found from here on, and what is being computed with the old ones is not
        stored."""
        self._session.poll()
        self._namer.reset()
        if not self._epochs.reset():
            return
        self._hits.forget_all()
        self._dumps.forget_all()
        for request_id in self._states:
            self._namer.forget(request_id)
            self._bypassed(request_id)
        self._session.reopen(*self._epochs.openings())
        self._stats.count("ucm_epochs")

    def close(self) -> None:
        self._namer.close()
        self._session.close()

    # -- dumps follow lookups ----------------------------------------------------------------

    def _plan_dump(self, state: RequestState, loaded: int = 0, *, is_last: bool = False) -> None:
        """Everything that the lookup did not find in the store. A producer's lookup may still be
        under way: then a later step plans it, or the request's end, with every block, of which the
        node cache then takes those it lacks."""
        prompt = state.prompt
        # What is answered to a prompt too short to be stored may fill blocks.
        has_names = bool(prompt.keys) or (self._stores_answers and prompt.chain is not None)
        if not has_names or not self._facts.dumps or self._dumps.is_planned(prompt.request_id):
            return
        missing = self._hits.missing_blocks(prompt)
        if missing is None and is_last:
            missing = list(range(len(prompt.keys)))
        if missing is not None:
            state.grown = None
            self._dumps.plan(prompt, missing, num_computed=state.local_tokens + loaded)

    def _answered(self, state: RequestState, device_blocks: Callable[[], DeviceBlocks]) -> None:
        """What is answered is stored once it fills a block."""
        if self._stores_answers and (grown := state.take_grown()) is not None:
            self._dumps.answered(grown, device_blocks())

    def _find_preempted(self) -> None:
        for request_id, state in self._states.items():
            is_preempted = state.request.status == RequestStatus.PREEMPTED
            if is_preempted and self._dumps.is_planned(request_id):
                self._dumps.taken_back(request_id)

    def _node_lost(self) -> None:
        self._hits.node_lost()
        self._dumps.node_lost()
        self._promises.node_lost()

    # -- from the first word to the last -----------------------------------------------------

    def _state_of(self, request: Any) -> RequestState:
        state = self._states.get(request.request_id)
        if state is None:
            prompt = unnamed_prompt(request, block_tokens=self._settings.block_tokens)
            state = self._states[request.request_id] = RequestState(request, prompt)
            self._promises.begin(request)
            self._namer.begin(request)
        return state

    def _named(self, request: Any, items: NamedItems, lora_digest: bytes | None) -> None:
        prompt = named_prompt(
            request,
            fingerprint=self._epochs.fingerprint,
            block_tokens=self._settings.block_tokens,
            named=items,
            lora_digest=lora_digest,
            with_tail=self._promises.wants_tail(request.request_id),
            strand_names=tuple(strand.name for strand in self._facts.strands),
        )
        self._states[request.request_id].prompt = prompt
        self._promises.named(prompt)

    def _bypassed(self, request_id: str) -> None:
        state = self._states[request_id]
        state.prompt = state.prompt.without_keys()

    def _forget(self, request_id: str) -> None:
        self._states.pop(request_id, None)
        self._namer.forget(request_id)
        self._promises.forget(request_id)
        self._hits.forget(request_id)
