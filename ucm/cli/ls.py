"""`ucm ls`: what is in a store."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from ucm.cli.ending import end, one_line_for_errors
from ucm.cli.printing import (
    STATUS_WRONG,
    AsJson,
    StoreArgument,
    ago,
    count,
    print_json,
    print_table,
    progress,
    say,
    short,
    size,
)
from ucm.cli.watched import SILENCE_S, TimeoutS, watched

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ucm.store.inspect.contents import BackendContents, PageEntry
    from ucm.store.inspect.given import GivenStore


def ls(
    store: StoreArgument,
    namespace: Annotated[
        str,
        typer.Option(
            "--namespace", "-n", help="list the pages of the one whose name begins so, one a line"
        ),
    ] = "",
    timeout_s: TimeoutS = SILENCE_S,
    as_json: AsJson = False,
) -> None:
    """What is in a store: its namespaces, or the pages of one.

    Only names are read. `ucm du` looks at sizes and ages as well.
    """
    act = partial(_ls, store, namespace, as_json=as_json)
    watched("ucm ls", store, timeout_s, act)


def _ls(store: str, namespace: str, *, as_json: bool) -> None:
    from ucm.store.inspect.given import given_store

    with one_line_for_errors("ucm ls"):
        given = given_store(store, may_be_bucket=True)
        if namespace:
            _list_pages(given, namespace, as_json=as_json)
        else:
            _list_namespaces(given, as_json=as_json)


def _list_namespaces(given: GivenStore, *, as_json: bool) -> None:
    from ucm.store.inspect.bucket_contents import bucket_contents
    from ucm.store.inspect.bucket_walk import Bounds
    from ucm.store.inspect.contents import backend_contents

    with progress("counting") as on_progress:
        backends = [
            backend_contents(backend, with_sizes=False, on_progress=on_progress)
            for backend in given.backends
        ]
        bucket = given.bucket()
        if bucket is not None:
            backends.append(bucket_contents(bucket, Bounds()))
    namespaces = [each for backend in backends for each in backend.namespaces]
    if as_json:
        print_json(backends)
    else:
        print_table(
            ("namespace", "model", "kv dtype", "tokens", "pages", "tails", "backend"),
            [
                (
                    *(short(each.namespace) + ("+key" if each.is_sealed else ""), each.model),
                    *(each.kv_dtype, each.block_tokens, each.num_pages, each.num_tails),
                    each.backend,
                )
                for each in namespaces
            ],
            right=("tokens", "pages", "tails"),
        )
        say(_sentence(backends))
    for each in namespaces:
        if each.problem:
            say(f"not all of it could be counted: {each.problem}", is_error=True)
    if any(each.num_problems for each in namespaces):
        raise typer.Exit(STATUS_WRONG)


def _sentence(backends: list[BackendContents]) -> str:
    namespaces = [each for backend in backends for each in backend.namespaces]
    pages = sum(each.num_pages for each in namespaces)
    text = f"{count(pages, 'page')} in {count(len(namespaces), 'namespace')}"
    writing = sum(each.num_temporary for each in namespaces)
    strange = sum(each.num_strange for each in namespaces)
    aside = sum(backend.num_quarantined for backend in backends)
    more = [
        *([f"{count(writing, 'file')} being written, or left by a dead writer"] * bool(writing)),
        *([f"{count(strange, 'name')} that nobody looks for"] * bool(strange)),
        *([f"{count(aside, 'file')} in quarantine"] * bool(aside)),
    ]
    return "; ".join([text, *more]) + "."


def _list_pages(given: GivenStore, beginning: str, *, as_json: bool) -> None:
    entries = _entries_by_place(given, beginning)
    names = {name for name, _ in entries}
    if len(names) != 1:
        end(
            f"ucm ls: --namespace {beginning}: {len(names)} "
            f"namespaces begin so: take a name of `ucm ls`, with more digits"
        )
    number = 0
    for _, its in entries:
        for entry in its:
            number += 1
            if as_json:
                print_json(entry)
                continue
            tail = f"tail of {entry.num_tokens}" if entry.num_tokens else ""
            more = "  ".join(filter(None, (entry.strand, tail)))
            say(f"{entry.key}  {size(entry.nbytes):>10}  {ago(entry.used_s):>7}  {more}")
    if not as_json:
        say(f"{count(number, 'page')}; the age is since a page was written or used last.")


def _entries_by_place(given: GivenStore, beginning: str) -> list[tuple[str, Iterator[PageEntry]]]:
    """Of each namespace that begins so, in each backend and in the bucket. Raises TierError."""
    from ucm.store.inspect.bucket_contents import bucket_entries
    from ucm.store.inspect.bucket_walk import Bounds
    from ucm.store.inspect.contents import page_entries
    from ucm.store.inspect.walk import namespace_folders

    folders = [each for backend in given.backends for each in namespace_folders(backend)]
    found = [(each.name, page_entries(each)) for each in folders if each.name.startswith(beginning)]
    bucket = given.bucket()
    if bucket is not None:
        bounds = Bounds()
        names = [name for name in bucket.namespaces(bounds) if name.startswith(beginning)]
        found += [(name, bucket_entries(bucket, name, bounds)) for name in names]
    return found
