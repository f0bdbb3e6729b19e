"""`ucm du`: how much a store takes, by namespace and age, and by salt."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from ucm.cli.ending import one_line_for_errors
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

    from ucm.store.inspect.contents import NamespaceContents
    from ucm.store.inspect.salts import SaltUse


def du(
    store: StoreArgument,
    by_age: Annotated[
        bool, typer.Option("--age", help="a column for each age: when pages were used last")
    ] = False,
    by_salt: Annotated[
        bool, typer.Option("--salt", help="a line for each cache_salt instead")
    ] = False,
    known_salts: Annotated[
        list[str] | None, typer.Option("--name-salt", help="a salt to be told by its name")
    ] = None,
    timeout_s: TimeoutS = SILENCE_S,
    as_json: AsJson = False,
) -> None:
    """How many bytes a store takes, by namespace and by age, or by salt.

    A page tells the tag of its salt, not the salt: those that quota_gb names, and those of
    --name-salt, are shown by name.
    """
    act = partial(
        _du, store, by_age=by_age, by_salt=by_salt, known_salts=known_salts or [], as_json=as_json
    )
    watched("ucm du", store, timeout_s, act)


def _du(store: str, *, by_age: bool, by_salt: bool, known_salts: list[str], as_json: bool) -> None:
    from ucm.store.inspect.bucket_contents import bucket_contents
    from ucm.store.inspect.bucket_walk import Bounds
    from ucm.store.inspect.contents import backend_contents
    from ucm.store.inspect.given import given_store
    from ucm.store.inspect.salts import SaltTally

    with one_line_for_errors("ucm du"), progress("measuring") as on_progress:
        given = given_store(store, may_be_bucket=True)
        tally = SaltTally() if by_salt else None
        backends = [
            backend_contents(backend, with_sizes=True, on_progress=on_progress, tally=tally)
            for backend in given.backends
        ]
        bucket = given.bucket()
        if bucket is not None:
            backends.append(bucket_contents(bucket, Bounds(), tally))
        named = [
            *known_salts,
            *(given.settings.store.quota_salts if given.settings else ()),
        ]
        salts = tally.uses(named) if tally is not None else []
    namespaces = [each for backend in backends for each in backend.namespaces]
    if as_json:
        print_json(salts if by_salt else backends)
    else:
        if by_salt:
            _print_salts(salts)
        else:
            (_print_ages if by_age else _print_sizes)(namespaces)
        total = sum(each.sizes.allocated_bytes for each in namespaces if each.sizes)
        pages = sum(each.num_pages for each in namespaces)
        where = count(len(backends), "storage backend")
        say(f"{size(total)} in {count(pages, 'page')} on {where}.")
    for each in namespaces:
        if each.problem:
            say(f"not all of it could be measured: {each.problem}", is_error=True)
    if any(each.num_problems for each in namespaces):
        raise typer.Exit(STATUS_WRONG)


def _print_sizes(namespaces: list[NamespaceContents]) -> None:
    print_table(
        ("namespace", "model", "pages", "on disk", "oldest", "newest", "backend"),
        [row for each in namespaces for row in _size_rows(each)],
        right=("pages", "on disk", "oldest", "newest"),
    )


def _size_rows(of: NamespaceContents) -> Iterator[tuple[object, ...]]:
    """Of a model with several strands one for each of them as well."""
    yield (
        *(short(of.namespace), of.model, of.num_pages),
        size(of.sizes.allocated_bytes) if of.sizes else "0 B",
        ago(of.sizes.oldest_s) if of.sizes else "",
        ago(of.sizes.newest_s) if of.sizes else "",
        of.backend,
    )
    for use in of.sizes.by_strand if of.sizes else ():
        name = f"  of these {use.strand or 'of no known strand'}"
        yield "", name, use.num_pages, size(use.allocated_bytes), "", "", ""


def _print_salts(salts: list[SaltUse]) -> None:
    print_table(
        ("salt", "tag", "pages", "on disk"),
        [
            (
                each.salt or ("?" if each.tag else "none"),
                *(each.tag, each.num_pages, size(each.allocated_bytes)),
            )
            for each in salts
        ],
        right=("pages", "on disk"),
    )


def _print_ages(namespaces: list[NamespaceContents]) -> None:
    from ucm.store.inspect.contents import AGES

    ages = [age for age, _ in AGES]
    print_table(
        ("namespace", "model", *ages),
        [
            (
                *(short(each.namespace), each.model),
                *(size(use.allocated_bytes) for use in (each.sizes.by_age if each.sizes else ())),
            )
            for each in namespaces
        ],
        right=ages,
    )
