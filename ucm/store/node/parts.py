"""What a node cache is made of: what all that decides in it has in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ucm.metrics import FAR
from ucm.store.node.lanes import Lanes
from ucm.store.node.notices import Notices
from ucm.store.node.saved import SavingRules
from ucm.store.node.slots import Slot, SlotTable
from ucm.store.tiers.tier import Tier

# Who looks for a page far off again does it so much more seldom: it costs more.
_FAR_RECHECK = 6.0

CallLater = Callable[[float, Callable[[], None]], object]
# Takes memory on another thread: offset and length in bytes, and whom to call then.
Populate = Callable[[int, int, Callable[[], None]], None]


@dataclass(frozen=True)
class PromisedRules:
    """Of promised pages that storage fails to bring: how often each is asked for again, and the
    pause before the first time, which doubles from one to the next."""

    retries: int = 4
    first_pause_s: float = 0.1


@dataclass(frozen=True)
class NodeLimits:
    """`ahead_bytes`: how much memory is taken before it is needed. `max_write_pages`: how many
    pages of a lane may wait to be written. `touch_every_s`: how often a page that is used is
    touched in storage; None for never."""

    ahead_bytes: int
    max_write_pages: int
    max_keys: int = 65_536
    max_open_keys: int = 4_194_304
    open_timeout_s: float = 5.0
    saving: SavingRules = field(default_factory=SavingRules)
    touch_every_s: float | None = None
    promised: PromisedRules = field(default_factory=PromisedRules)


@dataclass(frozen=True, eq=False)
class Behind:
    """A tier behind the memory, and its threads."""

    tier: Tier
    reads: Lanes
    writes: Lanes
    control: Lanes


@dataclass(frozen=True, eq=False)
class NodeParts:
    """Owned by the event loop's thread. `page_of` gives the bytes of a slot. `reads`, `writes` and
    `control` are threads: nobody's start (`control`) waits behind pages. All of them are those of
    the near tier; `far` has the same of the one behind it, where there are two, and counts under
    names of its own."""

    slots: SlotTable
    tier: Tier
    reads: Lanes
    writes: Lanes
    control: Lanes
    page_of: Callable[[Slot], memoryview]
    populate: Populate
    clock: Callable[[], float]
    call_later: CallLater
    notices: Notices
    limits: NodeLimits
    counters: Counter[str] = field(default_factory=Counter)
    counted_as: str = ""
    far: NodeParts | None = None

    @property
    def tiers(self) -> tuple[NodeParts, ...]:
        """The parts of each tier, near first."""
        return (self, *(self.far.tiers if self.far is not None else ()))

    def count(self, counter: str, by: int = 1) -> None:
        self.counters[self.counted_as + counter] += by


def far_parts(near: NodeParts, far: Behind) -> NodeParts:
    """Those of a tier behind that of `near`, in the same memory."""
    saving = near.limits.saving
    saving = replace(saving, recheck_s=saving.recheck_s * _FAR_RECHECK)
    return replace(
        near,
        tier=far.tier,
        reads=far.reads,
        writes=far.writes,
        control=far.control,
        limits=replace(near.limits, saving=saving, touch_every_s=None),
        counted_as=FAR,
    )
