"""Files with keys and passwords are for the proxy's user alone, and it says so when they aren't."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from yarl import URL

from tests.pd.security.certificates import Files
from ucm.pd.fleet.etcd_access import EtcdAccess
from ucm.pd.security import tls
from ucm.pd.security.credentials import InstanceFiles
from ucm.pd.security.keys import Keys

Reads = Callable[[str], object]
ETCD = EtcdAccess(endpoints=(URL("https://a:1"),))


def key_file(path: str) -> Keys:
    return Keys((), path, flag="--prefill-api-key-file")


def password_file(path: str) -> str:
    return replace(ETCD, user="u", password_file=path).password()


def proxys_key(path: str) -> object:
    return tls.of_the_proxy(certificate_of(path), path)


def instances_key(path: str) -> object:
    return tls.of_instances(
        InstanceFiles(instance_cert_file=certificate_of(path), instance_key_file=path)
    )


def etcds_key(path: str) -> object:
    return replace(ETCD, cert_file=certificate_of(path), key_file=path).tls_context()


def certificate_with_key(path: str) -> object:
    Path(path).write_text(Path(certificate_of(path)).read_text() + Path(path).read_text())
    return tls.of_the_proxy(path, None)


def certificate_of(key: str) -> str:
    return str(Path(key).with_suffix(".pem"))


each_secret = pytest.mark.parametrize(
    ("reads", "flag"),
    [
        (key_file, "--prefill-api-key-file"),
        (password_file, "--etcd-password-file"),
        (proxys_key, "--ssl-keyfile"),
        (instances_key, "--instance-key-file"),
        (etcds_key, "--etcd-key-file"),
        (certificate_with_key, "--ssl-certfile"),
    ],
)


@pytest.fixture
def secret(tmp_path: Path, reads: Reads) -> Path:
    """A file that `reads` takes, with a certificate beside it."""
    _, key = Files(tmp_path, "ours").issue("secret")
    path = Path(key)
    if reads in (key_file, password_file):
        path.write_text("secret\n")
    return path


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.message for each in caplog.records if "others may" in each.message]


@each_secret
@pytest.mark.parametrize("mode", [0o644, 0o604, 0o620, 0o602])
def test_a_secret_that_others_may_read_or_change_is_told_of_once(
    caplog: pytest.LogCaptureFixture, secret: Path, reads: Reads, flag: str, mode: int
):
    secret.chmod(mode)
    reads(str(secret))
    assert [f"{flag}: {secret}: others may read or change it: chmod 600 it"] == said(caplog)
    reads(str(secret))
    assert 1 == len(said(caplog))


@each_secret
@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640])
def test_one_of_the_users_or_the_groups_own_is_not(
    caplog: pytest.LogCaptureFixture, secret: Path, reads: Reads, flag: str, mode: int
):
    secret.chmod(mode)
    reads(str(secret))
    assert [] == said(caplog)


def test_what_a_command_writes_into_a_pipe_is_not(caplog: pytest.LogCaptureFixture):
    reading, writing = os.pipe()
    os.write(writing, b"secret\n")
    os.close(writing)
    try:
        key_file(f"/dev/fd/{reading}")
    finally:
        os.close(reading)
    assert [] == said(caplog)
