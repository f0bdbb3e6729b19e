"""What a tool was given to look at: a storage backend's directory, or a file of settings."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ucm.config.settings import Settings, load_settings_file
from ucm.errors import ConfigError
from ucm.store.blocks.page_key import PageKey, page_key_of
from ucm.store.tiers.posix import paths


@dataclass(frozen=True)
class GivenStore:
    """`backends` are absolute paths, `settings` those of the file if it was one."""

    backends: tuple[str, ...]
    settings: Settings | None = None

    def page_key(self) -> PageKey | None:
        """That of the settings. Raises ConfigError."""
        return page_key_of(self.settings.store.page_key_file) if self.settings is not None else None


def given_store(argument: str) -> GivenStore:
    """Backends that are there. Raises ConfigError for what is neither, or no storage backend."""
    given = given_place(argument)
    for backend in given.backends:
        if not _is_backend(backend):
            raise ConfigError(
                f"{backend}: no storage backend: it has no {paths.BACKEND_ID}: mount it, or name "
                f"a directory of storage_backends"
            )
    return given


def given_place(argument: str) -> GivenStore:
    """`given_store` for directories that need not be backends yet. Raises ConfigError."""
    if os.path.isdir(argument):
        return GivenStore((os.path.abspath(argument),))
    if not os.path.lexists(argument):
        raise ConfigError(f"{argument}: is not there: name a storage backend or a settings file")
    settings = load_settings_file(argument)
    backends = settings.store.storage_backends
    if not backends:
        raise ConfigError(f"{argument}: store_pipeline: has no storage to look at")
    return GivenStore(backends, settings)


def _is_backend(path: str) -> bool:
    """By its id, or by what an emptied one still has."""
    try:
        with os.scandir(path) as entries:
            return any(
                entry.name == paths.BACKEND_ID or paths.is_own_directory(entry.name, level=1)
                for entry in entries
            )
    except NotADirectoryError:
        return False
    except OSError as error:
        raise ConfigError(f"{path}: can't be listed: {error.strerror or error}") from error
