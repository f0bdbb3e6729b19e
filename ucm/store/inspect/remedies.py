"""What to change where storage refuses something, by the system's words for why. Pure."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Final

_OF_RIGHTS: Final = (
    "let the user that node caches run as list the directory and write there: its owner and mode, "
    "or what the export does with root (no_root_squash)"
)
_REMEDIES: Final[Mapping[int, str]] = {
    errno.ENOSPC: "make room, or raise the quota of the user that node caches run as",
    errno.EDQUOT: (
        "raise the quota of the user that node caches run as: what is free does not show it"
    ),
    errno.EACCES: _OF_RIGHTS,
    errno.EPERM: _OF_RIGHTS,
    errno.EROFS: "mount it so that it may be written to",
    errno.ENOMEM: "this machine has no memory for such pages: say a smaller --page-kib",
    errno.ENOENT: "mount it, or make it with `ucm init`",
    errno.ENOTDIR: "mount it, or make it with `ucm init`",
}
_NO_INODES: Final = (
    "no inode is left, and each page is a file: remove files, or make the filesystem with more"
)
_ELSE: Final = "look at the mount, and at the system's log"


def remedy(words: str, *, free_inodes: int | None = None) -> str:
    """`words` end with the system's own. `free_inodes` is None where nobody tells."""
    number = next((each for each in _REMEDIES if words.endswith(os.strerror(each))), 0)
    if number == errno.ENOSPC and free_inodes == 0:
        return _NO_INODES
    return _REMEDIES.get(number, _ELSE)
