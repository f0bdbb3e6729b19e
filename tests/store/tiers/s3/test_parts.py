"""What needs no server: names, the breaker, files of credentials, errors in our words."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from obstore.exceptions import GenericError, PermissionDeniedError

from tests.store.tiers.tier_contract import SMALL, make_key
from ucm.errors import ConfigError, TierError
from ucm.outcome import Outcome
from ucm.store.tiers.s3.breaker import BucketBreaker
from ucm.store.tiers.s3.bucket import Bucket, BucketPlace
from ucm.store.tiers.s3.credentials_file import CredentialsFile
from ucm.store.tiers.s3.names import Names
from ucm.store.tiers.s3.s3_errors import _NO_CREDENTIALS, is_absent, trouble_of

KEY = make_key(1)


def refused(breaker: BucketBreaker) -> bool:
    try:
        breaker.let_through()
    except TierError:
        return True
    return False


# -- names ---------------------------------------------------------------------------------


def test_without_a_prefix_names_begin_with_the_namespace() -> None:
    digits = KEY.hex()
    namespace = SMALL.fingerprint.hex()

    assert Names("").page(SMALL.fingerprint, KEY) == f"{namespace}/{digits[:4]}/{digits}.kv"
    assert Names("a/b").manifest(SMALL.fingerprint) == f"a/b/{namespace}/manifest.json"
    assert Names("", b"\1" * 8).manifest(b"\2") == f"02-{'01' * 8}/manifest.json"


def test_what_is_damaged_twice_has_two_names() -> None:
    names = Names("a")

    assert names.quarantine(b"\2", KEY) != names.quarantine(b"\2", KEY)


# -- the breaker ---------------------------------------------------------------------------


def test_a_server_that_fails_three_times_is_tried_by_one_call_in_each_pause() -> None:
    now_s = 0.0
    breaker = BucketBreaker(1.0, lambda: now_s)
    for _ in range(3):
        assert not refused(breaker)
        breaker.failed("can't connect")

    assert refused(breaker)
    now_s = 1.0
    assert [refused(breaker) for _ in range(3)] == [False, True, True]
    # That call hangs: another one may try.
    now_s = 2.0
    assert [refused(breaker) for _ in range(2)] == [False, True]
    breaker.worked()
    assert [refused(breaker) for _ in range(3)] == [False] * 3


def test_an_answer_between_failures_keeps_the_breaker_closed() -> None:
    breaker = BucketBreaker(1.0, lambda: 0.0)
    for _ in range(5):
        breaker.failed("no answer in time")
        breaker.failed("no answer in time")
        breaker.worked()

    assert not refused(breaker)


def test_whoever_is_refused_hears_why() -> None:
    breaker = BucketBreaker(1.0, lambda: 0.0)
    for _ in range(3):
        breaker.failed("can't connect")

    with pytest.raises(TierError, match="because can't connect"):
        breaker.let_through()


# -- credentials ---------------------------------------------------------------------------


def test_credentials_are_read_anew_after_a_minute(tmp_path: Path) -> None:
    """The client asks again when they end within five minutes."""
    file = tmp_path / "credentials"
    read = CredentialsFile(str(file))
    for name in ("first", "second"):
        file.write_text(
            f"[default]\naws_access_key_id = {name}\naws_secret_access_key: s%1\n"
            "aws_session_token = t\n"
        )

        found = read()

        assert (found["access_key_id"], found["secret_access_key"]) == (name, "s%1")
        assert found.get("token") == "t"
        assert found["expires_at"] is not None
        left = found["expires_at"] - datetime.now(timezone.utc) - timedelta(minutes=5)
        assert timedelta(seconds=50) < left <= timedelta(seconds=60)


def test_a_file_of_credentials_that_is_written_again_has_changed(tmp_path: Path) -> None:
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    read = CredentialsFile(str(file))
    assert not read.has_changed()
    read()
    assert not read.has_changed()

    file.write_text("[default]\naws_access_key_id = a\naws_secret_access_key = better\n")

    assert read.has_changed()
    read()
    assert not read.has_changed()


@pytest.mark.parametrize(
    "text", [None, "", "[default]\naws_access_key_id = HIDDEN\n", "HIDDEN\n", "[other]\nx = HIDDEN"]
)
def test_a_bad_file_of_credentials_is_told_without_what_is_in_it(
    tmp_path: Path, text: str | None
) -> None:
    file = tmp_path / "credentials"
    if text is not None:
        file.write_text(text)

    with pytest.raises(TierError, match=f"s3_credentials_file: {file}: ") as raised:
        CredentialsFile(str(file))()

    assert "HIDDEN" not in str(raised.value)


# -- certificates --------------------------------------------------------------------------


def test_a_certificate_that_is_none_stops_the_start(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    place = BucketPlace("pages", "us-east-1", tls_ca_file=str(file))
    with pytest.raises(ConfigError, match="No such file"):
        Bucket(place, BucketBreaker(1.0))

    file.write_text("no certificate")
    with pytest.raises(ConfigError, match="has no certificate in PEM's form"):
        Bucket(place, BucketBreaker(1.0))


def test_a_bucket_stands_in_the_path_or_before_the_host() -> None:
    assert BucketPlace("kv", "eu-west-1").url == "https://s3.eu-west-1.amazonaws.com"
    place = BucketPlace("kv", "x", endpoint="http://host:9000", path_style=False)
    assert place.url == "http://kv.host:9000"


# -- errors --------------------------------------------------------------------------------

_ANSWER = "Server returned non-2xx status code: {status}: <Error><Code>{code}</Code><Id>AKIA</Id>"


@pytest.mark.parametrize(
    ("error", "why", "reason", "is_unreachable"),
    [
        (
            PermissionDeniedError(
                _ANSWER.format(status="403 Forbidden", code="InvalidAccessKeyId")
            ),
            "access is denied (InvalidAccessKeyId): look at credentials and rights",
            Outcome.IO_ERROR,
            False,
        ),
        (
            GenericError(_ANSWER.format(status="400 Bad Request", code="ExpiredToken")),
            "access is denied (ExpiredToken): look at credentials and rights",
            Outcome.IO_ERROR,
            False,
        ),
        (
            PermissionDeniedError(
                _ANSWER.format(status="403 Forbidden", code="RequestTimeTooSkewed")
            ),
            "access is denied (RequestTimeTooSkewed): look at this machine's clock",
            Outcome.IO_ERROR,
            False,
        ),
        (
            GenericError(
                _ANSWER.format(status="400 Bad Request", code="AuthorizationHeaderMalformed")
            ),
            "access is denied (AuthorizationHeaderMalformed): look at s3_region and credentials",
            Outcome.IO_ERROR,
            False,
        ),
        (
            GenericError(
                "Error performing GET http://x/ in 1ms - Received redirect without LOCATION"
            ),
            "the server sends us elsewhere: is s3_region that of the bucket?",
            Outcome.IO_ERROR,
            False,
        ),
        (
            GenericError("Error performing POST REDACTED in 48.6µs - HTTP error: kind: Connect,"),
            "there are no credentials: none can be had for AWS_ROLE_ARN by its token",
            Outcome.IO_ERROR,
            True,
        ),
        (
            GenericError("DeleteObjects request failed for key a/b: no. (code: AccessDenied)"),
            "access is denied (AccessDenied): look at credentials and rights",
            Outcome.IO_ERROR,
            False,
        ),
        (
            GenericError(_ANSWER.format(status="503 Service Unavailable", code="SlowDown")),
            "the server answers SlowDown",
            Outcome.IO_ERROR,
            True,
        ),
        (
            GenericError(_ANSWER.format(status="507 Insufficient Storage", code="X")),
            "storage is full (X)",
            Outcome.FULL,
            False,
        ),
        (
            FileNotFoundError(_ANSWER.format(status="404 Not Found", code="NoSuchBucket")),
            "there is no such bucket",
            Outcome.IO_ERROR,
            False,
        ),
        (
            GenericError("TierError: s3_credentials_file: /c: No such file\n\nDebug source:"),
            "s3_credentials_file: /c: No such file",
            Outcome.IO_ERROR,
            False,
        ),
        (
            GenericError("Error performing PUT http://169.254.169.254/latest/api/token, 403"),
            _NO_CREDENTIALS,
            Outcome.IO_ERROR,
            True,
        ),
        (GenericError("kind: Timeout,"), "no answer in time", Outcome.TIMEOUT, True),
        (GenericError("kind: Connect,"), "can't connect", Outcome.IO_ERROR, True),
        (
            GenericError("kind: Connect, invalid peer certificate: UnknownIssuer"),
            "its certificate is not trusted: see s3_tls_ca_file",
            Outcome.IO_ERROR,
            True,
        ),
    ],
)
def test_what_the_client_says_is_said_in_our_words(
    error: Exception, why: str, reason: Outcome, is_unreachable: bool
) -> None:
    trouble = trouble_of(error)

    assert (trouble.why, trouble.reason, trouble.is_unreachable) == (why, reason, is_unreachable)
    assert not is_absent(error)


def test_an_object_that_is_not_there_is_no_trouble() -> None:
    assert is_absent(FileNotFoundError(_ANSWER.format(status="404 Not Found", code="NoSuchKey")))
