"""Goes through what lies below a prefix of a bucket while others use it, within bounds: so many
requests, and so much time. Read-only. Memory is bounded by one answer."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final

from ucm.config.s3_settings import S3_STAGE
from ucm.config.settings import StoreSettings
from ucm.errors import TierError, UcmError
from ucm.store.blocks.keys import Key
from ucm.store.blocks.page_names import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    fingerprint_in,
    is_namespace_name,
    key_id_in,
)
from ucm.store.inspect.signs_of_life import ASKED
from ucm.store.inspect.walk import FoundManifest, Wrong, manifest_in
from ucm.store.tiers.build import bucket_place
from ucm.store.tiers.s3.breaker import BucketBreaker

if TYPE_CHECKING:
    from ucm.store.tiers.s3.listed_bucket import ListedBucket, ListedObject

BUCKET_SCHEME: Final = "s3://"
# Behind a slash in the order of names: what comes behind all that is in a folder begins with it.
_BEHIND_SLASH: Final = "0"


@dataclass
class Bounds:
    """Of what a tool asks a bucket for. `num_requests` were asked. `are_options`: whoever calls the
    tool can change them."""

    max_requests: int = 20_000
    max_s: float = 600.0
    are_options: bool = False
    num_requests: int = 0
    started_s: float = field(default_factory=time.monotonic)

    def spend(self) -> None:
        """Before every request. Raises UcmError."""
        took_s = time.monotonic() - self.started_s
        if self.num_requests >= self.max_requests or took_s > self.max_s:
            what = f"it ended after {self.num_requests:,} requests and {took_s:.0f} s"
            if self.are_options:
                what += f" (--max-requests {self.max_requests}, --max-s {self.max_s:g})"
            raise OutOfBounds(f"not all was seen: {what}")
        self.num_requests += 1


class OutOfBounds(UcmError):
    """A bucket has more than may be asked for."""


@dataclass(frozen=True)
class FoundPage:
    """`name` is the object's, `namespace` that of its folder."""

    name: str
    namespace: str
    key: Key
    size_bytes: int
    modified_s: float


class _NoBreaker(BucketBreaker):
    """Nobody is spared by not asking: each answer is wanted. Whoever watches this process is told
    that it asks."""

    def let_through(self) -> None:
        sys.audit(ASKED)
        super().let_through()


class StoredBucket:
    """Of settings with an S3 stage. No request before the first call."""

    def __init__(self, settings: StoreSettings) -> None:
        """Raises ConfigError where the client isn't installed."""
        self._settings = settings
        self._place = bucket_place(settings)
        self._below = f"{settings.s3_prefix}/" if settings.s3_prefix else ""

    @property
    def place(self) -> str:
        """For people."""
        return self._settings.s3_place

    @cached_property
    def objects(self) -> ListedBucket:
        from ucm.store.tiers.s3.listed_bucket import ListedBucket

        return ListedBucket(self._place, _NoBreaker(0.0))

    def name_of(self, below: str) -> str:
        """The object's name of what is so named below the prefix."""
        return self._below + below

    def url_of(self, name: str, *, below_prefix: bool = True) -> str:
        """For people, who may copy it."""
        below = self._below if below_prefix else ""
        return f"{BUCKET_SCHEME}{self._settings.s3_bucket}/{below}{name}"

    def name_in(self, url: str) -> str | None:
        """The object's name; None: the URL is of something else."""
        bucket = f"{BUCKET_SCHEME}{self._settings.s3_bucket}/"
        return url.removeprefix(bucket) if url.startswith(bucket + self._below) else None

    def page_of(self, name: str) -> tuple[str, Key] | None:
        """The namespace and the key of an object that is where readers look for it."""
        from ucm.store.tiers.s3.names import parse_page

        is_below = name.startswith(self._below)
        return parse_page(name.removeprefix(self._below)) if is_below else None

    def move_aside(self, page: FoundPage, tag: str | None) -> str:
        """Returns what was done with the content that has this tag, for people."""
        from ucm.store.tiers.s3.names import Names
        from ucm.store.tiers.s3.quarantine import move_aside

        names = Names(self._settings.s3_prefix, key_id_in(page.namespace))
        to = names.quarantine(fingerprint_in(page.namespace), page.key)
        return move_aside(self.objects, page.name, to, tag)

    def folders(self, bounds: Bounds, below: str = "") -> Iterator[str]:
        """The first parts of all names below the prefix and `below`, sorted. One request each,
        however much is in them. Raises TierError, and UcmError out of bounds."""
        start, after = self.name_of(below), ""
        while True:
            bounds.spend()
            found = next(self.objects.listed(start.rstrip("/"), after=after), [])
            if not found:
                return
            for each in found:
                folder, slash, _ = each.name.removeprefix(start).partition("/")
                behind = f"{start}{folder}{_BEHIND_SLASH}"
                if slash and behind > after:
                    yield folder
                    after = behind
            after = max(after, found[-1].name)

    def namespaces(self, bounds: Bounds, below: str = "") -> list[str]:
        """Raises TierError, and UcmError out of bounds."""
        return [folder for folder in self.folders(bounds, below) if is_namespace_name(folder)]

    def manifest(self, namespace: str) -> FoundManifest:
        """Never raises for what storage does."""
        name = self.name_of(f"{namespace}/{MANIFEST}")
        try:
            got = self.objects.get_head(name, MAX_MANIFEST_BYTES)
        except TierError as error:
            return FoundManifest(None, f"the manifest can't be read: {error}", Wrong.UNREADABLE)
        if got is None:
            return FoundManifest(None, "no manifest")
        return manifest_in(bytes(got.content), fingerprint_in(namespace))

    def all_in(self, folder: str, bounds: Bounds, after: str = "") -> Iterator[ListedObject]:
        """Raises TierError, and UcmError out of bounds."""
        answers = self.objects.listed(self.name_of(folder), after=after)
        while True:
            bounds.spend()
            answer = next(answers, None)
            if answer is None:
                return
            yield from answer

    def pages_in(self, folder: str, bounds: Bounds) -> Iterator[FoundPage | None]:
        """All pages below a folder, sorted by key; None for what is neither page nor manifest.
        Raises TierError, and UcmError out of bounds."""
        from ucm.store.tiers.s3.names import parse_page

        for each in self.all_in(folder, bounds):
            name = each.name.removeprefix(self._below)
            parsed = parse_page(name)
            if parsed is not None:
                yield FoundPage(each.name, *parsed, each.size_bytes, each.modified_s)
            elif name.partition("/")[2] != MANIFEST:
                yield None

    def beginning_so(self, beginning: str) -> Iterator[ListedObject]:
        """Pages of any namespace whose key begins so, with four digits at least; those in
        quarantine too. Raises TierError, and UcmError out of bounds."""
        from ucm.store.tiers.s3.names import QUARANTINE

        bounds = Bounds()
        for namespace in self.namespaces(bounds):
            yield from self._beginning_so(f"{namespace}/{beginning[:4]}", beginning, bounds)
        for folder in self.namespaces(bounds, below=f"{QUARANTINE}/"):
            yield from self._beginning_so(f"{QUARANTINE}/{folder}", beginning, bounds)

    def _beginning_so(self, folder: str, beginning: str, bounds: Bounds) -> Iterator[ListedObject]:
        start = self.name_of(f"{folder}/{beginning}")
        for each in self.all_in(folder, bounds, after=start):
            if not each.name.startswith(start):
                return
            yield each

    def aside(self, bounds: Bounds) -> Iterator[ListedObject]:
        """What was found damaged and moved aside. Raises TierError, and UcmError out of bounds."""
        from ucm.store.tiers.s3.names import QUARANTINE, is_aside

        for each in self.all_in(QUARANTINE, bounds):
            if is_aside(each.name.removeprefix(self._below)):
                yield each


def stored_bucket(settings: StoreSettings) -> StoredBucket | None:
    """None: nothing is stored in one. Raises ConfigError."""
    return StoredBucket(settings) if S3_STAGE in settings.pipeline else None
