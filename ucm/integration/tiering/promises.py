"""Hand-off by vLLM's offloading: what prefill promises, and what decode takes for a promise. Pure.

A request's rows are written in the order of the prompt, those of the group that is waited for last
of each place. So when the last row of that group is there, all are.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ucm import handoff
from ucm.config.settings import Settings
from ucm.store.blocks.keys import Key


class Promising(ABC):
    """A tier, as its connector sees it."""

    @abstractmethod
    def receipt(
        self, request_id: str, block_hashes: Any, num_prompt: int
    ) -> handoff.Receipt | None:
        """For a request that has been computed; None if nothing can be promised."""

    @abstractmethod
    def begin_epoch(self) -> None:
        """vLLM has emptied its caches."""


@dataclass(frozen=True)
class WaitedGroup:
    """The group of vLLM's whose rows are waited for: one of which every row is kept (`keeps_all`),
    or that with the longest window."""

    number: int
    chunk_tokens: int
    keeps_all: bool


@dataclass(frozen=True)
class RowsPromised:
    """The rows up to `tokens` (all, if None) are there or on their way. `key` names the last."""

    wait_s: float
    tokens: int | None = None
    key: str = ""


def is_receipt_wanted(kv_transfer_params: Mapping[str, Any] | None) -> bool:
    """Of the prompt. Nothing is said of answers: vLLM decides which of them it offloads."""
    return handoff.wants_prompt_alone(handoff.parse(kv_transfer_params))


def promise_of(
    kv_transfer_params: Mapping[str, Any] | None,
    *,
    fingerprint: bytes,
    group: WaitedGroup,
    settings: Settings,
) -> RowsPromised | str | None:
    """None if nothing is promised; a word if what is can't be taken."""
    words = handoff.parse(kv_transfer_params)
    if isinstance(words, handoff.Expected):
        return RowsPromised(settings.expect_timeout_ms / 1000)
    if not isinstance(words, handoff.Receipt):
        return None
    if words.namespace != fingerprint.hex() or words.block_tokens != group.chunk_tokens:
        return "refused_namespace"
    return RowsPromised(settings.handoff_timeout_ms / 1000, words.tokens, words.key)


def awaited(
    promise: RowsPromised, asked: Mapping[Key, tuple[int, int]], group: WaitedGroup
) -> list[Key]:
    """Which of the rows that a request has asked for are waited for, in the prompt's order. `asked`
    says of each its group and where it ends. None, if the promise is another prompt's."""
    ends = {key: end for key, (number, end) in asked.items() if number == group.number}
    within = [key for key, end in ends.items() if promise.tokens is None or end <= promise.tokens]
    keys = sorted(within, key=ends.__getitem__)
    if not keys or (promise.key and keys[-1].hex() != promise.key):
        return []
    return keys if group.keeps_all else keys[-1:]


def receipt_for(
    *, fingerprint: bytes, key: Key, tokens: int, group: WaitedGroup
) -> handoff.Receipt:
    return handoff.Receipt(
        namespace=fingerprint.hex(),
        block_tokens=group.chunk_tokens,
        tokens=tokens,
        key=key.hex(),
        issued_s=time.time(),
    )
