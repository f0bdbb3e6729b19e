"""What the S3 client would take from the environment, and what it can't."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.s3_server import S3Server
from tests.store.tiers.s3.s3_tiers import s3_tier
from tests.store.tiers.tier_contract import SMALL, dump, empty_page, make_key, make_page
from ucm.errors import TierError
from ucm.store.tiers.tier import ReadStatus

pytestmark = pytest.mark.process
KEY = make_key(1)
NOWHERE = "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ENDPOINT", NOWHERE),
        ("AWS_ENDPOINT_URL", NOWHERE),
        ("AWS_ENDPOINT_URL_S3", NOWHERE),
        ("AWS_BUCKET", "another"),
        ("AWS_REGION", "elsewhere"),
        ("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true"),
        ("AWS_ALLOW_HTTP", "false"),
    ],
)
def test_settings_are_never_taken_from_the_environment(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """Pages would be at another place than all messages say."""
    monkeypatch.setenv(name, value)

    assert dump(s3_tier(server), SMALL, KEY, make_page(SMALL, "a"))


@pytest.mark.parametrize(
    "name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"]
)
def test_a_credential_with_a_line_end_is_named_and_not_shown(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As `echo` puts it into a secret. The client would end the thread that called it."""
    monkeypatch.setenv(name, "HIDDEN\n")
    tier = s3_tier(server)

    read = tier.read(SMALL, KEY, empty_page(SMALL))
    with pytest.raises(TierError, match=f"{name} has characters that no credential has") as raised:
        tier.open_namespace(SMALL)

    assert read.status is ReadStatus.IO_ERROR and name in read.detail
    assert "HIDDEN" not in f"{read.detail}{raised.value}"


def test_a_file_of_credentials_counts_whatever_the_environment_has(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x\n")
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")

    assert dump(s3_tier(server, credentials_file=str(file)), SMALL, KEY, make_page(SMALL, "a"))


def test_a_credential_of_two_lines_in_a_file_is_told_without_it(
    server: S3Server, tmp_path: Path
) -> None:
    file = tmp_path / "credentials"
    file.write_text(
        "[default]\naws_access_key_id = a\naws_secret_access_key = b\n"
        "aws_session_token = HIDDEN\n  AWAY\n"
    )
    tier = s3_tier(server, credentials_file=str(file))

    with pytest.raises(TierError, match=f"{file}: has characters in a value") as raised:
        tier.open_namespace(SMALL)

    assert "HIDDEN" not in str(raised.value)


def test_what_the_client_can_not_take_from_the_environment_is_named(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CHECKSUM_ALGORITHM", "HIDDEN")

    with pytest.raises(
        TierError, match=r"takes no such environment: (AWS_\w+, )*AWS_CHE"
    ) as raised:
        s3_tier(server).open_namespace(SMALL)

    assert "HIDDEN" not in str(raised.value) and "AWS_SECRET" not in str(raised.value)


def test_an_identity_that_is_not_there_is_named(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "token"
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(file))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/x")

    with pytest.raises(TierError, match=f"can't read the token file '{file}': No such file"):
        s3_tier(server).open_namespace(SMALL)


def test_what_the_client_calls_a_panic_is_an_error_like_others(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no Exception: nobody else would catch it, and a thread would be gone."""

    def nothing_is_bad() -> str:
        return ""

    monkeypatch.setattr("ucm.store.tiers.s3.bucket.bad_credential", nothing_is_bad)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x\n")
    tier = s3_tier(server)

    assert tier.read(SMALL, KEY, empty_page(SMALL)).status is ReadStatus.IO_ERROR
    with pytest.raises(TierError, match="the S3 client failed by itself"):
        tier.open_namespace(SMALL)
