"""Settings: every knob, its default and its limits; the only reader of YAML and environment.

    load_settings(extra_config)  what vLLM was given as kv_connector_extra_config
    load_settings_file(path)     the same tree from a file, for tools without vLLM

Both return frozen values or raise ConfigError, whose one line says which file, which key, what is
wrong with it and what to write instead. docs/configuration.md explains each setting.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from ucm.config.convert import check_unicode, convert_tree, is_unicode, show
from ucm.config.epoch_file import PRIVATE_EPOCH as PRIVATE_EPOCH
from ucm.config.epoch_file import read_epoch as read_epoch
from ucm.config.node_socket import NODE_PROTOCOL as NODE_PROTOCOL
from ucm.config.node_socket import check_socket_path, default_socket_path
from ucm.config.s3_settings import (
    S3Settings,
    check_no_credentials,
    checked_s3,
    not_used,
    s3_places,
)
from ucm.config.strict_yaml import read_yaml as read_yaml
from ucm.config.vocabulary import CONFIG_FILE_KEY, Vocabulary, did_you_mean
from ucm.errors import ConfigError

CONNECTOR_NAME: Final = "UcmPipelineStore"

PIPELINES: Final = ("Cache|Posix", "Posix", "Cache|S3", "Cache|Posix|S3", "Cache")
TIERS: Final = ("Posix", "S3")
STAGES: Final = ("Cache", *TIERS)

_STORE_PATH: Final = "ucm_connectors[0].ucm_connector_config"
_CAPACITY_KEY: Final = "cache_buffer_capacity_gb"
# More than any machine has: what exceeds it is a slip, such as a number of bytes.
_CAPACITY_MAX_GB: Final = 1 << 16

_Milliseconds = Annotated[int, Meta(ge=1, le=3_600_000)]


class StoreSettings(S3Settings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the node cache process needs to know. It travels on its command line as JSON.

    Engines whose pipeline and backends are the same share one node cache: the default socket path
    is made of these. The first one to start it decides about the other fields.
    """

    pipeline: tuple[str, ...] = msgspec.field(default=("Cache", "Posix"), name="store_pipeline")
    storage_backends: tuple[str, ...] = ()
    # 0: a quarter of the memory that is available when the node cache starts.
    cache_capacity_bytes: Annotated[int, Meta(ge=0)] = 0
    direct_io: bool = msgspec.field(default=False, name="io_direct")
    read_threads: Annotated[int, Meta(ge=1, le=256)] = msgspec.field(
        default=8, name="posix_read_threads"
    )
    write_threads: Annotated[int, Meta(ge=1, le=256)] = msgspec.field(
        default=4, name="posix_write_threads"
    )
    write_queue_pages: Annotated[int, Meta(ge=1, le=1_000_000)] = msgspec.field(
        default=1024, name="posix_write_queue_pages"
    )
    io_timeout_ms: _Milliseconds = msgspec.field(default=10_000, name="posix_io_timeout_ms")
    # None: a share of the filesystem, see ucm/store/tiers/posix/space.py.
    min_free_gb: Annotated[float, Meta(ge=0, le=1 << 20)] | None = None
    file_mode: Annotated[str, Meta(pattern=r"^0?[67][0-7]{2}$")] | None = None
    file_group: Annotated[str, Meta(min_length=1)] | None = None
    page_key_file: Annotated[str, Meta(min_length=1)] | None = None
    recheck_s: Annotated[float, Meta(ge=0, le=86_400)] = msgspec.field(
        default=10.0, name="posix_recheck_s"
    )
    retry_ms: _Milliseconds = msgspec.field(default=1_000, name="posix_retry_ms")
    promised_retries: Annotated[int, Meta(ge=0, le=100)] = msgspec.field(
        default=4, name="posix_promised_retries"
    )
    promised_retry_ms: _Milliseconds = msgspec.field(default=100, name="posix_promised_retry_ms")
    quarantine_per_minute: Annotated[int, Meta(ge=0, le=1_000_000)] = msgspec.field(
        default=6, name="posix_quarantine_per_minute"
    )
    stale_temp_hours: Annotated[int, Meta(ge=0, le=8_760)] = msgspec.field(
        default=24, name="posix_stale_temp_hours"
    )
    sweep_dirs_per_s: Annotated[int, Meta(ge=1, le=1_000_000)] = msgspec.field(
        default=200, name="posix_sweep_dirs_per_s"
    )
    autostart: bool = msgspec.field(default=True, name="node_cache_autostart")
    idle_exit_s: Annotated[float, Meta(gt=0, le=31_536_000)] = msgspec.field(
        default=60.0, name="node_cache_idle_exit_s"
    )
    drain_s: Annotated[float, Meta(ge=0, le=3_600)] = msgspec.field(
        default=20.0, name="node_cache_drain_s"
    )
    max_clients: Annotated[int, Meta(ge=2, le=65_536)] = msgspec.field(
        default=1024, name="node_cache_max_clients"
    )
    max_keys: Annotated[int, Meta(ge=1024, le=1_000_000)] = msgspec.field(
        default=65_536, name="node_cache_max_keys"
    )
    max_open_keys: Annotated[int, Meta(ge=65_536, le=1_000_000_000)] = msgspec.field(
        default=4_194_304, name="node_cache_max_open_keys"
    )
    hello_timeout_ms: _Milliseconds = msgspec.field(
        default=30_000, name="node_cache_hello_timeout_ms"
    )
    group: Annotated[str, Meta(min_length=1)] | None = msgspec.field(
        default=None, name="node_cache_group"
    )
    socket_path: str = msgspec.field(name="node_cache_socket")

    @property
    def tiers(self) -> tuple[str, ...]:
        """Where pages are kept besides memory, the nearest first: the labels of their metrics."""
        return tuple(stage.lower() for stage in self.pipeline if stage in TIERS)

    @property
    def has_storage(self) -> bool:
        """Whether there is more than memory."""
        return bool(self.tiers)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of one engine. `warnings` are for the caller to log, once."""

    store: StoreSettings
    use_layerwise: bool = False
    enable_event_sync: bool = True
    block_tokens: Annotated[int, Meta(gt=0, le=65_536, multiple_of=16)] = 128
    model_id: Annotated[str, Meta(min_length=1)] | None = None
    epoch: Annotated[int, Meta(ge=0, lt=PRIVATE_EPOCH)] = 0
    epoch_file: Annotated[str, Meta(min_length=1)] | None = None
    reset_epoch: Literal["new", "keep"] = "new"
    kv_layout: Literal["auto", "opaque"] = "auto"
    engine_layout: Literal["auto", "keep", "head_major"] = "auto"
    pin_piece_mb: Annotated[int, Meta(ge=0, le=65_536)] = 64
    copy_staging_mb: Annotated[int, Meta(ge=1, le=1_024)] = 16
    lookup_timeout_ms: _Milliseconds = 2_000
    max_lookups: Annotated[int, Meta(ge=1, le=65_536)] = 64
    max_handoffs: Annotated[int, Meta(ge=1, le=65_536)] = 1_024
    dump_timeout_ms: _Milliseconds = 10_000
    store_tail: bool = True
    store_generated: bool | Literal["end"] = True
    # In tokens; None: by the windows, 0: at the ends of prompts only.
    window_interval: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    load_policy: Literal["auto", "always"] = "auto"
    handoff_timeout_ms: _Milliseconds = 5_000
    expect_timeout_ms: _Milliseconds = 30_000
    warnings: tuple[str, ...] = ()

    @property
    def pin_piece_bytes(self) -> int:
        return self.pin_piece_mb << 20

    @property
    def copy_staging_bytes(self) -> int:
        return self.copy_staging_mb << 20


def _names(struct: type[msgspec.Struct]) -> set[str]:
    return {field.encode_name for field in msgspec.structs.fields(struct)}


VOCABULARY: Final = Vocabulary(
    used={
        "top": (_names(Settings) - {"store", "warnings"}) | {"ucm_connectors"},
        "connector": {"ucm_connector_name", "ucm_connector_config"},
        "store": (_names(StoreSettings) - {"cache_capacity_bytes"}) | {_CAPACITY_KEY},
    }
)


def load_settings(
    extra_config: Mapping[str, object] | None, *, source: str = "kv_connector_extra_config"
) -> Settings:
    """The settings in vLLM's kv_connector_extra_config: {"UCM_CONFIG_FILE": path}, or the same
    tree inline. `source` is what messages call it. Raises ConfigError."""
    if not extra_config:
        raise ConfigError(f"{source}: is empty: give {CONFIG_FILE_KEY}, or the settings themselves")
    if CONFIG_FILE_KEY not in extra_config:
        return _parse(extra_config, source=source)
    others = sorted(str(key) for key in extra_config if key != CONFIG_FILE_KEY)
    if others:
        raise ConfigError(
            f"{source}: {others[0]}: {CONFIG_FILE_KEY} is given as well, put it into that file"
        )
    path = extra_config[CONFIG_FILE_KEY]
    if not isinstance(path, str) or not path or "\0" in path or not is_unicode(path):
        raise ConfigError(f"{source}: {CONFIG_FILE_KEY}: expected a path, got {show(path)}")
    return load_settings_file(path)


def load_settings_file(path: str | os.PathLike[str]) -> Settings:
    """The settings in a YAML file. Raises ConfigError."""
    source = os.fspath(path)
    return _parse(read_yaml(source), source=source)


def _parse(tree: object, *, source: str) -> Settings:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{source}: expected a mapping with ucm_connectors, got {show(tree)}")
    check_unicode(tree, source=source)
    unused = list(VOCABULARY.check(tree, place="top", source=source, prefix=""))
    connector = _only_connector(tree, source=source)
    unused += VOCABULARY.check(
        connector, place="connector", source=source, prefix="ucm_connectors[0]."
    )
    store = _mapping(connector, "ucm_connector_config", source=source, path="ucm_connectors[0]")
    check_no_credentials(store, where=f"{source}: {_STORE_PATH}")
    unused += VOCABULARY.check(store, place="store", source=source, prefix=f"{_STORE_PATH}.")

    warnings: list[str] = []
    if unused:
        warnings.append(
            f"{source}: accepted without effect: {', '.join(unused)} (docs/configuration.md: why)"
        )
    store_tree = {key: store[key] for key in store if key in VOCABULARY.used["store"]}
    store_tree["store_pipeline"] = pipeline = _pipeline(store, source=source)
    store_tree["storage_backends"] = backends = _backends(store, pipeline, source=source)
    store_tree |= checked_s3(store, pipeline, where=f"{source}: {_STORE_PATH}")
    warnings += not_used(pipeline, store, source=source)
    if _CAPACITY_KEY in store_tree:
        store_tree["cache_capacity_bytes"] = _capacity(store_tree.pop(_CAPACITY_KEY), source=source)
    if store_tree.get("node_cache_group") is not None and "node_cache_socket" not in store_tree:
        raise ConfigError(
            f"{source}: {_STORE_PATH}.node_cache_group: needs node_cache_socket: the default place "
            f"is one user's own"
        )
    places = (*backends, *s3_places(store_tree, pipeline))
    store_tree.setdefault("node_cache_socket", default_socket_path(pipeline, places))

    settings_tree = {
        key: tree[key] for key in tree if key in VOCABULARY.used["top"] and key != "ucm_connectors"
    }
    settings_tree |= {"store": store_tree, "warnings": warnings}
    settings = convert_tree(settings_tree, Settings, source=source, names={"store": _STORE_PATH})
    check_socket_path(settings.store.socket_path, source=source, path_of_store=_STORE_PATH)
    _check_page_key_file(settings.store.page_key_file, source=source)
    _check_epoch_file(settings, source=source)
    return settings


def _only_connector(tree: Mapping[str, object], *, source: str) -> Mapping[str, object]:
    if "ucm_connectors" not in tree:
        raise ConfigError(f"{source}: ucm_connectors: missing: expected a list with one connector")
    connectors = tree["ucm_connectors"]
    if not isinstance(connectors, list) or len(connectors) != 1:
        got = f"{len(connectors)} of them" if isinstance(connectors, list) else show(connectors)
        raise ConfigError(
            f"{source}: ucm_connectors: expected a list with one connector, got {got}"
        )
    connector = connectors[0]
    if not isinstance(connector, Mapping):
        raise ConfigError(f"{source}: ucm_connectors[0]: expected a mapping, got {show(connector)}")
    name = connector.get("ucm_connector_name")
    if name != CONNECTOR_NAME:
        got = "missing" if name is None else f"no connector {show(name)}"
        raise ConfigError(
            f"{source}: ucm_connectors[0].ucm_connector_name: {got}: use {CONNECTOR_NAME}"
        )
    return connector


def _mapping(
    tree: Mapping[str, object], key: str, *, source: str, path: str
) -> Mapping[str, object]:
    if key not in tree:
        raise ConfigError(f"{source}: {path}.{key}: missing: expected a mapping")
    value = tree[key]
    if not isinstance(value, Mapping):
        raise ConfigError(f"{source}: {path}.{key}: expected a mapping, got {show(value)}")
    return value


def _pipeline(store: Mapping[str, object], *, source: str) -> tuple[str, ...]:
    value = store.get("store_pipeline", PIPELINES[0])
    where = f"{source}: {_STORE_PATH}.store_pipeline"
    if not isinstance(value, str):
        raise ConfigError(f"{where}: expected text such as {PIPELINES[0]}, got {show(value)}")
    stages = tuple(stage.strip() for stage in value.split("|"))
    for stage in stages:
        if stage not in STAGES:
            hint = did_you_mean(stage, STAGES) or f", known stages: {', '.join(STAGES)}"
            raise ConfigError(f"{where}: unknown stage {show(stage)}{hint}")
    if "|".join(stages) not in PIPELINES:
        raise ConfigError(f"{where}: no pipeline {show(value)}: use one of {', '.join(PIPELINES)}")
    return stages


def _backends(
    store: Mapping[str, object], pipeline: tuple[str, ...], *, source: str
) -> tuple[str, ...]:
    """Normalised paths, or none for a pipeline that has no storage."""
    where = f"{source}: {_STORE_PATH}.storage_backends"
    if "storage_backends" not in store:
        if "Posix" in pipeline:
            raise ConfigError(f"{where}: missing: the Posix stage needs a directory to store in")
        return ()
    value = store["storage_backends"]
    paths = value.split(":") if isinstance(value, str) else value
    if not isinstance(paths, (list, tuple)) or not paths:
        raise ConfigError(f"{where}: expected paths, joined by ':' or a list, got {show(value)}")
    backends: list[str] = []
    for path in paths:
        if not isinstance(path, str) or not os.path.isabs(path) or "\0" in path:
            raise ConfigError(f"{where}: expected absolute paths, got {show(path)}")
        # "/mnt/a" and "/mnt/a/" are one place, and must be one node cache.
        backend = "/" + os.path.normpath(path).lstrip("/")
        if backend in backends:
            raise ConfigError(f"{where}: {backend} is given twice")
        backends.append(backend)
    return tuple(backends) if "Posix" in pipeline else ()


def _capacity(value: object, *, source: str) -> int:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not isinstance(value, (int, float)) or not is_number or not 0 < value <= _CAPACITY_MAX_GB:
        raise ConfigError(
            f"{source}: {_STORE_PATH}.{_CAPACITY_KEY}: expected a number of GiB > 0 and"
            f" <= {_CAPACITY_MAX_GB}, got {show(value)}"
        )
    return max(1, int(value * (1 << 30)))


def _check_page_key_file(path: str | None, *, source: str) -> None:
    # A node cache works in `/`, wherever who starts it does.
    if path is not None and (not os.path.isabs(path) or "\0" in path):
        where = f"{source}: {_STORE_PATH}.page_key_file"
        raise ConfigError(f"{where}: expected an absolute path, got {show(path)}")


def _check_epoch_file(settings: Settings, *, source: str) -> None:
    path = settings.epoch_file
    if path is None:
        return
    if not os.path.isabs(path) or "\0" in path:
        raise ConfigError(f"{source}: epoch_file: expected an absolute path, got {show(path)}")
    if settings.epoch:
        raise ConfigError(f"{source}: epoch: epoch_file is given as well, which holds the epoch")


def start_epoch(settings: Settings) -> int:
    """The epoch that an engine starts in. Raises ConfigError."""
    return settings.epoch if settings.epoch_file is None else read_epoch(settings.epoch_file)
