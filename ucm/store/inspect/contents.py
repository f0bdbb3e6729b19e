"""What a store holds: namespaces, pages, bytes and their ages, counted by their names and sizes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from ucm.store.blocks.keys import Key, TailKey
from ucm.store.blocks.namespace import Manifest
from ucm.store.inspect.salts import SaltTally
from ucm.store.inspect.walk import (
    FoundName,
    Kind,
    NamespaceFolder,
    files_in,
    first_levels,
    look_at,
    namespace_folders,
    opened,
    read_manifest,
    second_levels,
)
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.os_errors import translated

_SECTOR_BYTES: Final = 512  # what st_blocks counts, whatever the filesystem's own blocks
_HOUR_S: Final = 3600.0
_DAY_S: Final = 24 * _HOUR_S
# The last holds all that is older.
AGES: Final = (
    ("hour", _HOUR_S),
    ("day", _DAY_S),
    ("week", 7 * _DAY_S),
    ("month", 30 * _DAY_S),
    ("older", float("inf")),
)
_SHOWN_DIGITS: Final = 8


class AgeUse(msgspec.Struct, frozen=True, kw_only=True):
    """Pages that were written or used last within `age`, and not within the one before it."""

    age: str
    num_pages: int
    allocated_bytes: int


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """Of all pages of a namespace. `allocated_bytes` is what the filesystem says they take;
    `oldest_s` and `newest_s` are seconds since 1970."""

    nbytes: int
    allocated_bytes: int
    oldest_s: float
    newest_s: float
    by_age: list[AgeUse]


class NamespaceContents(msgspec.Struct, frozen=True, kw_only=True):
    """`namespace` is the directory's name. Of pages, `num_tails` are tails. `problem` is the first
    of `num_problems` that kept something from being counted, empty without one."""

    backend: str
    namespace: str
    model: str
    kv_dtype: str
    block_tokens: int
    is_sealed: bool
    num_pages: int
    num_tails: int
    num_temporary: int
    num_strange: int
    sizes: Sizes | None
    num_problems: int
    problem: str


class BackendContents(msgspec.Struct, frozen=True, kw_only=True):
    """`num_quarantined` are files that were moved aside as damaged."""

    backend: str
    id: str
    num_quarantined: int
    namespaces: list[NamespaceContents]


class PageEntry(msgspec.Struct, frozen=True, kw_only=True):
    """`num_tokens` is that of a tail, or 0 for the page of a full block. `used_s`: seconds since
    1970."""

    backend: str
    namespace: str
    key: str
    num_tokens: int
    nbytes: int
    used_s: float


def model_label(manifest: Manifest) -> str:
    """A namespace's model in a few words: its `model_id`, or its kind and shape and the beginning
    of its weights' digest."""
    kind, _, digest = manifest.weights.partition(":")
    if kind != "sha256":
        return digest or manifest.weights
    name = manifest.model_shape.get("model_type", "a model")
    of_strands = [strand.get("num_layers") for strand in manifest.strands or ()]
    num_layers = sum(each for each in of_strands if isinstance(each, int)) or manifest.num_layers
    return f"{name}, {num_layers} layers, weights {digest[:_SHOWN_DIGITS]}"


def backend_contents(
    backend: str,
    *,
    with_sizes: bool,
    on_progress: Callable[[int, int], None],
    tally: SaltTally | None = None,
) -> BackendContents:
    """Counts all of a backend; with sizes each page is looked at, and told to `tally`.
    `on_progress(done, total)` counts directories of the first level. Raises TierError where the
    backend can't be listed."""
    folders = namespace_folders(backend)
    firsts = [_first_levels(folder) for folder in folders]
    done, total = 0, sum(len(names) for names, _ in firsts)
    namespaces = []
    for folder, (names, problem) in zip(folders, firsts, strict=True):
        count = _Count(with_sizes=with_sizes, now_s=time.time(), tally=tally)
        if problem:
            count.note(problem)
        for first in names:
            count.add(folder, first)
            done += 1
            on_progress(done, total)
        namespaces.append(count.of(folder))
    return BackendContents(
        backend=backend,
        id=backend_id(backend),
        num_quarantined=num_quarantined(backend),
        namespaces=namespaces,
    )


def used_s(status: os.stat_result) -> float:
    """When a page was written or touched last. Not its time of modification: that is its score, in
    a store with a limit."""
    return status.st_ctime


def age_of(age_s: float) -> str:
    """The first of AGES that it is within."""
    return next(name for name, limit_s in AGES if age_s <= limit_s)


def page_entries(folder: NamespaceFolder) -> Iterator[PageEntry]:
    """Every page of a namespace, sorted by key. Raises TierError if it can't be listed."""
    with translated(folder.path, "can't be listed"):
        for first in first_levels(folder):
            for second in second_levels(folder, first):
                with opened(folder, first, second) as fd:
                    if fd is not None:
                        yield from _entries(folder, fd, first, second)


def _entries(folder: NamespaceFolder, fd: int, first: str, second: str) -> Iterator[PageEntry]:
    for found in sorted(files_in(fd, first, second), key=lambda each: each.name):
        if found.kind is Kind.PAGE and (status := look_at(fd, found.name)):
            yield _entry(folder, found, status)


def _entry(folder: NamespaceFolder, found: FoundName, status: os.stat_result) -> PageEntry:
    key = found.key
    assert key is not None
    return PageEntry(
        backend=folder.backend,
        namespace=folder.name,
        key=key.hex(),
        num_tokens=key.num_tokens if isinstance(key, TailKey) else 0,
        nbytes=status.st_size,
        used_s=used_s(status),
    )


def backend_id(backend: str) -> str:
    """As text; empty where there is none that can be read."""
    try:
        with open(paths.backend_id_path(backend), encoding="ascii", errors="replace") as file:
            return file.read(64).strip()
    except OSError:
        return ""


def _first_levels(folder: NamespaceFolder) -> tuple[list[str], str]:
    try:
        return first_levels(folder), ""
    except OSError as error:
        return [], f"{folder.path}: {error.strerror or error}"


def num_quarantined(backend: str) -> int:
    """Files, as far as they can be listed. No link is followed."""
    directory = f"{backend}/{paths.QUARANTINE}"
    if os.path.islink(directory):
        return 0
    return sum(len(files) for _, _, files in os.walk(directory))


class _Count:
    """Of one namespace, while it is gone through."""

    def __init__(self, *, with_sizes: bool, now_s: float, tally: SaltTally | None) -> None:
        self._with_sizes = with_sizes
        self._tally = tally
        self._now_s = now_s
        self._num = dict.fromkeys(Kind, 0)
        self._num_tails = 0
        self._nbytes = 0
        self._oldest_s, self._newest_s = float("inf"), 0.0
        self._pages = dict.fromkeys((age for age, _ in AGES), 0)
        self._allocated = dict.fromkeys((age for age, _ in AGES), 0)
        self._num_problems = 0
        self._problem = ""

    def note(self, problem: str) -> None:
        self._problem = self._problem or problem
        self._num_problems += 1

    def add(self, folder: NamespaceFolder, first: str) -> None:
        """All below one directory of the first level."""
        where = f"{folder.path}/{first}"
        try:
            for second in second_levels(folder, first):
                where = f"{folder.path}/{first}/{second}"
                with opened(folder, first, second) as fd:
                    for found in files_in(fd, first, second) if fd is not None else ():
                        assert fd is not None
                        self._meet(fd, found)
        except OSError as error:
            self.note(f"{where}: {error.strerror or error}")

    def _meet(self, fd: int, found: FoundName) -> None:
        is_page = found.kind is Kind.PAGE
        if is_page and self._with_sizes:
            status = look_at(fd, found.name)
            if status is None:
                return
            self._measure(found.key, status)
        self._num[found.kind] += 1
        self._num_tails += is_page and isinstance(found.key, TailKey)

    def _measure(self, key: Key | None, status: os.stat_result) -> None:
        allocated_bytes = status.st_blocks * _SECTOR_BYTES
        if self._tally is not None and key is not None:
            self._tally.add(key, allocated_bytes)
        age = age_of(self._now_s - used_s(status))
        self._pages[age] += 1
        self._allocated[age] += allocated_bytes
        self._nbytes += status.st_size
        self._oldest_s = min(self._oldest_s, used_s(status))
        self._newest_s = max(self._newest_s, used_s(status))

    def of(self, folder: NamespaceFolder) -> NamespaceContents:
        manifest, why_unknown = read_manifest(folder)
        num_pages = self._num[Kind.PAGE]
        return NamespaceContents(
            backend=folder.backend,
            namespace=folder.name,
            model=model_label(manifest) if manifest is not None else f"? ({why_unknown})",
            kv_dtype=manifest.kv_dtype if manifest is not None else "",
            block_tokens=manifest.block_tokens if manifest is not None else 0,
            is_sealed=bool(folder.key_id),
            num_pages=num_pages,
            num_tails=self._num_tails,
            num_temporary=self._num[Kind.TEMPORARY],
            num_strange=self._num[Kind.STRANGE]
            + self._num[Kind.MISPLACED]
            + self._num[Kind.NO_FILE],
            sizes=self._sizes() if self._with_sizes and num_pages else None,
            num_problems=self._num_problems,
            problem=self._problem,
        )

    def _sizes(self) -> Sizes:
        return Sizes(
            nbytes=self._nbytes,
            allocated_bytes=sum(self._allocated.values()),
            oldest_s=self._oldest_s,
            newest_s=self._newest_s,
            by_age=[
                AgeUse(age=age, num_pages=self._pages[age], allocated_bytes=self._allocated[age])
                for age, _ in AGES
            ],
        )
