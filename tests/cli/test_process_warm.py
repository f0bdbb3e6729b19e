"""`ucm warm` as a person runs it, with a stand-in for what vLLM says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.cli.parts import PAGE_BYTES, ROOT, SOON_S, Store, flip_bit, manifest, settings_file
from tests.faults.fuse import mount_fuse, needs_fuse
from tests.store.node.support import Place
from ucm.store.blocks.namespace import to_json
from ucm.store.inspect.asked_prompt import AskedPrompt
from ucm.store.inspect.engine_identity import EngineIdentity

pytestmark = pytest.mark.process

A = manifest("a")
PAGES = 6
WITH_IDENTITY = """
import sys
import msgspec
from ucm.store.inspect import engine_identity
said = msgspec.json.decode(sys.argv.pop(1), type=engine_identity.EngineIdentity)
engine_identity.ask_vllm = lambda question: said
from ucm.cli.main import app
app()
"""


def prompts_of(number: int) -> list[AskedPrompt]:
    return [AskedPrompt(A, [each, *range(PAGES * A.block_tokens)]) for each in range(number)]


def warm(
    place: Place, backend: Path, prompts: list[AskedPrompt], *args: str, **settings: Any
) -> subprocess.CompletedProcess[str]:
    tokens = [list(prompt.tokens) for prompt in prompts]
    identity = EngineIdentity(
        manifest_json=to_json(A).decode(), page_bytes=PAGE_BYTES, tokens=tokens
    )
    file = place.directory / "prompts.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in tokens))
    socket = str(place.directory / "sockets" / "a.sock")
    given = settings_file(place.directory, backend, node_cache_socket=socket, **settings)
    command = [sys.executable, "-c", WITH_IDENTITY, msgspec.json.encode(identity).decode(), "warm"]
    return subprocess.run(
        [*command, str(given), "--model", "m", "--prompts", str(file), *args],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80"},
        text=True,
        capture_output=True,
        timeout=SOON_S,
    )


def test_what_was_brought_and_what_was_not_is_said(place: Place) -> None:
    prompts = prompts_of(3)
    store = Store(place.store)
    for prompt in prompts[:2]:
        store.put(A, prompt.keys()[:PAGES])
    flip_bit(store.file(A, prompts[1].keys()[4]))

    done = warm(place, place.store, prompts)

    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first == "3 prompts: 10 pages read, 0 in memory before, 6 not in the store."
    assert second.startswith("2 pages can't be had: the first of a prompt is damaged")


def test_a_prompt_that_memory_has_no_room_for_names_the_setting(place: Place) -> None:
    prompt = AskedPrompt(A, list(range(90 * A.block_tokens)))
    Store(place.store).put(A, prompt.keys())

    done = warm(place, place.store, [prompt], cache_buffer_capacity_gb=1 / 1024)

    first, second = done.stdout.splitlines()
    assert first.endswith("0 in memory before, 0 not in the store.")
    assert second.endswith(
        "the node cache's memory had no room: it has 1.0 MiB (cache_buffer_capacity_gb)."
    )


def test_an_engine_is_waited_for_longer_than_storage_and_that_it_does_not_come_is_said(
    place: Place,
) -> None:
    prompts = prompts_of(1)
    Store(place.store).put(A, prompts[0].keys()[:PAGES])

    done = warm(place, place.store, prompts, "--hold", "3", "--timeout-s", "1", "--json")

    assert json.loads(done.stdout)["read"] == PAGES
    assert (done.returncode, done.stderr) == (3, "No engine has connected in 3 s.\n")


@needs_fuse
def test_a_mount_that_answers_nothing_is_named_and_not_waited_for(
    place: Place, tmp_path: Path
) -> None:
    prompts = prompts_of(1)
    Store(place.store).put(A, prompts[0].keys()[:PAGES])
    with mount_fuse(place.store, tmp_path / "mnt") as mount:
        mount.freeze()
        done = warm(place, mount.path, prompts, "--timeout-s", "1.5")

    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"ucm warm: {mount.path}: storage doesn't answer: for 1.5 s")


@needs_fuse
def test_reads_that_hang_are_not_called_absent_and_held_for_nobody(
    place: Place, tmp_path: Path
) -> None:
    prompts = prompts_of(20)
    for prompt in prompts:
        Store(place.store).put(A, prompt.keys()[:PAGES])
    with mount_fuse(place.store, tmp_path / "mnt") as mount:
        mount.hang("read")
        done = warm(
            place,
            mount.path,
            prompts,
            *("--timeout-s", "2", "--hold", "600", "--json"),
            posix_io_timeout_ms=500,
        )
        mount.release()

    assert done.returncode == 1
    said = json.loads(done.stdout)
    assert (said["read"], said["missing"]) == (0, 0)
    assert said["timed_out"] == PAGES * said["num_prompts"]
    assert said["num_prompts"] + said["unasked_prompts"] == len(prompts)
    (line,) = done.stderr.splitlines()
    assert line.startswith("ucm warm: storage doesn't answer in time: ")
    assert "look at the mount" in line
