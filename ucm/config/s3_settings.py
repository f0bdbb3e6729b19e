"""Settings of the S3 tier: which bucket, and how it is reached. Never with what: credentials come
from the environment, a file or the instance's metadata, and a setting that holds one is refused
without being shown.

They stand among the others in ucm_connector_config; docs/configuration.md explains each.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Final
from urllib.parse import urlsplit

from msgspec import Meta

from ucm.config.convert import show
from ucm.config.reclaim_settings import ReclaimSettings
from ucm.errors import ConfigError

S3_STAGE: Final = "S3"

_REGION_OF_NONE: Final = "us-east-1"
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]", re.ASCII)
_PREFIX: Final = re.compile(r"[A-Za-z0-9!_.*'()-]+(/[A-Za-z0-9!_.*'()-]+)*", re.ASCII)
_MAX_PREFIX_CHARS: Final = 512
# Underscores are those of containers. What stands behind a ? may sign it, and is not shown.
_HOST: Final = re.compile(r"[A-Za-z0-9._:\[\]-]+", re.ASCII)
_REGION: Final = re.compile(r"[a-z0-9-]{1,64}", re.ASCII)
# With and without what other programs put before them.
_CREDENTIAL: Final = re.compile(
    r"(s3_|aws_|minio_)?(access_?key(_?id)?|secret(_?access)?(_?key)?|(session_|security_)?token"
    r"|credentials|password|user(name)?)",
    re.IGNORECASE,
)
_FILES: Final = ("s3_tls_ca_file", "s3_credentials_file")

_Text = Annotated[str, Meta(min_length=1)]


class S3Settings(ReclaimSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Part of the settings of a store. It stands on another part, because a struct of settings has
    one base."""

    s3_bucket: _Text | None = None
    s3_prefix: str = ""
    # None: AWS, in that region.
    s3_endpoint: _Text | None = None
    s3_region: _Text = _REGION_OF_NONE
    s3_path_style: bool = True
    s3_tls_ca_file: _Text | None = None
    s3_credentials_file: _Text | None = None

    @property
    def s3_place(self) -> str:
        """Where the objects lie: the same for all who share them. Empty without a bucket."""
        return _place(self.s3_endpoint, self.s3_region, self.s3_bucket, self.s3_prefix)


def _place(endpoint: object, region: object, bucket: object, prefix: object) -> str:
    if not bucket:
        return ""
    host = urlsplit(str(endpoint)).netloc if endpoint else str(region)
    below = f"/{prefix}" if prefix else ""
    return f"s3://{bucket}{below} at {host}"


def check_no_credentials(store: Mapping[str, object], *, where: str) -> None:
    """Raises ConfigError, which doesn't show what it found. `where`: the source and the path."""
    for key in store:
        if isinstance(key, str) and _CREDENTIAL.fullmatch(key):
            raise ConfigError(
                f"{where}.{key}: credentials are no settings, others read those: give them to the "
                f"node cache as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in the file of "
                f"s3_credentials_file, or by the instance's metadata"
            )


def s3_places(store: Mapping[str, object], pipeline: tuple[str, ...]) -> tuple[str, ...]:
    """Part of what names a node cache. Of settings that were checked; none without the stage."""
    if S3_STAGE not in pipeline:
        return ()
    names = ("s3_endpoint", "s3_region", "s3_bucket", "s3_prefix")
    endpoint, region, bucket, prefix = (store.get(name) for name in names)
    return (_place(endpoint, region or _REGION_OF_NONE, bucket, prefix),)


def not_used(pipeline: tuple[str, ...], store: Mapping[str, object], *, source: str) -> list[str]:
    """A warning for each that is given of a place to store in, for a stage that isn't there."""
    unneeded = set() if "Posix" in pipeline else {"storage_backends"}
    unneeded |= set() if S3_STAGE in pipeline else _NAMES
    shown = "|".join(pipeline)
    return [_warning(source, name, shown) for name in sorted(unneeded & store.keys())]


def _warning(source: str, name: str, pipeline: str) -> str:
    """For people."""
    return f"{source}: {name}: not used by store_pipeline {pipeline}"


def checked_s3(
    store: Mapping[str, object], pipeline: tuple[str, ...], *, where: str
) -> dict[str, object]:
    """The settings of this tier as they are meant. Raises ConfigError for what types can't say."""
    given = {name: store[name] for name in store if name in _NAMES}
    if S3_STAGE not in pipeline:
        return {}
    if given.get("s3_bucket") is None:
        raise ConfigError(f"{where}.s3_bucket: missing: the S3 stage needs a bucket to store in")
    _check(given, "s3_bucket", _BUCKET, "a bucket's name, without s3:// and prefix", where)
    _check(given, "s3_region", _REGION, "a region such as us-east-1", where)
    if isinstance(given.get("s3_prefix"), str):
        given["s3_prefix"] = str(given["s3_prefix"]).strip("/")
    if given.get("s3_prefix"):
        wanted = "names joined by /, of letters, digits and !_.*'()-"
        _check(given, "s3_prefix", _PREFIX, wanted, where)
        _check_parts(str(given["s3_prefix"]), where)
    _check_endpoint(given, where)
    for name in _FILES:
        path = given.get(name)
        # A node cache works in `/`, wherever who starts it does.
        if isinstance(path, str) and (not os.path.isabs(path) or "\0" in path):
            raise ConfigError(f"{where}.{name}: expected an absolute path, got {show(path)}")
    return given


def _check(
    given: Mapping[str, object], name: str, pattern: re.Pattern[str], wanted: str, where: str
) -> None:
    value = given.get(name)
    # What is no text is refused by its type.
    if isinstance(value, str) and not pattern.fullmatch(value):
        raise ConfigError(f"{where}.{name}: expected {wanted}, got {show(value)}")


def _check_parts(prefix: str, where: str) -> None:
    if len(prefix) > _MAX_PREFIX_CHARS or {".", ".."} & set(prefix.split("/")):
        raise ConfigError(
            f"{where}.s3_prefix: expected at most {_MAX_PREFIX_CHARS} characters and no part that "
            f"is . or .., got {show(prefix)}"
        )


def _check_endpoint(given: dict[str, object], where: str) -> None:
    endpoint = given.get("s3_endpoint")
    if not isinstance(endpoint, str):
        return
    try:
        url = urlsplit(endpoint)
        has_user, is_host = "@" in endpoint, bool(url.hostname) and (url.port is None or url.port)
    except ValueError:
        url, has_user, is_host = urlsplit(""), "@" in endpoint, False
    if has_user:
        raise ConfigError(f"{where}.s3_endpoint: has a user in it: credentials are no settings")
    is_host = is_host and _HOST.fullmatch(url.netloc) is not None
    is_alone = url.path in ("", "/") and not url.query and not url.fragment
    if url.scheme not in ("http", "https") or not is_host or not is_alone:
        raise ConfigError(
            f"{where}.s3_endpoint: expected http://host:port or https://host, without a path (that "
            f"is s3_prefix) and without the bucket, got {show(endpoint.partition('?')[0])}"
        )
    given["s3_endpoint"] = f"{url.scheme}://{url.netloc}"


_NAMES: Final = frozenset(S3Settings.__struct_fields__) - frozenset(
    ReclaimSettings.__struct_fields__
)
