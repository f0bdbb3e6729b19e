"""Two configurations at one socket."""

from __future__ import annotations

import msgspec
import pytest

from ucm.config.settings import StoreSettings
from ucm.errors import ConfigError
from ucm.store.client.greeting import check_pages, ignored_settings
from ucm.store.node import protocol as p

MINE = StoreSettings(storage_backends=("/mnt/a", "/mnt/b"), socket_path="/run/x.sock")


def welcome(settings: StoreSettings) -> p.Welcome:
    sent = p.Welcome(
        version=p.VERSION,
        arena="x",
        capacity_bytes=1,
        pid=7,
        settings=msgspec.to_builtins(settings),
    )
    (body,) = p.FrameBuffer().feed(p.encode(sent))
    received = p.decode_node(body)
    assert isinstance(received, p.Welcome)
    return received


def changed(**changes: object) -> p.Welcome:
    return welcome(msgspec.structs.replace(MINE, **changes))


def test_the_same_settings_are_no_reason_for_words() -> None:
    check_pages(MINE, welcome(MINE))
    assert ignored_settings(MINE, welcome(MINE)) == ""


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ({"storage_backends": ("/mnt/c",)}, "serves Cache|Posix in /mnt/c,"),
        ({"storage_backends": ("/mnt/b", "/mnt/a")}, "serves Cache|Posix in /mnt/b:/mnt/a,"),
        ({"pipeline": ("Cache",), "storage_backends": ()}, "serves Cache,"),
        ({"pipeline": ("Posix",)}, "serves Posix in /mnt/a:/mnt/b,"),
        # As no version spells it today.
        ({"pipeline": "Cache|Posix 2"}, "serves Cache|Posix 2 in /mnt/a:/mnt/b,"),
        ({"storage_backends": 3}, "serves Cache|Posix in 3,"),
    ],
)
def test_other_pages_are_refused_in_a_sentence_that_names_both(
    theirs: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        check_pages(MINE, changed(**theirs))

    message = str(raised.value)
    assert says in message
    assert "wants Cache|Posix in /mnt/a:/mnt/b" in message
    assert "/run/x.sock (pid 7)" in message
    assert "\n" not in message


def test_settings_without_effect_are_named_with_both_values() -> None:
    theirs = changed(
        cache_capacity_bytes=1 << 31, direct_io=True, read_threads=3, socket_path="/elsewhere"
    )
    assert ignored_settings(MINE, theirs) == (
        "cache_buffer_capacity_gb unset (it has 2), io_direct false (it has true),"
        " posix_read_threads 8 (it has 3)"
    )


def test_every_setting_of_the_node_cache_is_compared() -> None:
    """A field that is new is none that is forgotten here."""
    for field in msgspec.structs.fields(StoreSettings):
        if field.name in ("pipeline", "storage_backends", "socket_path", "autostart"):
            continue
        value = getattr(MINE, field.name)
        other: object = f"{value}x" if isinstance(value, str) else int(not value)
        if field.name == "quota_gb":
            other = {"*": 1}
        assert ignored_settings(MINE, changed(**{field.name: other})), field.name
