"""How much memory a node cache takes, on machines and in containers made of files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.errors import ConfigError
from ucm.store.node.limits import GIB, Left, be_taken_first, memory_left, rest_bytes, room_for

MIB = 1 << 20
UNLIMITED_V1 = 9223372036854771712


class Machine:
    """A /proc of its own, and memory groups where its mounts say they are."""

    def __init__(self, directory: Path, available_bytes: int = 64 * GIB) -> None:
        self.directory = directory
        self.proc = directory / "proc"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "meminfo").write_text(
            f"MemTotal: {1 << 30} kB\nMemAvailable: {available_bytes // 1024} kB\n"
        )
        self.say("cgroup", "")
        self.say("mountinfo", "22 1 0:20 / /proc rw - proc proc rw")

    def say(self, name: str, line: str) -> None:
        with (self.proc / "self" / name).open("a") as file:
            file.write(line + "\n" if line else "")

    def mount(self, at: str, *, v1: bool, top: str = "/") -> None:
        name = str(self.directory / at).replace(" ", r"\040")
        kind = "cgroup cgroup rw,memory" if v1 else "cgroup2 cgroup2 rw"
        self.say("mountinfo", f"35 31 0:32 {top} {name} rw,relatime shared:9 - {kind}")

    def group(self, path: str, files: dict[str, object]) -> None:
        directory = self.directory / path
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (directory / name).write_text(f"{content}\n")

    def left(self) -> Left:
        return memory_left(self.proc)


def v1(limit_bytes: int, used_bytes: int = 0, cached_bytes: int = 0) -> dict[str, object]:
    return {
        "memory.limit_in_bytes": limit_bytes,
        "memory.usage_in_bytes": used_bytes,
        "memory.stat": f"cache 5\ntotal_inactive_file {cached_bytes}\ntotal_active_file 0",
    }


def v2(limit_bytes: object, used_bytes: int = 0, cached_bytes: int = 0) -> dict[str, object]:
    return {
        "memory.max": limit_bytes,
        "memory.high": "max",
        "memory.current": used_bytes,
        "memory.stat": f"anon 5\ninactive_file 0\nactive_file {cached_bytes}",
    }


def test_a_machine_without_memory_groups_has_what_the_kernel_says(tmp_path: Path) -> None:
    assert Machine(tmp_path).left().nbytes == 64 * GIB


def test_the_tightest_of_all_groups_above_counts(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.say("cgroup", "0::/pods/pod/container")
    machine.mount("cg", v1=False)
    machine.group("cg", {"memory.stat": "inactive_file 0"})
    machine.group("cg/pods", v2("max", 50 * GIB))
    machine.group("cg/pods/pod", v2(10 * GIB, 8 * GIB))
    machine.group("cg/pods/pod/container", v2(9 * GIB, 2 * GIB))
    left = machine.left()
    assert left.nbytes == 2 * GIB
    assert left.where.endswith("cg/pods/pod/memory.max")
    machine.group("cg/pods/pod/container", {"memory.high": 3 * GIB})
    assert machine.left().nbytes == 1 * GIB


def test_version_1_beside_an_empty_version_2_counts(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.say("cgroup", "9:name=systemd:/\n4:cpu,memory:/a/b\n0::/")
    machine.mount("unified", v1=False)
    machine.mount("mem", v1=True)
    machine.group("unified", {})
    machine.group("mem", v1(UNLIMITED_V1, 3 * GIB))
    machine.group("mem/a", v1(4 * GIB, 1 * GIB))
    machine.group("mem/a/b", v1(UNLIMITED_V1, 1 * GIB))
    assert machine.left().nbytes == 3 * GIB


@pytest.mark.parametrize("path", ["/docker/abc", "/../../kubepods/abc", "/elsewhere/abc"])
def test_a_container_counts_the_group_that_is_mounted_in_it(tmp_path: Path, path: str) -> None:
    """Its path may be the host's, of which only its own group can be seen."""
    machine = Machine(tmp_path)
    machine.say("cgroup", f"4:memory:{path}")
    machine.mount("my groups/mem", v1=True, top="/docker/abc")
    machine.group("my groups/mem", v1(512 * MIB, 112 * MIB))
    assert machine.left().nbytes == 400 * MIB


@pytest.mark.parametrize("is_v1", [True, False])
def test_cached_files_are_free_and_a_full_group_has_nothing(tmp_path: Path, is_v1: bool) -> None:
    machine = Machine(tmp_path)
    machine.say("cgroup", "4:memory:/" if is_v1 else "0::/")
    machine.mount("cg", v1=is_v1)
    files = v1 if is_v1 else v2
    machine.group("cg", files(4 * GIB, 4 * GIB, 3 * GIB))
    assert machine.left().nbytes == 3 * GIB
    machine.group("cg", files(4 * GIB, 5 * GIB))
    assert machine.left().nbytes == 0
    with pytest.raises(ConfigError, match=r"0\.0 MiB of memory are left .*/cg/.*: give"):
        room_for(GIB, machine.left())


@given(
    configured=st.integers(0, 1 << 50),
    left=st.integers(2 * MIB, 1 << 50),
)
def test_whatever_is_configured_the_engines_keep_a_rest(configured: int, left: int) -> None:
    room = room_for(configured, Left(left, "here"))
    assert 0 < room.capacity_bytes <= left - rest_bytes(left)
    assert room.is_cut == (configured > room.capacity_bytes)
    if configured and not room.is_cut:
        assert room.capacity_bytes == configured


def test_the_rest_is_a_sixteenth_at_least_1_gib_and_at_most_half() -> None:
    assert rest_bytes(160 * GIB) == 10 * GIB
    assert rest_bytes(8 * GIB) == 1 * GIB
    assert rest_bytes(1 * GIB) == GIB // 2


def test_what_is_cut_is_said_with_the_limit_that_is_why() -> None:
    said = room_for(GIB, Left(400 * MIB, "/cg/memory.max")).said
    assert "not the 1.00 of cache_buffer_capacity_gb: 0.39 GiB are left (/cg/memory.max)" in said


def test_a_node_cache_that_may_not_be_taken_first_goes_on(tmp_path: Path) -> None:
    be_taken_first(tmp_path / "no proc")
