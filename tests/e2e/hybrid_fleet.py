"""Servers of a model with several strands or with windows, and what of it lies in the store.

Tokens alone would not show KV that is wrong a little: answers are compared with their logprobs.
"""

from __future__ import annotations

import http
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.cluster.client import Client, RequestFailed
from examples.cluster.processes import VllmServer
from tests.e2e.checks import Prompt, counted, wait_until
from tests.e2e.deployment import KV_CACHE_BYTES, Deployment, Engine
from tests.e2e.hybrid_models import HybridModel, make_hybrid
from tests.e2e.node import Node
from tests.e2e.store import Namespace, Store
from ucm.store.blocks.keys import Key, strand_key
from ucm.store.blocks.namespace import from_json
from ucm.store.blocks.page_layout import PageGeometry
from ucm.store.blocks.strands import (
    ALL,
    STATE,
    Reach,
    boundaries,
    default_interval_tokens,
    kept_blocks,
    needed_blocks,
    reach_of,
)
from ucm.store.tiers.posix import paths

MAX_TOKENS = 12
# In float32 other chunks and other ranks change logprobs by less than a hundredth of it, and KV
# that is another token's by a hundred times as much and more.
SAME_LOGPROBS = 1e-3
# What a request has said before it is preempted may be computed again as a prompt is, all at once.
# In bfloat16 that changes logprobs by half of it on average, also without UCM, and KV or a state of
# zeros by three times as much and more.
ROUNDED_LOGPROBS = 0.05

# Of a strand in a manifest.
_SIZES = ("num_layers", "num_kv_heads", "k_size", "v_size", "item_bytes")


@dataclass(frozen=True)
class Said:
    """An answer, with the logprob of each of its tokens."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    def is_like(self, other: Said) -> bool:
        pairs = zip(self.logprobs, other.logprobs, strict=True)
        same = all(abs(one - two) < SAME_LOGPROBS for one, two in pairs)
        return self.token_ids == other.token_ids and same


def ask(client: Client, prompt: Prompt, *, max_tokens: int = MAX_TOKENS, **more: object) -> Said:
    body = {
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
        "return_token_ids": True,
    }
    status, text = client.post("/v1/completions", {**body, **more})
    if status != http.HTTPStatus.OK:
        raise RequestFailed(status, text)
    (choice,) = json.loads(text)["choices"]
    return Said(tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]))


def ask_counted(engine: Engine, prompt: Prompt) -> tuple[Said, int, int]:
    """The answer, and how many tokens came from the engine's own cache and from the store."""
    before = engine.client.counters()
    said = ask(engine.client, prompt)
    gained = counted(engine.client, before, len(prompt))
    return said, gained.local_hits, gained.external_hits


@dataclass(frozen=True)
class StoredStrand:
    """As a manifest of format 2 describes it. `namespace` has the size of its pages."""

    name: str
    reach: Reach
    namespace: Namespace

    def key(self, prompt: Prompt, block: int) -> Key:
        key = self.namespace.keys(prompt)[block]
        return strand_key(key, self.name, is_salted=False) if self.name else key

    def needed(self, end_tokens: int) -> range:
        return needed_blocks(self.reach, end_tokens, self.namespace.block_tokens)


def strands(store: Store) -> list[StoredStrand]:
    """The base first, if there is one. Needs a block in the store."""
    (file,) = store.folder.glob(f"*/{paths.MANIFEST}")
    text = file.read_bytes()
    manifest = from_json(text)
    assert manifest.strands, "a model that is more than full attention of one kind"
    found = []
    for each in manifest.strands:
        reach = reach_of(str(each["reach"]))
        sizes = {name: int(str(each[name])) for name in _SIZES}
        if reach == STATE:  # a page has one state, however many tokens it stands for
            sizes["unit_tokens"] = manifest.block_tokens
        page = PageGeometry(block_tokens=manifest.block_tokens, **sizes)
        namespace = Namespace(bytes.fromhex(file.parent.name), text, page.page_bytes)
        found.append(StoredStrand(str(each["name"]), reach, namespace))
    return found


def kept_files(store: Store, model: HybridModel, prompt: Prompt) -> dict[str, dict[int, Path]]:
    """Where the pages of the prompt's full blocks lie, or will lie, by strand and block."""
    found = strands(store)
    interval = default_interval_tokens(strand.reach for strand in found)
    num_blocks = len(prompt) // model.block_size
    files: dict[str, dict[int, Path]] = {}
    for strand in found:
        kept = (
            strand.needed(model.hit_tokens(len(prompt)))
            if model.has_states
            else kept_blocks(strand.reach, len(prompt), num_blocks, model.block_size, interval)
        )
        fingerprint = strand.namespace.fingerprint
        files[strand.name] = {
            block: Path(paths.block_path(str(store.folder), fingerprint, strand.key(prompt, block)))
            for block in sorted(kept)
        }
    return files


def longest_end(store: Store, model: HybridModel, prompt: Prompt, *, without: Path) -> int:
    """Where a hit on the prompt ends, of all that prefill keeps of it but this file. With a strand
    of which every block is kept others are kept at boundaries only; else a hit may end wherever
    what it needs happens to be there. Of states there is one, or none."""
    found, unit = strands(store), model.block_size
    num_blocks = len(prompt) // unit
    there = {
        name: {block for block, file in files.items() if file != without}
        for name, files in kept_files(store, model, prompt).items()
    }
    ends = [block * unit for block in range(num_blocks, 0, -1)]
    if found[0].reach == ALL and not model.has_states:
        interval = default_interval_tokens(strand.reach for strand in found)
        ends = boundaries(len(prompt), num_blocks, unit, interval)

    def is_there(end: int) -> bool:
        end = min(end, len(prompt) - 1)
        return all(there[strand.name].issuperset(strand.needed(end)) for strand in found)

    return next(filter(is_there, ends), 0)


def wait_kept(store: Store, model: HybridModel, prompt: Prompt) -> None:
    """Until all that prefill keeps of the prompt is in files, of every strand."""
    if not model.hit_tokens(len(prompt)):
        return
    wait_until(lambda: bool(list(store.folder.glob(f"*/{paths.MANIFEST}"))), "a manifest")

    def missing() -> list[str]:
        return [
            f"{name or 'base'} {block}"
            for name, files in kept_files(store, model, prompt).items()
            for block, file in files.items()
            if not file.exists()
        ]

    try:
        wait_until(lambda: not missing(), "all pages stored")
    except AssertionError as error:
        raise AssertionError(f"{len(prompt)} tokens: {missing()} not stored in time") from error


class HybridFleet(Deployment):
    """Of one model: servers over one store, and `plain`, a vLLM without UCM, which computes every
    prompt cold. In bfloat16 a token's logprobs depend on how many are computed with it: there plain
    has a prefix cache, for which it ends a step where the others' hits end."""

    def __init__(self, folder: Path, model: HybridModel) -> None:
        super().__init__(folder, make_hybrid(folder, model))
        self.model = model
        self.plain = VllmServer(
            self._model,
            log=folder / "plain.log",
            dtype=model.dtype,
            block_size=model.engine_block_size,
            kv_cache_bytes=KV_CACHE_BYTES,
            args=["--no-enable-prefix-caching", *model.flags] if model.is_exact else model.flags,
        )
        self._answers: dict[tuple[Prompt, int], Said] = {}

    def start(self, name: str, node: Node, *, args: Sequence[str] = (), **options: Any) -> Engine:
        """As the model needs it. Without a prefix cache an engine keeps no states."""
        model = self.model
        fixed = {"dtype": model.dtype, "block_tokens": model.block_size}
        if model.has_states:
            fixed["prefix_caching"] = True
        options = {"block_size": model.engine_block_size, **options, **fixed}
        return super().start(name, node, args=[*args, *model.flags], **options)

    def hit_tokens(self, prompt: Prompt) -> int:
        return self.model.hit_tokens(len(prompt))

    def kept_files(self, prompt: Prompt) -> dict[str, dict[int, Path]]:
        return kept_files(self.store, self.model, prompt)

    def wait_kept(self, prompt: Prompt) -> None:
        wait_kept(self.store, self.model, prompt)

    def expected(self, prompt: Prompt, *, max_tokens: int = MAX_TOKENS) -> Said:
        key = (prompt, max_tokens)
        if key not in self._answers:
            self._answers[key] = ask(self.plain.client, prompt, max_tokens=max_tokens)
        return self._answers[key]

    def distance(self, prompt: Prompt, said: Said) -> float:
        """Between the logprobs of this answer and plain's, on average. Where plain would say
        another token, it goes on behind the one that was said."""
        distances: list[float] = []
        while num_left := len(said.token_ids) - len(distances):
            so_far = (*prompt, *said.token_ids[: len(distances)])
            plain = self.expected(so_far, max_tokens=num_left)
            for token, logprob in zip(plain.token_ids, plain.logprobs, strict=True):
                at = len(distances)
                distances.append(abs(said.logprobs[at] - logprob))
                if said.token_ids[at] != token:
                    break
        return sum(distances) / len(distances)

    def wait_ready(self) -> None:
        super().wait_ready()
        self.plain.wait_ready()

    def kill(self) -> None:
        super().kill()
        self.plain.kill()
