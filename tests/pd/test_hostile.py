"""Requests that no friendly client sends."""

from __future__ import annotations

import asyncio
import gzip
import json
import re

import pytest

from tests.pd.conftest import Fleet


async def raw(fleet: Fleet, head: str, body: bytes = b"", *headers: bytes) -> tuple[int, bytes]:
    """Status and body of a request line that aiohttp's client would not send."""
    reader, writer = await asyncio.open_connection(fleet.proxy.host, fleet.proxy.port)
    lines = [head.encode(), b"Host: a", b"Connection: close", *headers]
    if body:
        lines.append(b"Content-Length: %d" % len(body))
    writer.write(b"\r\n".join([*lines, b"", body]))
    answer = await asyncio.wait_for(reader.read(), 10.0)
    writer.close()
    found, _, rest = answer.partition(b"\r\n\r\n")
    return int(found.split()[1]), rest


@pytest.mark.parametrize("form", ["//{}/v1/models", "http://{}/v1/models"])
async def test_a_client_can_not_choose_whom_the_proxy_asks(fleet: Fleet, form: str):
    await fleet.start(1, 1)
    evil = await fleet.engine("evil")
    target = form.format(f"127.0.0.1:{evil.url.port}")
    for method, body in (("GET", b""), ("POST", b'{"prompt": "x"}')):
        line = f"{method} {target.replace('models', 'completions')} HTTP/1.1"
        await raw(fleet, line, body, b"Authorization: Bearer secret")
    assert [] == evil.asked
    assert fleet.decode[0].asked


async def test_a_path_reaches_decode_as_it_is(fleet: Fleet):
    await fleet.start(1, 1)
    paths = ["/v1/../x", "/v1/a%2Fb?q=%20+%c3", "/v1//x", "/v1/a%0Ab", "/%0a%0D"]
    for path in paths:
        assert 200 == (await raw(fleet, f"GET {path} HTTP/1.1"))[0]
    asked = [asked.path for asked in fleet.decode[0].asked]
    assert list(map(in_capitals, paths)) == list(map(in_capitals, asked))


def in_capitals(path: str) -> str:
    """Of what is escaped, which is the same either way."""
    return re.sub("%..", lambda found: found[0].upper(), path)


@pytest.mark.parametrize("line", ["OPTIONS * HTTP/1.1", "CONNECT a:443 HTTP/1.1"])
async def test_a_target_that_is_no_path_is_refused_in_the_words_of_the_api(fleet: Fleet, line: str):
    await fleet.start(1, 1)
    status, answer = await raw(fleet, line)
    error = json.loads(answer)["error"]
    assert (404, 404) == (status, error["code"])
    assert f"{line.split()[1]!r} is no path" in error["message"]
    assert [] == fleet.decode[0].asked


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/v1/completions", "BadRequestError"), ("/v1/messages", "invalid_request_error")],
)
async def test_an_unknown_expectation_is_refused_in_the_words_of_the_api(
    fleet: Fleet, path: str, kind: str
):
    await fleet.start(1, 1)
    line = f"POST {path} HTTP/1.1"
    status, answer = await raw(fleet, line, b"{}", b"Expect: wonders")
    error = json.loads(answer)["error"]
    assert (417, kind, "Unknown Expect: wonders") == (status, error["type"], error["message"])
    assert [] == fleet.decode[0].asked


async def test_an_authorization_that_is_no_text_is_the_engines_business(fleet: Fleet):
    await fleet.start(1, 1, admin_key="secret")
    odd = b"Authorization: Bearer \xff"
    body = b'{"prompt": "x"}'
    assert 200 == (await raw(fleet, "POST /v1/completions HTTP/1.1", body, odd))[0]
    assert 403 == (await raw(fleet, "POST /instances/add HTTP/1.1", b"{}", odd))[0]


async def test_a_packed_body_is_unpacked_and_a_broken_one_is_a_400(fleet: Fleet):
    await fleet.start(1, 1)
    packed = b"Content-Encoding: gzip"
    line = "POST /v1/completions HTTP/1.1"
    status, answer = await raw(fleet, line, b"x" * 10, packed)
    assert (400, 400) == (status, json.loads(answer)["error"]["code"])

    assert 200 == (await raw(fleet, line, gzip.compress(b'{"prompt": "x"}'), packed))[0]
    (asked,) = fleet.decode[0].asked
    assert (b'{"prompt": "x"}', False) == (asked.body, "Content-Encoding" in asked.headers)


@pytest.mark.parametrize("depth", [900, 100_000])
async def test_a_deep_body_ends_in_an_answer(fleet: Fleet, depth: int):
    await fleet.start(1, 1)
    body = b'{"prompt": "x", "a": ' + b"[" * depth + b"]" * depth + b"}"
    status, _ = await raw(fleet, "POST /v1/completions HTTP/1.1", body)
    assert status in (200, 400)
