"""Removes what writers that died have left under temporary names in one storage backend, what has
been in quarantine for long, and directories of pages that have been empty for long.

Such a file lies beside the page that it was to become, so the sweep walks the whole tree. It does
that slowly: at most `dirs_per_s` directories a second, and no longer than a fifth of its time in
storage, so that storage that is slow is asked less. It begins at a random place, so that node
caches that never live long enough for all of it see all of it in turn.

* Only names that paths.py knows for temporary ones are touched, only in directories that it knows
  for ours. No link is followed, whatever is put in a directory's place meanwhile.
* A writer that can be seen from here has to be dead. What others have left has to be unchanged for
  `stale_s` by the filesystem's own clock, and unchanged while it is looked at twice: where clients
  give files their times, one whose clock is wrong makes files that look old (writers.py).
* A directory that has no file, and has not changed for a day, goes: a namespace that nobody uses
  any more would keep tens of thousands of them. The filesystem itself refuses where a writer has
  made a file in it this moment, and a writer that finds it gone makes it again (tier.py). That of
  the namespace stays, with its manifest: nobody could remove both at once, and a page that came
  between would lie in a directory that nothing explains.
* What can't be removed stays, and is told once.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Event

from ucm.store.processes import Process, is_running, this_process
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.os_errors import is_not_there
from ucm.store.tiers.posix.plain_files import DIRECTORY_FLAGS
from ucm.store.tiers.posix.writers import Fate, fate, is_stale

_REST_PER_WORK = 4.0
_MAX_REST_S = 10.0
# Between the two looks at what others have left. A live writer's file grows within seconds.
_SETTLE_S = 60.0
# By when its writers, if there are any, come back to a directory.
_EMPTY_S = 86_400.0
# Of the levels below a backend: those that `make_dirs` makes again, and hold pages alone.
_FAN_OUT = (2, 3)
# EBUSY: an NFS client keeps what was removed while it is read, as `.nfs...`, and its directory.
_NOT_EMPTY = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY})
# Bounds for memory. What is beyond them is found by the next sweep.
_MAX_FOUND = 10_000
# A directory may have been filled with names that aren't ours.
_NAMES_PER_REST = 1_000


@dataclass
class Swept:
    """`problem` is the first of `num_problems`, for people; empty without one."""

    num_files: int = 0
    num_bytes: int = 0
    num_quarantined: int = 0
    num_emptied: int = 0
    num_directories: int = 0
    num_problems: int = 0
    problem: str = ""
    is_whole: bool = False

    def note(self, path: str, error: OSError) -> None:
        if not is_not_there(error):
            self.problem = self.problem or f"{path}: {error.strerror or error}"
            self.num_problems += 1


@dataclass(frozen=True)
class _Old:
    """A file that looks left behind, in the state it was seen in; `directory` are the names that
    lead to it from the backend."""

    directory: tuple[str, ...]
    name: str
    state: tuple[int, ...]


class _Stopped(Exception):
    pass


@dataclass
class Sweep:
    """Of the backend at `path`. One thread's; `stop` is another's, and ends it soon."""

    path: str
    stale_s: float
    dirs_per_s: float
    stop: Event
    settle_s: float = _SETTLE_S
    # How long what is in quarantine stays there; 0: for ever.
    quarantine_s: float = 0.0
    # How long a directory stays that is empty.
    empty_s: float = _EMPTY_S
    here: Process = field(default_factory=this_process)
    is_running: Callable[[int, int], bool | None] = is_running
    swept: Swept = field(default_factory=Swept)
    _olds: list[_Old] = field(default_factory=list)
    # What the filesystem's clock said, and when by this process's; None before it was asked.
    _clock: tuple[float | None, float] | None = None
    _worked_since_s: float = 0.0

    def run(self) -> Swept | None:
        """Walks the tree once. None: there is no backend. Never raises for what storage does."""
        try:
            root = os.open(self.path, DIRECTORY_FLAGS & ~os.O_NOFOLLOW)
        except OSError as error:
            if is_not_there(error):
                return None
            self.swept.note(self.path, error)
            return self.swept
        try:
            os.stat(paths.BACKEND_ID, dir_fd=root, follow_symlinks=False)
            self._worked_since_s = time.monotonic()
            # Who may only read needs no word of it each time.
            if os.access(".", os.W_OK, dir_fd=root, effective_ids=True):
                self._clear_quarantine(root)
                self._walk(root, root, ())
                self._remove_settled(root)
            self.swept.is_whole = True
        except _Stopped:
            pass
        except FileNotFoundError:
            return None
        except OSError as error:
            self.swept.note(self.path, error)
        finally:
            os.close(root)
        return self.swept

    def _walk(self, root: int, fd: int, directory: tuple[str, ...]) -> bool:
        """`fd` is that of `directory`. Whether nothing was in it."""
        names, below, is_empty = self._look(fd, len(directory) + 1)
        for name in names:
            self._meet(root, fd, directory, name)
        self.swept.num_directories += 1
        self._rest()
        random.shuffle(below)
        for name in below:
            self._enter(root, fd, (*directory, name))
        return is_empty

    def _enter(self, root: int, above: int, directory: tuple[str, ...]) -> None:
        try:
            fd = os.open(directory[-1], DIRECTORY_FLAGS, dir_fd=above)
            try:
                is_empty = self._walk(root, fd, directory)
                found = os.fstat(fd)
            finally:
                os.close(fd)
            if is_empty and len(directory) in _FAN_OUT:
                self._remove_empty(root, above, directory[-1], found)
        except OSError as error:
            self.swept.note(self._name(directory), error)

    def _remove_empty(self, root: int, above: int, name: str, found: os.stat_result) -> None:
        """A directory that was seen without anything in it. Raises OSError."""
        if not is_stale(self._age_s(root, found), stale_s=self.empty_s):
            return
        try:
            os.rmdir(name, dir_fd=above)
        except OSError as error:
            if error.errno not in _NOT_EMPTY:
                raise
        else:
            self.swept.num_emptied += 1

    def _look(self, fd: int, level: int) -> tuple[list[str], list[str], bool]:
        """The temporary names in a directory, the directories to go on with, and whether nothing is
        in it."""
        names: list[str] = []
        below: list[str] = []
        number = 0
        with os.scandir(fd) as entries:
            for number, entry in enumerate(entries, 1):
                if number % _NAMES_PER_REST == 0:
                    self._rest()
                if paths.parse_temp_name(entry.name) is not None:
                    names += [entry.name] * (len(names) < _MAX_FOUND)
                elif paths.is_own_directory(entry.name, level=level) and _is_directory(entry):
                    below += [entry.name] * (len(below) < _MAX_FOUND)
        return names, below, not number

    def _meet(self, root: int, fd: int, directory: tuple[str, ...], name: str) -> None:
        parsed = paths.parse_temp_name(name)
        assert parsed is not None
        seen = fate(parsed.writer.process, here=self.here, is_running=self.is_running)
        if seen is Fate.ALIVE or (seen is Fate.UNSEEN and not self.stale_s):
            return
        try:
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if not stat.S_ISREG(found.st_mode):
                return
            if seen is Fate.DEAD:
                self._remove(fd, name, found)
            elif is_stale(self._age_s(root, found), stale_s=self.stale_s):
                self._olds.append(_Old(directory, name, _state(found)))
        except OSError as error:
            self.swept.note(self._name((*directory, name)), error)
        if len(self._olds) >= _MAX_FOUND:
            self._remove_settled(root)

    def _remove_settled(self, root: int) -> None:
        """What looked left behind is, if nothing has happened to it since."""
        if not self._olds:
            return
        self._wait(self.settle_s)
        olds, self._olds = self._olds, []
        for old in olds:
            self._remove_old(root, old)
            self._rest()

    def _remove_old(self, root: int, old: _Old) -> None:
        try:
            with _opened(root, old.directory) as fd:
                found = os.stat(old.name, dir_fd=fd, follow_symlinks=False)
                if _state(found) == old.state:
                    self._remove(fd, old.name, found)
        except OSError as error:
            self.swept.note(self._name((*old.directory, old.name)), error)

    def _remove(self, fd: int, name: str, found: os.stat_result) -> None:
        os.unlink(name, dir_fd=fd)
        self.swept.num_files += 1
        self.swept.num_bytes += found.st_size

    def _clear_quarantine(self, root: int) -> None:
        """Of what was moved aside so long ago that people have seen it, or never will."""
        if not self.quarantine_s:
            return
        try:
            with _opened(root, (paths.QUARANTINE,)) as top:
                names = [name for name in os.listdir(top) if paths.is_own_directory(name, level=1)]
            for name in names[:_MAX_FOUND]:
                with _opened(root, (paths.QUARANTINE, name)) as fd:
                    self._clear_old(root, fd)
                self._rest()
        except OSError as error:
            self.swept.note(self._name((paths.QUARANTINE,)), error)

    def _clear_old(self, root: int, fd: int) -> None:
        for name in os.listdir(fd)[:_MAX_FOUND]:
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            is_old = is_stale(self._age_s(root, found), stale_s=self.quarantine_s)
            if is_old and not stat.S_ISDIR(found.st_mode):
                try:
                    os.unlink(name, dir_fd=fd)
                except OSError as error:
                    if error.errno != errno.EBUSY:
                        raise
                else:
                    self.swept.num_quarantined += 1

    def _age_s(self, root: int, found: os.stat_result) -> float | None:
        """By the filesystem's clock; None where it can't be told. A file that is made is the only
        way to ask; it has a temporary name too."""
        if self._clock is None:
            try:
                self._clock = _ask_clock(root), time.monotonic()
            except OSError as error:
                self.swept.note(f"{self.path}: no file can be made to learn its time", error)
                self._clock = None, 0.0
        now_s, asked_s = self._clock
        if now_s is None:
            return None
        return now_s + time.monotonic() - asked_s - max(found.st_mtime, found.st_ctime)

    def _name(self, names: tuple[str, ...]) -> str:
        return "/".join((self.path, *names))

    def _rest(self) -> None:
        worked_s = time.monotonic() - self._worked_since_s
        wanted_s = max(1 / self.dirs_per_s - worked_s, worked_s * _REST_PER_WORK)
        self._wait(min(wanted_s, _MAX_REST_S))

    def _wait(self, seconds: float) -> None:
        if self.stop.wait(max(0.0, seconds)):
            raise _Stopped
        self._worked_since_s = time.monotonic()


def _state(found: os.stat_result) -> tuple[int, ...]:
    kind = stat.S_IFMT(found.st_mode)
    return kind, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _is_directory(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):
        return entry.is_dir(follow_symlinks=False)
    return False


@contextmanager
def _opened(root: int, directory: tuple[str, ...]) -> Iterator[int]:
    """From the backend downwards, one by one, so that none is reached through a link."""
    fd = os.dup(root)
    try:
        for name in directory:
            above, fd = fd, os.open(name, DIRECTORY_FLAGS, dir_fd=fd)
            os.close(above)
        yield fd
    finally:
        os.close(fd)


def _ask_clock(root: int) -> float:
    name = os.path.basename(paths.temp_path(f"/{paths.BACKEND_ID}"))
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=root)
    try:
        return os.fstat(fd).st_mtime
    finally:
        os.close(fd)
        os.unlink(name, dir_fd=root)
