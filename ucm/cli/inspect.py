"""`ucm inspect`: what one page is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ucm.cli.ending import end, one_line_for_errors
from ucm.cli.printing import STATUS_WRONG, AsJson, ago, count, print_json, say, size

if TYPE_CHECKING:
    from ucm.store.inspect.page_report import PageReport

_MAX_FILES = 20


def inspect(
    page: Annotated[
        str, typer.Argument(metavar="FILE|KEY", help="a page's file, or the beginning of its key")
    ],
    store: Annotated[
        str,
        typer.Argument(
            metavar="[STORE]", help="where to look for KEY: a storage backend, or a settings file"
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Show what one page is, and check every byte of it.

    Ends with 3 if it is damaged or can't be read.
    """
    with one_line_for_errors("ucm inspect"):
        reports = _reports(page, store)
    if as_json:
        print_json(reports)
    else:
        for report in reports:
            _print(report)
    bad = [each for each in reports if each.condition in ("damaged", "unreadable")]
    if not as_json:
        whole = len(reports) - len(bad)
        say(f"{count(whole, 'page is', 'pages are')} right, {len(bad)} not.")
    if bad:
        raise typer.Exit(STATUS_WRONG)


def _reports(page: str, store: str) -> list[PageReport]:
    from ucm.store.inspect.given import check_no_url, given_store
    from ucm.store.inspect.page_report import files_of, is_key, page_report

    check_no_url(page)
    given = given_store(store) if store else None
    page_key = given.page_key() if given is not None else None
    if given is None or not is_key(page):
        if is_key(page) and "/" not in page and "." not in page and given is None:
            end(f"ucm inspect: {page}: looks like a key: say where to look, as a second argument")
        return [page_report(page, page_key)]
    files = files_of(given.backends, page)
    if not files:
        end(f"ucm inspect: {page}: no page whose key begins so in {', '.join(given.backends)}")
    if len(files) > _MAX_FILES:
        end(f"ucm inspect: {page}: {len(files)} pages begin so: give more digits")
    return [page_report(file, page_key) for file in files]


def _print(report: PageReport) -> None:
    sealed = f"by the page key {report.sealed_by}" if report.sealed_by else "no"
    tokens = f"{report.num_tokens}" + (", the tail of a prompt" if report.is_tail else "")
    segments = f"{count(report.num_segments, 'segment')} of {size(report.segment_bytes)}"
    lines = {
        "file": report.path,
        "state": report.condition + (report.why and f": {report.why}"),
        "place": "" if report.is_at_home else "no reader looks for it here",
        "namespace": report.namespace,
        "model": report.model,
        "strand": report.strand,
        "key": report.key,
        "tokens": tokens if report.page_bytes else "",
        "page": f"{report.page_bytes:,} bytes in {segments}" if report.page_bytes else "",
        "sealed": sealed if report.page_bytes else "",
        "length": f"{report.file_bytes:,} bytes",
        "rights": f"mode {report.mode}, uid {report.uid}",
        "used": f"{ago(report.used_s)} ago",
    }
    for name, value in lines.items():
        if value:
            say(f"{name:<10} {value}")
    say()
