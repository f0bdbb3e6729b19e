"""`ucm inspect`: what one page is."""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from ucm.cli.ending import end, one_line_for_errors
from ucm.cli.printing import STATUS_WRONG, AsJson, ago, count, print_json, say, size
from ucm.cli.watched import SILENCE_S, TimeoutS, watched

if TYPE_CHECKING:
    from ucm.store.inspect.given import GivenStore
    from ucm.store.inspect.page_report import PageReport

_MAX_FILES = 20


def inspect(
    page: Annotated[
        str,
        typer.Argument(
            metavar="FILE|KEY", help="a page's file or object, or the beginning of its key"
        ),
    ],
    store: Annotated[
        str,
        typer.Argument(
            metavar="[STORE]", help="where to look for KEY: a storage backend, or a settings file"
        ),
    ] = "",
    timeout_s: TimeoutS = SILENCE_S,
    as_json: AsJson = False,
) -> None:
    """Show what one page is, and check every byte of it.

    Ends with 3 if it is damaged or can't be read.
    """
    watched(
        "ucm inspect", store or page, timeout_s, partial(_inspect, page, store, as_json=as_json)
    )


def _inspect(page: str, store: str, *, as_json: bool) -> None:
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
    from ucm.store.inspect.page_report import is_key, page_report

    given = given_store(store, may_be_bucket=True) if store else None
    if given is not None and is_key(page):
        return _reports_of_key(page, given)
    bucket = given.bucket() if given is not None else None
    name = bucket.name_in(page) if bucket is not None else None
    if given is not None and bucket is not None and name is not None:
        from ucm.store.inspect.object_report import object_report

        return [object_report(bucket, name, given.page_key())]
    check_no_url(page)
    if given is None and is_key(page):
        end(f"ucm inspect: {page}: looks like a key: say where to look, as a second argument")
    return [page_report(page, given.page_key() if given is not None else None)]


def _reports_of_key(key: str, given: GivenStore) -> list[PageReport]:
    from ucm.store.inspect.object_report import object_report
    from ucm.store.inspect.page_report import files_of, page_report

    bucket, page_key = given.bucket(), given.page_key()
    files = files_of(given.backends, key)
    objects = []
    if bucket is not None:
        objects = [each.name for each in islice(bucket.beginning_so(key), _MAX_FILES + 1)]
    where = ", ".join([*given.backends, *([bucket.place] if bucket is not None else [])])
    number = len(files) + len(objects)
    if not number:
        end(f"ucm inspect: {key}: no page whose key begins so in {where}")
    if number > _MAX_FILES:
        end(f"ucm inspect: {key}: more than {_MAX_FILES} pages begin so: give more digits")
    reports = [page_report(file, page_key) for file in files]
    if bucket is not None:
        reports += [object_report(bucket, name, page_key) for name in objects]
    return reports


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
        "rights": f"mode {report.mode}, uid {report.uid}" if report.mode else "",
        "used" if report.mode else "written": f"{ago(report.used_s)} ago",
    }
    for name, value in lines.items():
        if value:
            say(f"{name:<10} {value}")
    say()
