"""The object tier when its server hangs, dies, comes back, or lets nobody in."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.faults.s3_server import S3Server
from tests.store.tiers.s3.s3_tiers import PAUSE_S, s3_tier
from tests.store.tiers.tier_contract import (
    BLOCK_TOKENS,
    SMALL,
    content_of,
    dump,
    empty_page,
    load,
    make_key,
    make_page,
)
from ucm.errors import TierError
from ucm.outcome import Outcome
from ucm.store.tiers.tier import ReadStatus

pytestmark = pytest.mark.process
KEY = make_key(1)
# Of the call; half of it is what the server is waited for.
TIMEOUT_S = 1.0


def test_a_server_that_hangs_costs_a_call_its_deadline_and_then_nothing(server: S3Server) -> None:
    tier = s3_tier(server, timeout_s=TIMEOUT_S)
    dump(tier, SMALL, KEY, make_page(SMALL, "a"))

    with server.stopped():
        for _ in range(3):
            began_s = time.monotonic()
            read = tier.read(SMALL, KEY, empty_page(SMALL))
            assert read.status is ReadStatus.IO_ERROR and "no answer in time" in read.detail
            assert time.monotonic() - began_s < TIMEOUT_S
        began_s = time.monotonic()
        with pytest.raises(TierError, match="left alone for a moment"):
            tier.contains(SMALL, [KEY])
        assert time.monotonic() - began_s < 0.1

    time.sleep(PAUSE_S)
    assert load(tier, SMALL, KEY) == content_of(SMALL, make_page(SMALL, "a"))


def test_a_server_that_died_is_used_again_when_it_is_back(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with S3Server() as mortal:
        tier = s3_tier(mortal)
        dump(tier, SMALL, KEY, make_page(SMALL, "a"))
        staged = tier.stage(SMALL, make_key(2), make_page(SMALL, "b"), num_tokens=BLOCK_TOKENS)
        assert staged is not None
        mortal.kill()

        with pytest.raises(TierError, match="can't be written: can't connect"):
            tier.publish(staged)
        assert load(tier, SMALL, KEY) is ReadStatus.IO_ERROR

        mortal.start()
        time.sleep(PAUSE_S)
        # It has forgotten all, the manifest as well.
        assert load(tier, SMALL, KEY) is ReadStatus.ABSENT
        assert dump(tier, SMALL, KEY, make_page(SMALL, "c"))
        assert load(tier, SMALL, KEY) == content_of(SMALL, make_page(SMALL, "c"))


def test_a_bucket_that_is_not_there_is_an_error_and_not_an_empty_one(server: S3Server) -> None:
    tier = s3_tier(server, bucket="another")

    with pytest.raises(TierError, match="there is no such bucket"):
        tier.open_namespace(SMALL)


def test_wrong_credentials_are_told_without_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAHIDDEN")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "HIDDEN")
    # It makes the bucket, and knows nobody from then on.
    with S3Server(checks_after=1) as strict:
        tier = s3_tier(strict)

        read = tier.read(SMALL, KEY, empty_page(SMALL))
        with pytest.raises(TierError, match=r"access is denied \(\w+\)") as raised:
            tier.open_namespace(SMALL)

    assert read.status is ReadStatus.IO_ERROR
    assert raised.value.reason is Outcome.IO_ERROR
    assert "HIDDEN" not in f"{read.detail} {raised.value} {raised.value.__cause__}"


def test_credentials_come_from_a_file_that_may_appear_later(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are taken before those of the environment."""
    file = tmp_path / "credentials"
    tier = s3_tier(server, credentials_file=str(file))
    with pytest.raises(TierError, match=f"s3_credentials_file: {file}: No such file"):
        tier.contains(SMALL, [KEY])

    file.write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")

    assert dump(tier, SMALL, KEY, make_page(SMALL, "a"))
