"""An etcd behind TLS, with its own authority, and with client certificates that it demands."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.pd.conftest import Fleet, until
from tests.pd.fleet.etcd_parts import (
    PATIENCE_S,
    EtcdServer,
    key_of,
    registrar_command,
    running_etcd,
)
from tests.pd.leftovers import LEFT_TO_THE_COLLECTOR
from tests.pd.security.certificates import Files
from ucm.pd.fleet.etcd import PREFIX, Etcd
from ucm.pd.fleet.etcd_access import EtcdAccess
from ucm.pd.fleet.etcd_gateway import EtcdError

# asyncio leaves the transport of a handshake that failed to the garbage collector.
pytestmark = [
    pytest.mark.process,
    *LEFT_TO_THE_COLLECTOR,
]


@pytest.fixture
def authority(tmp_path: Path) -> Files:
    return Files(tmp_path, "ours")


@pytest.fixture
def stranger(tmp_path: Path) -> Files:
    return Files(tmp_path, "strangers")


@pytest.fixture
def server(tmp_path: Path, authority: Files, wants_certificate: bool) -> Iterator[EtcdServer]:
    certificate, key = authority.issue("server")
    flags = ("--cert-file", certificate, "--key-file", key)
    if wants_certificate:
        flags += ("--client-cert-auth", "--trusted-ca-file", authority.ca)
    with running_etcd(tmp_path, scheme="https", flags=flags) as server:
        yield server


@pytest_asyncio.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest_asyncio.fixture
async def access(
    server: EtcdServer, authority: Files, session: aiohttp.ClientSession
) -> EtcdAccess:
    """One with which etcd answers, and does."""
    certificate, key = authority.issue("good")
    access = dataclasses.replace(
        server.access, ca_file=authority.ca, cert_file=certificate, key_file=key
    )

    async def answers() -> bool:
        return await problem(session, access) == ""

    await until(answers)
    return access


async def problem(session: aiohttp.ClientSession, access: EtcdAccess) -> str:
    """What the error says, or nothing."""
    try:
        await Etcd(session, access).range(PREFIX)
    except EtcdError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("wants_certificate", [False, True], ids=["server-only", "both"])
async def test_an_instance_is_registered_and_found_by_a_proxy_over_tls(
    access: EtcdAccess, server: EtcdServer, fleet: Fleet, session: aiohttp.ClientSession
):
    engine = await fleet.engine("a")
    flags = ["--etcd-ca-file", str(access.ca_file), "--etcd-cert-file", str(access.cert_file)]
    flags += ["--etcd-key-file", str(access.key_file)]
    command = registrar_command(str(engine.url.origin()), "prefill", server.address, *flags)
    registrar = await asyncio.to_thread(subprocess.Popen, command)
    etcd = Etcd(session, access)
    try:
        await fleet.start(0, 0, etcd=access)

        async def is_there() -> bool:
            async with fleet.client.get(fleet.proxy / "instances") as response:
                found = (await response.json())["instances"]
            return [str(engine.url.origin())] == [each["url"] for each in found]

        await until(is_there)
        assert [key_of(engine)] == list((await etcd.range(PREFIX)).values)
    finally:
        registrar.terminate()
        await asyncio.to_thread(registrar.wait, PATIENCE_S)
    assert {} == (await etcd.range(PREFIX)).values


@pytest.mark.parametrize("wants_certificate", [False])
async def test_an_etcd_that_a_stranger_vouches_for_is_not_asked(
    access: EtcdAccess, stranger: Files, session: aiohttp.ClientSession
):
    for ca_file in (stranger.ca, None):
        said = await problem(session, dataclasses.replace(access, ca_file=ca_file))
        assert "its certificate is not trusted: " in said
        assert said.endswith("look at --etcd-ca-file")
        assert "\n" not in said


@pytest.mark.parametrize("wants_certificate", [False])
async def test_an_etcd_that_has_the_certificate_of_another_machine_is_not_asked(
    access: EtcdAccess, tmp_path: Path, authority: Files, session: aiohttp.ClientSession
):
    certificate, key = authority.issue("elsewhere", "192.0.2.1")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    flags = ("--cert-file", certificate, "--key-file", key)
    with running_etcd(folder, scheme="https", flags=flags) as other:
        elsewhere = dataclasses.replace(access, endpoints=other.access.endpoints)

        async def is_refused() -> bool:
            return "IP address mismatch" in await problem(session, elsewhere)

        await until(is_refused)


@pytest.mark.parametrize("wants_certificate", [True])
async def test_an_etcd_that_wants_a_certificate_says_so(
    access: EtcdAccess, stranger: Files, session: aiohttp.ClientSession
):
    certificate, key = stranger.issue("bad")
    nobody = dataclasses.replace(access, cert_file=None, key_file=None)
    somebody = dataclasses.replace(access, cert_file=certificate, key_file=key)
    for wrong in (nobody, somebody):
        said = await problem(session, wrong)
        assert re.search("refuses our certificate, or wants one: look at --etcd-cert-file", said)


@pytest.mark.parametrize("wants_certificate", [True])
async def test_certificates_that_are_replaced_need_no_restart(
    access: EtcdAccess, tmp_path: Path, stranger: Files, session: aiohttp.ClientSession
):
    """Of both: the one that was trusted, and the one that is shown."""
    good = [access.ca_file, access.cert_file, access.key_file]
    bad = [stranger.ca, *stranger.issue("bad")]
    used = [str(tmp_path / f"used-{i}") for i in range(3)]
    names = ("ca_file", "cert_file", "key_file")
    etcd = Etcd(session, dataclasses.replace(access, **dict(zip(names, used, strict=True))))
    for i in range(3):
        shutil.copy(bad[i], used[i])
    with pytest.raises(EtcdError, match="--etcd-ca-file"):
        await etcd.range(PREFIX)

    shutil.copy(good[0], used[0])
    with pytest.raises(EtcdError, match="--etcd-cert-file"):
        await etcd.range(PREFIX)

    # One is there already and the other is not yet.
    os.unlink(used[2])
    with pytest.raises(EtcdError, match="--etcd-key-file"):
        await etcd.range(PREFIX)
    for i in range(3):
        shutil.copy(good[i], used[i])
    assert {} == (await etcd.range(PREFIX)).values


@pytest.mark.parametrize("wants_certificate", [False])
async def test_who_forgets_tls_or_has_it_in_vain_is_told(
    access: EtcdAccess, server: EtcdServer, tmp_path: Path, session: aiohttp.ClientSession
):
    plain = dataclasses.replace(server, scheme="http").access
    assert "wants TLS (https://)" in await problem(session, plain)

    folder = tmp_path / "plain"
    folder.mkdir()
    with running_etcd(folder) as other:
        in_vain = dataclasses.replace(
            access, endpoints=dataclasses.replace(other, scheme="https").access.endpoints
        )

        async def is_told() -> bool:
            return "it speaks no TLS: write http://" in await problem(session, in_vain)

        await until(is_told)
