"""Where damaged objects go: below `quarantine/`, so that the next dump can fill their place."""

from __future__ import annotations

from ucm.errors import TierError
from ucm.store.tiers.s3.bucket import Bucket


def move_aside(bucket: Bucket, name: str, to: str, tag: str | None) -> str:
    """Returns what was done with the content that has this tag, for people. A writer may put a good
    object in its place between the comparison and the move. That page is then lost, which costs one
    recomputation."""
    try:
        if bucket.tag(name) != tag:
            return "already replaced"
        bucket.move(name, to)
    except TierError as error:
        return f"can't be moved aside: {error}"
    return f"moved to {to}"
