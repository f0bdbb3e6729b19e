"""What a store holds: namespaces, pages, bytes and their ages, counted by their names and sizes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from ucm.store.blocks.keys import Key, TailKey
from ucm.store.inspect.model_label import model_label, strand_labels
from ucm.store.inspect.salts import SaltTally
from ucm.store.inspect.strand_pages import StrandPages
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


class AgeUse(msgspec.Struct, frozen=True, kw_only=True):
    """Pages that were written or used last within `age`, and not within the one before it."""

    age: str
    num_pages: int
    allocated_bytes: int


class StrandUse(msgspec.Struct, frozen=True, kw_only=True):
    """Pages of one strand, by its label; of several, if their pages are as large; empty for pages
    that are as large as those of none."""

    strand: str
    num_pages: int
    allocated_bytes: int


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """Of all pages of a namespace. `allocated_bytes` is what the filesystem says they take;
    `oldest_s` and `newest_s` are seconds since 1970. `by_strand`: of a model with several."""

    nbytes: int
    allocated_bytes: int
    oldest_s: float
    newest_s: float
    by_age: list[AgeUse]
    by_strand: list[StrandUse]


class NamespaceContents(msgspec.Struct, frozen=True, kw_only=True):
    """`namespace` is the directory's name. `strands` are the model's by their labels, none of one
    that is full attention of one kind. Of pages, which are those of all strands, `num_tails` are
    tails. `problem` is the first of `num_problems` that kept something from being counted, empty
    without one."""

    backend: str
    namespace: str
    model: str
    strands: list[str]
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
    """`strand` is the label of its strand, or of those whose pages are as large; empty where there
    is one, or where it can't be told. `num_tokens` is that of a tail, or 0 for the page of a full
    block. `used_s`: seconds since 1970."""

    backend: str
    namespace: str
    key: str
    strand: str
    num_tokens: int
    nbytes: int
    used_s: float


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
        count = _Count(folder, with_sizes=with_sizes, now_s=time.time(), tally=tally)
        if problem:
            count.note(problem)
        for first in names:
            count.add(first)
            done += 1
            on_progress(done, total)
        namespaces.append(count.contents())
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
    manifest, _ = read_manifest(folder)
    strands = StrandPages(manifest)
    with translated(folder.path, "can't be listed"):
        for first in first_levels(folder):
            for second in second_levels(folder, first):
                with opened(folder, first, second) as fd:
                    if fd is not None:
                        for found, status in _pages(fd, first, second):
                            yield _entry(folder, found, status, strands)


def _pages(fd: int, first: str, second: str) -> Iterator[tuple[FoundName, os.stat_result]]:
    for found in sorted(files_in(fd, first, second), key=lambda each: each.name):
        if found.kind is Kind.PAGE and (status := look_at(fd, found.name)):
            yield found, status


def _entry(
    folder: NamespaceFolder, found: FoundName, status: os.stat_result, strands: StrandPages
) -> PageEntry:
    key = found.key
    assert key is not None
    return PageEntry(
        backend=folder.backend,
        namespace=folder.name,
        key=key.hex(),
        strand=strands.of_file(status.st_size),
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

    def __init__(
        self, folder: NamespaceFolder, *, with_sizes: bool, now_s: float, tally: SaltTally | None
    ) -> None:
        self._folder = folder
        self._manifest, self._why_unknown = read_manifest(folder)
        self._strands = StrandPages(self._manifest)
        self._with_sizes = with_sizes
        self._tally = tally
        self._now_s = now_s
        self._num = dict.fromkeys(Kind, 0)
        self._num_tails = 0
        self._nbytes = 0
        self._oldest_s, self._newest_s = float("inf"), 0.0
        self._pages = dict.fromkeys((age for age, _ in AGES), 0)
        self._allocated = dict.fromkeys((age for age, _ in AGES), 0)
        # By strand: pages, and bytes.
        self._by_strand: dict[str, tuple[int, int]] = {}
        self._num_problems = 0
        self._problem = ""

    def note(self, problem: str) -> None:
        self._problem = self._problem or problem
        self._num_problems += 1

    def add(self, first: str) -> None:
        """All below one directory of the first level."""
        folder = self._folder
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
        strand = self._strands.of_file(status.st_size)
        num_pages, nbytes = self._by_strand.get(strand, (0, 0))
        self._by_strand[strand] = (num_pages + 1, nbytes + allocated_bytes)
        self._nbytes += status.st_size
        self._oldest_s = min(self._oldest_s, used_s(status))
        self._newest_s = max(self._newest_s, used_s(status))

    def contents(self) -> NamespaceContents:
        folder, manifest = self._folder, self._manifest
        num_pages = self._num[Kind.PAGE]
        return NamespaceContents(
            backend=folder.backend,
            namespace=folder.name,
            model=model_label(manifest) if manifest is not None else f"? ({self._why_unknown})",
            strands=strand_labels(manifest) if manifest is not None else [],
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
            by_strand=self._of_strands(),
        )

    def _of_strands(self) -> list[StrandUse]:
        if self._manifest is None or not strand_labels(self._manifest):
            return []
        return [
            StrandUse(strand=strand, num_pages=num_pages, allocated_bytes=nbytes)
            for strand, (num_pages, nbytes) in sorted(self._by_strand.items())
        ]
