"""What only tools ask of a bucket: which objects there are, and to delete some."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import obstore
from obstore.store import S3Store

from ucm.store.tiers.s3.bucket import Bucket

if TYPE_CHECKING:
    from obstore import ObjectMeta

# What a server gives at most in one answer, and takes in one request to delete.
MOST_IN_ONE: Final = 1000


@dataclass(frozen=True)
class ListedObject:
    """`modified_s`: seconds since 1970, when it was written. Nothing tells when it was read."""

    name: str
    size_bytes: int
    modified_s: float


class ListedBucket(Bucket):
    """Thread-safe."""

    def listed(self, below: str, *, after: str = "") -> Iterator[list[ListedObject]]:
        """What one answer holds at a time, sorted by name: all names that begin with `below` and a
        slash, all there are if it is empty, that come behind `after`. What is asked for is asked
        for when it is wanted. Raises TierError."""

        def begin(client: S3Store) -> Iterator[Sequence[ObjectMeta]]:
            found = obstore.list(
                client, below or None, offset=after or None, chunk_size=MOST_IN_ONE
            )
            return iter(found)

        what = f"{below}/" if below else ""
        stream = self._call(what, "can't be listed", begin)
        while objects := self._call(what, "can't be listed", lambda _: next(stream, ())):
            yield [_listed(each) for each in objects]

    def delete(self, names: Sequence[str]) -> None:
        """MOST_IN_ONE at most. What isn't there (any more) is no error. Raises TierError."""
        assert len(names) <= MOST_IN_ONE

        def delete(client: S3Store) -> None:
            obstore.delete(client, names)

        what = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        self._call(what, "can't be deleted", delete)

    def look(self, name: str) -> ListedObject | None:
        """None: there is none. Raises TierError."""
        return self._unless_absent(
            name, "can't be looked up", lambda client: _listed(obstore.head(client, name))
        )


def _listed(of: ObjectMeta) -> ListedObject:
    return ListedObject(of["path"], of["size"], of["last_modified"].timestamp())
