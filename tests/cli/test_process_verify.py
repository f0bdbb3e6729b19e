"""`ucm verify` and `ucm inspect`: is every byte what it was when it was written?"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import yaml

from tests.cli.conftest import PROMPT
from tests.cli.parts import ROOT, Store, flip_bit, keys_of, manifest, ucm
from tests.store.api.whole_store import whole_blocks
from tests.store.node.support import Place
from ucm.store.blocks.blockfile import HEADER_BYTES
from ucm.store.blocks.namespace import fingerprint
from ucm.store.blocks.page_key import load_page_key
from ucm.store.inspect.page_report import PageReport
from ucm.store.inspect.verified import Verified
from ucm.store.tiers.posix.tier import PosixTier

pytestmark = pytest.mark.process

A, B = manifest("a"), manifest("b", kv_dtype="fp8")


def verified(*args: object) -> tuple[int, Verified]:
    done = ucm("verify", *args, "--json")
    assert done.stderr == ""
    return done.returncode, msgspec.json.decode(done.stdout, type=Verified)


def test_a_whole_store_is_said_to_be_whole(filled: Store) -> None:
    before = filled.names()
    done = ucm("verify", filled.path)

    assert done.returncode == 0
    assert done.stdout.startswith("18 pages are whole; ")
    assert filled.names() == before


def test_every_kind_of_damage_is_found_and_nothing_is_changed(filled: Store) -> None:
    pages = [filled.file(A, key) for key in keys_of(A, PROMPT, salt="one")]
    flip_bit(pages[0])
    flip_bit(pages[1], 20)  # in the header
    os.truncate(pages[2], 5000)
    os.truncate(pages[3], 100)
    pages[4].unlink()
    pages[4].symlink_to(pages[5])
    before = filled.names()

    status, found = verified(filled.path)

    assert (status, found.num_damaged, found.num_whole) == (3, 5, 13)
    assert {each.path for each in found.files} == {str(page) for page in pages[:5]}
    assert filled.names() == before
    shown = ucm("verify", filled.path).stdout
    assert f"damaged: {pages[0]}: checksum of bytes [0, 20001) of the page differs" in shown


def test_a_page_of_another_block_is_damaged_in_its_place(filled: Store) -> None:
    one, other = (filled.file(A, key) for key in keys_of(A, PROMPT, salt="one")[:2])
    other.write_bytes(one.read_bytes())

    status, found = verified(filled.path)
    (bad,) = found.files
    assert status == 3 and bad.path == str(other) and bad.why.startswith("holds block ")


def test_quarantine_moves_what_is_damaged_and_nothing_else(filled: Store) -> None:
    page = filled.file(B, keys_of(B, PROMPT)[0])
    flip_bit(page)

    status, found = verified(filled.path, "--quarantine")

    assert (status, found.num_damaged, found.num_quarantined) == (3, 1, 1)
    assert not page.exists()
    (aside,) = (filled.path / "quarantine" / fingerprint(B).hex()).iterdir()
    assert aside.name.startswith(page.name)
    assert verified(filled.path)[0] == 0
    assert "1 file in quarantine" in ucm("ls", filled.path).stdout


def test_another_versions_files_are_not_damaged(filled: Store) -> None:
    """They lie in a namespace of their own, whose manifest says so; in ours it is damage."""
    ours = filled.file(A, keys_of(A, PROMPT, salt="one")[0])
    newer = manifest("a", page_format_version=2)
    filled.put(newer, keys_of(newer, PROMPT)[:1])
    theirs = filled.file(newer, keys_of(newer, PROMPT)[0])
    for path in (ours, theirs):
        content = bytearray(path.read_bytes())
        struct.pack_into("<I", content, 8, 2)
        path.write_bytes(content)

    status, found = verified(filled.path, "--quarantine")

    assert (status, found.num_other_version, found.num_damaged) == (3, 1, 1)
    assert theirs.exists() and not ours.exists()


@pytest.mark.parametrize("content", [b'{"block_tok', b"", b"[]", b'{"format_version": 1}', b"\xff"])
def test_a_manifest_that_is_none_is_found_and_its_pages_are_read_all_the_same(
    filled: Store, content: bytes
) -> None:
    manifests = sorted(filled.path.glob("*/manifest.json"))
    for path in manifests:
        path.write_bytes(content)

    status, found = verified(filled.path)
    assert (status, found.num_damaged, found.num_whole) == (3, 2, 18)
    assert [each.path for each in found.files] == [*map(str, manifests)]
    assert "the manifest is damaged: remove it, and" in found.files[0].why
    shown = ucm("ls", filled.path).stdout
    assert shown.count("? (the manifest is damaged)") == 2
    assert "version" not in shown


def test_another_namespaces_manifest_is_wrong_and_so_is_one_that_is_no_file(filled: Store) -> None:
    a, b = (filled.path / fingerprint(each).hex() / "manifest.json" for each in (A, B))
    a.write_bytes(b.read_bytes())
    b.unlink()
    b.symlink_to(a)

    status, found = verified(filled.path)
    assert (status, found.num_damaged) == (3, 2)
    whys = {each.path: each.why for each in found.files}
    assert whys[str(a)].startswith("the manifest is another namespace's")
    assert whys[str(b)].startswith("the manifest is a link and no file")


def test_other_versions_manifests_and_missing_ones_are_not_wrong(filled: Store) -> None:
    a, b = (filled.path / fingerprint(each).hex() / "manifest.json" for each in (A, B))
    a.write_bytes(b'{"format_version": 9}')
    b.unlink()
    assert verified(filled.path)[0] == 0


@pytest.fixture
def sealed(store: Store, tmp_path: Path) -> Path:
    """A settings file whose page key sealed 6 pages, of which one is a forgery."""
    secret = tmp_path / "secret"
    secret.write_text("a secret of enough bytes")
    secret.chmod(0o600)
    page_key = load_page_key(str(secret))
    keys = keys_of(A, PROMPT)
    store.put(A, keys, tier=PosixTier([str(store.path)], page_key=page_key))
    seal = bytearray(store.file(A, keys[0], page_key.id).read_bytes())
    seal[4056] ^= 1
    from xxhash import xxh3_64_intdigest

    struct.pack_into("<Q", seal, 4088, xxh3_64_intdigest(bytes(seal[:4088])))
    store.file(A, keys[0], page_key.id).write_bytes(seal)
    config = tmp_path / "ucm.yaml"
    of_store = {"storage_backends": str(store.path), "page_key_file": str(secret)}
    connector = {"ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": of_store}
    config.write_text(yaml.safe_dump({"ucm_connectors": [connector]}))
    return config


def test_seals_are_checked_by_who_has_the_page_key(sealed: Path, store: Store) -> None:
    status, found = verified(sealed)
    assert (status, found.num_whole, found.num_damaged) == (3, 5, 1)
    assert "the seal differs" in found.files[0].why

    status, found = verified(store.path)
    assert (status, found.num_sealed_by_another_key, found.num_damaged) == (0, 6, 0)


def test_verify_ls_and_du_work_while_a_node_cache_writes(place: Place) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-m", "tests.cli.writer", str(place.directory)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
        for _ in range(2):
            status, found = verified(place.store)
            assert status == 0 and not found.files, found
            for command in ("ls", "du"):
                assert ucm(command, place.store).returncode == 0
        assert writer.poll() is None
    finally:
        writer.kill()
        writer.wait()
        writer.communicate()
    with whole_blocks(place) as store:
        store.flush()
    status, found = verified(place.store)
    assert status == 0 and found.num_whole > 0


def test_inspect_shows_a_page_by_its_file_and_by_its_key(filled: Store) -> None:
    key = keys_of(B, PROMPT)[2]
    by_file = ucm("inspect", filled.file(B, key), "--json")
    by_key = ucm("inspect", key.hex()[:16], filled.path, "--json")

    assert by_file.returncode == by_key.returncode == 0, by_file.stderr
    (report,) = msgspec.json.decode(by_file.stdout, type=list[PageReport])
    assert msgspec.json.decode(by_key.stdout, type=list[PageReport]) == [report]
    assert (report.key, report.namespace) == (key.hex(), fingerprint(B).hex())
    assert (report.condition, report.page_bytes, report.num_tokens) == ("whole", 20_001, 16)
    shown = ucm("inspect", filled.file(B, key)).stdout
    assert "model      b\n" in shown and shown.endswith("1 page is right, 0 not.\n")


def test_inspect_says_what_is_wrong_with_a_damaged_page(filled: Store) -> None:
    page = filled.file(B, keys_of(B, PROMPT)[2])
    flip_bit(page, HEADER_BYTES - 1)

    done = ucm("inspect", page)
    assert done.returncode == 3
    assert "state      damaged: header checksum differs" in done.stdout


def test_inspect_finds_a_damaged_page_in_quarantine_by_its_key(filled: Store) -> None:
    key = keys_of(B, PROMPT)[2]
    flip_bit(filled.file(B, key))
    ucm("verify", filled.path, "--quarantine")

    done = ucm("inspect", key.hex(), filled.path)
    assert done.returncode == 3 and "no reader looks for it here" in done.stdout


def test_inspect_of_what_is_not_there_is_one_line(filled: Store, tmp_path: Path) -> None:
    note = tmp_path / "note"
    note.write_text("no page")
    for args in ([tmp_path / "no"], ["abcdef"], ["abcdef", filled.path], [note], [tmp_path]):
        done = ucm("inspect", *args)
        assert done.returncode == 1, args
        assert done.stderr.startswith("ucm inspect: ") and done.stderr.count("\n") == 1
