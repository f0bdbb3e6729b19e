"""A node cache whose place is disturbed, shared or somebody else's."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import signal
import stat
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.faults.mounts import mount_tmpfs, own_mounts
from tests.store.node.support import (
    SOON_S,
    Engine,
    Place,
    alive,
    client_of,
    engine,
    log_of,
    make_keys,
    wait_until,
)
from ucm.errors import ConfigError
from ucm.store.client.link import NodeLink
from ucm.store.client.start import connect_or_start, log_path
from ucm.store.node.lock import lock_path

pytestmark = pytest.mark.process
KEYS = make_keys("a", 4)


def socket_of(place: Place) -> Path:
    return Path(place.settings().socket_path)


@pytest.mark.parametrize("gone", ["socket", "lock and socket", "directory"])
def test_a_node_cache_whose_place_is_cleared_up_is_found_again(place: Place, gone: str) -> None:
    """By a logout, or by what cleans up old temporary files: nobody needs to start another."""
    settings = place.settings()
    with engine(settings, "one/0") as one:
        one.dump(KEYS)
        if gone == "directory":
            shutil.rmtree(socket_of(place).parent)
        else:
            socket_of(place).unlink()
        if gone == "lock and socket":
            os.unlink(lock_path(settings.socket_path))
        wait_until(socket_of(place).exists, "it listens anew")

        with engine(settings, "two/0") as two:
            assert two.pid == one.pid
            assert two.load(KEYS) == (4, 0)
        assert stat.S_IMODE(socket_of(place).parent.stat().st_mode) == 0o700
        assert place.pids() == [one.pid]


def test_a_place_that_is_cleared_up_again_and_again_is_said_once_a_minute(place: Place) -> None:
    settings = place.settings()
    with Engine(settings) as one:
        for _ in range(3):
            socket_of(place).unlink()
            wait_until(socket_of(place).exists, "it listens anew")
        with Engine(settings, "two/0") as two:
            assert two.pid == one.pid
    assert log_of(settings).count("listening anew") == 1


@pytest.mark.parametrize("gone", ["socket", "lock"])
def test_a_node_cache_without_free_descriptors_waits_for_them_to_renew_its_place(
    place: Place, gone: str
) -> None:
    settings = place.settings()
    with engine(settings, "one/0") as one:
        one.dump(KEYS)
        soft, hard = resource.prlimit(one.pid, resource.RLIMIT_NOFILE)
        # Nor for one in place of one that was closed.
        resource.prlimit(one.pid, resource.RLIMIT_NOFILE, (3, hard))
        os.unlink(settings.socket_path if gone == "socket" else lock_path(settings.socket_path))
        said = "could not listen" if gone == "socket" else "could not renew the lock"
        wait_until(lambda: said in log_of(settings), "it has tried in vain")
        assert one.load(KEYS) == (4, 0)

        resource.prlimit(one.pid, resource.RLIMIT_NOFILE, (soft, hard))
        wait_until(lambda: os.path.exists(lock_path(settings.socket_path)), "the lock is back")
        wait_until(socket_of(place).exists, "it listens anew")
        with engine(settings, "two/0") as two:
            assert two.pid == one.pid
            assert two.load(KEYS) == (4, 0)


@own_mounts
def test_a_node_cache_on_a_full_disk_waits_for_room_to_renew_its_lock(place: Place) -> None:
    settings = place.settings()
    directory = socket_of(place).parent
    directory.mkdir(mode=0o700, exist_ok=True)
    mount_tmpfs(directory, size_bytes=1 << 20)
    os.chmod(directory, 0o700)
    with engine(settings, "one/0") as one:
        one.dump(KEYS)
        fill = directory / "fill"
        with fill.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        os.unlink(lock_path(settings.socket_path))
        wait_until(lambda: os.path.exists(lock_path(settings.socket_path)), "it has tried")
        time.sleep(2.5)  # it looks once a second
        assert one.load(KEYS) == (4, 0)

        fill.unlink()
        with engine(settings, "two/0") as two:
            assert two.pid == one.pid


def test_a_file_at_the_sockets_name_is_not_removed(place: Place) -> None:
    socket_of(place).parent.mkdir(mode=0o700, exist_ok=True)
    socket_of(place).write_text("somebody's work")
    with pytest.raises(ConfigError, match=r"is there, and is no socket: remove it, or set another"):
        connect_or_start(place.settings(), session="e/0", role="scheduler", timeout_s=SOON_S)

    assert socket_of(place).read_text() == "somebody's work"


def test_a_node_cache_that_has_lost_its_place_to_another_leaves_it_alone(place: Place) -> None:
    settings = place.settings()
    with Engine(settings, "one/0") as one:
        # It can't look before the next one is there.
        os.kill(one.pid, signal.SIGSTOP)
        shutil.rmtree(socket_of(place).parent)
        with Engine(settings, "two/0") as two:
            assert two.pid != one.pid
            os.kill(one.pid, signal.SIGCONT)
            wait_until(lambda: not alive(one.pid), "the first has left")
            with Engine(settings, "three/0") as three:
                assert three.pid == two.pid


def test_a_socket_right_in_a_directory_of_everybody_is_refused(place: Place) -> None:
    """Nobody can replace what is another's there, but anybody may be first."""
    shared = place.directory / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    settings = place.settings("../tmp/x")

    with pytest.raises(ConfigError, match=r"others may write to .*/tmp.*set it to .*/ucm/x\.sock"):
        connect_or_start(settings, session="x/0", role="scheduler", timeout_s=1.0)
    assert list(shared.iterdir()) == []


def test_a_log_that_is_a_link_is_not_written_through(place: Place) -> None:
    settings = place.settings()
    precious = place.directory / "precious"
    precious.write_text("keep me")
    socket_of(place).parent.mkdir(mode=0o700)
    os.symlink(precious, log_path(settings))

    with pytest.raises(ConfigError, match=r"\.log: it is a link; remove it"):
        connect_or_start(settings, session="x/0", role="scheduler", timeout_s=1.0)
    assert precious.read_text() == "keep me"
    assert place.pids() == []


def test_an_engine_that_wants_other_files_is_refused_and_stores_nothing(place: Place) -> None:
    other = place.directory / "other"
    other.mkdir()
    settings = place.settings()
    with engine(settings, "one/0"):
        wanting = place.settings(storage_backends=(str(other),))
        with closing(NodeLink(wanting, engine_id="two")) as link:
            wait_until(lambda: link.problem, "it is refused")
            assert isinstance(link.problem, ConfigError)
            message = str(link.problem)
            assert link.poll(0.5) == []
            assert link.client is None

    assert f"serves Cache|Posix in {place.store}, " in message
    assert f"wants Cache|Posix in {other}: " in message
    assert list(other.iterdir()) == []


def test_settings_without_effect_are_in_the_log_of_the_engine(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with Engine(place.settings(), "one/0") as one:
        changed = place.settings(write_threads=9, idle_exit_s=61.0)
        with closing(NodeLink(changed, engine_id="two")) as link:
            assert client_of(link).welcome.pid == one.pid
        # Once, however often this process connects.
        Engine(changed, "three/0").close()
    said = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    (warning,) = (each for each in said if "other settings" in each)
    assert "node_cache_idle_exit_s 61.0 (it has 60.0), posix_write_threads 9 (it has 4)" in warning
