"""An etcd with authentication enabled, whose tokens expire, and users whose roles are limited."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.pd.conftest import Fleet, until
from tests.pd.fleet.etcd_parts import (
    PATIENCE_S,
    RETRY_S,
    EtcdServer,
    etcd_binary,
    key_of,
    registrar_command,
    running_etcd,
)
from ucm.pd.fleet.etcd import PREFIX, Etcd, Registration
from ucm.pd.fleet.etcd_access import EtcdAccess
from ucm.pd.fleet.etcd_gateway import EtcdError, Event
from ucm.pd.fleet.follow import follow

pytestmark = pytest.mark.process

TOKEN_TTL_S = 1
# etcd looks for old tokens once a second.
EXPIRY_S = 2.2
PASSWORD = "not secret"


def token_flags(folder: Path, kind: str) -> tuple[str, ...]:
    """Tokens that etcd remembers, or that it has signed."""
    if kind == "simple":
        return ("--auth-token-ttl", str(TOKEN_TTL_S))
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private, public = folder / "token.pem", folder / "token.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    ttl = f"ttl={TOKEN_TTL_S}s"
    return ("--auth-token", f"jwt,pub-key={public},priv-key={private},sign-method=RS256,{ttl}")


@dataclasses.dataclass
class Guarded:
    """An etcd, and what is asked of it."""

    server: EtcdServer
    session: aiohttp.ClientSession
    folder: Path

    def access(self, user: str, password: str = PASSWORD) -> EtcdAccess:
        file = self.folder / f"password-of-{user}"
        file.touch(mode=0o600)
        file.write_text(f"{password}\n")
        return dataclasses.replace(self.server.access, user=user, password_file=str(file))

    def etcd(self, user: str, password: str = PASSWORD) -> Etcd:
        return Etcd(self.session, self.access(user, password))

    async def control(self, *command: str) -> None:
        """As root, whether authentication is enabled or not."""
        done = await asyncio.to_thread(
            subprocess.run,
            [f"{etcd_binary()}ctl", "--endpoints", self.server.address, *command],
            env={"ETCDCTL_API": "3", "ETCDCTL_USER": f"root:{PASSWORD}"},
            capture_output=True,
            timeout=PATIENCE_S,
        )
        assert 0 == done.returncode, done.stderr

    async def enable(self) -> None:
        await self.control("user", "add", f"root:{PASSWORD}")
        await self.control("user", "grant-role", "root", "root")
        for user, right in (("registrar", "readwrite"), ("proxy", "read"), ("guest", "")):
            await self.control("user", "add", f"{user}:{PASSWORD}")
            await self.control("role", "add", user)
            if right:
                await self.control(
                    "role", "grant-permission", user, right, PREFIX, f"{PREFIX[:-1]}0"
                )
            await self.control("user", "grant-role", user, user)
        await self.control("auth", "enable")

    async def until_it_answers(self) -> None:
        async def answers() -> bool:
            try:
                await Etcd(self.session, self.server.access).range(PREFIX)
            except EtcdError as error:
                return "wants a user" in str(error)
            return True

        await until(answers)


@pytest.fixture
def server(tmp_path: Path, kind: str) -> Iterator[EtcdServer]:
    # The cheapest hash of passwords: it is not what is tried.
    flags = ("--bcrypt-cost", "4", *token_flags(tmp_path, kind))
    with running_etcd(tmp_path, flags=flags) as server:
        yield server


@pytest_asyncio.fixture
async def guarded(server: EtcdServer, tmp_path: Path) -> AsyncIterator[Guarded]:
    """Not enabled yet."""
    async with aiohttp.ClientSession() as session:
        guarded = Guarded(server, session, tmp_path)
        await guarded.until_it_answers()
        yield guarded


async def watched(etcd: Etcd, revision: int, wanted: Callable[[Event], bool]) -> None:
    """As a follower does: a watch that ends is begun again."""
    while True:
        async for batch in etcd.watch(PREFIX, revision=revision, for_s=PATIENCE_S):
            if any(map(wanted, batch)):
                return


both = pytest.mark.parametrize("kind", ["simple", "jwt"])
simple = pytest.mark.parametrize("kind", ["simple"])


@simple
async def test_a_registrar_and_a_proxy_need_a_right_to_the_instances_alone(
    guarded: Guarded, fleet: Fleet
):
    await guarded.enable()
    engine = await fleet.engine("a")
    access = guarded.access("registrar")
    flags = ["--etcd-user", "registrar", "--etcd-password-file", str(access.password_file)]
    address = guarded.server.address
    command = registrar_command(str(engine.url.origin()), "prefill", address, *flags)
    registrar = await asyncio.to_thread(subprocess.Popen, command)
    seen: list[dict[str, Registration]] = []
    following = asyncio.create_task(
        follow(guarded.etcd("proxy"), lambda now: seen.append(dict(now)), retry_s=RETRY_S)
    )
    try:

        async def is_seen() -> bool:
            return bool(seen) and key_of(engine) in seen[-1]

        await until(is_seen)
    finally:
        registrar.terminate()
        assert 0 == await asyncio.to_thread(registrar.wait, PATIENCE_S)

    async def is_gone() -> bool:
        return seen[-1] == {}

    await until(is_gone)
    following.cancel()
    with pytest.raises(EtcdError, match="role of user proxy lacks a right"):
        await guarded.etcd("proxy").put(f"{PREFIX}x", b"")


@simple
async def test_what_is_wrong_with_a_user_is_one_line_that_says_what_to_look_at(guarded: Guarded):
    await guarded.enable()
    url = f"http://{guarded.server.address}"
    for etcd, what in (
        (guarded.etcd("proxy", "wrong"), "etcd refuses user proxy: "),
        (guarded.etcd("nobody"), "etcd refuses user nobody: "),
        (guarded.etcd("guest"), "kv/range: etcdserver: permission denied: the role of user guest"),
        (Etcd(guarded.session, guarded.server.access), "kv/range: etcd wants a user: give --etcd-"),
    ):
        with pytest.raises(EtcdError) as info:
            await etcd.range(PREFIX)
        assert str(info.value).startswith(f"{url}: {what}")
        assert "\n" not in str(info.value)
        assert 0 == etcd.num_lost


@simple
async def test_a_watch_without_a_right_is_an_error_and_no_endless_attempt(guarded: Guarded):
    await guarded.enable()
    etcd = guarded.etcd("guest")
    with pytest.raises(EtcdError, match="permission denied"):
        await asyncio.wait_for(watched(etcd, 1, lambda _: False), PATIENCE_S)


@both
async def test_a_token_that_has_expired_is_renewed(guarded: Guarded):
    """For a call, and for a watch that is refused for it."""
    await guarded.enable()
    etcd = guarded.etcd("registrar")
    await etcd.put(f"{PREFIX}x", b"1")
    revision = (await etcd.range(PREFIX)).revision
    await asyncio.sleep(EXPIRY_S)
    await etcd.put(f"{PREFIX}x", b"2")
    await asyncio.sleep(EXPIRY_S)
    await asyncio.wait_for(watched(etcd, revision, lambda each: each.value == b"2"), PATIENCE_S)
    assert 0 == etcd.num_lost


@pytest.mark.parametrize("kind", ["jwt"])
async def test_who_follows_sees_all_and_complains_of_nothing_while_tokens_expire(
    guarded: Guarded, caplog: pytest.LogCaptureFixture
):
    await guarded.enable()
    seen: list[dict[str, Registration]] = []
    etcd = guarded.etcd("proxy")
    with caplog.at_level(logging.INFO):
        following = asyncio.create_task(
            follow(etcd, lambda now: seen.append(dict(now)), retry_s=RETRY_S)
        )
        for i in range(4):
            record = Registration("worker", f"http://x:{i + 1}", str(i))
            await guarded.etcd("registrar").put(record.key, record.encode())

            async def is_seen(key: str = record.key) -> bool:
                return bool(seen) and key in seen[-1]

            await until(is_seen)
            await asyncio.sleep(TOKEN_TTL_S)
        following.cancel()
    assert [] == [each.message for each in caplog.records if each.name.startswith("ucm")]
    assert all(len(a) <= len(b) for a, b in itertools.pairwise(seen))


@both
async def test_a_change_of_users_and_a_restart_of_etcd_need_no_new_start_of_ours(guarded: Guarded):
    await guarded.enable()
    etcd = guarded.etcd("registrar")
    await etcd.put(f"{PREFIX}x", b"1")
    await guarded.control("user", "add", f"another:{PASSWORD}")
    await etcd.put(f"{PREFIX}x", b"2")

    guarded.server.kill()
    with pytest.raises(EtcdError):
        await etcd.get(f"{PREFIX}x")
    guarded.server.start()
    await guarded.until_it_answers()
    assert b"2" == await etcd.get(f"{PREFIX}x")


@simple
async def test_a_password_that_is_replaced_needs_no_restart(guarded: Guarded):
    await guarded.enable()
    etcd = guarded.etcd("registrar", "wrong")
    with pytest.raises(EtcdError, match="--etcd-user and its password"):
        await etcd.range(PREFIX)
    guarded.access("registrar", PASSWORD)
    assert {} == (await etcd.range(PREFIX)).values


@simple
async def test_authentication_may_be_enabled_under_who_has_a_user_already(
    guarded: Guarded, caplog: pytest.LogCaptureFixture
):
    etcd = guarded.etcd("registrar")
    await etcd.put(f"{PREFIX}x", b"1")
    await etcd.put(f"{PREFIX}x", b"2")
    (warning,) = [each.message for each in caplog.records if each.name.startswith("ucm")]
    assert "authentication is not enabled" in warning

    await guarded.enable()
    assert b"2" == await etcd.get(f"{PREFIX}x")
    with pytest.raises(EtcdError, match="wants a user"):
        await Etcd(guarded.session, guarded.server.access).range(PREFIX)
