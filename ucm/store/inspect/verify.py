"""Reads every page of a backend and checks every byte, with a few threads, while others use it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Final

from ucm.store.blocks.blockfile import BlockId
from ucm.store.inspect.page_check import Condition, ExpectedPage, PageCheck, PageChecker
from ucm.store.inspect.verified import VerifiedCounts, VerifyRules
from ucm.store.inspect.walk import (
    FoundName,
    Kind,
    NamespaceFolder,
    files_in,
    first_levels,
    look_at_manifest,
    namespace_folders,
    opened,
    second_levels,
)
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.backend import Backend
from ucm.store.tiers.posix.quarantine import move_aside

# Directories that are handed to threads ahead, for each of them.
_AHEAD: Final = 4


@dataclass(frozen=True)
class _PageFolder:
    folder: NamespaceFolder
    first: str
    second: str
    version: int | None

    @property
    def path(self) -> str:
        return f"{self.folder.path}/{self.first}/{self.second}"


@dataclass
class Verifier:
    """Of one call. Its threads share nothing but the counts."""

    rules: VerifyRules
    counts: VerifiedCounts
    _thread: threading.local = field(default_factory=threading.local)

    def run(self, backend: str, on_progress: Callable[[int, int], None]) -> None:
        """All of a backend. `on_progress(done, total)` counts directories of the first
        level. Raises TierError where the backend can't be listed."""
        started_s = time.monotonic()
        folders = namespace_folders(backend)
        firsts = [(folder, first) for folder in folders for first in self._firsts(folder)]
        versions = {folder: self._version(folder) for folder in folders}
        aside = Backend(backend, direct_io=False)
        if self.rules.quarantine:
            aside.identity.check()
        running: set[Future[None]] = set()
        with ThreadPoolExecutor(self.rules.num_threads, "ucm-verify") as threads:
            for number, (folder, first) in enumerate(firsts, 1):
                for leaf in self._leaves(folder, first, versions[folder]):
                    if len(running) >= self.rules.num_threads * _AHEAD:
                        running = not_done(running)
                    running.add(threads.submit(self._verify, leaf, aside))
                on_progress(number, len(firsts))
            while running:
                running = not_done(running)
        self.counts.found.seconds += time.monotonic() - started_s

    def _firsts(self, folder: NamespaceFolder) -> list[str]:
        try:
            return first_levels(folder)
        except OSError as error:
            self.counts.bad(folder.path, Condition.UNREADABLE, error.strerror or str(error))
            return []

    def _version(self, folder: NamespaceFolder) -> int | None:
        """Of the namespace's pages, if its manifest can be read. What is wrong with that counts."""
        found = look_at_manifest(folder)
        self.counts.manifest(f"{folder.path}/{paths.MANIFEST}", found)
        return found.manifest.page_format_version if found.manifest is not None else None

    def _leaves(
        self, folder: NamespaceFolder, first: str, version: int | None
    ) -> Iterator[_PageFolder]:
        try:
            for second in second_levels(folder, first):
                yield _PageFolder(folder, first, second, version)
        except OSError as error:
            where = f"{folder.path}/{first}"
            self.counts.bad(where, Condition.UNREADABLE, error.strerror or str(error))

    def _verify(self, leaf: _PageFolder, aside: Backend) -> None:
        try:
            with opened(leaf.folder, leaf.first, leaf.second) as fd:
                if fd is not None:
                    for found in list(files_in(fd, leaf.first, leaf.second)):
                        self._verify_file(leaf, fd, found, aside)
        except OSError as error:
            self.counts.bad(leaf.path, Condition.UNREADABLE, error.strerror or str(error))

    def _verify_file(self, leaf: _PageFolder, fd: int, found: FoundName, aside: Backend) -> None:
        if found.kind in (Kind.PAGE, Kind.NO_FILE):
            assert found.key is not None
            folder = leaf.folder
            expected = ExpectedPage(found.key, folder.fingerprint, folder.key_id, leaf.version)
            self._note(
                leaf, found, self._checker().check(found.name, expected, directory=fd), aside
            )
            return
        self.counts.no_page(
            is_temporary=found.kind is Kind.TEMPORARY, is_misplaced=found.kind is Kind.MISPLACED
        )

    def _checker(self) -> PageChecker:
        try:
            return self._thread.checker  # type: ignore[no-any-return]
        except AttributeError:
            checker = self._thread.checker = PageChecker(self.rules.page_key)
            return checker

    def _note(self, leaf: _PageFolder, found: FoundName, check: PageCheck, aside: Backend) -> None:
        condition = check.condition
        if condition in (Condition.DAMAGED, Condition.UNREADABLE):
            done = ""
            if condition is Condition.DAMAGED and self.rules.quarantine:
                done = self._move(leaf, found, check, aside)
            self.counts.bad(f"{leaf.path}/{found.name}", condition, check.why, done)
            return
        self.counts.fine(condition, check.status.st_size if check.status is not None else 0)

    def _move(self, leaf: _PageFolder, found: FoundName, check: PageCheck, aside: Backend) -> str:
        path = f"{leaf.path}/{found.name}"
        assert found.key is not None
        try:
            seen = check.status or os.lstat(path)
        except OSError:
            return "already moved aside"
        block = BlockId(found.key, leaf.folder.fingerprint, 1)
        return move_aside(seen, path, aside, block)


def not_done(running: set[Future[None]]) -> set[Future[None]]:
    """Waits for one of them. Raises what a finished one has raised."""
    done, left = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return left
