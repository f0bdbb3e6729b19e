"""What a lookup asks of a tier, on an I/O thread."""

from __future__ import annotations

from collections.abc import Sequence

from ucm.store.node.lookup_state import LookupJob
from ucm.store.tiers.tier import Tier


def count_there(tier: Tier, job: LookupJob, blocks: Sequence[int]) -> int:
    """How many of `blocks`, from the first on. Where they are to be read, reading tells of those
    that were taken to be there and are not."""
    keys = [job.keys[i] for i in blocks]
    ask = tier.leads_to if job.load else tier.contains
    return ask(job.namespace.tier, keys)
