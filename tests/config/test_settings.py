"""Settings: what loads, and what each bad one says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.config.bad_settings import BAD_FILES, BAD_STORE, BAD_TOP, SEED, STORE
from ucm.config.settings import (
    NODE_PROTOCOL,
    VOCABULARY,
    Settings,
    StoreSettings,
    load_settings,
    load_settings_file,
)
from ucm.config.vocabulary import UNUSED_KEYS, UnusedKeys
from ucm.errors import ConfigError


def tree(store: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    """An inline configuration with one backend, changed by `store` and `top`."""
    config = {"storage_backends": "/mnt/kv"} | (store or {})
    connector = {"ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": config}
    return {"ucm_connectors": [connector]} | top


def load_text(tmp_path: Path, text: str | bytes) -> Settings:
    file = tmp_path / "ucm_config.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_settings({"UCM_CONFIG_FILE": str(file)})


def message_of(error: pytest.ExceptionInfo[ConfigError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_the_seeds_configuration_loads_as_it_stands(tmp_path: Path) -> None:
    """The first file a user writes is copied from there."""
    settings = load_text(tmp_path, SEED)

    assert settings.store.pipeline == ("Cache", "Posix")
    assert settings.store.storage_backends == ("/mnt/test1",)
    assert settings.store.cache_capacity_bytes == 32 << 30
    assert settings.enable_event_sync
    assert not settings.use_layerwise
    assert settings.warnings == ()


def test_the_same_tree_inline_gives_the_same_settings(tmp_path: Path) -> None:
    """kv_connector_extra_config holds the path of the tree, or the tree."""
    inline = load_settings(
        tree(
            {
                "store_pipeline": "Cache|Posix",
                "storage_backends": "/mnt/test1",
                "cache_buffer_capacity_gb": 32,
            },
            enable_event_sync=True,
            use_layerwise=False,
        )
    )

    assert load_text(tmp_path, SEED) == inline


def test_a_tool_reads_the_same_file_without_vllm(tmp_path: Path) -> None:
    """`ucm node-cache --config F` must find the node cache that the engines use."""
    settings = load_text(tmp_path, SEED)

    assert settings == load_settings_file(tmp_path / "ucm_config.yaml")


def test_every_setting_reaches_its_field() -> None:
    """No knob that turns nothing."""
    settings = load_settings(
        tree(
            {
                "store_pipeline": "Posix",
                "storage_backends": ["/mnt/a", "/mnt/b"],
                "cache_buffer_capacity_gb": 0.5,
                "io_direct": True,
                "posix_read_threads": 3,
                "posix_write_threads": 2,
                "posix_write_queue_pages": 7,
                "posix_io_timeout_ms": 1234,
                "min_free_gb": 1.5,
                "page_key_file": "/etc/ucm/key",
                "file_mode": "660",
                "file_group": "kv",
                "node_cache_group": "engines",
                "node_cache_idle_exit_s": 5,
                "node_cache_socket": "/run/ucm.sock",
            },
            use_layerwise=True,
            enable_event_sync=False,
            block_tokens=64,
            model_id="qwen",
            epoch=4,
            reset_epoch="keep",
            kv_layout="opaque",
            lookup_timeout_ms=11,
            max_lookups=12,
            dump_timeout_ms=13,
            store_tail=False,
            handoff_timeout_ms=14,
            expect_timeout_ms=15,
        )
    )

    expected = Settings(
        store=StoreSettings(
            pipeline=("Posix",),
            storage_backends=("/mnt/a", "/mnt/b"),
            cache_capacity_bytes=1 << 29,
            direct_io=True,
            read_threads=3,
            write_threads=2,
            write_queue_pages=7,
            io_timeout_ms=1234,
            min_free_gb=1.5,
            page_key_file="/etc/ucm/key",
            file_mode="660",
            file_group="kv",
            group="engines",
            idle_exit_s=5.0,
            socket_path="/run/ucm.sock",
        ),
        use_layerwise=True,
        enable_event_sync=False,
        block_tokens=64,
        model_id="qwen",
        epoch=4,
        reset_epoch="keep",
        kv_layout="opaque",
        lookup_timeout_ms=11,
        max_lookups=12,
        dump_timeout_ms=13,
        store_tail=False,
        handoff_timeout_ms=14,
        expect_timeout_ms=15,
    )
    assert expected == settings


def test_settings_of_the_node_cache_travel_as_json() -> None:
    """They are handed to its process on the command line."""
    store = load_settings(tree({"io_direct": True, "node_cache_idle_exit_s": 0.25})).store

    assert store == msgspec.json.decode(msgspec.json.encode(store), type=StoreSettings)


@pytest.mark.parametrize(("change", "fragment"), BAD_STORE, ids=[f for _, f in BAD_STORE])
def test_a_bad_setting_of_the_store_stops_the_start_with_one_line(
    change: dict[str, Any], fragment: str
) -> None:
    """File, path of the key, what is wrong, and the nearest known name."""
    with pytest.raises(ConfigError) as caught:
        load_settings(tree(change))

    message = message_of(caught)
    assert message.startswith(f"kv_connector_extra_config: {STORE}")
    assert fragment in message


@pytest.mark.parametrize(("change", "fragment"), BAD_TOP, ids=[f for _, f in BAD_TOP])
def test_a_bad_setting_at_the_top_stops_the_start_with_one_line(
    change: dict[str, Any], fragment: str
) -> None:
    """The same promise, one level up."""
    with pytest.raises(ConfigError) as caught:
        load_settings(tree() | change)

    message = message_of(caught)
    assert message.startswith("kv_connector_extra_config: ")
    assert fragment in message


@pytest.mark.parametrize(("text", "fragment"), BAD_FILES, ids=[f for _, f in BAD_FILES])
def test_a_bad_file_stops_the_start_with_one_line(
    tmp_path: Path, text: str | bytes, fragment: str
) -> None:
    """The message starts with the file, and knows the line where YAML does."""
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, text)

    message = message_of(caught)
    assert message.startswith(f"{tmp_path / 'ucm_config.yaml'}: ")
    assert fragment in message


def test_a_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    """A missing file is not an empty configuration."""
    for path, problem in [
        (tmp_path / "missing.yaml", "No such file or directory"),
        (tmp_path, "Is a directory"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load_settings({"UCM_CONFIG_FILE": str(path)})
        assert f"{path}: can't be read: {problem}" == message_of(caught)


@pytest.mark.parametrize(
    ("extra_config", "fragment"),
    [
        (None, "is empty: give UCM_CONFIG_FILE"),
        ({}, "is empty: give UCM_CONFIG_FILE"),
        ({"UCM_CONFIG_FILE": 3}, "UCM_CONFIG_FILE: expected a path, got 3"),
        ({"UCM_CONFIG_FILE": ""}, 'UCM_CONFIG_FILE: expected a path, got ""'),
        ({"UCM_CONFIG_FILE": "/a\ud800"}, 'UCM_CONFIG_FILE: expected a path, got "/a?"'),
        ({"UCM_CONFIG_FILE": "/a\0b"}, "UCM_CONFIG_FILE: expected a path, got"),
        (
            {"UCM_CONFIG_FILE": "/x.yaml", "use_layerwise": True},
            "use_layerwise: UCM_CONFIG_FILE is given as well, put it into that file",
        ),
        (
            {"UCM_CONFIG_FIEL": "/x"},
            "UCM_CONFIG_FIEL: unknown setting, did you mean UCM_CONFIG_FILE in kv",
        ),
    ],
)
def test_what_vllm_hands_over_is_a_file_or_a_tree(
    extra_config: dict[str, object] | None, fragment: str
) -> None:
    """Both at once would leave open which one counts."""
    with pytest.raises(ConfigError) as caught:
        load_settings(extra_config)

    assert fragment in message_of(caught)


def test_settings_of_ucm_0_8_1_without_effect_give_one_warning(tmp_path: Path) -> None:
    """A configuration that worked there starts here, and says in one line what it does not do."""
    text = SEED.replace(
        "      storage_backends",
        "      timeout_ms: 30000\n      store_health: {enabled: true}\n      storage_backends",
    )
    settings = load_text(tmp_path, text + "hit_ratio: 0.9\n")

    (warning,) = settings.warnings
    file = tmp_path / "ucm_config.yaml"
    assert warning.startswith(
        f"{file}: accepted without effect: hit_ratio, store_health, timeout_ms"
    )
    assert "\n" not in warning


@pytest.mark.parametrize("group", UNUSED_KEYS, ids=[group.why for group in UNUSED_KEYS])
def test_each_setting_without_effect_is_accepted_with_any_value(group: UnusedKeys) -> None:
    """Nobody checks the value of what nobody reads."""
    for key in group.keys:
        extra = tree()
        connector = extra["ucm_connectors"][0]
        places = {
            "top": extra,
            "connector": connector,
            "store": connector["ucm_connector_config"],
        }
        places[group.place][key] = {"anything": [1]}

        (warning,) = load_settings(extra).warnings
        assert key in warning


def test_backends_without_a_stage_for_them_give_a_warning() -> None:
    """A memory-only pipeline that is given a directory was perhaps not meant."""
    settings = load_settings(tree({"store_pipeline": "Cache"}))

    assert settings.store.storage_backends == ()
    assert settings.warnings == (
        "kv_connector_extra_config: storage_backends: not used by store_pipeline Cache",
    )


def test_equal_backends_meet_in_one_node_cache_and_others_do_not() -> None:
    """The default socket is named after the pipeline and the backends, and nothing else."""

    def socket(store: dict[str, Any], **top: Any) -> str:
        return load_settings(tree(store, **top)).store.socket_path

    same = socket({"storage_backends": "/mnt/a:/mnt/b"})
    assert same == socket({"storage_backends": ["/mnt/a/", "//mnt//b"], "io_direct": True})
    assert same == socket({"storage_backends": "/mnt/a:/mnt/b"}, block_tokens=64, epoch=3)
    assert same != socket({"storage_backends": "/mnt/a:/mnt/c"})
    assert same != socket({"storage_backends": "/mnt/a:/mnt/b", "store_pipeline": "Posix"})


def test_the_default_socket_is_not_where_a_logout_removes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Node caches outlive the session of who started the first engine, and all have to agree."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    elsewhere = load_settings(tree()).store.socket_path

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert load_settings(tree()).store.socket_path == elsewhere


def test_an_upgrade_that_speaks_another_protocol_looks_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = load_settings(tree()).store.socket_path
    monkeypatch.setattr("ucm.config.node_socket.NODE_PROTOCOL", NODE_PROTOCOL + 1)
    after = load_settings(tree()).store.socket_path

    assert before != after
    assert f".v{NODE_PROTOCOL}." in before


def test_a_default_directory_that_is_squatted_is_stepped_around(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's, open to others, or a link; everybody of this user goes to the same next."""
    tmp_path = tmp_path_factory.mktemp("t")  # a socket's path is a short one
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def directory() -> Path:
        return Path(load_settings(tree()).store.socket_path).parent

    plain = directory()
    assert plain == tmp_path / f"ucm-{os.getuid()}"
    plain.symlink_to(tmp_path)
    one = directory()
    assert one == tmp_path / f"ucm-{os.getuid()}-1"
    one.mkdir()
    assert directory() == one, "a directory of our own is used"
    one.chmod(0o777)
    two = directory()
    assert two == tmp_path / f"ucm-{os.getuid()}-2"
    if os.getuid() == 0:
        two.mkdir(mode=0o700)
        os.chown(two, 65534, 65534)
        assert directory() == tmp_path / f"ucm-{os.getuid()}-3"


def test_no_setting_is_both_used_and_without_effect() -> None:
    """Each name has one place in one table."""
    listed = [key for group in UNUSED_KEYS for key in group.keys]

    assert len(listed) == len(set(listed))
    assert not set(listed) & {key for keys in VOCABULARY.used.values() for key in keys}
