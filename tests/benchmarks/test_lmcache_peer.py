"""How LMCache is set up as a contender; that it hits is shown by the benchmarks themselves."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import psutil
import pytest

from benchmarks import contenders, lmcache_peer
from benchmarks.lmcache_peer import LmcacheNode

PINS = Path(__file__).resolve().parents[2] / "requirements/peers.txt"


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where its packages would be; none are."""
    monkeypatch.setattr(lmcache_peer, "ENVIRONMENT", tmp_path / "peers")
    return tmp_path / "peers"


def names(folder: Path) -> list[str]:
    return [each.name for each in contenders.contenders(folder, None)]


def test_without_its_packages_it_is_left_out_in_one_line_that_names_the_command(
    environment: Path, tmp_path: Path
) -> None:
    (line,) = contenders.left_out()
    assert "lmcache" in line and line.endswith("make peers")
    assert not [name for name in names(tmp_path) if "lmcache" in name]


def test_with_its_packages_it_is_there_on_one_node_and_on_two(
    environment: Path, tmp_path: Path
) -> None:
    environment.mkdir()
    (environment / ".ready").touch()
    assert contenders.left_out() == []
    assert [name for name in names(tmp_path) if "lmcache" in name] == ["lmcache", "lmcache-files"]


def test_two_nodes_have_files_in_common_and_nothing_else(environment: Path, tmp_path: Path) -> None:
    environment.mkdir()
    (environment / ".ready").touch()
    found = {each.name: each for each in contenders.contenders(tmp_path, None)}
    left, right = found["lmcache-files"].nodes
    assert left.files == right.files != found["lmcache"].nodes[0].files
    assert len({left.port, left.http_port, right.port, right.http_port}) == 4
    for node, told in (
        (left, found["lmcache-files"].prefill),
        (right, found["lmcache-files"].decode),
    ):
        assert told["kv_connector_extra_config"]["lmcache.mp.port"] == node.port


def test_its_chunks_are_as_long_as_our_blocks() -> None:
    assert lmcache_peer.CHUNK_TOKENS == contenders.BLOCK_TOKENS


def test_shared_memory_of_engines_that_are_gone_is_removed_and_of_others_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmcache_peer, "SHARED_MEMORY", tmp_path)
    alive = psutil.Process().pid
    gone = next(pid for pid in range(2**22 - 1, 0, -1) if not psutil.pid_exists(pid))
    for pid in (alive, gone):
        (tmp_path / f"lmcache_kv_{pid}_0").touch()
    (tmp_path / "vllm_offload_7.mmap").touch()
    lmcache_peer.remove_shared_memory()
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        f"lmcache_kv_{alive}_0",
        "vllm_offload_7.mmap",
    ]


def test_every_package_of_peers_is_pinned() -> None:
    lines = [line for line in PINS.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+", line)] == []


def test_a_server_is_told_its_node_and_is_ready_when_it_says_so(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}

    def note(command: list[str], **more: object) -> None:
        seen.update(command=command, **more)

    monkeypatch.setattr(lmcache_peer, "HttpServer", note)
    node = LmcacheNode.new("left", files=tmp_path / "files", dram_gb=2.0)
    node.start(tmp_path / "log")
    command = seen["command"]
    assert isinstance(command, list)
    words = dict(itertools.pairwise(command))
    assert words["--port"] == str(node.port) and words["--l1-size-gb"] == "2.0"
    assert str(tmp_path / "files") in words["--l2-adapter"]
    assert seen["health_path"] == "/healthcheck" and seen["port"] == node.http_port
