"""A node cache that serves a group: members of it, as users of their own, and nobody else."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.store.node.children import BECOME
from tests.store.node.support import (
    Engine,
    Place,
    alive,
    child,
    engine,
    log_of,
    make_keys,
    wait_until,
)
from ucm.config.settings import StoreSettings
from ucm.errors import ConfigError, ProtocolError
from ucm.store.client.link import NodeLink
from ucm.store.client.start import log_path
from ucm.store.node.lock import lock_path, try_lock
from ucm.store.node.rendezvous import ensure_private_directory, open_own_file
from ucm.store.node.trusted_users import Trust, trust_of

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else"),
]
GROUP = 54_321
ALICE, BOB, STRANGER = 50_001, 50_002, 50_003
COMMON = make_keys("common", 3)


@pytest.fixture
def shared(place: Place) -> Place:
    """Everybody may get as far as the directory of the socket, and into the backend."""
    place.directory.chmod(0o1777)
    place.store.chmod(0o777)
    return place


def group_settings(place: Place, **changes: Any) -> StoreSettings:
    return place.settings(group=str(GROUP), **{"file_mode": "666", **changes})


def as_user(
    what: str, settings: StoreSettings, uid: int, *, gid: int | None = None, groups: str = ""
) -> AbstractContextManager[subprocess.Popen[str]]:
    who = f"{uid}:{uid if gid is None else gid}:{groups}"
    return child(what, settings, env={**os.environ, BECOME: who})


def said_by(user: subprocess.Popen[str]) -> str:
    output, _ = user.communicate("go on\n", timeout=60.0)
    return output


@pytest.mark.parametrize(("gid", "groups"), [(GROUP, ""), (ALICE, f"4711,{GROUP}")])
def test_members_share_pages_with_the_user_who_has_started_it(
    shared: Place, gid: int, groups: str
) -> None:
    settings = group_settings(shared)
    with engine(settings) as root:
        root.dump(COMMON)
        with as_user("use", settings, ALICE, gid=gid, groups=groups) as alice:
            assert said_by(alice).startswith(f"{root.pid} (3, 0) True")
        assert root.load(make_keys("own", 3)) == (3, 0)
        assert len(root.status().sessions) == 1
        assert f"for uid 0, root and group {GROUP}" in log_of(settings)


def test_who_is_no_member_gets_nothing_whatever_the_path_allows(shared: Place) -> None:
    settings = group_settings(shared)
    with engine(settings) as root:
        # A file's rights are not what keeps them out.
        Path(settings.socket_path).parent.chmod(0o2771)
        Path(settings.socket_path).chmod(0o666)
        with child("intrude", settings) as stranger:
            assert said_by(stranger) == "0 0\n"
        assert "refused a connection: from uid 65534" in log_of(settings)
        with as_user("knock", settings, STRANGER, groups="4711") as stranger:
            said = f"node_cache_group: uid {STRANGER} is not in group {GROUP}: put it in"
            assert [said in line for line in said_by(stranger).splitlines()] == [True, True]
        assert len(root.status().sessions) == 1


def test_any_member_may_start_the_next_one_where_another_has_been_killed(shared: Place) -> None:
    settings = group_settings(shared)
    with as_user("serve", settings, ALICE, groups=f"{GROUP}") as alice:
        with engine(settings) as root:
            assert root.pid == alice.pid
            root.dump(COMMON)
            root.wait_written()
            with as_user("use", settings, BOB, gid=GROUP) as bob:
                assert said_by(bob).startswith(f"{alice.pid} (3, 0) True")
        alice.kill()
        alice.wait()
    with (
        as_user("serve", settings, BOB, gid=GROUP) as bob,
        as_user("use", settings, ALICE, groups=f"{GROUP}") as alice,
    ):
        assert said_by(alice).startswith(f"{bob.pid} (3, 3) True")
        for path in (settings.socket_path, lock_path(settings.socket_path)):
            info = os.stat(path)
            assert (info.st_gid, stat.S_IMODE(info.st_mode)) == (GROUP, 0o660)
        directory = os.stat(os.path.dirname(settings.socket_path))
        assert (directory.st_gid, stat.S_IMODE(directory.st_mode)) == (GROUP, 0o2770)
        bob.send_signal(signal.SIGTERM)
        wait_until(lambda: not alive(bob.pid), "it has left")
        assert not os.path.exists(settings.socket_path)


def test_a_member_writes_the_log_that_another_has_begun(shared: Place) -> None:
    settings = group_settings(shared, idle_exit_s=0.2)
    with Engine(settings) as root:
        pid = root.pid
    wait_until(lambda: not alive(pid), "it has left")
    info = os.stat(log_path(settings))
    assert (info.st_gid, stat.S_IMODE(info.st_mode)) == (GROUP, 0o660)


def test_a_member_without_the_setting_trusts_nobody_elses(shared: Place) -> None:
    settings = group_settings(shared)
    with (
        as_user("serve", settings, ALICE, groups=f"{GROUP}"),
        pytest.raises(ConfigError, match=f"belongs to uid {ALICE}, who could pose as"),
    ):
        Engine(shared.settings())


def test_who_is_no_member_is_not_believed_to_be_a_node_cache(shared: Place) -> None:
    settings = group_settings(shared)
    trust = trust_of(settings)
    ensure_private_directory(settings.socket_path, trust)
    directory = Path(settings.socket_path).parent
    directory.chmod(0o777)
    with as_user("pose", settings, STRANGER) as stranger:
        directory.chmod(0o2770)
        with pytest.raises(ProtocolError, match=f"uid {STRANGER} serves at .* not to be trusted"):
            Engine(settings)
        assert stranger.stdout is not None and stranger.stdout.readline() == "0\n"


@pytest.mark.parametrize(
    ("mode", "gid"),
    [(0o2750, GROUP), (0o770, GROUP), (0o2777, GROUP), (0o3770, GROUP), (0o2770, 7)],
)
def test_a_directory_that_is_not_the_groups_alone_is_refused(
    shared: Place, mode: int, gid: int
) -> None:
    settings = group_settings(shared)
    directory = Path(settings.socket_path).parent
    directory.mkdir()
    os.chown(directory, 0, gid)
    directory.chmod(mode)

    with pytest.raises(ConfigError, match=f"not the group's alone: chgrp {GROUP} and chmod 2770"):
        Engine(settings)
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("planted", ["symlink", "hard link", "fifo"])
def test_what_a_member_plants_in_place_of_the_lock_gets_no_rights_and_is_not_written(
    shared: Place, planted: str
) -> None:
    settings = group_settings(shared)
    trust = trust_of(settings)
    ensure_private_directory(settings.socket_path, trust)
    path = lock_path(settings.socket_path)
    precious = shared.directory / "precious"
    precious.write_text("keep me")
    precious.chmod(0o600)
    if planted == "symlink":
        os.symlink(precious, path)
    elif planted == "hard link":
        os.link(precious, path)
    else:
        os.mkfifo(path)

    for attempt in (try_lock, lambda at, by: open_own_file(f"{at}.lock", os.O_RDWR, by)):
        with pytest.raises(ConfigError, match="remove it"):
            attempt(settings.socket_path, trust)
    assert precious.read_text() == "keep me"
    assert stat.S_IMODE(precious.stat().st_mode) == 0o600


def test_a_group_that_stands_for_all_that_cannot_be_named_is_refused(place: Place) -> None:
    """In a user namespace every group from outside looks like this one."""
    overflow = Path("/proc/sys/kernel/overflowgid").read_text().strip()
    with pytest.raises(ConfigError, match="every group that it can't name"):
        trust_of(place.settings(group=overflow))


def test_an_engine_that_is_no_member_goes_on_and_says_why(place: Place) -> None:
    settings = place.settings(group="no-such-group")
    link = NodeLink(settings, engine_id="one")
    try:
        wait_until(lambda: link.problem, "it is refused")
        assert str(link.problem) == (
            "node_cache_group: no-such-group: no such group on this machine: give its number"
        )
    finally:
        link.close()


def test_trust_is_own_root_and_the_group() -> None:
    owner = Trust(GROUP)
    assert owner.user(0) and owner.user(os.getuid()) and not owner.user(ALICE)
