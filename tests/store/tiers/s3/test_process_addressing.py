"""A bucket that stands before the server's name: `s3_path_style: false`."""

from __future__ import annotations

import pytest

from tests.faults.s3_server import BUCKET, S3Server
from tests.store.tiers.s3.s3_tiers import PREFIX, s3_tier
from tests.store.tiers.tier_contract import SMALL, content_of, dump, load, make_key, make_page
from ucm.errors import TierError
from ucm.store.tiers.s3.names import Names

pytestmark = pytest.mark.process
KEY = make_key(1)
DOMAIN = "s3.test"


@pytest.fixture
def named(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """No name server knows its names: it is its own proxy."""
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, server.url)
    for name in ("NO_PROXY", "no_proxy"):
        # What the tests ask it themselves.
        monkeypatch.setenv(name, "127.0.0.1")
    return server


def test_the_bucket_is_found_by_the_name_of_its_host(named: S3Server) -> None:
    tier = s3_tier(named, endpoint=f"http://{DOMAIN}", path_style=False)
    assert dump(tier, SMALL, KEY, make_page(SMALL, "a"))
    assert load(tier, SMALL, KEY) == content_of(SMALL, make_page(SMALL, "a"))
    assert tier.contains(SMALL, [KEY, make_key(2)]) == 1
    # By its path it is the same object.
    assert named.has(Names(PREFIX).page(SMALL.fingerprint, KEY))
    assert load(s3_tier(named), SMALL, KEY) == content_of(SMALL, make_page(SMALL, "a"))


def test_of_a_host_that_is_not_there_the_error_names_the_bucket_before_it(
    named: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    tier = s3_tier(named, endpoint=f"http://{DOMAIN}", path_style=False)
    with pytest.raises(TierError, match=f"at http://{BUCKET}.{DOMAIN}: can't be read: can't conn"):
        tier.open_namespace(SMALL)
