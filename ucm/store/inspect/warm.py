"""Brings the pages of prompts from storage into a node cache's memory, before anybody wants them.

They stay there as all others do: as long as there is room.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec

from ucm.config.settings import StoreSettings
from ucm.errors import ConfigError
from ucm.store.blocks.keys import Key, TailKey
from ucm.store.blocks.namespace import Manifest, fingerprint, to_json
from ucm.store.blocks.strands import ALL
from ucm.store.client.connection import NodeClient
from ucm.store.client.start import connect_or_start
from ucm.store.inspect.asked_prompt import AskedPrompt
from ucm.store.inspect.node_client import answer_of, is_tool, tool_session
from ucm.store.node import protocol as p

_CONNECT_S: Final = 30.0
# Of storage that is slow, for one prompt; and for the answer to arrive behind it.
_READ_S: Final = 60.0
_ANSWER_S: Final = 10.0
_LOOK_EVERY_S: Final = 0.5


class Warmed(msgspec.Struct, frozen=True, kw_only=True):
    """Pages of whole blocks: those that were in memory, that were `read` into it, and that are not
    stored or could not be read. `memory_bytes` is what the node cache has, `warm_bytes` are those
    of the first two. It `is_used`: an engine is connected."""

    num_prompts: int = 0
    in_memory: int = 0
    read: int = 0
    missing: int = 0
    warm_bytes: int = 0
    memory_bytes: int = 0
    is_used: bool = False

    def __add__(self, more: Warmed) -> Warmed:
        return Warmed(
            num_prompts=self.num_prompts + more.num_prompts,
            in_memory=self.in_memory + more.in_memory,
            read=self.read + more.read,
            missing=self.missing + more.missing,
            warm_bytes=self.warm_bytes + more.warm_bytes,
            memory_bytes=max(self.memory_bytes, more.memory_bytes),
        )


def warm(
    settings: StoreSettings,
    prompts: Sequence[AskedPrompt],
    page_bytes: Sequence[int],
    *,
    hold_s: float = 0.0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_warmed: Callable[[Warmed], None] = lambda warmed: None,
) -> Warmed:
    """One after the other, each with all threads that the node cache has; it is started if nobody
    serves. `page_bytes` are those of each strand. A node cache that nobody uses leaves after a
    while: when all is read it is kept from that until somebody uses it, for `hold_s` at most.
    Raises ConfigError, ProtocolError or NodeUnavailable."""
    with connect_or_start(
        settings, session=tool_session(), role="tool", timeout_s=_CONNECT_S
    ) as client:
        warmed = Warmed(memory_bytes=client.welcome.capacity_bytes)
        if prompts:
            _open(client, prompts[0].manifest, page_bytes)
        for done, prompt in enumerate(prompts, 1):
            warmed += _warm_one(client, prompt, page_bytes)
            on_progress(done, len(prompts))
        warmed = msgspec.structs.replace(warmed, is_used=_is_used(client))
        on_warmed(warmed)
        until_s = time.monotonic() + hold_s
        while not warmed.is_used and (left_s := until_s - time.monotonic()) > 0:
            time.sleep(min(left_s, _LOOK_EVERY_S))
            warmed = msgspec.structs.replace(warmed, is_used=_is_used(client))
    return warmed


def _is_used(client: NodeClient) -> bool:
    """Whether anybody but tools is connected."""
    client.send(p.GetStatus(id=1))
    sessions = answer_of(client, p.Status, timeout_s=_ANSWER_S).sessions
    return not all(map(is_tool, sessions))


def _open(client: NodeClient, manifest: Manifest, page_bytes: Sequence[int]) -> None:
    """The namespace, once for each size of a page: as engines do, by the number of the strand."""
    for number, nbytes in enumerate(page_bytes):
        namespace = p.OpenNamespace(
            ns=number,
            fingerprint=fingerprint(manifest),
            page_bytes=nbytes,
            block_tokens=manifest.block_tokens,
            manifest=to_json(manifest),
        )
        client.send(namespace)
        opened = answer_of(client, p.NamespaceOpened, timeout_s=_ANSWER_S)
        if opened.refused:
            raise ConfigError(f"the node cache refuses the namespace: {opened.error}")


def _warm_one(client: NodeClient, prompt: AskedPrompt, page_bytes: Sequence[int]) -> Warmed:
    found = Warmed(num_prompts=1)
    by_strand = zip(prompt.strands(), prompt.keys_by_strand(), page_bytes, strict=True)
    for number, (strand, keys, nbytes) in enumerate(by_strand):
        keys = [key for key in keys if not isinstance(key, TailKey)]
        # Of a strand that needs every block what lies behind a hole is of no use.
        runs = [keys] if strand.reach == ALL else _stored_runs(client, number, keys)
        for run in runs:
            if run:
                found += _read(client, number, run, nbytes)
    return found


def _read(client: NodeClient, number: int, keys: Sequence[Key], page_bytes: int) -> Warmed:
    asked: list[bytes] = [*keys]
    timeout_ms = int(_READ_S * 1000)
    lookup = p.Lookup(id=1, ns=number, keys=asked, read_from=0, load=True, timeout_ms=timeout_ms)
    client.send(lookup)
    reply = answer_of(client, p.LookupReply, timeout_s=_READ_S + _ANSWER_S)
    client.send(p.Release(lookups=[lookup.id]))
    had = len(reply.offsets)
    # Those behind a page that could not be had were read as well.
    read = min(had, reply.from_files)
    return Warmed(
        in_memory=had - read,
        read=read,
        missing=len(asked) - had,
        warm_bytes=had * page_bytes,
    )


def _stored_runs(client: NodeClient, number: int, keys: Sequence[Key]) -> list[list[Key]]:
    """Of a window, or states, some blocks are kept: the stretches of them."""
    asked: list[bytes] = [*keys]
    timeout_ms = int(_READ_S * 1000)
    client.send(p.Find(id=1, ns=number, keys=asked, storage=True, timeout_ms=timeout_ms))
    return list(runs_of(keys, answer_of(client, p.Found, timeout_s=_READ_S + _ANSWER_S).places))


def runs_of(keys: Sequence[Key], places: bytes) -> Iterator[list[Key]]:
    """The stretches of keys that are anywhere. Pure."""
    run: list[Key] = []
    for key, place in zip(keys, places, strict=True):
        if place:
            run.append(key)
        elif run:
            yield run
            run = []
    if run:
        yield run
