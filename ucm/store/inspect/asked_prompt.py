"""A prompt that a tool is asked about: the keys of its blocks, in each strand of its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ucm.errors import UcmError
from ucm.store.blocks.keys import Key, TailKey, prompt_keys, root_key, strand_key
from ucm.store.blocks.namespace import Manifest, fingerprint
from ucm.store.blocks.strands import ALL, STATE, Reach, boundaries, interval_tokens, reach_of
from ucm.store.inspect.model_label import strand_labels


@dataclass(frozen=True)
class AskedStrand:
    """`name` is in the keys of its pages, empty for the first one; `label` is for people."""

    name: str
    label: str
    reach: Reach


@dataclass(frozen=True)
class AskedPrompt:
    """What a prompt's keys are made of, and what else may be tried in its place. Salts and adapters
    are None for none. Of an engine with several strands, how far apart it keeps boundaries
    (`window_interval`, None for the default) and states."""

    manifest: Manifest
    tokens: Sequence[int]
    salt: str | None = None
    adapter: bytes | None = None
    other_salts: Sequence[str | None] = (None,)
    other_adapters: Sequence[bytes | None] = (None,)
    window_interval: int | None = None
    state_interval_tokens: int = 0

    @property
    def has_strands(self) -> bool:
        return bool(self.manifest.strands)

    def strands(self) -> list[AskedStrand]:
        """Raises UcmError if there are some that this version doesn't know."""
        given = self.manifest.strands or []
        if not given:
            return [AskedStrand("", "", ALL)]
        try:
            return [
                AskedStrand(str(each.get("name") or ""), label, reach_of(str(each.get("reach"))))
                for each, label in zip(given, strand_labels(self.manifest), strict=True)
            ]
        except ValueError as error:
            raise UcmError(
                f"the manifest of namespace {fingerprint(self.manifest).hex()} has strands that "
                f"this version doesn't know: {error}"
            ) from error

    def keys(self) -> list[Key]:
        """Of the prompt's full blocks and, as the last one, of its tail; under their own names, in
        the first strand."""
        return self.keys_with(self.manifest, self.salt, self.adapter)

    def keys_by_strand(self) -> list[list[Key]]:
        """The same in every strand."""
        keys, is_salted = self.keys(), self.salt is not None
        return [[in_strand(key, each, is_salted) for key in keys] for each in self.strands()]

    def keys_with(self, of: Manifest, salt: str | None, adapter: bytes | None) -> list[Key]:
        """`keys` in another namespace, or with another salt or adapter."""
        root = root_key(fingerprint(of), lora_digest=adapter, cache_salt=salt)
        return prompt_keys(
            root, self.tokens, block_tokens=of.block_tokens, cache_salt=salt, with_tail=True
        )

    def boundaries(self, num_blocks: int, *, with_states: bool) -> list[int]:
        """Where a prefill of its first blocks keeps what is needed to go on, the last one first."""
        interval = interval_tokens(
            [strand.reach for strand in self.strands()],
            window_interval=self.window_interval,
            state_interval_tokens=self.state_interval_tokens,
        )
        size = self.manifest.block_tokens
        return boundaries(len(self.tokens), num_blocks, size, interval, with_states=with_states)


def in_strand(key: Key, strand: AskedStrand, is_salted: bool) -> Key:
    """The key of a block's page in a strand."""
    return strand_key(key, strand.name, is_salted=is_salted) if strand.name else key


def is_tail(keys: Sequence[Key], block: int) -> bool:
    return isinstance(keys[block], TailKey)


def has_states(strands: Sequence[AskedStrand]) -> bool:
    return any(strand.reach == STATE for strand in strands)
