"""The flags about etcd, which proxy and registrar share, and what a client makes of endpoints."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from tests.pd.conftest import Answer, Engine, Fleet, answering, until
from tests.pd.security.certificates import Files
from ucm.pd import flags, register
from ucm.pd.fleet.etcd import CALL_TIMEOUT_S, PREFIX, Etcd, Registration
from ucm.pd.fleet.etcd_access import EtcdAccess, etcd_endpoints
from ucm.pd.fleet.etcd_gateway import MAX_ANSWER_BYTES, EtcdError
from ucm.pd.fleet.follow import follow
from ucm.pd.fleet.instance import Role

Parse = Callable[..., "EtcdAccess | None"]
PATIENCE_S = 30.0
# What the sender has written and nobody has read.
IN_SOCKETS_BYTES = 16 << 20
NOTHING = b'{"header": {"revision": "7"}}'


def proxys(*words: str) -> EtcdAccess | None:
    return flags.parse_flags([*words], description="").etcd


def registrars(*words: str) -> EtcdAccess | None:
    return register.parse_flags(["--role", "worker", "--url", "http://x:1", *words]).etcd


either = pytest.mark.parametrize("parse", [proxys, registrars])


async def is_true(what: bool) -> bool:
    return what


@pytest.fixture
def authority(tmp_path: Path) -> Files:
    return Files(tmp_path, "ours")


@either
def test_several_endpoints_are_given_with_commas(parse: Parse):
    access = parse("--etcd-addr", "a:1, https://b:2,[::1]:3")
    assert access is not None
    assert tuple(map(URL, ("http://a:1", "https://b:2", "http://[::1]:3"))) == access.endpoints


@either
def test_files_of_certificates_turn_tls_on(parse: Parse, authority: Files):
    certificate, key = authority.issue("x")
    for words in (
        ["--etcd-ca-file", authority.ca],
        ["--etcd-cert-file", certificate, "--etcd-key-file", key],
    ):
        access = parse("--etcd-addr", "a:1,b:2", *words)
        assert access is not None
        assert {"https"} == {each.scheme for each in access.endpoints}


@either
@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("--etcd-addr a:1,a:1", "--etcd-addr: http://a:1 is there twice"),
        ("--etcd-addr a:1,", "'' is no etcd"),
        ("--etcd-addr user:pw@a:1", "'...@a:1' is no etcd"),
        ("--etcd-addr http://a:1 --etcd-ca-file {ca}", "write https://"),
        ("--etcd-addr a:1 --etcd-ca-file {none}", "--etcd-ca-file: {none}: No such"),
        ("--etcd-addr a:1 --etcd-ca-file {password}", "--etcd-ca-file: {password} has no"),
        ("--etcd-addr a:1 --etcd-cert-file {cert}", "--etcd-cert-file: {cert} are no"),
        ("--etcd-addr a:1 --etcd-cert-file {none} --etcd-key-file {key}", "{none}"),
        (
            "--etcd-addr a:1 --etcd-cert-file {ca} --etcd-key-file {key}",
            "--etcd-cert-file: {ca} and {key}",
        ),
        ("--etcd-addr a:1 --etcd-key-file {key}", "--etcd-cert-file is missing: "),
        ("--etcd-addr a:1 --etcd-user u", "--etcd-password-file"),
        ("--etcd-addr a:1 --etcd-password-file {password}", "--etcd-user"),
        ("--etcd-addr a:1 --etcd-user u:pw", "--etcd-user takes a name alone"),
        ("--etcd-addr a:1 --etcd-user u --etcd-password-file {none}", "{none}: can't be read"),
        ("--etcd-addr a:1 --etcd-user u --etcd-password-file {empty}", "there is no password"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag_and_no_password(
    parse: Parse,
    words: str,
    names: str,
    authority: Files,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    certificate, key = authority.issue("x")
    (tmp_path / "password").write_text("secret\n")
    (tmp_path / "empty").write_text("\n")
    files = {each: str(tmp_path / each) for each in ("none", "password", "empty")}
    files.update(ca=authority.ca, cert=certificate, key=key)
    with pytest.raises(SystemExit) as exit_info:
        parse(*words.format(**files).split())

    assert 2 == exit_info.value.code
    (line,) = capsys.readouterr().err.splitlines()
    assert names.format(**files) in line
    assert "pw" not in line.replace(str(tmp_path), "")


def test_a_flag_about_no_etcd_is_a_mistake(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        proxys("--worker-hosts", "x:1", "--etcd-user", "u")
    assert "--etcd-user is of no use without --etcd-addr" in capsys.readouterr().err


@given(ttl_s=st.integers(1, 60), part=st.floats(0.01, 0.99), num=st.integers(1, 9))
def test_a_lease_outlives_a_renewal_for_which_only_the_last_endpoint_answers(
    ttl_s: int, part: float, num: int
):
    interval_s = part * ttl_s
    endpoints = etcd_endpoints(",".join(f"x:{i + 1}" for i in range(num)))
    settings = register.RegisterSettings(
        role=Role.WORKER,
        url=URL("http://x:1"),
        health_url=URL("http://x:1/health"),
        etcd=EtcdAccess(endpoints=endpoints),
        lease_ttl_s=ttl_s,
        interval_s=interval_s,
    )
    timeout_s = register.call_timeout_s(settings)
    assert register._SHORTEST_CALL_S <= timeout_s <= CALL_TIMEOUT_S
    if timeout_s > register._SHORTEST_CALL_S:
        assert interval_s + (num - 1) * timeout_s < ttl_s


async def test_the_next_endpoint_is_asked_in_the_same_call_and_from_then_on(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
):
    engines = [await fleet.engine(name) for name in "abcd"]
    unwell = b'{"error": "etcdserver: no leader", "code": 14}'
    engines[0].answer = answering(unwell, status=503)
    engines[1].answer = engines[1].never
    engines[2].answer = answering(b"<html>")
    engines[3].answer = answering(NOTHING)
    access = EtcdAccess(endpoints=tuple(each.url.origin() for each in engines))
    etcd = Etcd(fleet.client, access, timeout_s=0.3)

    assert 7 == (await etcd.range(PREFIX)).revision
    assert 7 == (await etcd.range(PREFIX)).revision
    assert [1, 1, 1, 2] == [len(each.asked) for each in engines]
    assert 3 == etcd.num_lost
    # Each time it has to be noticed; once it is said.
    engines[3].answer = answering(unwell, status=503)
    with pytest.raises(EtcdError) as info:
        await etcd.range(PREFIX)
    assert all(str(each.url.origin()) in str(info.value) for each in engines)
    assert ": etcdserver: no leader; " in str(info.value)
    assert ": no answer in time; " in str(info.value)


async def test_who_is_missing_after_the_loss_of_an_endpoint_gets_the_grace_of_an_outage(
    fleet: Fleet,
):
    """Its registrar may have lost that endpoint, too, and been too slow for its lease."""
    first, other = [await fleet.engine(name) for name in "ab"]
    record = Registration("worker", "http://x:1", "1")
    key, value = (
        base64.b64encode(each).decode() for each in (record.key.encode(), record.encode())
    )

    def gateway(*kvs: dict[str, str]) -> Answer:
        async def answer(request: web.Request) -> web.StreamResponse:
            if request.path.endswith("watch"):
                await asyncio.Event().wait()
            return web.json_response({"header": {"revision": "7"}, "kvs": kvs})

        return answer

    first.answer, other.answer = gateway({"key": key, "value": value}), gateway()
    access = EtcdAccess(endpoints=(first.url.origin(), other.url.origin()))
    seen: list[dict[str, Registration]] = []
    etcd = Etcd(fleet.client, access, timeout_s=0.2)
    following = asyncio.create_task(
        follow(etcd, lambda now: seen.append(dict(now)), retry_s=0.05, grace_s=2.0)
    )
    try:
        await until(lambda: is_true(bool(seen)))
        first.answer = first.never
        await until(lambda: is_true(len(other.asked) > 0))
        await asyncio.sleep(0.1)
        assert [{record.key: record}] == seen
        await until(lambda: is_true(seen[-1] == {}))
    finally:
        following.cancel()


async def test_that_another_endpoint_is_asked_is_said_at_a_bounded_rate(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
):
    engines = [await fleet.engine(name) for name in "ab"]
    etcd = Etcd(fleet.client, EtcdAccess(endpoints=tuple(each.url.origin() for each in engines)))
    for i in range(6):
        engines[i % 2].answer = answering(NOTHING)
        engines[1 - i % 2].answer = answering(b"", status=503)
        await etcd.range(PREFIX)
    assert 5 == etcd.num_lost
    (warning,) = [each.message for each in caplog.records if each.name.startswith("ucm")]
    assert f"another etcd, {engines[1].url.origin()}, is asked from now on: " in warning


@pytest.mark.parametrize("status", [400, 401, 403, 302])
async def test_a_refusal_is_not_asked_for_at_every_endpoint(fleet: Fleet, status: int):
    engines = [await fleet.engine(name) for name in "ab"]
    engines[0].answer = answering(b'{"error": "no"}', status=status)
    etcd = Etcd(fleet.client, EtcdAccess(endpoints=tuple(each.url.origin() for each in engines)))
    with pytest.raises(EtcdError, match=r": kv/range: no$"):
        await etcd.range(PREFIX)
    assert [1, 0] == [len(each.asked) for each in engines]


@pytest.mark.parametrize("status", [200, 400])
async def test_an_answer_without_end_is_not_read_and_its_endpoint_is_lost(
    fleet: Fleet, status: int
):
    engines = [await fleet.engine(name) for name in "ab"]
    written = without_end(engines[0], status=status)
    engines[1].answer = answering(NOTHING)
    etcd = Etcd(
        fleet.client,
        EtcdAccess(endpoints=tuple(each.url.origin() for each in engines)),
        timeout_s=PATIENCE_S,
    )
    assert 7 == (await etcd.range(PREFIX)).revision
    assert 1 == etcd.num_lost
    assert sum(written) <= MAX_ANSWER_BYTES + IN_SOCKETS_BYTES

    engines[1].answer = answering(b"", status=503)
    with pytest.raises(EtcdError, match=r": kv/range: its answer has more than 16 MiB"):
        await etcd.range(PREFIX)


async def test_a_line_of_a_watch_without_end_is_not_read(fleet: Fleet):
    engine = await fleet.engine("a")
    written = without_end(engine, status=200)
    etcd = Etcd(fleet.client, EtcdAccess(endpoints=(engine.url.origin(),)))
    with pytest.raises(EtcdError, match=r": watch: its answer has more than 16 MiB"):
        async for _ in etcd.watch(PREFIX, revision=1, for_s=PATIENCE_S):
            pass
    assert sum(written) <= MAX_ANSWER_BYTES + IN_SOCKETS_BYTES


def without_end(engine: Engine, *, status: int) -> list[int]:
    """Makes it answer so. How many bytes it has written, one item for each piece."""
    written: list[int] = []
    piece = b" " * (1 << 20)

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=status)
        await response.prepare(request)
        # Who reads on is not to need all memory.
        while sum(written) < 10 * MAX_ANSWER_BYTES:
            await response.write(piece)
            written.append(len(piece))
        return response

    engine.answer = answer
    return written


async def test_a_gateway_that_hangs_up_on_an_old_token_is_shown_a_new_one(
    fleet: Fleet, tmp_path: Path
):
    """As those of some versions of etcd do, which say nothing then."""
    engine = await fleet.engine("a")
    valid = 0

    async def gateway(request: web.Request) -> web.StreamResponse:
        nonlocal valid
        if request.path == "/v3/auth/authenticate":
            valid += 1
            return web.json_response({"token": str(valid)})
        if request.headers.get("Authorization") != str(valid):
            assert request.transport is not None
            request.transport.close()
        return web.Response(body=NOTHING)

    engine.answer = gateway
    (tmp_path / "password").write_text("secret")
    access = EtcdAccess(
        endpoints=(engine.url.origin(),), user="u", password_file=str(tmp_path / "password")
    )
    etcd = Etcd(fleet.client, access)
    for expected in (1, 3, 5):
        assert 7 == (await etcd.range(PREFIX)).revision
        assert expected == valid
        valid += 1
    assert 0 == etcd.num_lost
