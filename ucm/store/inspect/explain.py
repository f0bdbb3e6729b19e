"""Why a prompt hits or misses: where each of its blocks is, or why it is not there.

A block that is missing under its own name is looked for under those of `guesses.py`. Of a model
with several strands, or with windows, the other strands' blocks are looked for that are needed at
some boundary, and the hit ends where every strand can go on, as engines look for it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import msgspec

from ucm.store.blocks.hit_ends import MAX_TRIES, end_before, ends_in_base, likely_ends
from ucm.store.blocks.keys import Key
from ucm.store.blocks.namespace import fingerprint
from ucm.store.blocks.page_key import PageKey
from ucm.store.blocks.strands import ALL, needed_blocks
from ucm.store.inspect.asked_prompt import (
    AskedPrompt,
    AskedStrand,
    has_states,
    in_strand,
    is_tail,
)
from ucm.store.inspect.guesses import Guess, Whereabouts, guesses, nearest_differences
from ucm.store.inspect.model_label import model_label
from ucm.store.inspect.page_check import Condition, ExpectedPage, PageChecker
from ucm.store.inspect.reclaims import Reclaims
from ucm.store.inspect.walk import NamespaceFolder, manifests_of, namespace_folders
from ucm.store.tiers.posix import paths


class ExplainedBlock(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens [first_token, end_token) in a strand, which is empty where there is one. `where` is a
    file, empty if there is none; `why` is for what is not stored as asked."""

    strand: str
    block: int
    first_token: int
    end_token: int
    key: str
    state: str
    where: str
    why: str


class ExplainedEnd(msgspec.Struct, frozen=True, kw_only=True):
    """A number of tokens at which a hit was tried to end. `strand` is one that can't go on there,
    as it lacks `block`; empty, and -1, where all can."""

    end_tokens: int
    strand: str
    block: int


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """`num_loadable` leading blocks, of `num_loadable_tokens`, can be loaded here. `tail`: what is
    behind the last full block, which only hand-offs store and load. `is_known`: whether the store
    has the namespace at all; if not, `differences` are those to the nearest one. `namespace` is
    empty where that is not known and only a running engine knows it.

    Of a model with several strands or with windows `blocks` and `tail` are those of the first
    strand, `sides` what the others need at some boundary, and `ends` where the hit was tried to
    end, the longest first: the last one is its end, if that lacks nothing. `num_handed_over` are
    the tokens that a hand-off of this very prompt would have loaded, with its tail."""

    namespace: str
    model: str
    is_known: bool
    differences: list[str]
    num_tokens: int
    num_loadable: int
    num_loadable_tokens: int
    blocks: list[ExplainedBlock]
    tail: ExplainedBlock | None
    sides: list[ExplainedBlock]
    ends: list[ExplainedEnd]
    num_handed_over: int


def explain(
    backends: Sequence[str],
    asked: AskedPrompt,
    page_key: PageKey | None,
    *,
    in_memory: Collection[Key] = (),
    on_progress: Callable[[int, int], None],
) -> Explanation:
    """Reads every page of the prompt that is there. `in_memory` are blocks that a node cache has.
    `on_progress(done, total)` counts blocks of the first strand. Raises TierError where a backend
    can't be listed, and UcmError for strands that this version doesn't know."""
    folders = [folder for backend in backends for folder in namespace_folders(backend)]
    name = fingerprint(asked.manifest)
    key_id = page_key.id if page_key is not None else b""
    own = [NamespaceFolder(backend, _name(name, key_id)) for backend in backends]
    look = _PromptPages(
        asked=asked,
        strands=asked.strands(),
        keys=asked.keys(),
        own=own,
        guesses=list(guesses(asked, folders, own)),
        checker=PageChecker(page_key),
        reclaims=Reclaims.of(own, [*itertools.chain(*asked.keys_by_strand())]),
        in_memory=in_memory,
    )
    blocks = []
    for block in range(len(look.keys)):
        blocks.append(look.at(block))
        on_progress(block + 1, len(look.keys))
    tail = blocks.pop() if blocks and is_tail(look.keys, -1) else None
    if has_states(look.strands):
        tail = None  # no state is kept inside of a block
    ends = _ends(look, len(blocks)) if asked.has_strands else []
    handed_over = _ends(look, len(look.keys)) if asked.has_strands and tail is not None else []
    is_known = any(folder in folders for folder in own)
    num_loadable = sum(1 for _ in itertools.takewhile(can_be_loaded, blocks))
    num_loadable_tokens = num_loadable * asked.manifest.block_tokens
    if asked.has_strands:
        num_loadable_tokens = _end_of(ends)
        num_loadable = -(-num_loadable_tokens // asked.manifest.block_tokens)
    return Explanation(
        namespace=_name(name, key_id) if asked.manifest.strands != [] else "",
        model=model_label(asked.manifest),
        is_known=is_known,
        differences=[] if is_known else nearest_differences(asked.manifest, manifests_of(folders)),
        num_tokens=len(asked.tokens),
        num_loadable=num_loadable,
        num_loadable_tokens=num_loadable_tokens,
        blocks=blocks,
        tail=tail,
        sides=look.sides(len(blocks)),
        ends=ends,
        num_handed_over=_end_of(handed_over),
    )


def _name(of: bytes, key_id: bytes) -> str:
    return os.path.basename(paths.namespace_dir("", of, key_id))


def can_be_loaded(block: ExplainedBlock) -> bool:
    """If all before it can be."""
    return block.state in (Whereabouts.STORED.value, Whereabouts.IN_MEMORY.value)


def is_broken(block: ExplainedBlock) -> bool:
    """It is there, and can't be read or believed."""
    return block.state in (Whereabouts.CORRUPT.value, Whereabouts.UNREADABLE.value)


@dataclass(eq=False)
class _PromptPages:
    """At one prompt's blocks, each of which is read once."""

    asked: AskedPrompt
    strands: Sequence[AskedStrand]
    keys: Sequence[Key]
    own: Sequence[NamespaceFolder]
    guesses: Sequence[Guess]
    checker: PageChecker
    reclaims: Reclaims
    in_memory: Collection[Key]
    _seen: dict[tuple[int, int], ExplainedBlock] = field(default_factory=dict)

    def at(self, block: int, strand: int = 0) -> ExplainedBlock:
        found = self._seen.get((strand, block))
        if found is None:
            found = self._seen[strand, block] = self._explained(block, self.strands[strand])
        return found

    def has(self, block: int, strand: int = 0) -> bool:
        return can_be_loaded(self.at(block, strand))

    def sides(self, num_blocks: int) -> list[ExplainedBlock]:
        """Of the strands beside the first one: what was looked at, and what is needed at the
        prompt's own boundaries."""
        with_states, size = has_states(self.strands), self.asked.manifest.block_tokens
        own_ends = self.asked.boundaries(num_blocks, with_states=with_states)
        for number, strand in enumerate(self.strands[1:], start=1):
            for end in own_ends:
                for block in needed_blocks(strand.reach, end, size):
                    self.at(block, number)
        return [self._seen[each] for each in sorted(self._seen) if each[0]]

    def _explained(self, block: int, strand: AskedStrand) -> ExplainedBlock:
        key = in_strand(self.keys[block], strand, self.asked.salt is not None)
        state, where, why = self._own_state(key)
        if state is Whereabouts.NOT_STORED and key in self.in_memory:
            state, why = Whereabouts.IN_MEMORY, "only in this machine's node cache"
        elif state is Whereabouts.NOT_STORED and (when := self.reclaims.when(key)):
            state, why = Whereabouts.RECLAIMED, f"at {when}"
        elif state is Whereabouts.NOT_STORED:
            state, where, why = self._guessed(block, strand)
        if state is Whereabouts.NOT_STORED and is_tail(self.keys, block):
            why += "; tails are stored for hand-offs alone"
        size = self.asked.manifest.block_tokens
        return ExplainedBlock(
            strand=strand.label,
            block=block,
            first_token=block * size,
            end_token=min((block + 1) * size, len(self.asked.tokens)),
            key=key.hex(),
            state=state.value,
            where=where,
            why=why,
        )

    def _own_state(self, key: Key) -> tuple[Whereabouts, str, str]:
        """Of the block under its own name."""
        for folder in self.own:
            path = paths.block_path(folder.backend, folder.fingerprint, key, folder.key_id)
            expected = ExpectedPage(key, folder.fingerprint, folder.key_id)
            check = self.checker.check(path, expected)
            if check.condition is Condition.WHOLE:
                return Whereabouts.STORED, path, ""
            if check.condition is Condition.UNREADABLE:
                return Whereabouts.UNREADABLE, path, check.why
            if check.condition is not Condition.GONE:
                return Whereabouts.CORRUPT, path, check.why
        for folder in self.own:
            aside = _in_quarantine(folder, key)
            if aside:
                return Whereabouts.CORRUPT, aside, "was found damaged and moved aside"
        return Whereabouts.NOT_STORED, "", ""

    def _guessed(self, block: int, strand: AskedStrand) -> tuple[Whereabouts, str, str]:
        """The first guess that leads to a file."""
        for guess in self.guesses:
            path = guess.where(block, strand)
            if path:
                return guess.state, path, guess.why
        return Whereabouts.NOT_STORED, "", self.reclaims.otherwise


def _in_quarantine(folder: NamespaceFolder, key: Key) -> str:
    directory = f"{folder.backend}/{paths.QUARANTINE}/{folder.fingerprint.hex()}"
    try:
        with os.scandir(directory) as entries:
            return next((each.path for each in entries if each.name.startswith(key.hex())), "")
    except OSError:
        return ""


def _ends(look: _PromptPages, num_blocks: int) -> list[ExplainedEnd]:
    """Where a hit on the prompt's first `num_blocks` blocks is tried to end. The last token is
    computed in any case; where there are states, boundaries leave one."""
    num_tokens, size = len(look.asked.tokens), look.asked.manifest.block_tokens
    has_base = look.strands[0].reach == ALL
    is_plain = all(strand.reach == ALL for strand in look.strands)
    candidates = _candidates(look, num_blocks, has_base=has_base)
    ends: list[ExplainedEnd] = []
    end = candidates[0] if candidates else 0
    while end and len(ends) < MAX_TRIES:
        end_tokens = min(end, num_tokens - 1)
        lacking = [
            (block, strand.label)
            for number, strand in enumerate(look.strands)
            if number or not has_base
            for block in needed_blocks(strand.reach, end_tokens, size)
            if not look.has(block, number)
        ]
        block, label = min(lacking, default=(-1, ""))
        ends.append(ExplainedEnd(end_tokens=end_tokens, strand=label, block=block))
        missing = block * size if lacking else 0
        end = end_before(candidates, end_tokens, missing=missing, is_plain=is_plain)
    return ends


def _candidates(look: _PromptPages, num_blocks: int, *, has_base: bool) -> list[int]:
    with_states, size = has_states(look.strands), look.asked.manifest.block_tokens
    own_ends = look.asked.boundaries(num_blocks, with_states=with_states)
    there = [look.has(block) for block in range(num_blocks)]
    if has_base:
        num_there = sum(1 for _ in itertools.takewhile(bool, there))
        num_tokens = len(look.asked.tokens)
        found = ends_in_base(num_tokens, num_there, size, own_ends, with_states=with_states)
        return found if num_there else []
    num_whole = num_blocks - is_tail(look.keys, num_blocks - 1) if num_blocks else 0
    whole = range(num_whole)
    return likely_ends(
        look.strands[0].reach,
        own_ends,
        found={block for block in whole if there[block]},
        absent={block for block in whole if not there[block]},
        block_tokens=size,
    )


def _end_of(ends: Sequence[ExplainedEnd]) -> int:
    """The hit's tokens."""
    return ends[-1].end_tokens if ends and not ends[-1].strand else 0
