"""What is promised of a prompt, and receipts for what this engine has stored. Pure.

A promise only changes for how long decode waits and how it counts what it computes itself: keys are
its own, and pages are verified as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ucm.handoff import Expected, Handoff, Receipt, Withdrawn, wants_prompt_alone
from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.blocks.strands import last_boundary


@dataclass(frozen=True)
class Promise:
    """The first `num_blocks` of a prompt, `tokens` in all, are there or on their way; waited for
    until `until_s` (monotonic), or, with `is_renewed`, for `wait_s` after each that comes. Nothing
    is waited for with a `void` promise: it says why, and what it would have spared is counted."""

    num_blocks: int
    tokens: int
    wait_s: float = 0.0
    until_s: float = 0.0
    is_renewed: bool = False
    void: Outcome = Outcome.FINE

    def left_s(self, now_s: float) -> float:
        """How long to wait from now on."""
        if self.void:
            return 0.0
        return self.wait_s if self.is_renewed else max(0.0, self.until_s - now_s)


@dataclass(frozen=True)
class PromiseRules:
    """This engine's own side of it. Without `keeps_tails` there are none in its store. One that
    `has_states` goes on at the ends of blocks only, and has a token left to compute there."""

    fingerprint: bytes
    block_tokens: int
    keeps_tails: bool
    handoff_timeout_s: float
    expect_timeout_s: float
    has_states: bool = False


def wants_tail(handoff: Handoff | None, rules: PromiseRules) -> bool:
    """Whether the keys of such a request have one for the tail."""
    is_promised = isinstance(handoff, (Receipt, Expected))
    return rules.keeps_tails and (is_promised or wants_prompt_alone(handoff))


def promise_of(
    handoff: Handoff | None,
    *,
    keys: Sequence[Key],
    num_prompt: int,
    rules: PromiseRules,
    now_s: float,
) -> Promise | None:
    """What `handoff` promises to a request with these keys that comes now."""
    if isinstance(handoff, Expected):
        tokens = last_boundary(
            num_prompt, len(keys), rules.block_tokens, with_states=rules.has_states
        )
        if not tokens:
            return Promise(0, num_prompt, void=Outcome.UNSUPPORTED)
        num_blocks = -(-tokens // rules.block_tokens)
        return Promise(
            num_blocks, tokens, wait_s=rules.expect_timeout_s, until_s=now_s, is_renewed=True
        )
    if isinstance(handoff, Withdrawn):
        return Promise(0, num_prompt, void=Outcome.WITHDRAWN)
    if not isinstance(handoff, Receipt):
        return None
    tokens = min(handoff.tokens, num_prompt)
    if handoff.namespace != rules.fingerprint.hex():
        return Promise(0, tokens, void=Outcome.NAMESPACE)
    num_blocks = -(-tokens // rules.block_tokens)
    if tokens % rules.block_tokens and not rules.keeps_tails:
        num_blocks -= 1  # what the receipt's key names is not looked for here
    elif num_blocks > len(keys) or keys[num_blocks - 1].hex() != handoff.key:
        num_blocks = 0  # of another prompt
    if not 0 < num_blocks <= len(keys):
        return Promise(0, tokens, void=Outcome.UNSUPPORTED)
    until_s = now_s + rules.handoff_timeout_s
    return Promise(num_blocks, tokens, wait_s=rules.handoff_timeout_s, until_s=until_s)


def receipt_for(
    keys: Sequence[Key],
    num_blocks: int,
    *,
    num_prompt: int,
    rules: PromiseRules,
    issued_s: float,
    found_tokens: int = 0,
) -> Receipt | None:
    """For the first `num_blocks` of the keys; None for none."""
    if num_blocks == 0:
        return None
    tokens = min(num_blocks * rules.block_tokens, num_prompt)
    # If all blocks had a name. Of a prompt with states no more can be promised.
    all_blocks = -(-num_prompt // rules.block_tokens)
    end = last_boundary(num_prompt, all_blocks, rules.block_tokens, with_states=rules.has_states)
    return Receipt(
        namespace=rules.fingerprint.hex(),
        block_tokens=rules.block_tokens,
        tokens=tokens,
        key=keys[num_blocks - 1].hex(),
        is_whole=tokens == end,
        issued_s=issued_s,
        found_tokens=found_tokens,
    )
