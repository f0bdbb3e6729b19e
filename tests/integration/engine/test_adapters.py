"""A LoRA adapter is what its files hold, as long as they are what a rank may have loaded."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")


from tests.integration.engine.naming_parts import (
    NUM_BLOCKS,
    PROMPT,
    common,
    keys,
    lora,
    make_adapter,
    named,
    picture,
    red,
)
from tests.integration.scheduler_parts import Engine, Loopback


def test_adapters_are_told_apart_by_what_they_do_not_by_name_id_or_place(tmp_path: Path) -> None:
    one = make_adapter(tmp_path / "one", seed=1)
    expected = keys(lora=lora(one))
    assert len(expected) == NUM_BLOCKS

    copy = shutil.copytree(one, tmp_path / "elsewhere" / "copy")
    assert keys(lora=lora(copy, 7)) == expected
    for other in (
        make_adapter(tmp_path / "weights", seed=2),
        make_adapter(tmp_path / "config", seed=1, lora_alpha=32),
    ):
        assert common(keys(lora=lora(other)), expected) == 0
    assert common(keys(lora=lora(one, is_3d_lora_weight=True)), expected) == 0
    assert common(keys(), expected) == 0


def rewritten(folder: Path) -> None:
    """As a trainer does that saves to the same place: new weights, the same sizes."""
    make_adapter(folder, seed=9)


def replaced(folder: Path) -> None:
    """By rename, with the old file's times."""
    file = folder / "adapter_model.safetensors"
    old = file.stat()
    new = make_adapter(folder.parent / "new", seed=9) / file.name
    os.utime(new, ns=(old.st_atime_ns, old.st_mtime_ns))
    new.replace(file)


def reconfigured(folder: Path) -> None:
    make_adapter(folder, lora_alpha=64)


def half_deleted(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


@pytest.mark.parametrize("change", [rewritten, replaced, reconfigured, half_deleted])
def test_an_adapter_that_was_changed_in_place_bypasses_until_it_has_a_new_id(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    """vLLM may have either in memory: it reads the files anew after it has thrown them out."""
    folder = make_adapter(tmp_path / "adapter")
    engine = Engine(Loopback())
    before = keys(engine, lora=lora(folder))
    assert len(before) == NUM_BLOCKS

    change(folder)
    assert keys(engine, lora=lora(folder)) == []
    make_adapter(folder)
    assert keys(engine, lora=lora(folder)) == []
    assert engine.counted("ucm_unnamed_requests", what="adapter") == 2

    change(folder)
    again = keys(engine, lora=lora(folder, 2))
    assert len(again) == NUM_BLOCKS and common(before, again) == 0


def test_two_adapters_under_one_id_bypass(tmp_path: Path) -> None:
    """Two API servers of one engine may count alike: it computes with whichever came first."""
    one, two = (make_adapter(tmp_path / f"{n}", seed=n) for n in (1, 2))
    engine = Engine(Loopback())
    assert len(keys(engine, lora=lora(one))) == NUM_BLOCKS
    assert keys(engine, lora=lora(two)) == []
    assert keys(engine, lora=lora(one)) == []
    assert keys(engine, lora=lora(one, 2, load_inplace=True)) == []
    assert keys(engine, lora=lora(one, 2)) == []


def test_an_adapter_is_found_where_vllm_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside absolute paths: below the home, the working directory, and the hub's cache."""
    adapter = make_adapter(tmp_path / "home" / "adapters" / "mine", seed=1)
    hub = tmp_path / "hub"
    snapshot = hub / "models--someone--theirs" / "snapshots" / ("0" * 40)
    shutil.copytree(adapter, snapshot)
    refs = hub / "models--someone--theirs" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.chdir(tmp_path / "home")
    expected = keys(lora=lora(adapter))

    for path in ("~/adapters/mine", "adapters/mine", "someone/theirs"):
        assert keys(lora=lora(path)) == expected
    assert keys(lora=lora("someone/unknown")) == []


def test_an_adapter_that_arrives_later_is_named_then(tmp_path: Path) -> None:
    """vLLM downloads it when it is first used."""
    engine = Engine(Loopback())
    assert keys(engine, lora=lora(tmp_path / "adapter")) == []
    make_adapter(tmp_path / "adapter")
    assert len(keys(engine, lora=lora(tmp_path / "adapter"))) == NUM_BLOCKS


@pytest.mark.parametrize("changes", [False, True])
def test_what_was_computed_while_its_adapter_changed_is_not_stored(
    tmp_path: Path, changes: bool
) -> None:
    """The name was right when the request came; the rank loads the files after that."""
    folder = make_adapter(tmp_path / "adapter")
    engine = Engine(Loopback())
    request = engine.add("a", PROMPT, lora=lora(folder))
    named(engine, request)
    engine.admit(request)
    engine.step({"a": PROMPT})
    if changes:
        rewritten(folder)
    is_kept, _ = engine.side.finished(request, engine.blocks(request))
    engine.step({})
    engine.copied(*engine.take_dumping())
    assert is_kept

    released: tuple[str, ...] = ()
    deadline_s = time.monotonic() + 30
    while not released:
        released = engine.step({}).released
        assert time.monotonic() < deadline_s
    slots = engine.slots()
    assert slots["filling"] == 0
    assert slots["ready"] == (0 if changes else NUM_BLOCKS)


@contextmanager
def hanging_reads(monkeypatch: pytest.MonkeyPatch, path: Path) -> Iterator[None]:
    """Whoever opens `path` waits, as on a mount whose server has gone."""
    returns = threading.Event()
    real = os.open

    def opened(name: Any, *args: Any, **more: Any) -> int:
        if str(name).startswith(str(path)):
            returns.wait(60)
        return real(name, *args, **more)

    monkeypatch.setattr("os.open", opened)
    try:
        yield
    finally:
        returns.set()


def test_an_adapter_on_a_disk_that_hangs_costs_its_requests_the_store_and_nobody_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter(tmp_path / "adapter")
    engine = Engine(Loopback(), timeout_ms=200)
    with hanging_reads(monkeypatch, folder):
        request = engine.add("hangs", PROMPT, lora=lora(folder))
        assert engine.side.matched_tokens(request, 0) == (None, False)
        # Everybody else is served meanwhile.
        assert len(keys(engine)) == NUM_BLOCKS
        assert len(keys(engine, features=[picture(red())])) == NUM_BLOCKS
        named(engine, request)
        assert engine.side._states["hangs"].prompt.keys == ()
        assert engine.counted("ucm_unnamed_requests", what="timeout") == 1
        engine.admit(request)
        engine.step({"hangs": PROMPT})
        assert engine.side.finished(request, engine.blocks(request)) == (False, None)


def test_a_rank_that_waits_for_a_hanging_disk_gets_its_blocks_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can't be proven right in time is given up, and vLLM's blocks with it."""
    folder = make_adapter(tmp_path / "adapter")
    engine = Engine(Loopback(), dump_timeout_ms=200)
    request = engine.add("a", PROMPT, lora=lora(folder))
    named(engine, request)
    engine.admit(request)
    with hanging_reads(monkeypatch, folder):
        engine.step({"a": PROMPT})
        engine.side.finished(request, engine.blocks(request))
        engine.copied(*engine.take_dumping())
        released: tuple[str, ...] = ()
        deadline_s = time.monotonic() + 30
        while not released:
            released = engine.step({}).released
            assert time.monotonic() < deadline_s
        assert engine.slots()["ready"] == 0
