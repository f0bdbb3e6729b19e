"""The scheduler side's lookups: what vLLM is told it can have.

    none ──lookup──► asked ──reply──► answered (pinned) ──allocated──► a load's

A promise is kept or not made: vLLM hears of tokens only when their pages are pinned in memory that
every rank has mapped, so a load can't fail on storage. While a lookup has no answer vLLM is told to
ask again at its next step.
"""

from __future__ import annotations

import time
from functools import partial

import msgspec

from ucm.config.settings import Settings
from ucm.integration.engine.counts import Counts
from ucm.integration.engine.explorer import Explorer
from ucm.integration.engine.facts import EngineFacts
from ucm.integration.engine.hit import Hit, RequestLookups
from ucm.integration.engine.load_policy import LoadPolicy
from ucm.integration.engine.promise_book import PromiseBook
from ucm.integration.engine.prompt import Prompt
from ucm.integration.engine.ranges import missing_blocks, offered_tokens
from ucm.integration.engine.side_lookups import SideLookups, SideWaits
from ucm.integration.engine.step_waits import STEP_WAIT_S
from ucm.integration.engine.turns import Turn, Turns
from ucm.integration.engine.window_search import WindowSearch
from ucm.outcome import Outcome, missed_as
from ucm.store.client.session import NodeSession
from ucm.store.node import protocol as p

# The node cache settles a lookup by its deadline; an answer later than this will never come, unless
# the machine itself stood still: it gets as long again from when that is noticed.
_GRACE_S = 0.5


# Of models without a base, which has no pages to ask for.
_ABOUT_NOTHING = p.LookupReply(
    id=0, offsets=[], num_stored=0, from_files=0, head_stored=0, reason=Outcome.FINE
)


class Hits:
    """All lookups of one engine. Owned by the engine's thread."""

    def __init__(
        self,
        session: NodeSession,
        facts: EngineFacts,
        settings: Settings,
        *,
        promises: PromiseBook,
        policy: LoadPolicy,
        stats: Counts,
    ) -> None:
        self._session = session
        self._facts = facts
        self._promises = promises
        self._policy = policy
        self._stats = stats
        self._layerwise = settings.use_layerwise
        self._timeout_s = settings.lookup_timeout_ms / 1000
        self._interval_tokens = facts.interval_tokens(settings.window_interval)
        self._turns = Turns(
            max_lookups=settings.max_lookups,
            max_handoffs=settings.max_handoffs,
            timeout_s=self._timeout_s,
        )
        self._explorer = Explorer(session, policy.read, timeout_s=self._timeout_s)
        self._requests: dict[str, RequestLookups] = {}
        self._hits: dict[str, Hit] = {}

    # -- what vLLM asks --------------------------------------------------------------------

    def matched_tokens(
        self, prompt: Prompt, num_computed: int, *, may_load: bool
    ) -> tuple[int | None, bool]:
        """As vLLM's get_num_new_matched_tokens; None asks vLLM to ask again. Without `may_load`
        vLLM drops the answer."""
        of_request = self.of_request(prompt)
        if not prompt.keys or of_request.no_loads:
            return 0, False
        loads = self._facts.loads and may_load
        hit = self._hits.get(prompt.request_id)
        if hit is not None and not self._still_good(hit, num_computed):
            self.drop(prompt.request_id)
            hit = None
        if hit is None:
            if not loads and not self._facts.has_base:
                return 0, False  # what is stored of windows is told when they are dumped
            if not self._session.is_ready:
                of_request.reason = self._session.why_not_ready
                return 0, False
            now_s = time.monotonic()
            turn = self._turn_of(prompt, now_s)
            if turn is not Turn.NOW:
                return self._wait_for_turn(prompt, turn, loads=loads), False
            hit = self._ask(prompt, num_computed, load=loads, now_s=now_s)
        if not loads:
            return 0, False  # a producer only wants to know what is stored, and doesn't wait
        if not self._is_settled_by_now(hit):
            if not self._is_given_up(hit):
                return None, False
            self.drop(prompt.request_id)
            self._session.found_silent()
            of_request.end(Outcome.TIMEOUT)
            return 0, False
        # There is something to do: the answers of others can be waited for in the next step.
        self._session.wait_at_most(STEP_WAIT_S)
        return self._offer(hit, num_computed)

    def _is_settled_by_now(self, hit: Hit) -> bool:
        if not hit.is_settled:
            self._session.wait_for_news()
        if hit.reply is not None and not hit.is_settled:
            self._session.wait_for_news()  # of the other strands, which have just been asked for
        return hit.is_settled

    def reason(self, request_id: str) -> Outcome:
        """Why the request's last lookup has brought no more; FINE as well if there was none."""
        of_request = self._requests.get(request_id)
        return Outcome.FINE if of_request is None else of_request.reason

    def of_request(self, prompt: Prompt) -> RequestLookups:
        return self._requests.setdefault(prompt.request_id, RequestLookups())

    def _turn_of(self, prompt: Prompt, now_s: float) -> Turn:
        waits = self._promises.left_s(prompt.request_id, now_s) > 0
        return self._turns.turn_of(prompt.request_id, waits=waits, now_s=now_s)

    def _wait_for_turn(self, prompt: Prompt, turn: Turn, *, loads: bool) -> int | None:
        """Who only wants to know what is stored doesn't wait: dumps skip what is there anyway."""
        if turn is Turn.NEVER:
            self.of_request(prompt).end(Outcome.TIMEOUT)
            if loads:
                missed = len(prompt.keys)
                self._stats.count("ucm_lookup_missed_blocks", missed, reason=Outcome.TIMEOUT)
        return None if loads and turn is Turn.LATER else 0

    def _is_given_up(self, hit: Hit) -> bool:
        now_s = time.monotonic()
        if now_s <= hit.overdue_s:
            return False
        was_last, hit.is_last_wait, hit.overdue_s = hit.is_last_wait, True, now_s + _GRACE_S
        return was_last

    def _still_good(self, hit: Hit, num_computed: int) -> bool:
        """Not if the node cache is another one, or if vLLM has less of the prompt than then."""
        same_node = hit.generation == self._session.generation
        return same_node and num_computed >= hit.read_from * hit.prompt.block_tokens

    def _ask(self, prompt: Prompt, num_computed: int, *, load: bool, now_s: float) -> Hit:
        promise = self._promises.promise(prompt.request_id)
        wait_s = promise.left_s(now_s) if promise is not None else 0.0
        renewed = promise is not None and promise.is_renewed
        timeout_s = max(wait_s, self._timeout_s)
        hit = Hit(
            prompt=prompt,
            of_request=self.of_request(prompt),
            promise=promise,
            lookup_id=self._session.next_id(),
            generation=self._session.generation,
            read_from=min(num_computed // prompt.block_tokens, len(prompt.keys)),
            asked_s=now_s,
            overdue_s=now_s + timeout_s * (len(prompt.keys) if renewed else 1) + _GRACE_S,
        )
        crowded_out = self._turns.asks(hit.lookup_id, prompt.request_id, waits=wait_s > 0)
        if crowded_out is not None:
            self._promises.crowded_out(crowded_out)
            self.drop(crowded_out)  # it asks again, for what is there by now
        self._hits[prompt.request_id] = hit
        if not self._facts.has_base:
            WindowSearch(
                self._session,
                hit.lookup_id,
                self._facts.strands[0].reach,
                prompt,
                read_from=hit.read_from,
                own_ends=prompt.boundaries(self._interval_tokens),
                promised_blocks=promise.num_blocks if promise is not None and wait_s > 0 else 0,
                renewed=renewed,
                timeout_s=timeout_s,
                on_ends=partial(self._on_ends, hit),
            )
            return hit
        self._session.ask(
            p.Lookup(
                id=hit.lookup_id,
                ns=self._session.namespace,
                keys=list(prompt.keys),
                read_from=hit.read_from,
                load=load,
                timeout_ms=int(timeout_s * 1000),
                promised=promise.num_blocks if promise is not None and wait_s > 0 else 0,
                renewed=renewed,
                tail_tokens=prompt.tail_tokens,
                costs=self._policy.read_costs(),
            ),
            partial(self._on_reply, hit),
        )
        return hit

    def _offer(self, hit: Hit, num_computed: int) -> tuple[int, bool]:
        extra = offered_tokens(
            hit.end_tokens,
            num_computed=num_computed,
            num_prompt=hit.prompt.num_tokens,
            # With a window, the last token needs what the whole prompt's hit has no more.
            in_step=self._layerwise or not self._facts.is_plain or len(self._facts.strands) > 1,
        )
        if self._facts.has_states and num_computed % hit.prompt.block_tokens:
            extra = 0  # what it has itself ends inside a block, whose rest can't be loaded
        if extra and not self._policy.takes(extra):
            hit.of_request.reason = Outcome.NOT_WORTH
            refused = -(-extra // hit.prompt.block_tokens)
            self._stats.count("ucm_lookup_missed_blocks", refused, reason=Outcome.NOT_WORTH)
            extra = 0
        if not extra:
            self.release(hit)
        return extra, bool(extra) and not self._layerwise

    def _on_reply(self, hit: Hit, reply: p.LookupReply) -> None:
        self._turns.ended(hit.lookup_id)
        hit.reply = reply
        hit.of_request.reason = Outcome.NOT_WORTH if reply.refused else reply.reason
        self._count_reply(hit, reply)
        self._policy.read(reply)
        if len(self._facts.strands) > 1 and reply.offsets:
            num_blocks, interval = hit.read_from + len(reply.offsets), self._interval_tokens
            with_states = self._facts.has_states
            ends = hit.prompt.ends_in_base(num_blocks, interval, with_states=with_states)
            self._begin_sides(hit, ends)
        if reply.refused:
            prompt, start = hit.prompt, hit.read_from + reply.num_stored
            num_full = len(prompt.keys) - bool(prompt.tail_tokens)
            self._explorer.try_again(prompt.keys[:num_full], start)

    def _on_ends(self, hit: Hit, ends: list[int], reason: Outcome) -> None:
        """These are likely ends of the hit, the longest first."""
        hit.of_request.reason = Outcome.FINE
        hit.reply = _ABOUT_NOTHING
        num_blocks, block_tokens = len(hit.prompt.keys), hit.prompt.block_tokens
        found = max(hit.read_from, -(-ends[0] // block_tokens) if ends else 0)
        if found < num_blocks:
            self._on_shorter(hit, num_blocks - found, reason or Outcome.NEVER_STORED)
        self._begin_sides(hit, ends)

    def _begin_sides(self, hit: Hit, ends: list[int]) -> None:
        """The base's pages are pinned, if there is a base. How far can all strands go on?"""
        now_s = time.monotonic()
        left_s = hit.promise.left_s(now_s) if hit.promise is not None else 0.0
        timeout_s = max(left_s, self._timeout_s)
        hit.is_last_wait, hit.overdue_s = False, now_s + timeout_s + _GRACE_S
        hit.sides = SideLookups(
            self._session,
            self._facts,
            hit.prompt,
            read_from=hit.read_from,
            ends=ends,
            waits=SideWaits(
                until_s=now_s + timeout_s,
                promised_blocks=hit.promise.num_blocks if hit.promise and left_s > 0 else 0,
            ),
            on_shorter=partial(self._on_shorter, hit),
            why_shorter=hit.of_request.reason,
            on_settled=partial(self._on_settled, hit),
        )

    def _on_settled(self, hit: Hit) -> None:
        if not self._facts.has_base:
            self._turns.ended(hit.lookup_id)
            self._observe_wait(hit)

    def _observe_wait(self, hit: Hit) -> bool:
        """Whether it has waited for what is promised."""
        is_promised = hit.promise is not None and not hit.promise.void
        if is_promised:
            self._stats.observe("ucm_handoff_wait_seconds", time.monotonic() - hit.asked_s)
        return is_promised

    def _on_shorter(self, hit: Hit, num_blocks: int, reason: Outcome) -> None:
        """A strand lacks something: the hit has so many blocks less."""
        hit.of_request.reason = reason
        if hit.promise is None or hit.promise.void:
            self._stats.count("ucm_lookup_missed_blocks", num_blocks, reason=missed_as(reason))

    def _count_reply(self, hit: Hit, reply: p.LookupReply) -> None:
        if not self._observe_wait(hit) and self._facts.loads:
            count = self._stats.count
            count("ucm_lookup_missed_blocks", reply.refused, reason=Outcome.NOT_WORTH)
            if reply.reason:
                missed = len(hit.prompt.keys) - hit.read_from - reply.num_stored - reply.refused
                count("ucm_lookup_missed_blocks", missed, reason=missed_as(reply.reason))

    def missing_blocks(self, prompt: Prompt) -> list[int] | None:
        """What of the prompt its lookup did not find in the store: all of it where there was none.
        None: it has no answer yet."""
        hit = self._hits.get(prompt.request_id)
        if hit is None:
            return list(range(len(prompt.keys)))
        if hit.reply is None:
            return None
        return missing_blocks(
            len(prompt.keys),
            head_stored=hit.reply.head_stored,
            read_from=hit.read_from,
            num_stored=hit.reply.num_stored,
        )

    def take(self, request_id: str) -> Hit | None:
        """The request's lookup, whose pins are the caller's from now on."""
        return self._hits.pop(request_id, None)

    def forget(self, request_id: str) -> None:
        """The request is no more."""
        self.drop(request_id)
        self._turns.forget(request_id)
        self._requests.pop(request_id, None)

    def drop(self, request_id: str) -> None:
        """Withdraws the request's lookup, or gives back what it pinned."""
        hit = self._hits.pop(request_id, None)
        if hit is not None:
            self.release(hit)

    def release(self, hit: Hit) -> None:
        """Gives back what the lookup pinned, if the node cache is still there."""
        self._turns.ended(hit.lookup_id)
        if hit.generation == self._session.generation and not hit.pins_nothing:
            self._session.release(hit.lookup_id)
        if hit.sides is not None:
            if hit.generation == self._session.generation:
                hit.sides.release()
            hit.sides = None
        if hit.reply is not None:
            hit.reply = msgspec.structs.replace(hit.reply, offsets=[])

    def forget_all(self) -> None:
        """Nothing that was looked up counts any more."""
        for request_id in list(self._hits):
            self.drop(request_id)

    def node_lost(self) -> None:
        """What was promised is gone."""
        self._explorer.node_lost()
        lost = [name for name, hit in self._hits.items() if hit.sides or not hit.pins_nothing]
        for name in lost:
            self._turns.ended(self._hits.pop(name).lookup_id)
