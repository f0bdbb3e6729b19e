"""What is said of a backend into which others may write, or this process may not."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parts.strangers import run_as_stranger
from tests.store.tiers.tier_contract import SMALL, content_of, dump, load, make_key, make_page
from ucm.errors import ConfigError, TierError
from ucm.store.blocks.page_key import PageKey
from ucm.store.tiers.posix.rights import file_rights, problems
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import ReadStatus

KEY, PAGE = make_key(1), make_page(SMALL, "a")
SECRET = PageKey.of(b"a secret of some length")


@pytest.mark.parametrize("mode", [0o755, 0o775, 0o700, 0o2770])
def test_a_directory_of_ones_own_is_not_worth_a_word(mode: int) -> None:
    assert problems(mode, may_write=True, uid=1, is_sealed=False) == []


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o757])
def test_a_directory_that_anybody_may_write_to_is_warned_of_unless_pages_are_sealed(
    mode: int,
) -> None:
    (problem,) = problems(mode, may_write=True, uid=1, is_sealed=False)
    assert "page_key_file" in problem
    assert problems(mode, may_write=True, uid=1, is_sealed=True) == []


def test_root_that_may_not_write_hears_what_nfs_takes_it_for() -> None:
    of_root, of_another = (
        problems(0o755, may_write=False, uid=uid, is_sealed=False) for uid in (0, 1)
    )
    assert ["no_root_squash" in problem for problem in of_root] == [False, True]
    assert ["no_root_squash" in problem for problem in of_another] == [False]
    assert problems(0o755, may_write=True, uid=0, is_sealed=False) == []
    (of_a_mount,) = problems(0o755, may_write=False, uid=0, is_sealed=False, is_read_only=True)
    assert of_a_mount in of_root


def test_a_group_that_only_this_machine_knows_its_user_in_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As servers of NFS do that look groups up themselves."""

    def refuse(*args: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chown", refuse)
    monkeypatch.setattr(os, "fchown", refuse)
    tier = PosixTier([str(tmp_path)], rights=file_rights("660", "2000"))
    tier.open_namespace(SMALL)
    with pytest.raises(TierError, match=f"storage does not count uid {os.geteuid()} to .* 2000"):
        dump(tier, SMALL, KEY, PAGE)


def test_it_is_said_once_where_the_store_is_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(0o777)
    tier = PosixTier([str(tmp_path)])
    for _ in range(3):
        tier.open_namespace(SMALL)
    assert [str(tmp_path) in line for line in caplog.messages if "forge" in line] == [True]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_who_may_only_read_is_told_so_and_reads(tmp_path: Path) -> None:
    store = tmp_path / "store"
    dump(PosixTier([str(store)]), SMALL, KEY, PAGE)
    for path in [tmp_path, *tmp_path.parents]:
        if path.stat().st_uid == 0 and path != Path("/") and path != Path("/tmp"):
            path.chmod(path.stat().st_mode | 0o055)
    said = run_as_stranger(
        "from tests.store.tiers.posix.test_rights import *",
        "tier = PosixTier([sys.argv[1]]); tier.open_namespace(SMALL); "
        "assert load(tier, SMALL, KEY) == content_of(SMALL, PAGE); "
        "check_room(tier)",
        store,
    )
    assert "uid 65534 may not write here" in said


def check_room(tier: PosixTier) -> None:
    """In a process of somebody who may not write."""
    with pytest.raises(TierError, match="can't be written: Permission denied"):
        tier.check_room(SMALL, 0)


# -- of what this node makes ------------------------------------------------------------------


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def rights_of(store: Path) -> tuple[set[int], set[int]]:
    """Modes of directories and of files."""
    found = [store, *store.rglob("*")]
    modes = [(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in found]
    return {m for is_dir, m in modes if is_dir}, {m for is_dir, m in modes if not is_dir}


@pytest.mark.parametrize(
    ("file_mode", "directories", "files"),
    [("640", 0o750, 0o640), ("600", 0o700, 0o600), ("660", 0o770, 0o660), ("0644", 0o755, 0o644)],
)
def test_a_mode_that_is_set_holds_whatever_the_umask(
    tmp_path: Path, umask: int, file_mode: str, directories: int, files: int
) -> None:
    """Of pages, manifests, ids and every directory."""
    tier = PosixTier([str(tmp_path / "store")], rights=file_rights(file_mode, None))
    tier.open_namespace(SMALL)
    dump(tier, SMALL, KEY, PAGE)
    assert rights_of(tmp_path / "store") == ({directories}, {files})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to any group")
@pytest.mark.parametrize("file_mode", ["660", None])
def test_a_group_that_is_set_gets_everything(tmp_path: Path, file_mode: str | None) -> None:
    """Also where no directory hands it on, because the umask decides about rights."""
    tier = PosixTier([str(tmp_path / "store")], rights=file_rights(file_mode, "12345"))
    tier.open_namespace(SMALL)
    dump(tier, SMALL, KEY, PAGE)
    found = [tmp_path / "store", *(tmp_path / "store").rglob("*")]
    assert {path.stat().st_gid for path in found} == {12345}
    if file_mode is not None:
        assert rights_of(tmp_path / "store") == ({0o2770}, {0o660})


@pytest.mark.parametrize("group", ["no-such-group", "²", "4294967295", "9" * 11, "-1", "\ud800"])
def test_a_group_that_is_not_there_stops_the_start(group: str) -> None:
    with pytest.raises(ConfigError, match=f"file_group: {group}"):
        file_rights(None, group)


# -- sealed pages ---------------------------------------------------------------------------


def test_sealed_pages_are_found_by_who_has_the_key_and_by_nobody_else(tmp_path: Path) -> None:
    """Others look elsewhere: they take nothing for damaged, and write what is theirs."""
    mine = PosixTier([str(tmp_path)], page_key=SECRET)
    plain = PosixTier([str(tmp_path)])
    other = PosixTier([str(tmp_path)], page_key=PageKey.of(b"another secret, as long"))
    mine.open_namespace(SMALL)
    dump(mine, SMALL, KEY, PAGE)
    for tier in (plain, other):
        tier.open_namespace(SMALL)
        assert tier.contains(SMALL, [KEY]) == 0
        assert load(tier, SMALL, KEY) is ReadStatus.ABSENT
        assert dump(tier, SMALL, KEY, PAGE)
    for tier in (mine, plain, other):
        assert load(tier, SMALL, KEY) == content_of(SMALL, PAGE)
    assert mine.read_manifest(SMALL.fingerprint) == SMALL.manifest_json


def test_a_page_that_was_forged_into_a_sealed_store_is_moved_aside(tmp_path: Path) -> None:
    """By who can write files with right checksums, and has no key."""
    mine, plain = PosixTier([str(tmp_path)], page_key=SECRET), PosixTier([str(tmp_path)])
    dump(mine, SMALL, KEY, PAGE)
    dump(plain, SMALL, KEY, make_page(SMALL, "forged"))
    (sealed,) = tmp_path.glob("*-*/*/*/*.kv")
    (forged,) = tmp_path.glob(f"{SMALL.fingerprint.hex()}/*/*/*.kv")
    forged.replace(sealed)

    assert load(mine, SMALL, KEY) is ReadStatus.CORRUPT
    assert not sealed.exists()
    assert dump(mine, SMALL, KEY, PAGE)
    assert load(mine, SMALL, KEY) == content_of(SMALL, PAGE)
