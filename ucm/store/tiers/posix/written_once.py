"""Files of a backend that are written once, by whoever is first: its id, and manifests."""

from __future__ import annotations

import errno
import os

from ucm.errors import TierError
from ucm.outcome import Outcome
from ucm.store.tiers.posix.os_errors import translated
from ucm.store.tiers.posix.plain_files import NotPlain, read_plain
from ucm.store.tiers.posix.rights import FileRights

# A manifest is a few KiB of JSON; an id is 17 bytes.
_MAX_BYTES = 1 << 20
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


def read_once(path: str) -> bytes | None:
    with translated(path, "can't be read"):
        try:
            return read_plain(path, max_bytes=_MAX_BYTES)
        except NotPlain as error:
            raise TierError(f"{path}: {error}; remove it", reason=Outcome.CORRUPT) from error


def write_durably(path: str, content: bytes, rights: FileRights) -> None:
    """With fsync, unlike blocks: a torn manifest would have to be repaired by hand."""
    with open(path, "xb") as file:
        rights.give_file(file.fileno())
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def link_or_rename(temp: str, path: str) -> None:
    """Raises FileExistsError if `path` is there. A filesystem without hard links can't tell: two
    nodes that start a new store in the same instant may then hold different ids until they
    restart, and miss each other's blocks."""
    try:
        os.link(temp, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        os.rename(temp, path)
