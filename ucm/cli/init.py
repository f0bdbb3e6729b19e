"""`ucm init`: makes a directory a storage backend."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ucm.cli.ending import end, one_line_for_errors
from ucm.cli.printing import say


@dataclass(frozen=True)
class Opened:
    """A storage backend as it is now; `is_new` if its id was made by this very call."""

    path: str
    id: int
    is_new: bool


def init(
    directory: Annotated[
        str, typer.Argument(help="an entry of storage_backends, where this node mounts it")
    ],
    backend_id: Annotated[
        str, typer.Option("--id", help="the id it had, where a storage backend was emptied by hand")
    ] = "",
) -> None:
    """Make a directory a storage backend: give it its id, so that it is told from an empty mount
    point."""
    from ucm.store.inspect.given import check_no_url
    from ucm.store.tiers.posix.id_file import parse_id

    with one_line_for_errors("ucm init"):
        check_no_url(directory)
        if os.path.isfile(directory):
            end(
                f"ucm init: {directory}: is a file: name a directory of its storage_backends; "
                f"nothing has to be made in a bucket first"
            )
        wanted_id = parse_id("--id", backend_id.encode()) if backend_id else None
        opened = _open(str(Path(directory).absolute()), wanted_id)
    since = "now" if opened.is_new else "already"
    say(f"{opened.path}: {since} the storage backend {opened.id:016x}")
    if wanted_id not in (None, opened.id):
        end(f"ucm init: {opened.path}: has another id than {backend_id}")


def _open(path: str, wanted_id: int | None) -> Opened:
    """Makes what is missing. Raises TierError."""
    from ucm.store.tiers.posix.backend import Backend

    backend = Backend(path, direct_io=False)
    is_new = backend.open(wanted_id=wanted_id)
    assert backend.identity.id is not None
    return Opened(path, backend.identity.id, is_new)
