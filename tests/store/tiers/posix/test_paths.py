from __future__ import annotations

import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.store.tiers.posix.tree import BlockName, block_of, quarantined_block_of
from ucm.store.blocks.keys import Key, TailKey
from ucm.store.processes import UNKNOWN, Process
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.writers import WriterName

BACKEND = "/mnt/kv"
FINGERPRINT = bytes(range(32))
KEY = Key(bytes(range(100, 132)))
FP_HEX = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
KEY_HEX = "6465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f80818283"


def below_backend(path: str) -> str:
    return os.path.relpath(path, BACKEND)


def test_names_on_disk_are_these() -> None:
    """Golden: other nodes run other versions, and find blocks by these names."""
    block = paths.block_path(BACKEND, FINGERPRINT, KEY)

    assert block == f"/mnt/kv/{FP_HEX}/64/65/{KEY_HEX}.kv"
    tail = paths.block_path(BACKEND, FINGERPRINT, Key(TailKey(KEY, 44)))
    assert tail == f"/mnt/kv/{FP_HEX}/64/65/{KEY_HEX}.44.kv"
    assert paths.namespace_dir(BACKEND, FINGERPRINT) == f"/mnt/kv/{FP_HEX}"
    assert paths.manifest_path(BACKEND, FINGERPRINT) == f"/mnt/kv/{FP_HEX}/manifest.json"
    assert paths.backend_id_path(BACKEND) == "/mnt/kv/ucm-backend-id"


def test_what_is_built_for_a_tail_says_how_many_tokens_it_has() -> None:
    key = Key(TailKey(KEY, 44))
    for path, parse in (
        (paths.block_path(BACKEND, FINGERPRINT, key), block_of),
        (paths.quarantine_path(BACKEND, FINGERPRINT, key), quarantined_block_of),
    ):
        name = parse(below_backend(path))
        assert name is not None
        assert isinstance(name.key, TailKey) and (name.key, name.key.num_tokens) == (KEY, 44)


@given(fingerprint=st.binary(min_size=32, max_size=32), key=st.binary(min_size=32, max_size=32))
def test_what_is_built_can_be_parsed(fingerprint: bytes, key: bytes) -> None:
    block = paths.block_path(BACKEND, fingerprint, Key(key))
    aside = paths.quarantine_path(BACKEND, fingerprint, Key(key))
    name = BlockName(fingerprint, Key(key))

    assert block_of(below_backend(block)) == name
    assert quarantined_block_of(below_backend(aside)) == name


def test_a_temporary_file_lies_beside_its_target_and_names_its_writer() -> None:
    target = paths.block_path(BACKEND, FINGERPRINT, KEY)

    temp = paths.temp_path(target)

    assert os.path.dirname(temp) == os.path.dirname(target)
    assert paths.temp_target(temp) == target
    parsed = paths.parse_temp_name(os.path.basename(temp))
    assert parsed is not None
    assert parsed.target == f"{KEY_HEX}.kv"
    assert parsed.writer.process.pid == os.getpid()
    assert parsed.writer.created_s > 1_700_000_000


@pytest.mark.parametrize("host", ["node1", "node1.example.com", "a.kv", "", "-", "x" * 300, "..."])
def test_whatever_a_host_is_called_its_pages_get_their_names(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    process = Process(host, "0123456789abcdef", 1, 2)
    monkeypatch.setattr(paths, "this_process", lambda: process)
    for target in (
        paths.block_path(BACKEND, FINGERPRINT, KEY),
        paths.block_path(BACKEND, FINGERPRINT, Key(TailKey(KEY, 65_535))),
        paths.manifest_path(BACKEND, FINGERPRINT),
        paths.backend_id_path(BACKEND),
    ):
        temp = paths.temp_path(target)
        assert paths.temp_target(temp) == target
        assert len(os.path.basename(temp)) <= 255
    quarantined = paths.quarantine_path(BACKEND, FINGERPRINT, KEY)
    assert quarantined_block_of(below_backend(quarantined)) == BlockName(FINGERPRINT, KEY)


@pytest.mark.parametrize("host", ["node1", "node1.example.com"])
def test_a_temporary_name_of_an_older_version_is_one_of_an_unknown_process(host: str) -> None:
    parsed = paths.parse_temp_name(f".{KEY_HEX}.kv.{host}-17-1700000000-0123456789abcdef.tmp")
    assert parsed is not None
    assert parsed.target == f"{KEY_HEX}.kv"
    assert parsed.writer == WriterName(Process(host, UNKNOWN, 17, 0), 1_700_000_000)


def test_a_clock_before_1970_makes_names_that_can_be_parsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine whose clock was never set can store all the same."""
    monkeypatch.setattr(time, "time", lambda: -86400.0)
    target = paths.block_path(BACKEND, FINGERPRINT, KEY)
    assert paths.temp_target(paths.temp_path(target)) == target
    quarantined = paths.quarantine_path(BACKEND, FINGERPRINT, KEY)
    assert quarantined_block_of(below_backend(quarantined)) is not None


def test_no_two_temporary_names_are_equal() -> None:
    target = paths.block_path(BACKEND, FINGERPRINT, KEY)

    assert len({paths.temp_path(target) for _ in range(1000)}) == 1000


@pytest.mark.parametrize(
    "path",
    [
        f"{FP_HEX}/64/65/{KEY_HEX}.kv.tmp",
        f"{FP_HEX}/64/65/{KEY_HEX}",
        f"{FP_HEX}/64/66/{KEY_HEX}.kv",
        f"{FP_HEX}/64/{KEY_HEX}.kv",
        f"{FP_HEX}/64/65/{KEY_HEX.upper()}.kv",
        f"{FP_HEX[:-2]}/64/65/{KEY_HEX}.kv",
        f"{FP_HEX}/64/65/{KEY_HEX}.kv\n",
        f"{FP_HEX}/manifest.json",
        f"/mnt/kv/{FP_HEX}/64/65/{KEY_HEX}.kv",
        f"quarantine/{FP_HEX}/{KEY_HEX}.kv.h-1-2-0123456789abcdef",
        "",
    ],
)
def test_other_names_are_not_blocks(path: str) -> None:
    assert block_of(path) is None


@pytest.mark.parametrize(
    "name",
    [
        f"{KEY_HEX}.kv",
        f".{KEY_HEX}.kv.tmp",
        f"{KEY_HEX}.kv.host-1-2-0123456789abcdef.tmp",
        f".{KEY_HEX}.kv.host-1-2-0123456789ABCDEF.tmp",
        f".{KEY_HEX}.kv.host-1-0123456789abcdef.tmp",
        f".{KEY_HEX}.kv.host-0123456789abcdef-1-2-0123456789abcdef.tmp",
        f".{KEY_HEX}.kv.host-0123456789abcdef-1-2-3-0123456789abcdef.tmp~",
        f".{KEY_HEX}.txt.host-1-2-0123456789abcdef.tmp",
        ".nfs000000000000a1b200000003",
        ".bashrc",
        "",
    ],
)
def test_other_names_are_not_temporary_files(name: str) -> None:
    """The sweep must never take a stranger's file for a stray one of ours."""
    assert paths.parse_temp_name(name) is None


def test_a_block_and_a_quarantined_block_are_not_taken_for_each_other() -> None:
    block = below_backend(paths.block_path(BACKEND, FINGERPRINT, KEY))
    aside = below_backend(paths.quarantine_path(BACKEND, FINGERPRINT, KEY))

    assert block_of(aside) is None
    assert quarantined_block_of(block) is None
