"""Which pages are there, without reading them.

Every question is one to the metadata server of all nodes. So where what is counted will be read,
a page stands for those before it (`count_by_order`): questions grow with the logarithm of a prompt.
What this machine may remember as missing is asked for anew only where an answer rests on it
(`revalidate.py`): that costs several questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ucm.errors import TierError
from ucm.store.blocks.keys import Key
from ucm.store.tiers.posix import revalidate
from ucm.store.tiers.posix.backend import Backend
from ucm.store.tiers.posix.os_errors import is_gone, tier_error, translated, unless_gone
from ucm.store.tiers.posix.placement import Placement
from ucm.store.tiers.tier import TierNamespace, leading_by_order

LOOKING_UP = "can't be looked up"


class Presence:
    """Any thread's; keeps nothing. Raises TierError where storage can't tell."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement

    def count(self, namespace: TierNamespace, keys: Sequence[Key]) -> int:
        """How many leading ones are there, each by itself."""
        look = partial(self._look, namespace, {})
        for i, key in enumerate(keys):
            seen = look(key)
            if not seen and not (seen is None and self.is_there_unseen(namespace, key)):
                return i
        return len(keys)

    def count_by_order(self, namespace: TierNamespace, keys: Sequence[Key]) -> int:
        """The same where one that is there stands for those between the first and it."""
        look = partial(self._look, namespace, {})
        leading = 0
        while leading < len(keys):
            left = keys[leading:]
            seen: dict[int, bool | None] = {}
            found = leading_by_order(len(left), partial(_note, look, left, seen))
            leading += found
            is_forgotten = found < len(left) and seen[found] is None
            if not is_forgotten or not self.is_there_unseen(namespace, left[found]):
                return leading
            leading += 1
        return leading

    def is_there_unseen(self, namespace: TierNamespace, key: Key) -> bool:
        """There, though this machine says that it isn't."""
        backend = self._placement.of(key)
        may_be_there = backend is not None and backend.seen_through.remembers_absences()
        return may_be_there and self.is_there_now(namespace, key)

    def is_there_now(self, namespace: TierNamespace, key: Key) -> bool:
        """Past whatever this machine remembers."""
        backend = self._placement.of(key)
        if backend is None or not backend.identity.is_here():
            return False
        path = backend.block_path(namespace.fingerprint, key)
        with translated(path, LOOKING_UP), unless_gone():
            if backend.seen_through.is_told():
                return backend.has_page(path)
            return revalidate.is_there_now(path, below=backend.path)
        return False

    def doubt(self, namespace: TierNamespace, key: Key) -> None:
        """Never raises."""
        try:
            backend = self._placement.of(key)
            is_here = backend is not None and backend.identity.is_here()
        except TierError:
            return
        if backend is not None and is_here and not backend.seen_through.is_told():
            path = backend.block_path(namespace.fingerprint, key)
            revalidate.doubt(path, below=backend.path)

    def _look(
        self, namespace: TierNamespace, is_here: dict[Backend, bool], key: Key
    ) -> bool | None:
        """None: there is no such name, as far as this machine remembers. `is_here`: of backends
        that were looked at, whether they are what was opened."""
        backend = self._placement.of(key)
        if backend is None:
            return False
        if backend not in is_here:
            is_here[backend] = backend.identity.is_here()
        if not is_here[backend]:
            return False
        path = backend.block_path(namespace.fingerprint, key)
        try:
            return backend.has_page(path)
        except OSError as error:
            if not is_gone(error):
                raise tier_error(path, LOOKING_UP, error) from error
        return None


def _note(
    look: Callable[[Key], bool | None], keys: Sequence[Key], seen: dict[int, bool | None], i: int
) -> bool:
    """Is the page of block `i` there? Notes in `seen` what was found."""
    seen[i] = look(keys[i])
    return seen[i] is True
