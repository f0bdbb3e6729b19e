"""docs/on-disk.md is checked against the code that makes names and bytes."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from xxhash import xxh3_64_digest

from tests.documents.document_tables import quoted, table
from ucm.store.blocks import blockfile
from ucm.store.blocks.blockfile import HEADER_BYTES, BlockId, encode_header
from ucm.store.blocks.keys import Key, TailKey
from ucm.store.blocks.namespace import Manifest
from ucm.store.blocks.page_key import PageKey
from ucm.store.tiers.posix import paths

KEY = Key(bytes(range(100, 132)))
FINGERPRINT = bytes(range(32))
PAGE = memoryview(bytes(range(256)) * (3 << 12))  # three segments of 1 MiB
PAGE_KEY = PageKey.of(b"secret" * 4)


def fields() -> dict[str, tuple[int, str]]:
    """Name -> offset and length."""
    rows = table("on-disk.md", "A page file")
    return {quoted(name)[0]: (int(offset), length) for offset, length, name, _ in rows}


def header(page_key: PageKey | None) -> bytes:
    into = memoryview(bytearray(HEADER_BYTES))
    block = BlockId(KEY, FINGERPRINT, len(PAGE))
    encode_header(block, PAGE, num_tokens=77, into=into, page_key=page_key)
    return bytes(into)


def part(of: bytes, name: str) -> bytes:
    offset, length = fields()[name]
    return of[offset : offset + int(length)]


def u(value: int, num_bytes: int) -> bytes:
    return value.to_bytes(num_bytes, "little")


@pytest.mark.parametrize("page_key", [None, PAGE_KEY], ids=["unsealed", "sealed"])
def test_every_field_lies_where_the_table_says(page_key: PageKey | None) -> None:
    sums = b"".join(xxh3_64_digest(PAGE[i << 20 : (i + 1) << 20])[::-1] for i in range(3))
    made = header(page_key)
    seal_offset, seal_bytes = fields()["seal"]
    assert page_key is None or part(made, "seal") == page_key.seal(
        memoryview(made)[:seal_offset], PAGE
    )
    if page_key is None:
        assert part(made, "seal") == bytes(int(seal_bytes))

    expected = {
        "magic": b"UCMBLOCK",
        "version": u(1, 4),
        "header_bytes": u(4096, 4),
        "key": KEY,
        "namespace fingerprint": FINGERPRINT,
        "page_bytes": u(len(PAGE), 8),
        "segment_bytes": u(1 << 20, 8),
        "num_tokens": u(77, 4),
        "id of the page key": bytes(8) if page_key is None else page_key.id,
        "zeros": bytes(20),
        "header checksum": xxh3_64_digest(made[: fields()["header checksum"][0]])[::-1],
    }
    assert {name: part(made, name) for name in expected} == expected
    assert part(made, "checksums").startswith(sums)
    assert fields().keys() == {*expected, "checksums", "seal", "page"}
    assert fields()["page"][0] == HEADER_BYTES


def test_the_table_is_that_of_the_code() -> None:
    """The docstring of blockfile.py, which the constants stand beside."""
    fixed = (blockfile.__doc__ or "").partition("fixed:")[2].partition("sealed:")[0]
    told = {name.strip(): int(offset) for offset, name in re.findall(r"\b(\d+)  ([a-z_ ]+)", fixed)}

    end = fields()["checksums"][0]
    documented = {name: offset for name, (offset, _) in fields().items() if offset < end}
    assert {name.removesuffix(" u"): offset for name, offset in told.items()} == documented


def test_every_byte_of_the_header_is_in_the_table_once() -> None:
    spans = sorted(
        (offset, offset + int(length))
        for name, (offset, length) in fields().items()
        if name not in ("page", "seal")
    )

    assert spans[0][0] == 0 and spans[-1][1] == HEADER_BYTES
    for (_, end), (start, _) in itertools.pairwise(spans):
        assert end == start
    seal_offset, seal_bytes = fields()["seal"]
    assert seal_offset + int(seal_bytes) == fields()["header checksum"][0]


def test_the_tree_has_the_names_that_the_code_builds() -> None:
    words = {
        "fingerprint": FINGERPRINT.hex(),
        "key": KEY.hex(),
        "node": "0123456789abcdef",
        "h1": KEY.hex()[:2],
        "h2": KEY.hex()[2:4],
        "tokens": "44",
        "key id": PAGE_KEY.id.hex(),
        "name": f"{KEY.hex()}.kv",
        "directory": f"{FINGERPRINT.hex()}/{KEY.hex()[:2]}/{KEY.hex()[2:4]}",
    }

    def filled(path: str) -> str:
        return re.sub("<([^>]+)>", lambda match: words.get(match[1], match[0]), path)

    block = paths.block_path("", FINGERPRINT, KEY)
    temp = paths.temp_path(block)
    aside = paths.quarantine_path("", FINGERPRINT, KEY)
    writer = aside.rpartition(".kv.")[2]
    built = [
        paths.backend_id_path(""),
        *(f"/{paths.RECLAIM_LEASE}", f"/{paths.RECLAIM_GRANTS}"),
        "/" + paths.reclaim_node_name("0123456789abcdef"),
        *reversed(paths.reclaim_record_paths("")),
        paths.manifest_path("", FINGERPRINT),
        block,
        paths.block_path("", FINGERPRINT, Key(TailKey(KEY, 44))),
        paths.namespace_dir("", FINGERPRINT, PAGE_KEY.id) + "/...",
        temp.replace(temp.partition(".kv.")[2].removesuffix(".tmp"), "<writer>"),
        aside.replace(writer, "<writer>"),
    ]

    documented = [filled(quoted(path)[0]) for path, _ in table("on-disk.md", "The tree")]
    assert documented == [path.removeprefix("/") for path in built]


def test_the_manifest_has_the_documented_fields_and_no_other() -> None:
    documented = [name for cell, _ in table("on-disk.md", "The manifest") for name in quoted(cell)]
    assert sorted(documented) == sorted(Manifest.__struct_fields__)


def test_its_files_exist() -> None:
    text = (Path(__file__).parents[2] / "docs" / "on-disk.md").read_text()
    named = set(re.findall(r"`(ucm/[\w/]+\.py)`", text))

    assert len(named) > 5
    assert not [name for name in named if not (Path(__file__).parents[2] / name).exists()]
