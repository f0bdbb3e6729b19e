"""What the operating system says, in the words of a tier: the one place that turns OSError into
TierError.

    with translated(path, "can't be looked up"), unless_gone():
        return is_there(path)
    return False
"""

from __future__ import annotations

import errno

from ucm.errors import TierError
from ucm.outcome import Outcome

READ_ONLY_ERRNOS = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_OUTCOMES: dict[int | None, Outcome] = {
    errno.ENOSPC: Outcome.FULL,
    errno.EDQUOT: Outcome.FULL,
    errno.ETIMEDOUT: Outcome.TIMEOUT,
}
# Another node removed the file while this one was at it: NFS says ESTALE, others sometimes EBADF.
_GONE = frozenset({errno.ENOENT, errno.ESTALE, errno.EBADF})
_NOT_THERE = frozenset({errno.ENOENT, errno.ESTALE, errno.ENOTDIR, errno.ELOOP})


def tier_error(path: str, doing: str, error: OSError) -> TierError:
    """`doing` is what could not be done with `path`, for people: "can't be read"."""
    reason = _OUTCOMES.get(error.errno, Outcome.IO_ERROR)
    return TierError(f"{path}: {doing}: {error.strerror or error}", reason=reason)


def is_gone(error: OSError) -> bool:
    """Whether a name, or what was open, is not there (any more): absent, and no fault."""
    return error.errno in _GONE


def is_not_there(error: OSError) -> bool:
    """Of what was found by its name a moment ago: somebody else was faster, or something else lies
    there now, as a link in a directory's place."""
    return error.errno in _NOT_THERE


class translated:  # noqa: N801 read as a statement
    """Raises the `tier_error` of an OSError that its block raises, and nothing else. What is called
    for each key of a lookup does the same by hand: this costs a fifth of what asking for an
    absent key costs."""

    __slots__ = ("_doing", "_path")

    def __init__(self, path: str, doing: str) -> None:
        self._path = path
        self._doing = doing

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, OSError):
            raise tier_error(self._path, self._doing, error) from error


class unless_gone:  # noqa: N801 read as a statement
    """Goes on behind its block where what the block was about is gone."""

    __slots__ = ()

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        return isinstance(error, OSError) and is_gone(error)


class unless_full:  # noqa: N801 read as a statement
    """Goes on behind its block where the disk, or somebody's quota on it, is full."""

    __slots__ = ()

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        return isinstance(error, OSError) and _OUTCOMES.get(error.errno) is Outcome.FULL
