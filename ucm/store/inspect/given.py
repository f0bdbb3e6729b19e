"""What a tool was given to look at: a storage backend's directory, or a file of settings, which may
name a bucket."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ucm.config.s3_settings import S3_STAGE
from ucm.config.settings import Settings, load_settings_file
from ucm.errors import ConfigError
from ucm.store.blocks.page_key import PageKey, page_key_of
from ucm.store.inspect.bucket_walk import StoredBucket, stored_bucket
from ucm.store.inspect.signs_of_life import LOOKED
from ucm.store.tiers.posix import paths

_BUCKET_SCHEME: Final = "s3"
_PIPELINE: Final = f"Cache|{S3_STAGE}"
_URL: Final = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<bucket>[^/]*)/?(?P<prefix>.*)")


@dataclass(frozen=True)
class GivenStore:
    """`backends` are absolute paths, `settings` those of the file if it was one, which may name a
    bucket as well, or a bucket alone."""

    backends: tuple[str, ...]
    settings: Settings | None = None

    def bucket(self) -> StoredBucket | None:
        """None: nothing is stored in one. Raises ConfigError where its client isn't installed."""
        return stored_bucket(self.settings.store) if self.settings is not None else None

    def page_key(self) -> PageKey | None:
        """That of the settings. Raises ConfigError."""
        return page_key_of(self.settings.store.page_key_file) if self.settings is not None else None


def given_store(argument: str, *, may_be_bucket: bool = False) -> GivenStore:
    """Backends that are there. Raises ConfigError for what is neither, or no storage backend; and
    for a bucket alone, unless it may be one."""
    given = given_place(argument, may_be_bucket=may_be_bucket)
    check_backends(given.backends)
    return given


def check_backends(backends: Iterable[str]) -> None:
    """Raises ConfigError for a directory that is not there, or no storage backend."""
    for backend in backends:
        if not _is_backend(backend):
            raise ConfigError(
                f"{backend}: no storage backend: it has no {paths.BACKEND_ID}: mount it, or name "
                f"a directory of storage_backends"
            )


def given_place(argument: str, *, may_be_bucket: bool = False) -> GivenStore:
    """`given_store` for directories that need not be backends yet. Raises ConfigError."""
    check_no_url(argument)
    sys.audit(LOOKED, os.path.abspath(argument))
    if os.path.isdir(argument):
        return GivenStore((os.path.abspath(argument),))
    if not os.path.lexists(argument):
        raise ConfigError(f"{argument}: is not there: name a storage backend or a settings file")
    settings = load_settings_file(argument)
    backends = settings.store.storage_backends
    has_bucket = S3_STAGE in settings.store.pipeline
    if not backends and not has_bucket:
        raise ConfigError(f"{argument}: store_pipeline: has no storage to look at")
    if not backends and not may_be_bucket:
        raise ConfigError(
            f"{argument}: stores in a bucket alone, and this tool looks at directories; `ucm "
            f"doctor` measures a bucket; `ucm ls`, `du`, `inspect`, `verify` and `reclaim` take one"
        )
    return GivenStore(backends, settings)


def check_no_url(argument: str) -> None:
    """Before it is taken for a path. Raises ConfigError, which says what to name instead."""
    url = _URL.fullmatch(argument)
    if url is None:
        return
    if url["scheme"].lower() != _BUCKET_SCHEME:
        raise ConfigError(
            f"{argument}: nothing is stored by such a URL: name a directory that is mounted, or a "
            f"settings file"
        )
    lines = [f"s3_bucket: {url['bucket'] or '...'}", f"s3_prefix: {url['prefix'].strip('/')}"]
    named = ", ".join(line for line in lines if not line.endswith(" "))
    raise ConfigError(
        f'{argument}: name a settings file instead, with store_pipeline: "{_PIPELINE}", {named}, '
        f"and s3_endpoint unless it is AWS; `ucm doctor FILE` tries it out, and nothing has to be "
        f"made in a bucket first"
    )


def _is_backend(path: str) -> bool:
    """By its id, or by what an emptied one still has."""
    try:
        with os.scandir(path) as entries:
            return any(
                entry.name == paths.BACKEND_ID or paths.is_own_directory(entry.name, level=1)
                for entry in entries
            )
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ConfigError(f"{path}: can't be listed: {error.strerror or error}") from error
