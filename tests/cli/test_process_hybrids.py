"""The tools on a store of a plain model and of one with several strands: whose pages are which?"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.cli.conftest import PROMPT
from tests.cli.parts import Store, flip_bit, keys_of, manifest, settings_file, ucm

pytest.importorskip("vllm")

from tests.cli.hybrids import Hybrid, with_states, with_windows
from ucm.store.blocks.namespace import fingerprint, to_json
from ucm.store.inspect.contents import BackendContents, PageEntry, StrandUse
from ucm.store.inspect.examine import Diagnosis
from ucm.store.inspect.page_report import PageReport
from ucm.store.inspect.verified import Verified

pytestmark = pytest.mark.process

PLAIN = manifest("gemma")
NUM_PLAIN = len(PROMPT) // PLAIN.block_tokens
LONG = list(range(320))


@pytest.fixture(scope="module")
def gemma() -> Hybrid:
    return with_windows()


@pytest.fixture
def mixed(store: Store, gemma: Hybrid) -> Store:
    """6 pages of a plain model; of one that has windows 20 of full attention, and 16 of windows."""
    store.put(PLAIN, keys_of(PLAIN, PROMPT))
    assert [len(blocks) for blocks in gemma.fill(store, LONG)] == [20, 16]
    return store


def decoded(text: str, kind: Any) -> Any:
    return msgspec.json.decode(text, type=kind)


def test_ls_names_a_models_strands_beside_a_plain_model(mixed: Store, gemma: Hybrid) -> None:
    done = ucm("ls", mixed.path)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if "bfloat16" in line}
    name = fingerprint(gemma.manifest).hex()
    assert re.search(r" gemma \(all, window 256\) +bfloat16 +16 +36 +0 ", rows[name[:12]])
    assert re.search(r" gemma +bfloat16 +16 +6 +0 ", rows[fingerprint(PLAIN).hex()[:12]])
    assert done.stdout.splitlines()[-1] == "42 pages in 2 namespaces."

    (backend,) = decoded(ucm("ls", mixed.path, "--json").stdout, list[BackendContents])
    strands = {each.namespace: each.strands for each in backend.namespaces}
    assert strands == {name: ["all", "window 256"], fingerprint(PLAIN).hex(): []}


def test_ls_of_one_namespace_tells_pages_of_strands_apart(mixed: Store, gemma: Hybrid) -> None:
    name, prompt = fingerprint(gemma.manifest).hex(), gemma.prompt(LONG)
    lines = ucm("ls", mixed.path, "-n", name, "--json").stdout.splitlines()
    strands = {entry.key: entry.strand for entry in (decoded(line, PageEntry) for line in lines)}
    assert strands == {
        **{prompt.key_of(block).hex(): "all" for block in range(20)},
        **{prompt.key_of(block, 1).hex(): "window 256" for block in range(4, 20)},
    }
    shown = ucm("ls", mixed.path, "-n", name).stdout
    assert re.search(rf"{prompt.key_of(19, 1).hex()} .* window 256\n", shown)
    assert "all" not in ucm("ls", mixed.path, "-n", fingerprint(PLAIN).hex()).stdout


def test_du_says_how_much_each_strand_takes(mixed: Store, gemma: Hybrid) -> None:
    (backend,) = decoded(ucm("du", mixed.path, "--json").stdout, list[BackendContents])
    by_strand = {each.model: each.sizes and each.sizes.by_strand for each in backend.namespaces}
    uses = by_strand["gemma (all, window 256)"]
    assert uses is not None and by_strand["gemma"] == list[StrandUse]()
    assert [(use.strand, use.num_pages) for use in uses] == [("all", 20), ("window 256", 16)]
    base, window = (strand.geometry.page_bytes for strand in gemma.facts.strands)
    assert uses[0].allocated_bytes >= 20 * base and uses[1].allocated_bytes >= 16 * window

    shown = ucm("du", mixed.path).stdout
    assert re.search(r"\n +of these all +20 ", shown)
    assert re.search(r"\n +of these window 256 +16 ", shown)
    assert shown.count("of these") == 2
    assert "gemma (all, window 256)" in ucm("du", "--age", mixed.path).stdout
    assert "42 pages on 1 storage backend." in ucm("du", "--salt", mixed.path).stdout


def test_du_tells_what_is_as_large_as_no_strands_pages(mixed: Store, gemma: Hybrid) -> None:
    page = mixed.file(gemma.manifest, gemma.prompt(LONG).key_of(0))
    page.write_bytes(page.read_bytes()[:5000])
    assert re.search(r"\n +of these of no known strand +1 ", ucm("du", mixed.path).stdout)


def test_inspect_says_of_which_strand_a_page_is(mixed: Store, gemma: Hybrid) -> None:
    key = gemma.prompt(LONG).key_of(19, 1)
    done = ucm("inspect", key.hex()[:16], mixed.path)
    assert done.returncode == 0, done.stderr
    assert "model      gemma (all, window 256)\nstrand     window 256\n" in done.stdout

    page = mixed.file(PLAIN, keys_of(PLAIN, PROMPT)[0])
    (plain,) = decoded(ucm("inspect", page, "--json").stdout, list[PageReport])
    assert (plain.model, plain.strand) == ("gemma", "")


def test_verify_knows_the_manifest_and_reads_the_pages_of_every_strand(
    mixed: Store, gemma: Hybrid
) -> None:
    done = ucm("verify", mixed.path)
    assert done.returncode == 0 and done.stdout.startswith("42 pages are whole; ")

    flip_bit(mixed.file(gemma.manifest, gemma.prompt(LONG).key_of(19, 1)))
    (mixed.path / fingerprint(gemma.manifest).hex() / "manifest.json").write_bytes(to_json(PLAIN))
    done = ucm("verify", mixed.path, "--json")
    found = decoded(done.stdout, Verified)
    assert (done.returncode, found.num_whole, found.num_damaged) == (3, 41, 2)
    assert any("another namespace's" in each.why for each in found.files)


def test_a_page_that_claims_another_version_is_damaged_where_the_manifest_does_not(
    mixed: Store, gemma: Hybrid
) -> None:
    """Whose manifest can't be read might have such pages."""
    page = mixed.file(gemma.manifest, gemma.prompt(LONG).key_of(0))
    content = bytearray(page.read_bytes())
    content[8] = 2
    page.write_bytes(content)
    found = decoded(ucm("verify", mixed.path, "--json").stdout, Verified)
    assert (found.num_damaged, found.num_other_version) == (1, 0)


def test_doctor_names_the_strands_and_tries_pages_of_the_first_one(
    store: Store, gemma: Hybrid
) -> None:
    """A long prompt is read from these: what they give are its tokens per second."""
    gemma.fill(store, LONG)
    done = ucm("doctor", store.path, "--json")
    (examined,) = decoded(done.stdout, Diagnosis).backends
    assert examined.facts is not None
    name = fingerprint(gemma.manifest).hex()
    assert examined.facts.namespaces == {name: "gemma (all, window 256)"}
    assert examined.facts.page_bytes == gemma.facts.strands[0].geometry.page_bytes
    assert f"{name[:12]}  gemma (all, window 256)\n" in ucm("doctor", store.path).stdout


def test_reclaim_frees_pages_of_every_strand(mixed: Store) -> None:
    done = ucm("reclaim", "--free-gb", "1", "--grace-s", "0", mixed.path)
    assert done.returncode == 3 and "no page is left" in done.stdout + done.stderr
    assert "42 pages deleted" in done.stdout
    assert not list(mixed.path.glob("*/??/??/*.kv"))


def test_a_format_that_is_newer_still_is_another_versions(mixed: Store, gemma: Hybrid) -> None:
    path = mixed.path / fingerprint(gemma.manifest).hex() / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 3}))

    done = ucm("ls", mixed.path)
    assert done.returncode == 0
    assert "? (another version's manifest)" in done.stdout and "gemma (all" not in done.stdout
    assert decoded(ucm("verify", mixed.path, "--json").stdout, Verified).num_damaged == 0


def test_states_are_told_from_full_attention(store: Store, tmp_path: Path) -> None:
    granite = with_states()
    assert [len(blocks) for blocks in granite.fill(store, PROMPT)] == [6, 6]
    shown = ucm("du", settings_file(tmp_path, store.path)).stdout
    assert "granite (all, state)" in shown
    assert re.search(r"\n +of these all +6 ", shown) and re.search(r"\n +of these state +6 ", shown)
