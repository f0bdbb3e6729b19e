"""Under which other names a prompt's blocks may lie in a store: those that they would have with
another salt, another adapter, or in another namespace.

Only names that somebody can think of can be tried: a key does not tell the salt that it was made
with.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum

from ucm.store.blocks.keys import Key
from ucm.store.blocks.namespace import Manifest, differences, fingerprint, without_strands
from ucm.store.inspect.asked_prompt import AskedPrompt, AskedStrand, in_strand
from ucm.store.inspect.walk import NamespaceFolder, read_manifest
from ucm.store.tiers.posix import paths

_DTYPES = frozenset({"kv_dtype", "model_dtype", "kv_scales"})
# With a dtype differs how its kernel packs it: on a CPU with AMX, say.
_PACKING = frozenset({"layout", "num_kv_heads", "k_size", "v_size"})
# Of a strand, what follows from its dtype: its name tells how large a number is.
_OF_STRAND = re.compile(r"strands\.\d+\.(item_bytes|name|layout|num_kv_heads|k_size|v_size)$")


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


@dataclass(frozen=True)
class Guess:
    """Keys that the prompt would have had otherwise. `folders` are the namespace's."""

    state: Whereabouts
    why: str
    folders: Sequence[NamespaceFolder]
    keys: Sequence[Key]
    is_salted: bool

    def where(self, block: int, strand: AskedStrand) -> str:
        """The file, if it is there."""
        key = in_strand(self.keys[block], strand, self.is_salted)
        for folder in self.folders:
            path = paths.block_path(folder.backend, folder.fingerprint, key, folder.key_id)
            if os.path.lexists(path):
                return path
        return ""


def nearest_differences(mine: Manifest, manifests: Iterable[Manifest]) -> list[str]:
    """In what `mine` differs from the namespace of the store that is most like it: one line for
    each field. Empty where there is none."""
    found = [_differences(manifest, mine) for manifest in manifests]
    return min(found, key=len, default=[])


def _differences(there: Manifest, mine: Manifest) -> list[str]:
    """Of an engine whose strands are unknown only what is known."""
    if mine.strands == []:
        there = without_strands(there)
    return differences(there, mine, there_label="the store", here_label="this engine")


def guesses(
    asked: AskedPrompt, folders: Sequence[NamespaceFolder], own: Sequence[NamespaceFolder]
) -> Iterator[Guess]:
    """What differs in one thing comes first."""
    mine = asked.manifest
    name = fingerprint(mine)
    keys = asked.keys()
    is_salted = asked.salt is not None
    for folder in folders:
        if folder.fingerprint == name and folder not in own:
            sealed = (
                f"sealed by the page key {folder.key_id.hex()}" if folder.key_id else "unsealed"
            )
            why = f"it is there {sealed}"
            yield Guess(Whereabouts.OTHER_PAGE_KEY, why, [folder], keys, is_salted)
    salts = [salt for salt in asked.other_salts if salt != asked.salt]
    adapters = [each for each in asked.other_adapters if each != asked.adapter]
    ours = [folder for folder in folders if folder.fingerprint == name]
    for salt in salts:
        why = f"stored with {_salt(salt)}, asked for with {_salt(asked.salt)}"
        keys = asked.keys_with(mine, salt, asked.adapter)
        yield Guess(Whereabouts.OTHER_SALT, why, ours, keys, salt is not None)
    for adapter in adapters:
        why = f"stored with {_adapter(adapter)}, asked for with {_adapter(asked.adapter)}"
        keys = asked.keys_with(mine, asked.salt, adapter)
        yield Guess(Whereabouts.OTHER_ADAPTER, why, ours, keys, is_salted)
    for folder, manifest in _others(mine, folders):
        lines = _differences(manifest, mine)
        state = Whereabouts.OTHER_NAMESPACE
        if _is_by_dtype({line.partition(":")[0] for line in lines}):
            state = Whereabouts.OTHER_DTYPE
        for salt, adapter in itertools.product((asked.salt, *salts), (asked.adapter, *adapters)):
            keys = asked.keys_with(manifest, salt, adapter)
            yield Guess(state, "; ".join(lines), [folder], keys, salt is not None)


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
    of_strands = {field for field in fields if _OF_STRAND.match(field)}
    allowed = _DTYPES | of_strands | (_PACKING if "layout" in fields else set())
    return bool(fields & _DTYPES) and fields <= allowed


def _salt(salt: str | None) -> str:
    return "no salt" if salt is None else f"the salt {salt!r}"


def _adapter(digest: bytes | None) -> str:
    return "no adapter" if digest is None else f"the adapter {digest.hex()[:8]}"
