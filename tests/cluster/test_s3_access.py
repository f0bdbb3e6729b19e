"""How a server that people run is reached: credentials that expire, and TLS of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import trustme

from examples.cluster.seaweedfs import CREDENTIALS, SeaweedFS, weed_binary
from tests.cluster import packages
from tests.cluster.seaweedfs import SeaweedServer
from tests.faults.s3_server import BUCKET
from tests.store.tiers.s3.s3_tiers import s3_tier
from tests.store.tiers.tier_contract import SMALL, content_of, dump, load, make_key, make_page
from ucm.errors import TierError
from ucm.store.tiers.tier import ReadStatus

pytestmark = [pytest.mark.long, pytest.mark.cluster]
KEY = make_key(1)


def write_credentials(file: Path, credentials: Mapping[str, str]) -> None:
    lines = [f"{name.lower()} = {value}" for name, value in credentials.items()]
    file.write_text("\n".join(["[default]", *lines, ""]))


def test_credentials_that_have_expired_are_read_again_as_soon_as_their_file_has_others(
    server: SeaweedServer, tmp_path: Path
) -> None:
    """What is refused is one request."""
    file = tmp_path / "credentials"
    write_credentials(file, dict.fromkeys(CREDENTIALS, "expired"))
    tier = s3_tier(server, credentials_file=str(file))
    for _ in range(2):
        with pytest.raises(TierError, match="access is denied"):
            tier.open_namespace(SMALL)

    write_credentials(file, CREDENTIALS)

    assert load(tier, SMALL, KEY) is ReadStatus.IO_ERROR
    assert dump(tier, SMALL, KEY, make_page(SMALL, "a"))


def test_a_certificate_of_ones_own_is_trusted_where_its_ca_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if weed_binary() is None:
        pytest.skip(f"not installed: {packages.install_lines()[-1]}")
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1")
    ca, certificate, key = (tmp_path / name for name in ("ca.pem", "certificate.pem", "key.pem"))
    authority.cert_pem.write_to_path(ca)
    made.cert_chain_pems[0].write_to_path(certificate)
    made.private_key_pem.write_to_path(key)

    with SeaweedFS(tmp_path / "server", bucket=BUCKET, tls=(certificate, key)) as server:
        server.wait_ready()
        server.make_bucket()
        url = f"https://127.0.0.1:{server.tls_port}"
        trusting, plain = (s3_tier(server, endpoint=url, tls_ca_file=f) for f in (str(ca), None))

        assert dump(trusting, SMALL, KEY, make_page(SMALL, "a"))
        assert load(trusting, SMALL, KEY) == content_of(SMALL, make_page(SMALL, "a"))
        with pytest.raises(TierError, match="certificate is not trusted: see s3_tls_ca_file"):
            plain.open_namespace(SMALL)
