from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.store.tiers.tier_contract import (
    BLOCK_TOKENS,
    ODD,
    SMALL,
    TierContract,
    content_of,
    dump,
    load,
    make_key,
    make_page,
    run_together,
)
from ucm.errors import TierError
from ucm.store.blocks.blockfile import decode_header
from ucm.store.blocks.keys import Key
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import ReadStatus, Tier, TierNamespace

KEYS = [make_key(i) for i in range(200)]


def files_below(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def three_backends(tmp_path: Path) -> list[str]:
    return [str(tmp_path / name) for name in ("disk0", "disk1", "disk2")]


class TestPosixTier(TierContract):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Tier:
        return PosixTier([str(tmp_path / "store")])


class TestPosixTierWithDirectIo(TierContract):
    """Or without, where the filesystem of temporary directories has no O_DIRECT."""

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Tier:
        return PosixTier([str(tmp_path / "store")], direct_io=True)


class TestPosixTierOnSeveralBackends(TierContract):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Tier:
        return PosixTier(three_backends(tmp_path))


# -- what lies on disk ---------------------------------------------------------------------


def test_a_dump_leaves_the_block_and_the_manifest_and_nothing_else(tmp_path: Path) -> None:
    tier = PosixTier([str(tmp_path)])
    tier.open_namespace(ODD)
    dump(tier, ODD, KEYS[0], make_page(ODD, "a"))

    block = paths.block_path("", ODD.fingerprint, KEYS[0]).lstrip("/")
    manifest = paths.manifest_path("", ODD.fingerprint).lstrip("/")
    assert files_below(tmp_path) == {block, manifest, paths.BACKEND_ID}
    assert (tmp_path / manifest).read_bytes() == ODD.manifest_json
    header = decode_header((tmp_path / block).read_bytes()[:4096])
    assert header.block.key == KEYS[0]
    assert header.num_tokens == BLOCK_TOKENS


def test_nothing_is_made_before_the_first_call(tmp_path: Path) -> None:
    PosixTier([str(tmp_path / "store")])

    assert not (tmp_path / "store").exists()


def test_lookups_make_no_directories(tmp_path: Path) -> None:
    tier = PosixTier([str(tmp_path / "store")])

    tier.contains(SMALL, KEYS)
    load(tier, SMALL, KEYS[0])

    assert not (tmp_path / "store").exists()


def test_a_backend_whose_parent_is_missing_is_not_made(tmp_path: Path) -> None:
    """It is most likely a mount that isn't there yet; files would fill the disk below it."""
    tier = PosixTier([str(tmp_path / "mnt" / "store")])

    complaint = f"{tmp_path}/mnt is not there; mount or make it"
    with pytest.raises(TierError, match=complaint):
        tier.open_namespace(SMALL)
    with pytest.raises(TierError, match="has no id"):
        tier.stage(SMALL, KEYS[0], make_page(SMALL, 0), num_tokens=BLOCK_TOKENS)

    assert not (tmp_path / "mnt").exists()
    assert tier.contains(SMALL, KEYS) == 0


def test_a_staged_page_is_a_file_that_names_its_writer(tmp_path: Path) -> None:
    """So that what a killed writer leaves behind can be swept."""
    tier = PosixTier([str(tmp_path)])
    tier.open_namespace(SMALL)
    staged = tier.stage(SMALL, KEYS[0], make_page(SMALL, 0), num_tokens=BLOCK_TOKENS)
    assert staged is not None

    (temp,) = [name for name in files_below(tmp_path) if name.endswith(".tmp")]
    parsed = paths.parse_temp_name(os.path.basename(temp))
    assert parsed is not None
    assert parsed.writer.process.pid == os.getpid()

    tier.discard(staged)
    assert temp not in files_below(tmp_path)


def test_a_block_without_an_opened_namespace_still_gets_its_manifest(tmp_path: Path) -> None:
    dump(PosixTier([str(tmp_path)]), SMALL, KEYS[0], make_page(SMALL, 0))

    assert Path(paths.manifest_path(str(tmp_path), SMALL.fingerprint)).exists()


def test_a_different_manifest_on_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    PosixTier([str(tmp_path)]).open_namespace(SMALL)
    manifest = Path(paths.manifest_path(str(tmp_path), SMALL.fingerprint))
    manifest.write_bytes(b"{}")

    tier = PosixTier([str(tmp_path)])
    with pytest.raises(TierError, match=str(manifest)):
        tier.open_namespace(SMALL)
    with pytest.raises(TierError, match=str(manifest)):
        tier.stage(SMALL, KEYS[0], make_page(SMALL, 0), num_tokens=BLOCK_TOKENS)


def test_many_openers_write_one_manifest(tmp_path: Path) -> None:
    tiers = [PosixTier([str(tmp_path / "store")]) for _ in range(8)]

    run_together(*[lambda tier=tier: tier.open_namespace(SMALL) for tier in tiers])

    names = sorted(os.path.basename(name) for name in files_below(tmp_path))
    assert names == ["manifest.json", paths.BACKEND_ID]


def test_a_store_that_is_emptied_while_in_use_fills_again(tmp_path: Path) -> None:
    """With its manifest, as long as its id stays: that needs no restart of anything."""
    tier = PosixTier([str(tmp_path / "store")])
    dump(tier, SMALL, KEYS[0], make_page(SMALL, 0))
    os.rename(tmp_path / "store", tmp_path / "gone")
    (tmp_path / "store").mkdir()
    shutil.copy(tmp_path / "gone" / paths.BACKEND_ID, tmp_path / "store")

    assert load(tier, SMALL, KEYS[0]) is ReadStatus.ABSENT
    assert dump(tier, SMALL, KEYS[0], make_page(SMALL, 0))

    assert files_below(tmp_path / "store") == files_below(tmp_path / "gone")


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("other", [bytes([1, 2, 4]), bytes([1, 3]), bytes([2])])
def test_directories_that_are_removed_while_in_use_are_made_again(
    tmp_path: Path, level: int, other: bytes
) -> None:
    """Whichever of those above a page is gone, and whether or not this process knew all of them."""
    one, another = (Key(start.ljust(32, b".")) for start in (bytes([1, 2, 3]), other))
    tier = PosixTier([str(tmp_path)])
    dump(tier, SMALL, one, make_page(SMALL, 0))
    block = Path(paths.block_path(str(tmp_path), SMALL.fingerprint, one))
    shutil.rmtree(block.parents[2 - level])

    # As a node cache does it, which opened the namespace long ago.
    staged = tier.stage(SMALL, another, make_page(SMALL, 0), num_tokens=BLOCK_TOKENS)
    assert staged is not None
    tier.publish(staged)
    assert load(tier, SMALL, another) == bytes(make_page(SMALL, 0))
    assert (block.parents[2] / paths.MANIFEST).exists()


def test_publishing_what_was_swept_is_an_error(tmp_path: Path) -> None:
    tier = PosixTier([str(tmp_path)])
    tier.open_namespace(SMALL)
    staged = tier.stage(SMALL, KEYS[0], make_page(SMALL, 0), num_tokens=BLOCK_TOKENS)
    assert staged is not None
    os.unlink(staged.ticket)

    with pytest.raises(TierError, match="can't be published"):
        tier.publish(staged)


def test_publishing_again_is_fine_when_the_first_answer_was_lost(tmp_path: Path) -> None:
    """NFS clients repeat a rename; the second one finds its source gone and the target there."""
    tier = PosixTier([str(tmp_path)])
    tier.open_namespace(SMALL)
    staged = tier.stage(SMALL, KEYS[0], make_page(SMALL, 0), num_tokens=BLOCK_TOKENS)
    assert staged is not None

    tier.publish(staged)
    tier.publish(staged)

    assert load(tier, SMALL, KEYS[0]) == content_of(SMALL, make_page(SMALL, 0))


@pytest.mark.parametrize("in_place", ["file", "directory"])
def test_something_else_under_the_name_of_a_block_is_no_exception(
    tmp_path: Path, in_place: str
) -> None:
    """A file where a directory should be, and the reverse: an I/O error in the result."""
    tier = PosixTier([str(tmp_path)])
    tier.open_namespace(SMALL)
    block = Path(paths.block_path(str(tmp_path), SMALL.fingerprint, KEYS[0]))
    if in_place == "directory":
        block.mkdir(parents=True)
    else:
        block.parent.parent.write_bytes(b"")

    page = make_page(SMALL, 0)
    read = tier.read(SMALL, KEYS[0], page)

    assert read.status in (ReadStatus.IO_ERROR, ReadStatus.CORRUPT)
    assert str(block) in read.detail


# -- several backends ----------------------------------------------------------------------


def fill(tier: Tier, namespace: TierNamespace = SMALL) -> None:
    tier.open_namespace(namespace)
    for i, key in enumerate(KEYS):
        dump(tier, namespace, key, make_page(namespace, i))


def backend_of_each_key(backends: list[str]) -> list[str]:
    """The one backend on which each key lies."""
    places = []
    for key in KEYS:
        candidates = [paths.block_path(each, SMALL.fingerprint, key) for each in backends]
        (place,) = [i for i, path in enumerate(candidates) if os.path.exists(path)]
        places.append(backends[place])
    return places


def test_keys_spread_over_all_backends(tmp_path: Path) -> None:
    backends = three_backends(tmp_path)
    fill(PosixTier(backends))

    counts = Counter(backend_of_each_key(backends))

    assert all(counts[backend] > len(KEYS) / 6 for backend in backends)


def test_neither_the_order_nor_the_path_of_backends_has_to_agree(tmp_path: Path) -> None:
    """Another node mounts the same backends elsewhere and lists them the other way round."""
    fill(PosixTier(three_backends(tmp_path)))
    os.mkdir(tmp_path / "node1")
    elsewhere = []
    for i, backend in enumerate(reversed(three_backends(tmp_path))):
        elsewhere.append(str(tmp_path / "node1" / f"mount{i}"))
        os.symlink(backend, elsewhere[-1])

    assert PosixTier(elsewhere).contains(SMALL, KEYS) == len(KEYS)


def test_an_added_backend_takes_keys_and_moves_no_others(tmp_path: Path) -> None:
    backends = three_backends(tmp_path)
    fill(PosixTier(backends[:2]))
    before = backend_of_each_key(backends[:2])

    tier = PosixTier(backends)
    tier.open_namespace(SMALL)
    found = [tier.contains(SMALL, [key]) == 1 for key in KEYS]
    fill(tier)

    for key, was_found, old_place in zip(KEYS, found, before, strict=True):
        taken = os.path.exists(paths.block_path(backends[2], SMALL.fingerprint, key))
        assert was_found != taken
        assert os.path.exists(paths.block_path(old_place, SMALL.fingerprint, key))
    assert 0 < found.count(False) < len(KEYS) / 2


def test_one_backend_under_two_names_is_refused(tmp_path: Path) -> None:
    os.mkdir(tmp_path / "disk")
    os.symlink(tmp_path / "disk", tmp_path / "again")

    with pytest.raises(TierError, match="are the same storage backend"):
        PosixTier([str(tmp_path / "disk"), str(tmp_path / "again")]).open_namespace(SMALL)


def test_a_damaged_backend_id_is_an_error_and_in_a_read_a_result(tmp_path: Path) -> None:
    backend = three_backends(tmp_path)[0]
    fill(PosixTier([backend]))
    Path(paths.backend_id_path(backend)).write_bytes(b"")

    tier = PosixTier([backend])

    with pytest.raises(TierError, match="not the id of a storage backend"):
        tier.contains(SMALL, KEYS)
    assert load(tier, SMALL, KEYS[0]) is ReadStatus.IO_ERROR


def test_an_id_that_is_edited_in_place_is_noticed(tmp_path: Path) -> None:
    tier, key = PosixTier([str(tmp_path)]), make_key(1)
    assert dump(tier, SMALL, key, make_page(SMALL, "a"))
    path = Path(paths.backend_id_path(str(tmp_path)))
    mine = path.read_text()
    other = mine.replace(mine[0], "1" if mine[0] != "1" else "2")
    with path.open("r+") as file:
        file.write(other)

    with pytest.raises(TierError, match="not the storage backend"):
        tier.stage(SMALL, make_key(2), make_page(SMALL, "b"), num_tokens=BLOCK_TOKENS)
    assert load(tier, SMALL, key) is ReadStatus.ABSENT
    path.write_text(mine)
    assert load(tier, SMALL, key) == bytes(make_page(SMALL, "a")[: SMALL.page_bytes])


def test_of_several_backends_a_damaged_id_costs_what_lies_there_and_all_writing(
    tmp_path: Path,
) -> None:
    backends = three_backends(tmp_path)
    fill(PosixTier(backends))
    places = backend_of_each_key(backends)
    Path(paths.backend_id_path(backends[1])).write_bytes(b"")

    tier = PosixTier(backends)

    with pytest.raises(TierError, match="not the id of a storage backend"):
        tier.open_namespace(SMALL)
    with pytest.raises(TierError, match="not the id of a storage backend"):
        fill(tier)
    found = [tier.contains(SMALL, [key]) == 1 for key in KEYS]
    assert found == [place != backends[1] for place in places]


def test_many_first_writers_agree_on_the_ids_of_backends(tmp_path: Path) -> None:
    tiers = [PosixTier(three_backends(tmp_path)) for _ in range(8)]

    run_together(*[lambda tier=tier: fill(tier) for tier in tiers])

    backend_of_each_key(three_backends(tmp_path))
    assert all(tier.contains(SMALL, KEYS) == len(KEYS) for tier in tiers)
