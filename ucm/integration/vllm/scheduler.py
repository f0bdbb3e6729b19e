"""The scheduler side: answers vLLM's scheduler and plans the copies of each step.

Runs in the engine's process, on the engine's thread, and is the node cache's only client there. It
does no I/O but messages to the node cache, and waits for those about a millisecond per step, a few
while nothing is computed.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.request import RequestStatus

from ucm.config.settings import Settings
from ucm.integration.engine.device_blocks import BlockLedger
from ucm.integration.engine.dumps import Dumps
from ucm.integration.engine.epoch import Epochs
from ucm.integration.engine.facts import EngineFacts
from ucm.integration.engine.gauges import NodeGauges
from ucm.integration.engine.handoff import PromiseBook
from ucm.integration.engine.loads import Hits
from ucm.integration.engine.naming import Namer
from ucm.integration.engine.promise import wants_tail
from ucm.integration.engine.prompt import NamedItems, RequestState, request_keys
from ucm.integration.engine.proofs import Proofs
from ucm.integration.engine.turns import Turns
from ucm.integration.engine.waiting import IDLE_WAIT_MAX_S, IDLE_WAIT_S, STEP_WAIT_S
from ucm.integration.vllm.device_facts import writes_before_hooks
from ucm.integration.vllm.items import VllmItems
from ucm.integration.vllm.metadata import RankReport, StepMetadata
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
            stats,
            VllmItems(settings.block_tokens),
            timeout_s=settings.lookup_timeout_ms / 1000,
            adapter_rules=facts.adapter_rules,
        )
        self._states: dict[str, RequestState] = {}
        self._ledger = BlockLedger()
        self._acks: dict[int, int] = {}
        self._failed: set[int] = set()
        self._idle_wait_s = IDLE_WAIT_S
        self._epochs = Epochs(settings, facts, manifest)
        dump_timeout_s = settings.dump_timeout_ms / 1000
        self._session = NodeSession(
            link,
            self._epochs.opening(),
            world_size=facts.world_size,
            dump_timeout_s=dump_timeout_s,
            log_path=log_path(settings.store),
        )
        self._promises = PromiseBook(self._session, self._epochs, stats)
        self._gauges = NodeGauges(self._session, stats)
        self._hits = Hits(
            self._session,
            facts,
            self._ledger,
            layerwise=settings.use_layerwise,
            block_tokens=settings.block_tokens,
            timeout_s=settings.lookup_timeout_ms / 1000,
            turns=Turns(
                max_lookups=settings.max_lookups,
                max_handoffs=settings.max_handoffs,
                timeout_s=settings.lookup_timeout_ms / 1000,
            ),
            stats=stats,
        )
        self._dumps = Dumps(
            self._session,
            facts,
            self._ledger,
            block_tokens=settings.block_tokens,
            timeout_s=dump_timeout_s,
        )
        self._proofs = Proofs(self._namer, self._dumps, timeout_s=dump_timeout_s)
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
        if not self._namer.is_ready(state):
            return None, False
        if self._dumps.is_planned(state):
            # vLLM asks anew because it has preempted the request.
            self._dumps.taken_back(state)
        state.local_tokens = num_computed
        return self._hits.matched_tokens(state, num_computed)

    def allocated(self, request: Any, device_blocks: list[int], num_external: int) -> None:
        if RequestStatus.is_finished(request.status):
            return
        state = self._state_of(request)
        state.device_blocks = device_blocks
        self._promises.account(state, state.local_tokens + num_external)
        self._plan_dump(state)
        if num_external > 0:
            self._hits.allocated(state, state.local_tokens, num_external)
        elif self._facts.loads:
            self._hits.drop(state)

    def step(self, output: Any) -> StepMetadata:
        """Plans the copies of the step that vLLM has just scheduled."""
        self._session.poll()
        self._gauges.step()
        self._find_preempted()
        self._proofs.settle()
        block_state = output.kv_connector_block_state
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            state = self._states.get(request_id)
            if state is None or self._ledger.is_loading(request_id):
                continue
            self._plan_dump(state)
            if not self._dumps.is_planned(state):
                continue
            (state.device_blocks,) = block_state.get_block_ids(request_id)
            computed = state.request.num_computed_tokens + num_tokens
            self._dumps.computed(state, min(computed, state.request.num_prompt_tokens))
        released = self._dumps.drain()
        for request_id in released:
            self._states.pop(request_id, None)
        loads = self._hits.take_planned()
        idle = not output.num_scheduled_tokens
        # For what vLLM asks before its next step.
        self._session.may_wait(self._wait_s(idle=idle))
        layerwise = self._settings.use_layerwise
        return StepMetadata(
            generation=self._session.generation,
            idle=idle,
            loads=() if layerwise else loads,
            step_loads=loads if layerwise else (),
            dumps=self._dumps.take_planned(),
            fence=self._dumps.take_fence(),
            writes_before_fence=writes_before_hooks(output),
            released=released,
        )

    def _wait_s(self, *, idle: bool) -> float:
        """The ranks wait for a load themselves. Nobody else has anything to do in an idle step."""
        has_news = self._session.take_news()
        if not idle or self._hits.is_loading:
            self._idle_wait_s = IDLE_WAIT_S
            return STEP_WAIT_S
        wait_s = IDLE_WAIT_S if has_news or self._dumps.is_draining else self._idle_wait_s
        self._idle_wait_s = min(2 * wait_s, IDLE_WAIT_MAX_S)
        return wait_s

    def ranks_reported(self, report: RankReport) -> None:
        """Adds up acknowledgements; a job has ended when every rank has ended it. Jobs that nobody
        knows are not counted."""
        for job_id in report.failed:
            if self._is_under_way(job_id):
                self._failed.add(job_id)
                # Before anything is committed that was computed with it in the same step.
                self._dumps.spoiled(self._hits.failed(job_id))
        for job_id, count in report.ended.items():
            acks = self._acks.pop(job_id, 0) + count
            if not self._is_under_way(job_id):
                continue
            if acks < self._facts.world_size:
                self._acks[job_id] = acks
                continue
            failed = job_id in self._failed
            self._failed.discard(job_id)
            if self._hits.is_under_way(job_id):
                self._hits.ended(job_id)
            else:
                self._proofs.dump_ended(job_id, failed=failed)

    def _is_under_way(self, job_id: int) -> bool:
        return self._hits.is_under_way(job_id) or self._dumps.is_under_way(job_id)

    def finished(
        self, request: Any, device_blocks: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Whether vLLM must keep the device blocks until the ranks report the request; and what its
        response carries as kv_transfer_params."""
        state = self._states.get(request.request_id)
        if state is None:
            return False, None
        if self._ledger.is_held(state.request_id):
            return True, None  # said twice: it is told once
        if self._ledger.is_loading(state.request_id) or not device_blocks:
            # vLLM hears of the load, and frees then; or it has preempted the request before.
            self._dumps.taken_back(state)
            is_copying = False
        else:
            self._plan_dump(state, is_last_chance=True)
            state.device_blocks = device_blocks
            is_copying = self._dumps.finished(state)
        self._hits.drop(state)
        if not is_copying:
            del self._states[request.request_id]
        return is_copying, self._promises.receipt(state)

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
        for state in self._states.values():
            state.keys, state.no_loads = [], True
            self._namer.forget(state)
        self._session.reopen(self._epochs.opening())
        self._stats.count("ucm_epochs")

    def close(self) -> None:
        self._namer.close()
        self._session.close()

    # -- dumps follow lookups ----------------------------------------------------------------

    def _plan_dump(self, state: RequestState, *, is_last_chance: bool = False) -> None:
        """Everything that the lookup did not find in the store. A producer's lookup may still be
        under way: then a later step plans it, or the request's end, with every block, of which the
        node cache then takes those it lacks."""
        if not state.keys or self._dumps.is_planned(state) or not self._facts.dumps:
            return
        hit = self._hits.known(state)
        if hit is None or (hit.reply is None and is_last_chance):
            self._dumps.plan(state, range(len(state.keys)))
        elif hit.reply is not None:
            stored_to = hit.read_from + hit.reply.num_stored
            head = range(hit.reply.head_stored, hit.read_from)
            self._dumps.plan(state, [*head, *range(stored_to, len(state.keys))])

    def _find_preempted(self) -> None:
        for state in self._states.values():
            if state.request.status == RequestStatus.PREEMPTED and self._dumps.is_planned(state):
                self._dumps.taken_back(state)

    def _node_lost(self) -> None:
        self._hits.node_lost()
        self._dumps.node_lost()
        self._promises.node_lost()

    def _state_of(self, request: Any) -> RequestState:
        state = self._states.get(request.request_id)
        if state is None:
            state = RequestState(request, handoff=self._promises.heard(request))
            self._states[request.request_id] = state
            self._namer.begin(state)
        return state

    def _named(self, state: RequestState, items: NamedItems) -> None:
        state.keys = request_keys(
            state.request,
            fingerprint=self._epochs.fingerprint,
            block_tokens=self._settings.block_tokens,
            named=items,
            lora_digest=state.lora_digest,
            with_tail=wants_tail(state.handoff, self._epochs.rules),
        )
        self._promises.note(state, state.handoff)
