"""What a command prints of a store: nothing that somebody wrote there to move a terminal's cursor,
to begin a line of its own, or to hide."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import PROMPT
from tests.cli.parts import ROOT, Store, keys_of, manifest, ucm
from ucm.cli.printing import printable
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.lease import ReclaimLease

pytestmark = pytest.mark.process

EVIL = "x\x1b[31m\x9b2J\x7f\r\nFit for a store.\u202e\u2028"
SHOWN = r"x\x1b[31m\x9b2J\x7f\r\nFit for a store.\u202e\u2028"


@pytest.fixture
def evil(store: Store) -> Store:
    made = manifest(EVIL, kv_dtype=EVIL, model_shape={EVIL: EVIL})
    store.put(made, keys_of(made, PROMPT))
    (store.path / f"ucm-probe-{EVIL}").mkdir()
    return store


def is_tame(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


@pytest.mark.parametrize("command", ["ls", "du", "du --age", "verify", "doctor"])
@pytest.mark.parametrize("form", ["", "--json"])
def test_nothing_of_a_store_reaches_the_terminal_as_it_is(
    evil: Store, command: str, form: str
) -> None:
    done = ucm(*command.split(), evil.path, *form.split())
    assert done.returncode == 0, done.stderr
    assert is_tame(done.stdout) and is_tame(done.stderr)
    if not form and command != "verify":
        assert SHOWN in done.stdout
    if form and command == "ls":
        (backend,) = json.loads(done.stdout)
        assert backend["namespaces"][0]["model"] == EVIL


def test_a_page_and_an_error_are_told_so_as_well(evil: Store) -> None:
    made = manifest(EVIL, kv_dtype=EVIL, model_shape={EVIL: EVIL})
    done = ucm("inspect", evil.file(made, keys_of(made, PROMPT)[0]))
    assert SHOWN in done.stdout and is_tame(done.stdout)

    root = os.open(evil.path, os.O_RDONLY)
    assert ReclaimLease(60.0, 5.0).hold(root)
    os.close(root)
    lease = evil.path / paths.RECLAIM_LEASE
    lease.write_text(json.dumps({**json.loads(lease.read_text()), "host": EVIL}))
    done = ucm("reclaim", evil.path, "--free-gb", 1)
    assert done.returncode == 1
    assert SHOWN in done.stderr and is_tame(done.stderr)


def test_a_name_that_is_no_text_is_no_trace(tmp_path: Path) -> None:
    store = Store(Path(os.fsdecode(os.fsencode(tmp_path) + b"/st\xffre")))
    store.put(manifest("a"), keys_of(manifest("a"), PROMPT))
    for more in ((), ("--json",)):
        done = ucm("ls", store.path, *more)
        assert done.returncode == 0 and r"st\udcffre" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "command", ["ls", "ls --json", "du", "verify", "doctor", "bench --mib 8 --seconds 0.1"]
)
def test_a_reader_that_goes_away_ends_a_command_quietly(filled: Store, command: str) -> None:
    arguments = [sys.executable, "-m", "ucm.cli.main", *command.split(), str(filled.path)]
    with subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
    assert not [*filled.path.glob("ucm-probe-*")]


def test_text_for_people_stays_as_it_is() -> None:
    assert printable("größer als 3 µs ─ 模型") == "größer als 3 µs ─ 模型"


def test_commands_print_in_one_place() -> None:
    for path in (ROOT / "ucm" / "cli").glob("*.py"):
        if path.name == "printing.py":
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call):
                said = ast.unparse(node.func)
                assert said not in ("print", "typer.echo", "typer.secho"), f"{path}: {said}"
                assert not said.endswith((".stdout.write", ".stderr.write")), f"{path}: {said}"
