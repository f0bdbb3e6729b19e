"""The matrix of faults: what storage does at which of its operations while a node cache is at what,
and what that costs. `docs/reliability.md` shows it, `test_matrix.py` sees to it.

Pure. To widen it: an operation, a fault or a phase here, and for a phase what is done in
`phases.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# What a fault costs, if not a reason that is given: it is not noticed, or pages count as not there.
NOTHING: Final = "nothing"
ABSENT: Final = "absent"

_READS: Final = ("slow", "hang", "EIO", "ESTALE")
_WRITES: Final = (*_READS, "ENOSPC", "EDQUOT")
_DATA_READ: Final = (*_READS, "short reads", "flipped bits")
_DATA_WRITTEN: Final = (*_WRITES, "short writes", "lost ends")

FAULTS: Final = {
    "slow": "each call takes 50 ms longer",
    "hang": "no call returns until the fault ends",
    "EIO": "each call fails with this error, as do the next ones",
    "ESTALE": "",
    "ENOSPC": "",
    "EDQUOT": "",
    "short reads": "a read brings half of what was asked for",
    "flipped bits": "a read brings one wrong bit",
    "short writes": "a write takes half, and says so",
    "lost ends": "a write takes half, and says that it took all: files are cut short",
    "no space": "a tmpfs without room for one page more",
    "no inodes": "a tmpfs without room for one name more",
}
# Not faults of an operation.
OF_A_DISK: Final = ("no space", "no inodes")
DISK: Final = "(full disk)"

# What each phase asks of a mount, as the kernel calls it, and which faults that may have.
OPERATIONS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "dump": {
        "lookup": _READS,
        "statfs": _READS,
        "mkdir": _WRITES,
        "create": _WRITES,
        "write": _DATA_WRITTEN,
        "rename": _WRITES,
        DISK: OF_A_DISK,
    },
    "load": {"lookup": _READS, "open": _READS, "read": _DATA_READ, DISK: OF_A_DISK},
    "lookup": {"lookup": _READS, DISK: OF_A_DISK},
    "start": {
        "lookup": _READS,
        "open": _READS,
        "read": _DATA_READ,
        "opendir": _READS,
        DISK: OF_A_DISK,
    },
    "first start": {
        "mkdir": _WRITES,
        "create": _WRITES,
        "write": (*_WRITES, "short writes"),
        "link": _WRITES,
        DISK: OF_A_DISK,
    },
    "reclaim": {
        "opendir": _READS,
        "readdir": _READS,
        "lookup": _READS,
        "unlink": _READS,
        "create": _WRITES,
        "write": (*_WRITES, "short writes"),
        "rename": _WRITES,
        "statfs": _READS,
        DISK: OF_A_DISK,
    },
}

_COSTS: Final = {
    "slow": NOTHING,
    "hang": "timeout",
    "EIO": "io_error",
    "ESTALE": "io_error",
    "ENOSPC": "full",
    "EDQUOT": "full",
    "short reads": NOTHING,  # the rest is read as well
    "flipped bits": "corrupt",
    "short writes": NOTHING,
    "lost ends": "corrupt",
    "no space": "full",
    "no inodes": "full",
}
# Of cells in which that is otherwise.
_OTHERWISE: Final[dict[tuple[str, str], dict[str, str]]] = {
    # Nothing is written there.
    ("load", DISK): dict.fromkeys(OF_A_DISK, NOTHING),
    ("lookup", DISK): dict.fromkeys(OF_A_DISK, NOTHING),
    ("start", DISK): dict.fromkeys(OF_A_DISK, NOTHING),
    ("lookup", "lookup"): {"ESTALE": ABSENT},
    # Only who clears up after dead writers lists directories there.
    ("start", "opendir"): dict.fromkeys(_READS, NOTHING),
    # More is written at once than room is left or made, and a node that can't say what it has
    # written, or hears of no room, writes nothing.
    ("reclaim", "opendir"): {"slow": "full", "ESTALE": "full"},
    ("reclaim", "readdir"): {"slow": "full", "ESTALE": "full"},
    ("reclaim", "lookup"): {"slow": "full"},
    ("reclaim", "unlink"): dict.fromkeys(_READS, "full"),
    ("reclaim", "create"): dict.fromkeys(_READS, "full"),
    ("reclaim", "write"): dict.fromkeys((*_READS, "short writes"), "full"),
    ("reclaim", "rename"): dict.fromkeys(_READS, "full"),
    ("reclaim", "statfs"): {"slow": "full"},
}


@dataclass(frozen=True)
class Cell:
    phase: str
    operation: str
    fault: str

    def __str__(self) -> str:
        return f"{self.phase}-{self.operation}-{self.fault}".replace(" ", "_")

    @property
    def costs(self) -> str:
        """The reason that is counted or told, NOTHING or ABSENT."""
        otherwise = _OTHERWISE.get((self.phase, self.operation), {})
        return otherwise.get(self.fault, _COSTS[self.fault])


CELLS: Final = tuple(
    Cell(phase, operation, fault)
    for phase, operations in OPERATIONS.items()
    for operation, faults in operations.items()
    for fault in faults
)
