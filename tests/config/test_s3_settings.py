"""Settings of the S3 tier: what loads, whose node cache it is, and that no secret is shown."""

from __future__ import annotations

import msgspec
import pytest

from tests.config.bad_settings import BAD_STORE
from tests.config.test_settings import tree
from ucm.config.settings import StoreSettings, load_settings
from ucm.errors import ConfigError

S3 = {"store_pipeline": "Cache|S3", "s3_bucket": "pages"}


def store_of(**changes: object) -> StoreSettings:
    return load_settings(tree(S3 | {"storage_backends": "/mnt/kv"} | changes)).store


def test_every_setting_of_s3_reaches_its_field() -> None:
    given = {
        "s3_prefix": "team/kv",
        "s3_endpoint": "https://host:9000",
        "s3_region": "eu-west-1",
        "s3_path_style": False,
        "s3_tls_ca_file": "/etc/ca.pem",
        "s3_credentials_file": "/etc/credentials",
    }

    built = msgspec.to_builtins(store_of(**given))

    assert {name: built[name] for name in given} == given
    assert built["s3_bucket"] == "pages"


def test_slashes_around_a_prefix_and_behind_an_endpoint_mean_nothing() -> None:
    store = store_of(s3_prefix="/team/kv/", s3_endpoint="http://host:9000/")

    assert (store.s3_prefix, store.s3_endpoint) == ("team/kv", "http://host:9000")


def test_engines_meet_by_bucket_prefix_and_server() -> None:
    sockets = {
        store_of(**changes).socket_path
        for changes in (
            {},
            {"s3_bucket": "other"},
            {"s3_prefix": "team"},
            {"s3_endpoint": "http://host:9000"},
            {"s3_region": "eu-west-1"},
        )
    }

    assert len(sockets) == 5
    one_server = {"s3_endpoint": "http://host:9000"}
    away = store_of(**one_server, s3_region="eu-west-1", s3_credentials_file="/etc/c")
    assert away.socket_path == store_of(**one_server).socket_path


def test_where_a_stage_is_missing_its_settings_are_named_in_a_warning() -> None:
    settings = load_settings(tree({"s3_bucket": "pages", "s3_prefix": "x"}))

    for name in ("s3_bucket", "s3_prefix"):
        assert (
            f"kv_connector_extra_config: {name}: not used by store_pipeline Cache|Posix"
            in settings.warnings
        )
    assert "storage_backends: not used by store_pipeline Cache|S3" in str(
        load_settings(tree(S3)).warnings
    )


@pytest.mark.parametrize(
    "changes", [changes for changes, _ in BAD_STORE if "HIDDEN" in str(changes)]
)
def test_no_message_shows_a_secret(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as raised:
        load_settings(tree(changes))

    assert "HIDDEN" not in str(raised.value)
