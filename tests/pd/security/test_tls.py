"""TLS between proxy and engines, and of the proxy's own, with real handshakes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from examples.cluster.processes import free_port
from tests.pd.conftest import Engine, Fleet, until
from tests.pd.leftovers import LEFT_TO_THE_COLLECTOR
from tests.pd.legs.test_websocket import REALTIME, echo
from tests.pd.security.certificates import Files
from ucm.pd import toy_proxy_server
from ucm.pd.flags import ProxySettings
from ucm.pd.fleet.etcd_access import EtcdAccess, etcd_endpoints
from ucm.pd.fleet.instance import Role
from ucm.pd.register import RegisterSettings, Registrar
from ucm.pd.server.serve import serve

NEVER_S = 1000.0

# asyncio leaves the transport of a handshake that failed to the garbage collector.
pytestmark = [*LEFT_TO_THE_COLLECTOR]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path, "ours")


async def secured(fleet: Fleet, name: str, context: ssl.SSLContext) -> Engine:
    engine = await fleet.engine(name)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", engine.handle)
    server = TestServer(app, scheme="https")
    await server.start_server(ssl=context)
    fleet.servers[f"{name} secured"] = server
    engine.url = server.make_url("/")
    return engine


async def start(fleet: Fleet, context: ssl.SSLContext, **settings: object) -> None:
    """Engines of both roles that speak TLS."""
    prefill, decode = [await secured(fleet, name, context) for name in ("prefill", "decode")]
    urls = {"prefillers": (prefill.url.origin(),), "decoders": (decode.url.origin(),)}
    await fleet.start(0, 0, **{**urls, **settings})
    fleet.prefill, fleet.decode = [prefill], [decode]


async def status(fleet: Fleet, path: str = "v1/completions") -> int:
    async with await fleet.post(path, prompt="a") as response:
        return response.status


@contextlib.asynccontextmanager
async def served(**settings: object) -> AsyncIterator[str]:
    """A proxy as its process serves it; where, without the scheme."""
    port = free_port()
    made = ProxySettings(host="127.0.0.1", port=port, health_interval_s=NEVER_S, **settings)
    serving = asyncio.create_task(serve(made))
    try:
        yield f"localhost:{port}"
    finally:
        serving.cancel()
        await asyncio.wait({serving})


async def test_engines_with_certificates_of_a_private_authority_are_reached(fleet, files):
    await start(
        fleet,
        files.server(*files.issue("engine")),
        instance_ca_file=files.ca,
        health_interval_s=0.05,
        admin_key="admin",
    )

    assert 200 == await status(fleet)
    headers = {"X-Ucm-Admin-Key": "admin"}
    async with fleet.client.post(fleet.proxy / "sleep", headers=headers) as response:
        assert 200 == response.status
    fleet.decode[0].answer = echo
    async with fleet.client.ws_connect(fleet.proxy / REALTIME) as socket:
        await socket.receive_json()

    async def looked() -> bool:
        paths = [{each.path for each in engine.asked} for engine in fleet.prefill + fleet.decode]
        return all({"/health", "/sleep"} <= each for each in paths)

    await until(looked)


@pytest.mark.parametrize("trusts", [False, True])
async def test_an_engine_that_is_not_who_it_says_hears_nothing(fleet, files, tmp_path, trusts):
    """Signed by nobody who is trusted, or for another host."""
    other = Files(tmp_path, "other")
    signer, hosts = (files, ["elsewhere.example"]) if trusts else (other, [])
    await start(
        fleet,
        signer.server(*signer.issue("engine", *hosts)),
        instance_ca_file=files.ca,
    )
    async with await fleet.post(prompt="a") as response:
        assert 502 == response.status
        assert "certificate verify failed" in (await response.json())["error"]["message"]
    assert [] == fleet.decode[0].asked + fleet.prefill[0].asked


async def test_engines_that_want_a_certificate_get_the_proxys(fleet, files):
    context = files.server(*files.issue("engine"), wants_client=True)
    cert, key = files.issue("proxy", "proxy.example")
    await start(
        fleet,
        context,
        instance_ca_file=files.ca,
        instance_cert_file=cert,
        instance_key_file=key,
    )
    assert 200 == await status(fleet)
    assert 1 == len(fleet.prefill[0].asked)


async def test_without_one_they_are_not_reached(fleet, files):
    context = files.server(*files.issue("engine"), wants_client=True)
    await start(fleet, context, instance_ca_file=files.ca)
    assert 502 == await status(fleet)
    assert [] == fleet.decode[0].asked


async def test_an_authority_that_is_replaced_is_trusted_from_then_on(fleet, files, tmp_path):
    other = Files(tmp_path, "other")
    await start(fleet, other.server(*other.issue("engine")), instance_ca_file=files.ca)
    assert 502 == await status(fleet)

    os.replace(other.ca, files.ca)

    async def is_reached() -> bool:
        return await status(fleet) == 200

    await until(is_reached)


async def test_a_file_that_goes_wrong_later_changes_nothing(fleet, files, caplog):
    await start(fleet, files.server(*files.issue("engine")), instance_ca_file=files.ca)
    files.spoil()

    async def is_said() -> bool:
        return "the certificates stay as they are: --instance-ca-file: " in caplog.text

    await until(is_said)
    assert 200 == await status(fleet)


async def test_the_proxy_serves_tls_and_takes_on_a_renewed_certificate(fleet, files, tmp_path):
    await fleet.start(1, 1)
    cert, key = files.issue("proxy")
    urls = {"workers": (fleet.decode[0].url.origin(),)}
    async with served(ssl_certfile=cert, ssl_keyfile=key, **urls) as where:

        async def shown() -> bytes | None:
            try:
                connecting = asyncio.open_connection(
                    *where.split(":"), ssl=files.client(), server_hostname="localhost"
                )
                _, writer = await asyncio.wait_for(connecting, 10)
            except OSError:
                return None
            der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            writer.close()
            return der

        async def is_there() -> bool:
            return await shown() is not None

        await until(is_there)
        request = {"json": {"prompt": "a"}, "ssl": files.client()}
        async with fleet.client.post(f"https://{where}/v1/completions", **request) as response:
            assert (200, {"from": "decode0"}) == (response.status, await response.json())
        with pytest.raises(aiohttp.ClientError):
            await fleet.client.get(f"http://{where}/health")

        before = await shown()
        files.issue("proxy")

        async def is_renewed() -> bool:
            return await shown() not in (None, before)

        await until(is_renewed)


async def test_a_registrar_reaches_its_instance_as_proxies_do(fleet, files):
    context = files.server(*files.issue("engine"), wants_client=True)
    engine = await secured(fleet, "prefill", context)
    cert, key = files.issue("registrar")
    settings = RegisterSettings(
        role=Role.PREFILL,
        url=engine.url.origin(),
        etcd=EtcdAccess(endpoints=etcd_endpoints("127.0.0.1:1")),
        health_url=engine.url / "health",
        instance_ca_file=files.ca,
        instance_cert_file=cert,
        instance_key_file=key,
    )
    stop = asyncio.Event()
    running = asyncio.create_task(Registrar(fleet.client, settings).run(stop))
    await asyncio.wait_for(engine.started.wait(), 10)
    stop.set()
    await running


def encrypted(folder: Path) -> str:
    """A certificate whose key asks for a password."""
    cert, key = Files(folder, "locked").issue("a")
    text = Path(key).read_text()
    text = text.replace("BEGIN EC PRIVATE KEY-----\n", "BEGIN EC PRIVATE KEY-----\n" + LOCK)
    (folder / "locked.pem").write_text(Path(cert).read_text() + text)
    return str(folder / "locked.pem")


LOCK = "Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00112233445566778899AABBCCDDEEFF\n\n"


@pytest.mark.parametrize(
    ("flag", "what"),
    [
        (flag, what)
        for flag in ("--instance-ca-file", "--instance-cert-file", "--ssl-certfile")
        for what in ("nothing", "a folder", "no certificate", "a locked key")
        # Authorities come without keys.
        if (flag, what) != ("--instance-ca-file", "a locked key")
    ],
)
def test_a_file_that_is_of_no_use_is_one_line_and_status_2(tmp_path, capsys, flag, what):
    path = tmp_path / "file"
    if what == "a folder":
        path.mkdir()
    elif what == "no certificate":
        path.write_text("-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n")
    elif what == "a locked key":
        path = Path(encrypted(tmp_path))
    with pytest.raises(SystemExit) as exited:
        toy_proxy_server.main([flag, str(path), "--port", str(free_port())])
    assert 2 == exited.value.code
    error = capsys.readouterr().err
    assert f"toy_proxy_server.py: {flag}: {path}" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("key", "cert"),
    [("--instance-key-file", "--instance-cert-file"), ("--ssl-keyfile", "--ssl-certfile")],
)
def test_a_key_without_a_certificate_is_a_mistake(capsys, key, cert):
    with pytest.raises(SystemExit) as exited:
        toy_proxy_server.main([key, "/key.pem"])
    assert 2 == exited.value.code
    assert f"{cert} is missing: {key} is of no use without it" in capsys.readouterr().err
