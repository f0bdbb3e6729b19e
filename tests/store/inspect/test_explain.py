"""Where each block of a prompt is, or why it is not there."""

from __future__ import annotations

import mmap
import time
from typing import Any

import pytest

from tests.cli.conftest import PROMPT
from tests.cli.conftest import store as store
from tests.cli.parts import PAGE_BYTES, Store, flip_bit, keys_of, manifest, tail_of
from ucm.store.blocks.namespace import Manifest, fingerprint
from ucm.store.blocks.page_key import PageKey
from ucm.store.blocks.page_layout import padded_bytes
from ucm.store.inspect.asked_prompt import AskedPrompt
from ucm.store.inspect.explain import ExplainedBlock, Explanation, explain
from ucm.store.inspect.reclaim_now import ReclaimOrder, reclaim_now
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import TierNamespace

MINE = manifest("a")
NUM_BLOCKS = len(PROMPT) // MINE.block_tokens
ADAPTER = b"\x01" * 32


def explained(store: Store, mine: Manifest = MINE, **asked: Any) -> Explanation:
    page_key, in_memory = asked.pop("page_key", None), asked.pop("in_memory", ())
    return explain(
        [str(store.path)],
        AskedPrompt(manifest=mine, tokens=PROMPT, **asked),
        page_key,
        in_memory=in_memory,
        on_progress=lambda done, total: None,
    )


def only(found: Explanation) -> tuple[str, str]:
    """The state of all blocks, which is one and the same, and why."""
    (state,) = {(block.state, block.why) for block in found.blocks}
    return state


def test_what_is_stored_is_named_by_its_file(store: Store) -> None:
    keys = keys_of(MINE, PROMPT)
    store.put(MINE, keys[:4])

    found = explained(store)

    assert (found.num_loadable, found.is_known, found.num_tokens) == (4, True, len(PROMPT))
    assert [block.state for block in found.blocks] == ["stored"] * 4 + ["not_stored"] * 2
    assert [block.where for block in found.blocks[:4]] == [
        str(store.file(MINE, key)) for key in keys[:4]
    ]
    assert found.blocks[5].why == "never stored; no reclaim is on record"


def test_a_damaged_page_ends_the_prefix_and_says_what_is_wrong(store: Store) -> None:
    keys = keys_of(MINE, PROMPT)
    store.put(MINE, keys)
    flip_bit(store.file(MINE, keys[2]))

    found = explained(store)
    assert found.num_loadable == 2
    assert found.blocks[2].state == "corrupt" and "checksum" in found.blocks[2].why


def test_one_that_a_reader_has_moved_aside_is_found_in_quarantine(store: Store) -> None:
    keys = keys_of(MINE, PROMPT)
    store.put(MINE, keys)
    flip_bit(store.file(MINE, keys[2]))
    tier = PosixTier([str(store.path)])
    page = memoryview(mmap.mmap(-1, padded_bytes(PAGE_BYTES)))
    tier.read(TierNamespace(fingerprint(MINE), PAGE_BYTES, b""), keys[2], page)

    block = explained(store).blocks[2]
    assert (block.state, block.why) == ("corrupt", "was found damaged and moved aside")
    assert "/quarantine/" in block.where


@pytest.mark.parametrize("field", ["kv_dtype", "model_dtype"])
def test_what_an_engine_of_another_dtype_has_stored_is_named_so(store: Store, field: str) -> None:
    other = manifest("a", **{field: "float16"})
    store.put(other, keys_of(other, PROMPT))

    found = explained(store)
    why = f"{field}: float16 (the store) / bfloat16 (this engine)"
    assert only(found) == ("other_dtype", why)
    assert (found.is_known, found.differences, found.num_loadable) == (False, [why], 0)


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"kv_dtype": "float16", "layout": "opaque:cpu", "k_size": 99}, "other_dtype"),
        ({"kv_dtype": "float16", "k_size": 99}, "other_namespace"),
        ({"layout": "opaque:cpu", "k_size": 99}, "other_namespace"),
    ],
)
def test_a_packing_that_comes_with_a_dtype_is_no_other_namespace(
    store: Store, changes: dict[str, str], state: str
) -> None:
    other = manifest("a", **changes)
    store.put(other, keys_of(other, PROMPT))
    assert only(explained(store))[0] == state


def test_what_another_model_has_stored_is_named_so(store: Store) -> None:
    other = manifest("b")
    store.put(other, keys_of(other, PROMPT))

    state, why = only(explained(store))
    assert state == "other_namespace"
    assert why == "weights: model_id:b (the store) / model_id:a (this engine)"


def test_another_salt_is_named_if_it_is_one_of_those_to_try(store: Store) -> None:
    store.put(MINE, keys_of(MINE, PROMPT, salt="tenant"))

    tried = explained(store, other_salts=(None, "nobody", "tenant"))
    assert only(tried) == ("other_salt", "stored with the salt 'tenant', asked for with no salt")
    assert only(explained(store, salt="tenant"))[0] == "stored"
    assert only(explained(store))[0] == "not_stored"


def test_no_salt_is_always_tried(store: Store) -> None:
    store.put(MINE, keys_of(MINE, PROMPT))

    why = "stored with no salt, asked for with the salt 'tenant'"
    assert only(explained(store, salt="tenant")) == ("other_salt", why)


def test_another_adapter_is_named_so_and_none_is_always_tried(store: Store) -> None:
    store.put(MINE, keys_of(MINE, PROMPT))
    why = "stored with no adapter, asked for with the adapter 01010101"
    assert only(explained(store, adapter=ADAPTER)) == ("other_adapter", why)

    adapted = keys_of(MINE, PROMPT[::-1], lora=ADAPTER)
    store.put(MINE, adapted)
    found = explain(
        [str(store.path)],
        AskedPrompt(manifest=MINE, tokens=PROMPT[::-1], other_adapters=(None, ADAPTER)),
        None,
        on_progress=lambda done, total: None,
    )
    assert only(found)[0] == "other_adapter"


def test_pages_of_another_page_key_are_named_so(store: Store) -> None:
    theirs = PageKey.of(b"a secret of theirs")
    store.put(MINE, keys_of(MINE, PROMPT), tier=PosixTier([str(store.path)], page_key=theirs))

    assert only(explained(store))[0] == "other_page_key"
    assert only(explained(store, page_key=theirs))[0] == "stored"


def test_what_nobody_has_stored_is_not_stored(store: Store) -> None:
    store.put(MINE, keys_of(MINE, PROMPT[::-1]))

    found = explained(store)
    assert only(found) == ("not_stored", "never stored; no reclaim is on record")
    assert len(found.blocks) == NUM_BLOCKS and found.is_known


def reclaim(store: Store, num_pages: int) -> None:
    on_disk_bytes = 24 << 10
    done = reclaim_now(
        str(store.path), ReclaimOrder(free_bytes=num_pages * on_disk_bytes, grace_s=0)
    )
    assert done.num_files == num_pages


def minutes(since_s: float) -> set[str]:
    """All since then, as they are said."""
    now_min = int(time.time() // 60)
    said = range(int(since_s // 60), now_min + 1)
    return {time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(60 * each)) for each in said}


def test_what_was_reclaimed_is_told_from_what_was_never_stored(store: Store) -> None:
    began_s = time.time()
    store.put(MINE, keys_of(MINE, PROMPT)[:4])
    reclaim(store, 4)

    found = explained(store)
    assert [block.state for block in found.blocks] == ["reclaimed"] * 4 + ["not_stored"] * 2
    assert found.blocks[0].why in {f"at {minute}" for minute in minutes(began_s)}
    never = "never stored, or gone before the record of reclaim begins at"
    assert found.blocks[5].why in {f"{never} {minute}" for minute in minutes(began_s)}


def test_what_was_reclaimed_and_stored_again_is_stored(store: Store) -> None:
    for _ in range(2):
        store.put(MINE, keys_of(MINE, PROMPT))
        assert only(explained(store))[0] == "stored"
        reclaim(store, NUM_BLOCKS)
        assert only(explained(store))[0] == "reclaimed"


def test_what_was_reclaimed_says_so_also_where_another_engine_has_its_own(store: Store) -> None:
    store.put(MINE, keys_of(MINE, PROMPT))
    reclaim(store, NUM_BLOCKS)
    other = manifest("a", kv_dtype="fp8")
    store.put(other, keys_of(other, PROMPT))

    assert only(explained(store))[0] == "reclaimed"


def test_sealed_pages_that_were_reclaimed_are_not_taken_for_unsealed_ones(store: Store) -> None:
    theirs = PageKey.of(b"a secret of theirs")
    store.put(MINE, keys_of(MINE, PROMPT), tier=PosixTier([str(store.path)], page_key=theirs))
    reclaim(store, NUM_BLOCKS)

    assert only(explained(store))[0] == "not_stored"
    assert only(explained(store, page_key=theirs))[0] == "reclaimed"


def test_a_record_that_cannot_be_read_is_named(store: Store) -> None:
    store.put(MINE, keys_of(MINE, PROMPT)[:1])
    (store.path / paths.RECLAIM_RECORD).symlink_to("/dev/zero")

    state, why = {(block.state, block.why) for block in explained(store).blocks[1:]}.pop()
    said = f"the record in {store.path} is a link and no file"
    assert (state, why) == ("not_stored", f"never stored, or reclaimed: {said}")


def test_what_only_a_node_cache_has_can_be_loaded_here(store: Store) -> None:
    keys = keys_of(MINE, PROMPT)
    store.put(MINE, keys[:2])

    found = explained(store, in_memory=keys[1:4])
    assert [block.state for block in found.blocks] == (
        ["stored"] * 2 + ["in_memory"] * 2 + ["not_stored"] * 2
    )
    assert found.num_loadable == 4


def explained_tokens(store: Store, tokens: list[int]) -> Explanation:
    return explain(
        [str(store.path)],
        AskedPrompt(manifest=MINE, tokens=tokens),
        None,
        on_progress=lambda done, total: None,
    )


def test_a_prompt_of_one_token_has_nothing_to_explain(store: Store) -> None:
    store.put(MINE, [])
    found = explained_tokens(store, [1])
    assert (found.blocks, found.tail) == (list[ExplainedBlock](), None)


def test_a_tail_is_explained_behind_the_last_full_block(store: Store) -> None:
    keys, tail = keys_of(MINE, PROMPT), tail_of(MINE, PROMPT)
    store.put(MINE, [*keys, tail])

    found = explained(store)
    assert (found.num_loadable, len(found.blocks)) == (NUM_BLOCKS, NUM_BLOCKS)
    assert found.tail is not None
    assert (found.tail.first_token, found.tail.end_token) == (96, len(PROMPT))
    assert (found.tail.state, found.tail.where) == ("stored", str(store.file(MINE, tail)))
    assert found.tail.where.endswith(".4.kv")


def test_a_prompt_that_ends_with_a_block_has_no_tail(store: Store) -> None:
    store.put(MINE, keys_of(MINE, PROMPT))
    assert explained_tokens(store, PROMPT[:96]).tail is None


def test_a_prompt_shorter_than_a_block_is_a_tail(store: Store) -> None:
    store.put(MINE, [tail_of(MINE, [1, 2])])
    found = explained_tokens(store, [1, 2])
    assert found.blocks == [] and found.tail is not None and found.tail.state == "stored"
    longer = explained_tokens(store, [1, 2, 3]).tail
    assert longer is not None and longer.state == "not_stored", "of another prompt"


def test_why_a_tail_is_not_there_is_told_as_of_any_block(store: Store) -> None:
    tail = tail_of(MINE, PROMPT)
    store.put(MINE, [])
    never = explained(store).tail
    assert never is not None
    assert (never.state, never.why) == (
        "not_stored",
        "never stored; no reclaim is on record; tails are stored for hand-offs alone",
    )

    store.put(MINE, [tail_of(MINE, PROMPT, salt="tenant")])
    other = explained(store, other_salts=("tenant",)).tail
    assert other is not None and other.state == "other_salt"

    in_memory = explained(store, in_memory=[tail]).tail
    assert in_memory is not None and in_memory.state == "in_memory"

    store.put(MINE, [tail])
    flip_bit(store.file(MINE, tail))
    damaged = explained(store).tail
    assert damaged is not None and damaged.state == "corrupt"

    reclaim(store, 2)
    gone = explained(store).tail
    assert gone is not None and gone.state == "reclaimed"
