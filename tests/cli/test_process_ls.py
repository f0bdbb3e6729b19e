"""`ucm ls` and `ucm du`: what is in a store, counted without touching it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest

from tests.cli.conftest import PROMPT
from tests.cli.parts import ROOT, Store, keys_of, manifest, settings_file, ucm
from ucm.store.blocks.keys import Key, salt_tag
from ucm.store.blocks.namespace import fingerprint
from ucm.store.inspect.contents import BackendContents, PageEntry
from ucm.store.inspect.salts import SaltUse

pytestmark = pytest.mark.process

A, B = manifest("a"), manifest("b", kv_dtype="fp8")


def contents(text: str) -> BackendContents:
    (backend,) = msgspec.json.decode(text, type=list[BackendContents])
    return backend


def test_ls_names_each_namespace_with_its_model_and_pages(filled: Store) -> None:
    before = filled.names()
    done = ucm("ls", filled.path)

    assert done.returncode == 0, done.stderr
    (a_line,) = [line for line in done.stdout.splitlines() if fingerprint(A).hex()[:12] in line]
    (b_line,) = [line for line in done.stdout.splitlines() if fingerprint(B).hex()[:12] in line]
    assert re.search(r"\ba +bfloat16 +16 +12 +0 ", a_line)
    assert re.search(r"\bb +fp8 +16 +6 +0 ", b_line)
    assert done.stdout.splitlines()[-1] == "18 pages in 2 namespaces."
    assert filled.names() == before


def test_ls_of_one_namespace_has_each_page_once(filled: Store) -> None:
    name = fingerprint(B).hex()
    done = ucm("ls", filled.path, "--namespace", name[:10], "--json")

    entries = [msgspec.json.decode(line, type=PageEntry) for line in done.stdout.splitlines()]
    assert [each.key for each in entries] == sorted(key.hex() for key in keys_of(B, PROMPT))
    assert {each.namespace for each in entries} == {name}
    shown = ucm("ls", filled.path, "-n", name)
    assert all(key.hex() in shown.stdout for key in keys_of(B, PROMPT))


def test_du_counts_bytes_by_namespace_and_age(filled: Store) -> None:
    page = filled.file(B, keys_of(B, PROMPT)[0])
    # A page that is worth keeping, in a store with a limit.
    os.utime(page, (time.time() + 3 * 86_400,) * 2)

    done = ucm("du", filled.path, "--json")
    assert done.returncode == 0, done.stderr
    by_name = {each.namespace: each for each in contents(done.stdout).namespaces}
    a, b = (by_name[fingerprint(each).hex()].sizes for each in (A, B))
    assert a is not None and b is not None
    assert a.nbytes == 2 * b.nbytes == 12 * page.stat().st_size
    assert a.allocated_bytes >= a.nbytes
    assert {use.age: use.num_pages for use in b.by_age if use.num_pages} == {"hour": 6}
    assert b.newest_s <= time.time() + 1

    assert "18 pages on 1 storage backend." in ucm("du", filled.path).stdout
    assert "week" in ucm("du", "--age", filled.path).stdout


def test_du_tells_salts_by_their_tags_and_by_the_names_it_is_given(
    filled: Store, tmp_path: Path
) -> None:
    for salt, num_blocks in (("tenant a", 4), ("tenant b", 2), ("tenant c", 1)):
        filled.put(A, keys_of(A, PROMPT, salt=salt)[:num_blocks])
    done = ucm("du", "--salt", filled.path, "--json")
    plain = msgspec.json.decode(done.stdout, type=list[SaltUse])
    a, b, c = (salt_tag(f"tenant {name}").hex() for name in "abc")
    assert {(use.tag, use.salt, use.num_pages) for use in plain} == {
        (salt_tag("one").hex(), "", 6),
        (salt_tag("two").hex(), "", 6),
        (a, "", 4),
        (b, "", 2),
        # One page is not enough to tell a salt by.
        ("", "", 7),
    }

    config = settings_file(tmp_path, filled.path, quota_gb={"salt:tenant a": 1, "*": 1})
    shown = ucm("du", "--salt", config, "--name-salt", "tenant c").stdout
    rows = {line.split("  ")[0]: line.split() for line in shown.splitlines()}
    assert rows["tenant a"][2:4] == [a, "4"] and rows["tenant c"][2:4] == [c, "1"]
    assert rows["none"][1] == "6" and re.search(rf"\? +{b} +2 ", shown)
    assert "25 pages on 1 storage backend." in shown


def test_a_settings_file_is_as_good_as_the_directory(filled: Store, tmp_path: Path) -> None:
    config = settings_file(tmp_path, filled.path)

    assert ucm("ls", config).stdout == ucm("ls", filled.path).stdout


def test_a_listing_that_is_cut_short_by_its_reader_is_no_error(filled: Store) -> None:
    """As by `head`."""
    keys = (Key(sha256(b"%d" % number).digest()) for number in range(2000))
    for key in keys:
        path = filled.file(A, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    command = [sys.executable, "-m", "ucm.cli.main", "ls", "-n", fingerprint(A).hex()]
    with subprocess.Popen(
        [*command, str(filled.path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


def test_what_is_no_store_is_one_line(tmp_path: Path) -> None:
    for command in ("ls", "du", "verify"):
        for what in (tmp_path, tmp_path / "nowhere"):
            done = ucm(command, what)
            assert done.returncode == 1
            assert done.stderr.startswith(f"ucm {command}: {what}: ")
            assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_another_versions_namespace_is_counted_and_named_unknown(filled: Store) -> None:
    path = filled.path / fingerprint(A).hex() / "manifest.json"
    path.write_bytes(b'{"format_version": 9}')

    done = ucm("ls", filled.path)
    assert done.returncode == 0
    assert "? (another version's manifest)" in done.stdout and "18 pages" in done.stdout


def test_links_are_not_followed_and_strange_names_are_told(filled: Store, tmp_path: Path) -> None:
    """Whoever can write into a backend can put a link there."""
    outside = tmp_path / "outside"
    (filled.path / fingerprint(A).hex()).rename(outside)
    (filled.path / fingerprint(A).hex()).symlink_to(outside)
    page = filled.file(B, keys_of(B, PROMPT)[0])
    page.with_name("notes.txt").write_text("mine")

    done = ucm("ls", filled.path)
    assert done.stdout.splitlines()[-1] == ("6 pages in 1 namespace; 1 name that nobody looks for.")


def test_what_may_not_be_listed_is_told_and_the_rest_is_counted(filled: Store) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may list everything")
    os.chmod(filled.file(B, keys_of(B, PROMPT)[0]).parent, 0)

    done = ucm("ls", filled.path)
    assert done.returncode == 3
    assert "17 pages" in done.stdout and "Permission denied" in done.stderr
