"""A node cache that writes until it is killed: `python -m tests.cli.writer FOLDER`."""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

from tests.store.api import whole_store as api
from tests.store.node.support import Place

# Verifying what it has written must not take longer and longer.
_PAUSE_S = 0.05


def write(place: Place) -> None:
    with api.whole_blocks(place) as store:
        print("writing", flush=True)
        for number in itertools.count():
            api.dump(store, [f"block {number} {i}".encode() for i in range(8)])
            time.sleep(_PAUSE_S)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = Place.__new__(Place)
    found.directory, found.store = folder, folder / "store"
    write(found)
