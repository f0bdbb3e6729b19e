"""One storage backend: a directory on a filesystem that all nodes mount.

What the Posix tier needs of the filesystem beside reading and writing blocks: directories on
demand, its id and other small files that are written once, O_DIRECT where it works.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import time
from collections.abc import Callable
from typing import TypeVar

from ucm.errors import TierError
from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.blocks.page_key import PageKey
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.filesystem import Mount, SeenThrough, mount_of
from ucm.store.tiers.posix.id_file import ID_BYTES, IdFile
from ucm.store.tiers.posix.lost_mount import Identity
from ucm.store.tiers.posix.os_errors import translated
from ucm.store.tiers.posix.plain_files import NotPlain, check_directory
from ucm.store.tiers.posix.retouch import Retouch
from ucm.store.tiers.posix.rights import UMASK_DECIDES, FileRights, may_read, say_problems
from ucm.store.tiers.posix.written_once import link_or_rename, read_once, write_durably

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")

# In a row: one file may be refused for a reason of its own.
_MAX_DIRECT_REFUSALS = 8
_MAX_KNOWN_DIRS = 1 << 17
_SAY_EVERY_S = 60.0


class Backend:
    """`path` is the directory. `open` makes it if its parent is there, and nothing else does;
    parents are never made, because a missing one is most likely a mount that is not there yet."""

    def __init__(
        self,
        path: str,
        *,
        direct_io: bool,
        page_key: PageKey | None = None,
        rights: FileRights = UMASK_DECIDES,
    ) -> None:
        self.path = os.path.normpath(path)
        id_file = IdFile(self.path)
        self.identity = Identity(self.path, locate=id_file.locate, read=id_file.read)
        self.direct_io = direct_io
        self.page_key = page_key
        self.rights = rights
        self._key_id = page_key.id if page_key is not None else b""
        self._direct_refusals = 0
        self._has_said_rights = False
        self._said_unreadable_s = -_SAY_EVERY_S
        # The directory that was to be a backend, and has no id yet.
        self._unmade: tuple[int, int] | None = None
        # Looked at, and directories indeed.
        self._known_dirs: set[str] = set()
        self._dirs_generation = 0
        self.seen_through = SeenThrough(self.path)
        self._retouch = Retouch(self._touch)

    def changed(self, directory: str) -> None:
        """Something new is in it: a page, or a directory that this process has made."""
        if self.seen_through.believes_times():
            self._retouch.later(directory)

    def _touch(self, directory: str) -> None:
        if self.identity.is_here():
            os.utime(directory)

    def try_direct(self, act: Callable[[int], _T]) -> _T:
        """`act(flags)` opens its file with `flags` added. O_DIRECT is tried as long as it works:
        filesystems refuse it at open, or at the first transfer, or take it from some offsets only,
        so the first uses are the probe. What is refused without it as well was not refused
        because of it."""
        if not self.direct_io:
            return act(0)
        try:
            done = act(os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            self._direct_refusals = 0
            return done
        done = act(0)
        self._direct_refusals += 1
        if self._direct_refusals == _MAX_DIRECT_REFUSALS:
            self.direct_io = False
            _logger.info("%s: no O_DIRECT here, reading and writing buffered", self.path)
        return done

    def make_dirs(self, directory: str) -> None:
        """Makes `directory`, which lies below the backend, and what is missing above it, but never
        the backend itself, nor on what has taken its place. Each is looked at once. Raises NotPlain
        if one of them is a link or no directory at all, BackendAway, TierError and OSError."""
        for each in self._unknown(directory):
            try:
                check_directory(each)
            except FileNotFoundError:
                below = os.path.relpath(each, self.path)
                with self.identity.pinned() as root, contextlib.suppress(FileExistsError):
                    os.mkdir(below, dir_fd=root)
                    self.rights.give_directory(each)
                    self.changed(os.path.dirname(each))
                check_directory(each)
            self._known_dirs.add(each)

    def check_dirs(self, directory: str) -> None:
        """`make_dirs` for directories that are there."""
        for each in self._unknown(directory):
            check_directory(each)
            self._known_dirs.add(each)

    def forget_dirs(self) -> None:
        """Something is missing that was there: looks at every directory again."""
        self._known_dirs.clear()

    def _unknown(self, directory: str) -> list[str]:
        """What has to be looked at, from the backend downwards, which itself may be a link."""
        generation = self.identity.generation
        if generation != self._dirs_generation or len(self._known_dirs) > _MAX_KNOWN_DIRS:
            self._known_dirs.clear()
            self._dirs_generation = generation
        unknown: list[str] = []
        while len(directory) > len(self.path) and directory not in self._known_dirs:
            unknown.append(directory)
            directory = os.path.dirname(directory)
        return unknown[::-1]

    def open(self, *, wanted_id: int | None = None) -> bool:
        """Finds the id that tells this backend from others, and makes it, and the directory, if
        there is none and this process knew of none: `wanted_id`, or a new one. Returns whether it
        made one.

        It lies in the backend and not in the configuration, so that nodes may mount the same
        backends under different paths and list them in any order.

        Raises BackendAway if another one is there than this process knew, and TierError.
        """
        if self.identity.look() is not None:
            return False
        self._make()
        self._unmade = self._directory()
        path = paths.backend_id_path(self.path)
        new_id = secrets.token_hex(ID_BYTES) if wanted_id is None else f"{wanted_id:016x}"
        mine = new_id.encode() + b"\n"
        found = self._write_once(path, mine)
        self._unmade = None
        self.identity.check()
        if found == mine:
            self._say_made()
        return found == mine

    def open_again(self) -> None:
        """Makes the id that `open` could not make, as where the disk was full: a start at a bad
        moment must not need another start. Only in the very directory that was opened; what has
        taken its place may be a mount point without its mount. Raises as `open` does."""
        if self._unmade is not None and self._unmade == self._directory():
            self.open()

    def _directory(self) -> tuple[int, int]:
        with translated(self.path, "can't be looked up"):
            status = os.stat(self.path)
        return status.st_dev, status.st_ino

    def _make(self) -> None:
        with translated(self.path, "can't be made"):
            try:
                os.mkdir(self.path)
                self.rights.give_directory(self.path)
            except FileExistsError:
                if not os.path.isdir(self.path):
                    raise NotPlain(
                        f"{self.path}: is no directory, or a link to nothing; mount or make what "
                        f"it should be"
                    ) from None
            except FileNotFoundError as error:
                parent = os.path.dirname(self.path)
                raise TierError(
                    f"{self.path}: can't be made, because {parent} is not there; mount or make it",
                    reason=Outcome.IO_ERROR,
                ) from error

    def _say_made(self) -> None:
        """A store that begins on a disk of this machine's own may be a mount that was forgotten."""
        mount = self._mount()
        where = "an unknown filesystem" if mount is None else f"{mount.kind} at {mount.point}"
        made = f"{self.path}: made a new storage backend, {self.identity.id:016x}, on {where}"
        if mount is not None and mount.is_local:
            _logger.warning(
                "%s: only this machine sees it. If nodes are to share it, remove it again, mount "
                "shared storage there, and begin anew",
                made,
            )
        else:
            _logger.info("%s", made)

    def _mount(self) -> Mount | None:
        try:
            return mount_of(self.path)
        except OSError:
            return None

    def has_page(self, path: str) -> bool:
        """Whether there is something by that name that may be read; reading tells what it is.
        Raises OSError, also where there is none."""
        if may_read(path, os.lstat(path)):
            return True
        now_s = time.monotonic()
        if now_s - self._said_unreadable_s > _SAY_EVERY_S:
            self._said_unreadable_s = now_s
            _logger.warning(
                "%s: uid %d may not read it, so it is absent here: mend its rights, or remove it",
                path,
                os.geteuid(),
            )
        return False

    def say_rights(self) -> None:
        """Once: who else may write here, and that this process may not."""
        if not self._has_said_rights:
            with contextlib.suppress(OSError):
                say_problems(self.path, is_sealed=self.page_key is not None)
                self._has_said_rights = True

    def block_path(self, fingerprint: bytes, key: Key) -> str:
        return paths.block_path(self.path, fingerprint, key, self._key_id)

    def namespace_name(self, fingerprint: bytes) -> str:
        """Of its directory."""
        return os.path.basename(paths.namespace_dir(self.path, fingerprint, self._key_id))

    def ensure_manifest(self, fingerprint: bytes, manifest_json: bytes) -> None:
        """Raises TierError if another one is there, or if there is none and it can't be written."""
        path = paths.manifest_path(self.path, fingerprint, self._key_id)
        content = read_once(path)
        if content is None:
            content = self._write_once(path, manifest_json)
        if content != manifest_json:
            raise TierError(
                f"{path}: differs from the manifest of this namespace; move its directory away",
                reason=Outcome.CORRUPT,
            )

    def read_manifest(self, fingerprint: bytes) -> bytes | None:
        return read_once(paths.manifest_path(self.path, fingerprint, self._key_id))

    def _write_once(self, path: str, content: bytes) -> bytes:
        """Writes `path` unless somebody else was faster. Returns what is there then."""
        temp = paths.temp_path(path)
        with translated(path, "can't be written"), contextlib.suppress(FileExistsError):
            self.make_dirs(os.path.dirname(path))
            try:
                try:
                    write_durably(temp, content, self.rights)
                except FileNotFoundError:
                    # A directory that was there, and was removed.
                    self.forget_dirs()
                    self.make_dirs(os.path.dirname(path))
                    write_durably(temp, content, self.rights)
                link_or_rename(temp, path)
            finally:
                unlink_if_there(temp)
                self.changed(os.path.dirname(path))
        found = read_once(path)
        if found is None:
            raise TierError(f"{path}: vanished after it was written", reason=Outcome.IO_ERROR)
        return found


def unlink_if_there(path: str) -> None:
    """Best effort: what stays behind is a stray temporary file, and those are swept."""
    try:
        os.unlink(path)
    except OSError as error:
        if error.errno != errno.ENOENT:
            _logger.debug("%s: not removed: %s", path, error)
