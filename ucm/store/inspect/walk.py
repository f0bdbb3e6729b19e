"""Goes through a backend while others use it: which namespaces, directories and files there are.

Read-only. Each directory is opened below the one above it and never through a link; what has gone
meanwhile is left out. Memory is bounded by one directory's names.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from ucm.errors import UcmError
from ucm.store.blocks.keys import Key
from ucm.store.blocks.namespace import Manifest, fingerprint, from_json, is_of_another_version
from ucm.store.blocks.page_names import (
    MAX_MANIFEST_BYTES,
    fingerprint_in,
    key_id_in,
    parse_page_name,
)
from ucm.store.inspect.signs_of_life import LOOKED
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.os_errors import is_gone, is_not_there, tier_error
from ucm.store.tiers.posix.plain_files import DIRECTORY_FLAGS, NotPlain, read_plain


@dataclass(frozen=True)
class NamespaceFolder:
    """`name` is that of the directory; `key_id` that of the page key, empty if pages are plain."""

    backend: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.backend}/{self.name}"

    @property
    def fingerprint(self) -> bytes:
        return fingerprint_in(self.name)

    @property
    def key_id(self) -> bytes:
        return key_id_in(self.name)


class Wrong(Enum):
    """What is wrong with a manifest."""

    DAMAGED = "damaged"
    UNREADABLE = "unreadable"


@dataclass(frozen=True)
class FoundManifest:
    """Without a manifest `why` says why; one of another version, or none at all, is not `wrong`."""

    manifest: Manifest | None
    why: str = ""
    wrong: Wrong | None = None


class Kind(Enum):
    PAGE = "page"
    TEMPORARY = "temporary"
    # A page's name on a link, a FIFO or a directory.
    NO_FILE = "no_file"
    # A page's name where nobody looks for it.
    MISPLACED = "misplaced"
    STRANGE = "strange"


@dataclass(frozen=True)
class FoundName:
    """One name of a directory of pages."""

    name: str
    kind: Kind
    key: Key | None = None


def namespace_folders(backend: str) -> list[NamespaceFolder]:
    """Sorted by name. Raises TierError if the backend can't be listed."""
    try:
        with os.scandir(backend) as entries:
            names = [
                entry.name
                for entry in entries
                if paths.is_own_directory(entry.name, level=1)
                and entry.is_dir(follow_symlinks=False)
            ]
    except OSError as error:
        raise tier_error(backend, "can't be listed", error) from error
    return [NamespaceFolder(backend, name) for name in sorted(names)]


def read_manifest(folder: NamespaceFolder) -> tuple[Manifest | None, str]:
    """The manifest, or None and why."""
    found = look_at_manifest(folder)
    return found.manifest, found.why


def look_at_manifest(folder: NamespaceFolder) -> FoundManifest:
    """Never raises for what storage does."""
    path = f"{folder.path}/{paths.MANIFEST}"
    try:
        content = read_plain(path, max_bytes=MAX_MANIFEST_BYTES)
    except NotPlain as error:
        return FoundManifest(None, f"the manifest {error}", Wrong.DAMAGED)
    except OSError as error:
        if is_gone(error):
            return FoundManifest(None, "no manifest")
        why = f"the manifest can't be read: {error.strerror or error}"
        return FoundManifest(None, why, Wrong.UNREADABLE)
    if content is None:
        return FoundManifest(None, "no manifest")
    return manifest_in(content, folder.fingerprint)


def manifest_in(content: bytes, of: bytes) -> FoundManifest:
    """The manifest as it was stored for the fingerprint `of`."""
    if is_of_another_version(content):
        return FoundManifest(None, "another version's manifest")
    try:
        manifest = from_json(content)
    except UcmError:
        return FoundManifest(None, "the manifest is damaged", Wrong.DAMAGED)
    if fingerprint(manifest) != of:
        return FoundManifest(None, "the manifest is another namespace's", Wrong.DAMAGED)
    return FoundManifest(manifest)


def manifests_of(folders: Iterable[NamespaceFolder]) -> list[Manifest]:
    """Those that can be read."""
    return [manifest for each in folders if (manifest := read_manifest(each)[0]) is not None]


def first_levels(folder: NamespaceFolder) -> list[str]:
    """The first level of the fan-out: a unit of progress. Raises OSError."""
    with opened(folder) as fd:
        return _directories(fd, level=2) if fd is not None else []


def second_levels(folder: NamespaceFolder, first: str) -> list[str]:
    """Raises OSError."""
    with opened(folder, first) as fd:
        return _directories(fd, level=3) if fd is not None else []


def files_in(fd: int, first: str, second: str) -> Iterator[FoundName]:
    """All names of one directory of pages, which is open as `fd`. Raises OSError."""
    with os.scandir(fd) as entries:
        # Read to the end first: who stops in the middle would leave the directory open.
        found = list(entries)
    for entry in found:
        key = parse_page_name(entry.name)
        if key is None:
            is_temporary = paths.parse_temp_name(entry.name) is not None
            yield FoundName(entry.name, Kind.TEMPORARY if is_temporary else Kind.STRANGE)
        elif not entry.is_file(follow_symlinks=False):
            yield FoundName(entry.name, Kind.NO_FILE, key)
        else:
            is_at_home = entry.name[:4] == first + second
            yield FoundName(entry.name, Kind.PAGE if is_at_home else Kind.MISPLACED, key)


@contextmanager
def opened(folder: NamespaceFolder, *below: str) -> Iterator[int | None]:
    """A descriptor of the namespace's directory, or of one below it; None if it isn't there (any
    more). The backend itself may be a link. Raises OSError."""
    fd: int | None = None
    try:
        try:
            fd = os.open(folder.backend, DIRECTORY_FLAGS & ~os.O_NOFOLLOW)
            sys.audit(LOOKED, "/".join((folder.path, *below)))
            for name in (folder.name, *below):
                above, fd = fd, os.open(name, DIRECTORY_FLAGS, dir_fd=fd)
                os.close(above)
        except OSError as error:
            if not is_not_there(error):
                raise
            if fd is not None:
                os.close(fd)
            fd = None
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


def _directories(fd: int, *, level: int) -> list[str]:
    with os.scandir(fd) as entries:
        return sorted(
            entry.name
            for entry in entries
            if paths.is_own_directory(entry.name, level=level)
            and entry.is_dir(follow_symlinks=False)
        )


def look_at(fd: int, name: str) -> os.stat_result | None:
    """A plain file's status; None for what has gone, or has become something else. Raises
    OSError."""
    sys.audit(LOOKED, name)
    try:
        status = os.stat(name, dir_fd=fd, follow_symlinks=False)
    except OSError as error:
        if is_not_there(error):
            return None
        raise
    return status if stat.S_ISREG(status.st_mode) else None
