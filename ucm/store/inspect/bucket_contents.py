"""What a bucket holds: namespaces, pages, bytes and their ages, by one listing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

from ucm.errors import UcmError
from ucm.store.blocks.keys import TailKey
from ucm.store.blocks.namespace import Manifest
from ucm.store.blocks.page_names import key_id_in
from ucm.store.inspect.bucket_walk import Bounds, FoundPage, StoredBucket
from ucm.store.inspect.contents import (
    AGES,
    AgeUse,
    BackendContents,
    NamespaceContents,
    PageEntry,
    Sizes,
    StrandUse,
    age_of,
)
from ucm.store.inspect.model_label import model_label, strand_labels
from ucm.store.inspect.salts import SaltTally
from ucm.store.inspect.strand_pages import StrandPages


def bucket_contents(
    bucket: StoredBucket, bounds: Bounds, tally: SaltTally | None = None
) -> BackendContents:
    """Bytes are those of objects, and ages since they were written. Raises TierError, and UcmError
    out of bounds before there is anything to be told."""
    names = bucket.namespaces(bounds)
    # Before pages, which may be too many: then what was counted is told.
    num_aside = sum(1 for _ in bucket.aside(bounds))
    namespaces = [_contents(bucket, name, bounds, tally) for name in names]
    return BackendContents(
        backend=bucket.place, id="", num_quarantined=num_aside, namespaces=namespaces
    )


def bucket_entries(bucket: StoredBucket, namespace: str, bounds: Bounds) -> Iterator[PageEntry]:
    """Every page of a namespace, sorted by key; ages are since they were written. Raises TierError,
    and UcmError out of bounds."""
    strands = StrandPages(bucket.manifest(namespace).manifest)
    for page in bucket.pages_in(namespace, bounds):
        if page is not None:
            yield PageEntry(
                backend=bucket.place,
                namespace=namespace,
                key=page.key.hex(),
                strand=strands.of_file(page.size_bytes),
                num_tokens=page.key.num_tokens if isinstance(page.key, TailKey) else 0,
                nbytes=page.size_bytes,
                used_s=page.modified_s,
            )


def _contents(
    bucket: StoredBucket, name: str, bounds: Bounds, tally: SaltTally | None
) -> NamespaceContents:
    looked = bucket.manifest(name)
    manifest, why = looked.manifest, looked.why
    pages: list[tuple[int, float]] = []
    num_tails = num_strange = 0
    problem = ""
    try:
        for page in bucket.pages_in(name, bounds):
            if page is None:
                num_strange += 1
                continue
            pages.append((page.size_bytes, page.modified_s))
            num_tails += isinstance(page.key, TailKey)
            _tell(tally, page)
    except UcmError as error:
        problem = str(error)
    return NamespaceContents(
        backend=bucket.place,
        namespace=name,
        model=model_label(manifest) if manifest is not None else f"? ({why})",
        strands=strand_labels(manifest) if manifest is not None else [],
        kv_dtype=manifest.kv_dtype if manifest is not None else "",
        block_tokens=manifest.block_tokens if manifest is not None else 0,
        is_sealed=bool(key_id_in(name)),
        num_pages=len(pages),
        num_tails=num_tails,
        num_temporary=0,
        num_strange=num_strange,
        sizes=_sizes(pages, manifest) if pages else None,
        num_problems=int(bool(problem)),
        problem=problem,
    )


def _tell(tally: SaltTally | None, page: FoundPage) -> None:
    if tally is not None:
        tally.add(page.key, page.size_bytes)


def _sizes(pages: list[tuple[int, float]], manifest: Manifest | None) -> Sizes:
    now_s = time.time()
    num = dict.fromkeys((age for age, _ in AGES), 0)
    nbytes = dict.fromkeys((age for age, _ in AGES), 0)
    for size_bytes, modified_s in pages:
        age = age_of(now_s - modified_s)
        num[age] += 1
        nbytes[age] += size_bytes
    total = sum(nbytes.values())
    return Sizes(
        nbytes=total,
        allocated_bytes=total,
        oldest_s=min(modified_s for _, modified_s in pages),
        newest_s=max(modified_s for _, modified_s in pages),
        by_age=[AgeUse(age=age, num_pages=num[age], allocated_bytes=nbytes[age]) for age in num],
        by_strand=_by_strand(pages, manifest),
    )


def _by_strand(pages: list[tuple[int, float]], manifest: Manifest | None) -> list[StrandUse]:
    if manifest is None or not strand_labels(manifest):
        return []
    strands, sizes = StrandPages(manifest), Counter(size_bytes for size_bytes, _ in pages)
    num: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for size_bytes, count in sizes.items():
        strand = strands.of_file(size_bytes)
        num[strand] += count
        nbytes[strand] += count * size_bytes
    return [
        StrandUse(strand=each, num_pages=num[each], allocated_bytes=nbytes[each])
        for each in sorted(num)
    ]
