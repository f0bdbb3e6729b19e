"""What one page in a bucket is, and whether it is whole."""

from __future__ import annotations

from ucm.errors import ConfigError
from ucm.store.blocks.blockfile import HEADER_BYTES
from ucm.store.blocks.page_key import PageKey
from ucm.store.blocks.page_names import fingerprint_in, key_id_in
from ucm.store.inspect.bucket_walk import StoredBucket
from ucm.store.inspect.object_check import ObjectChecker
from ucm.store.inspect.page_check import Condition, ExpectedPage
from ucm.store.inspect.page_report import PageReport, Seen, expected_by_header, report_of


def object_report(bucket: StoredBucket, name: str, page_key: PageKey | None) -> PageReport:
    """`name` is the object's. Raises ConfigError for what is no page, and TierError."""
    url = bucket.url_of(name, below_prefix=False)
    there = bucket.objects.look(name)
    if there is None:
        raise ConfigError(f"{url}: is not there")
    page, manifest = bucket.page_of(name), None
    if page is not None:
        namespace, key = page
        manifest = bucket.manifest(namespace).manifest
        version = manifest.page_format_version if manifest is not None else None
        expected = ExpectedPage(key, fingerprint_in(namespace), key_id_in(namespace), version)
    else:
        head = bucket.objects.get_head(name, HEADER_BYTES)
        expected = expected_by_header(url, head.content if head is not None else b"")
    check = ObjectChecker(bucket.objects, page_key).check(name, there.size_bytes, expected).of_page
    if check.condition is Condition.GONE:
        raise ConfigError(f"{url}: is not there")
    return report_of(
        url,
        expected,
        check,
        Seen(there.size_bytes, there.modified_s),
        is_at_home=page is not None,
        manifest=manifest,
    )
