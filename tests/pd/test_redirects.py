"""Where an answer points to is at the proxy: clients never learn where the engines are."""

from __future__ import annotations

from urllib.parse import urljoin

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from tests.pd.conftest import Fleet
from ucm.pd.legs.upstream import at_the_proxy

BODY = b'{"prompt": "hi"}'


def slashless(request: web.Request, status: int) -> web.Response:
    """As vLLM does it: the same path without its last slash, at the host that it was asked as."""
    target = f"{request.scheme}://{request.host}{request.path_qs.replace('/?', '?').rstrip('/')}"
    return web.Response(status=status, headers={"Location": target})


@pytest.mark.parametrize("status", [201, 301, 302, 303, 307, 308])
@pytest.mark.parametrize("path", ["v1/chat/completions/", "v1/models/?a=1%2F2", "metrics2/"])
async def test_a_redirect_leads_back_to_the_proxy(fleet: Fleet, status: int, path: str):
    await fleet.start(1, 2)

    async def answer(request: web.Request) -> web.StreamResponse:
        return slashless(request, status)

    for engine in fleet.decode:
        engine.answer = answer
    url = URL(f"{fleet.proxy}{path}", encoded=True)
    async with fleet.client.post(url, data=BODY, allow_redirects=False) as response:
        assert status == response.status
        whole = f"{response.headers}{await response.text()}"
        location = response.headers["Location"]
    for engine in (*fleet.prefill, *fleet.decode):
        assert str(engine.url.port) not in whole
    expected = "/" + path.replace("/?", "?").rstrip("/")
    assert expected == location


async def test_a_client_that_follows_is_answered_through_both_legs(fleet: Fleet):
    await fleet.start(1, 1)
    good = fleet.decode[0].answer

    async def answer(request: web.Request) -> web.StreamResponse:
        return slashless(request, 307) if request.path.endswith("/") else await good(request)

    fleet.decode[0].answer = answer
    async with fleet.client.post(fleet.proxy / "v1/completions/", data=BODY) as response:
        assert "decode0" == (await response.json(content_type=None))["from"]
        assert "pd" == response.headers["x-ucm-pd-path"]
        assert fleet.proxy.port == response.url.port


@pytest.mark.parametrize(
    ("given_location", "expected"),
    [
        ("http://10.0.0.1:7800/a/b?c=d#e", "/a/b?c=d#e"),
        ("HTTPS://engine-3.cluster.local", "/"),
        ("http://user:key@[fd00::1]:7800?x=1", "/?x=1"),
        ("//10.0.0.1:7800/a", "/a"),
        ("http://10.0.0.1//10.0.0.2/a", "/10.0.0.2/a"),
        (r"\\10.0.0.1\a", "/a"),
        ("http:10.0.0.1/a", "/a"),
        ("/\t/10.0.0.1/a", "/a"),
        ("/a/b?at=http://x/", "/a/b?at=http://x/"),
        ("../b", "../b"),
        ("?page=2", "?page=2"),
        ("", ""),
    ],
)
def test_of_a_reference_all_but_its_host_stays(given_location: str, expected: str):
    assert expected == at_the_proxy(given_location)


BEGINNINGS = [
    "",
    "/",
    "//",
    "\\\\",
    "/\\",
    "/\t/",
    "http:",
    "https://",
    "HTTP:\\\\",
    "h\tttp://",
    "ftp://",
]


@given(
    st.tuples(st.sampled_from(BEGINNINGS), st.text(alphabet="htp:/\\.?#a1@[] \t", max_size=20)).map(
        "".join
    )
)
def test_no_reference_leads_away_from_the_proxy(location: str):
    changed = at_the_proxy(location).replace("\\", "/")
    try:
        joined = urljoin("http://proxy:8000/v1/x", changed)
    except ValueError:
        return  # nobody can follow it
    if joined.startswith("http"):
        assert "proxy:8000" == joined.split("/")[2], (location, joined)
