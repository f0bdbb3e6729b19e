"""Why a prompt hits or misses: where each of its blocks is, or why it is not there.

A block that is missing under its own name is looked for under the names that it would have with
another salt, another adapter, or in the other namespaces of the store. Only names that somebody can
think of can be tried: a key does not tell the salt that it was made with.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum

import msgspec

from ucm.store.blocks.keys import Key, TailKey, prompt_keys, root_key
from ucm.store.blocks.namespace import Manifest, differences, fingerprint
from ucm.store.blocks.page_key import PageKey
from ucm.store.inspect.model_label import model_label
from ucm.store.inspect.page_check import Condition, ExpectedPage, PageChecker
from ucm.store.inspect.reclaims import Reclaims
from ucm.store.inspect.walk import NamespaceFolder, namespace_folders, read_manifest
from ucm.store.tiers.posix import paths

_DTYPES = frozenset({"kv_dtype", "model_dtype", "kv_scales"})
# With a dtype differs how its kernel packs it: on a CPU with AMX, say.
_PACKING = frozenset({"layout", "num_kv_heads", "k_size", "v_size"})


class Whereabouts(str, Enum):
    """Of one block of the prompt."""

    STORED = "stored"
    # In the memory of this machine's node cache, and not in storage (yet).
    IN_MEMORY = "in_memory"
    # There, and not whole: a reader would move it aside; or it lies in quarantine already.
    CORRUPT = "corrupt"
    UNREADABLE = "unreadable"
    OTHER_DTYPE = "other_dtype"
    OTHER_NAMESPACE = "other_namespace"
    OTHER_SALT = "other_salt"
    OTHER_ADAPTER = "other_adapter"
    OTHER_PAGE_KEY = "other_page_key"
    # It was there under its own name.
    RECLAIMED = "reclaimed"
    # Never stored, or gone before the record of what was reclaimed begins.
    NOT_STORED = "not_stored"


class ExplainedBlock(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens [first_token, end_token). `where` is a file, empty if there is none; `why` is for what
    is not stored as asked."""

    block: int
    first_token: int
    end_token: int
    key: str
    state: str
    where: str
    why: str


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """`num_loadable` leading blocks can be loaded here. `tail`: what is behind the last full block,
    which only hand-offs store and load. `is_known`: whether the store has the namespace at all; if
    not, `differences` are those to the nearest one."""

    namespace: str
    model: str
    is_known: bool
    differences: list[str]
    num_tokens: int
    num_loadable: int
    blocks: list[ExplainedBlock]
    tail: ExplainedBlock | None


@dataclass(frozen=True)
class AskedPrompt:
    """What a prompt's keys are made of, and what else may be tried in its place. Salts and adapters
    are None for none."""

    manifest: Manifest
    tokens: Sequence[int]
    salt: str | None = None
    adapter: bytes | None = None
    other_salts: Sequence[str | None] = (None,)
    other_adapters: Sequence[bytes | None] = (None,)

    def keys(self) -> list[Key]:
        """Of the prompt's full blocks and, as the last one, of its tail; under their own names."""
        return _keys(self.manifest, self, self.salt, self.adapter)


@dataclass(frozen=True)
class _Guess:
    """Keys that the prompt would have had otherwise. `folders` are the namespace's."""

    state: Whereabouts
    why: str
    folders: Sequence[NamespaceFolder]
    keys: Sequence[Key]


def explain(
    backends: Sequence[str],
    asked: AskedPrompt,
    page_key: PageKey | None,
    *,
    in_memory: Collection[Key] = (),
    on_progress: Callable[[int, int], None],
) -> Explanation:
    """Reads every page of the prompt that is there. `in_memory` are blocks that a node cache has.
    `on_progress(done, total)` counts blocks. Raises TierError where a backend can't be listed."""
    folders = [folder for backend in backends for folder in namespace_folders(backend)]
    name = fingerprint(asked.manifest)
    key_id = page_key.id if page_key is not None else b""
    own = [NamespaceFolder(backend, _name(name, key_id)) for backend in backends]
    keys = asked.keys()
    guesses = list(_guesses(asked, folders, own))
    checker = PageChecker(page_key)
    reclaims = Reclaims.of(own, keys)
    blocks: list[ExplainedBlock] = []
    for block, key in enumerate(keys):
        state, where, why = _own_state(own, key, checker)
        if state is Whereabouts.NOT_STORED and key in in_memory:
            state, why = Whereabouts.IN_MEMORY, "only in this machine's node cache"
        elif state is Whereabouts.NOT_STORED and (when := reclaims.when(key)):
            state, why = Whereabouts.RECLAIMED, f"at {when}"
        elif state is Whereabouts.NOT_STORED:
            state, where, why = _guessed(guesses, block, reclaims)
        if state is Whereabouts.NOT_STORED and isinstance(key, TailKey):
            why += "; tails are stored for hand-offs alone"
        blocks.append(_explained(asked, block, key, state, where, why))
        on_progress(block + 1, len(keys))
    tail = blocks.pop() if keys and isinstance(keys[-1], TailKey) else None
    is_known = any(folder in folders for folder in own)
    return Explanation(
        namespace=_name(name, key_id),
        model=model_label(asked.manifest),
        is_known=is_known,
        differences=[] if is_known else nearest_differences(asked.manifest, folders),
        num_tokens=len(asked.tokens),
        num_loadable=sum(1 for _ in itertools.takewhile(can_be_loaded, blocks)),
        blocks=blocks,
        tail=tail,
    )


def nearest_differences(mine: Manifest, folders: Sequence[NamespaceFolder]) -> list[str]:
    """In what `mine` differs from the namespace of the store that is most like it: one line for
    each field. Empty where there is none."""
    manifests = [manifest for folder in folders if (manifest := read_manifest(folder)[0])]
    found = [_differences(manifest, mine) for manifest in manifests]
    return min(found, key=len, default=[])


def _differences(there: Manifest, mine: Manifest) -> list[str]:
    return differences(there, mine, there_label="the store", here_label="this engine")


def _name(of: bytes, key_id: bytes) -> str:
    return os.path.basename(paths.namespace_dir("", of, key_id))


def can_be_loaded(block: ExplainedBlock) -> bool:
    """If all before it can be."""
    return block.state in (Whereabouts.STORED.value, Whereabouts.IN_MEMORY.value)


def _explained(
    asked: AskedPrompt, block: int, key: Key, state: Whereabouts, where: str, why: str
) -> ExplainedBlock:
    size = asked.manifest.block_tokens
    return ExplainedBlock(
        block=block,
        first_token=block * size,
        end_token=min((block + 1) * size, len(asked.tokens)),
        key=key.hex(),
        state=state.value,
        where=where,
        why=why,
    )


def _keys(of: Manifest, asked: AskedPrompt, salt: str | None, adapter: bytes | None) -> list[Key]:
    root = root_key(fingerprint(of), lora_digest=adapter, cache_salt=salt)
    return prompt_keys(
        root, asked.tokens, block_tokens=of.block_tokens, cache_salt=salt, with_tail=True
    )


def _own_state(
    folders: Sequence[NamespaceFolder], key: Key, checker: PageChecker
) -> tuple[Whereabouts, str, str]:
    """Of the block under its own name."""
    for folder in folders:
        path = paths.block_path(folder.backend, folder.fingerprint, key, folder.key_id)
        expected = ExpectedPage(key, folder.fingerprint, folder.key_id)
        check = checker.check(path, expected)
        if check.condition is Condition.WHOLE:
            return Whereabouts.STORED, path, ""
        if check.condition is Condition.UNREADABLE:
            return Whereabouts.UNREADABLE, path, check.why
        if check.condition is not Condition.GONE:
            return Whereabouts.CORRUPT, path, check.why
    for folder in folders:
        aside = _in_quarantine(folder, key)
        if aside:
            return Whereabouts.CORRUPT, aside, "was found damaged and moved aside"
    return Whereabouts.NOT_STORED, "", ""


def _in_quarantine(folder: NamespaceFolder, key: Key) -> str:
    directory = f"{folder.backend}/{paths.QUARANTINE}/{folder.fingerprint.hex()}"
    try:
        with os.scandir(directory) as entries:
            return next((each.path for each in entries if each.name.startswith(key.hex())), "")
    except OSError:
        return ""


def _guessed(
    guesses: Sequence[_Guess], block: int, reclaims: Reclaims
) -> tuple[Whereabouts, str, str]:
    """The first guess that leads to a file."""
    for guess in guesses:
        for folder in guess.folders:
            key = guess.keys[block]
            path = paths.block_path(folder.backend, folder.fingerprint, key, folder.key_id)
            if os.path.lexists(path):
                return guess.state, path, guess.why
    return Whereabouts.NOT_STORED, "", reclaims.otherwise


def _guesses(
    asked: AskedPrompt, folders: Sequence[NamespaceFolder], own: Sequence[NamespaceFolder]
) -> Iterator[_Guess]:
    """What differs in one thing comes first."""
    mine = asked.manifest
    name = fingerprint(mine)
    keys = _keys(mine, asked, asked.salt, asked.adapter)
    for folder in folders:
        if folder.fingerprint == name and folder not in own:
            sealed = (
                f"sealed by the page key {folder.key_id.hex()}" if folder.key_id else "unsealed"
            )
            yield _Guess(Whereabouts.OTHER_PAGE_KEY, f"it is there {sealed}", [folder], keys)
    salts = [salt for salt in asked.other_salts if salt != asked.salt]
    adapters = [each for each in asked.other_adapters if each != asked.adapter]
    ours = [folder for folder in folders if folder.fingerprint == name]
    for salt in salts:
        why = f"stored with {_salt(salt)}, asked for with {_salt(asked.salt)}"
        yield _Guess(Whereabouts.OTHER_SALT, why, ours, _keys(mine, asked, salt, asked.adapter))
    for adapter in adapters:
        why = f"stored with {_adapter(adapter)}, asked for with {_adapter(asked.adapter)}"
        yield _Guess(Whereabouts.OTHER_ADAPTER, why, ours, _keys(mine, asked, asked.salt, adapter))
    for folder, manifest in _others(mine, folders):
        lines = _differences(manifest, mine)
        state = Whereabouts.OTHER_NAMESPACE
        if _is_by_dtype({line.partition(":")[0] for line in lines}):
            state = Whereabouts.OTHER_DTYPE
        for salt, adapter in itertools.product((asked.salt, *salts), (asked.adapter, *adapters)):
            keys = _keys(manifest, asked, salt, adapter)
            yield _Guess(state, "; ".join(lines), [folder], keys)


def _others(
    mine: Manifest, folders: Sequence[NamespaceFolder]
) -> list[tuple[NamespaceFolder, Manifest]]:
    """Namespaces whose blocks can be compared with ours one by one, those most like it first."""
    found = [
        (folder, manifest)
        for folder in folders
        if folder.fingerprint != fingerprint(mine)
        and (manifest := read_manifest(folder)[0]) is not None
        and manifest.block_tokens == mine.block_tokens
    ]
    return sorted(found, key=lambda each: len(_differences(each[1], mine)))


def _is_by_dtype(fields: AbstractSet[str]) -> bool:
    """Whether two namespaces that differ in these fields do because of their dtypes."""
    allowed = _DTYPES | _PACKING if "layout" in fields else _DTYPES
    return bool(fields & _DTYPES) and fields <= allowed


def _salt(salt: str | None) -> str:
    return "no salt" if salt is None else f"the salt {salt!r}"


def _adapter(digest: bytes | None) -> str:
    return "no adapter" if digest is None else f"the adapter {digest.hex()[:8]}"
