"""What goes when a store is too large: enough and hardly more, never what is young, tails first,
the lowest score first, and each namespace and salt within its own quota."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.store.blocks.keys import salt_tag
from ucm.store.tiers.posix.grants import NodeAccount, granted, with_grants
from ucm.store.tiers.posix.quotas import quotas_of, salt_account
from ucm.store.tiers.posix.reclaim_plan import (
    WHOLE,
    ReclaimRules,
    StoredFile,
    Want,
    choose,
    choose_from_pool,
    want_of,
)

NOW_NS = 10**18
SECOND_NS = 10**9
GIB = 1 << 30

ages_s = st.integers(0, 1000)
files = st.lists(
    st.builds(
        lambda number, nbytes, used_s, changed_s, is_tail: StoredFile(
            f"{number}",
            nbytes,
            score_ns=NOW_NS - used_s * SECOND_NS,
            changed_ns=NOW_NS - changed_s * SECOND_NS,
            is_tail=is_tail,
        ),
        st.integers(0, 1 << 60),
        st.integers(1, 1 << 22),
        ages_s,
        ages_s,
        st.booleans(),
    ),
    unique_by=lambda file: file.name,
    max_size=40,
)


def size(some: list[StoredFile]) -> int:
    return sum(file.nbytes for file in some)


@given(files, st.integers(0, 1 << 26), ages_s)
def test_enough_goes_and_not_one_file_more_than_is_needed(
    stored: list[StoredFile], free_bytes: int, grace_s: int
) -> None:
    gone = choose(stored, free_bytes=free_bytes, now_ns=NOW_NS, grace_s=grace_s)

    old = [file for file in stored if NOW_NS - file.changed_ns >= grace_s * SECOND_NS]
    assert size(gone) >= min(free_bytes, size(old))
    assert not gone or size(gone[:-1]) < free_bytes


@given(files, st.integers(0, 1 << 26), ages_s)
def test_what_is_young_stays_whatever_is_wanted(
    stored: list[StoredFile], free_bytes: int, grace_s: int
) -> None:
    gone = choose(stored, free_bytes=free_bytes, now_ns=NOW_NS, grace_s=grace_s)

    assert all(NOW_NS - file.changed_ns >= grace_s * SECOND_NS for file in gone)


@given(files, st.integers(0, 1 << 26))
def test_tails_go_first_and_then_what_was_used_longest_ago(
    stored: list[StoredFile], free_bytes: int
) -> None:
    gone = choose(stored, free_bytes=free_bytes, now_ns=NOW_NS, grace_s=0)

    kept = [file for file in stored if file not in gone]
    for went in gone:
        for stays in kept:
            assert went.is_tail >= stays.is_tail
            if went.is_tail == stays.is_tail:
                assert went.score_ns <= stays.score_ns


accounts = st.tuples(st.sampled_from(["a", "b", "c"]), st.sampled_from(["", "salt"])).map(
    lambda names: (WHOLE, *(name for name in names if name))
)
pools = st.lists(
    st.tuples(files, accounts).map(lambda of: [replace(file, accounts=of[1]) for file in of[0]]),
    max_size=4,
).map(lambda lists: [file for some in lists for file in some])
wanted = st.dictionaries(
    st.sampled_from([WHOLE, "a", "b", "salt"]),
    st.builds(Want, st.integers(1, 1 << 26), st.floats(0.01, 1)),
)


@given(pools, pools, wanted, ages_s)
def test_an_account_takes_of_its_own_files_only_and_each_file_goes_once(
    pool: list[StoredFile], others: list[StoredFile], wants: dict[str, Want], grace_s: int
) -> None:
    seen = {name: [file for file in others if name in file.accounts] for name in wants}
    gone = choose_from_pool(pool, wants, seen=seen, now_ns=NOW_NS, grace_s=grace_s)

    assert len({id(file) for file in gone}) == len(gone)
    assert {id(file) for file in gone} <= {id(file) for file in pool}
    assert all(NOW_NS - file.changed_ns >= grace_s * SECOND_NS for file in gone)
    assert all(set(file.accounts) & set(wants) for file in gone)


@given(pools, wanted)
def test_a_pool_gives_its_share(pool: list[StoredFile], wants: dict[str, Want]) -> None:
    gone = choose_from_pool(pool, wants, seen={}, now_ns=NOW_NS, grace_s=0)

    for name, want in wants.items():
        everything = size([file for file in pool if name in file.accounts])
        freed = size([file for file in gone if name in file.accounts])
        assert freed >= min(want.free_bytes, int(everything * want.share))


@given(pools, wanted)
def test_what_one_account_gives_counts_for_the_others_that_it_belongs_to(
    pool: list[StoredFile], wants: dict[str, Want]
) -> None:
    """Nobody gives for the whole what its quota has freed already."""
    of_quotas = {name: want for name, want in wants.items() if name != WHOLE}
    by_quotas = choose_from_pool(pool, of_quotas, seen={}, now_ns=NOW_NS, grace_s=0)
    wants = of_quotas | {WHOLE: Want(max(1, size(by_quotas)), 1.0)}

    gone = choose_from_pool(pool, wants, seen={}, now_ns=NOW_NS, grace_s=0)

    assert not by_quotas or gone == by_quotas


@given(st.integers(1, 40))
def test_a_pool_of_few_files_gives_none_that_are_used_more_than_most(num_files: int) -> None:
    def file(name: str, used_s: int) -> StoredFile:
        return StoredFile(name, 1, score_ns=NOW_NS - used_s * SECOND_NS, changed_ns=0)

    pool = [file(f"hot {number}", number) for number in range(num_files)]
    seen = {WHOLE: [file(f"cold {number}", 1000 + number) for number in range(40)]}
    gone = choose_from_pool(pool, {WHOLE: Want(1 << 20, 0.4)}, seen=seen, now_ns=NOW_NS, grace_s=0)

    assert gone == []


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 40), st.floats(0.05, 1), st.floats(0.05, 1))
def test_a_run_begins_at_the_trigger_and_ends_below_it(
    used: int, limit: int, trigger: float, share: float
) -> None:
    want = want_of(used_bytes=used, limit_bytes=limit, trigger=trigger, share=share)

    assert (want is not None) == (used > 0 and used >= int(limit * trigger))
    if want is not None:
        assert used - want.free_bytes <= limit * trigger
        assert want.free_bytes >= int(used * share)


@given(
    st.integers(0, 1 << 40),
    st.integers(0, 1 << 41),
    st.integers(1, 1 << 40),
    st.floats(0.05, 1),
    st.booleans(),
)
def test_what_can_not_be_freed_leaves_pages_less_and_never_less_than_a_quarter(
    pages: int, others: int, limit: int, trigger: float, is_refused: bool
) -> None:
    want = want_of(
        used_bytes=pages + others,
        other_bytes=others,
        limit_bytes=limit,
        trigger=trigger,
        share=0.1,
        is_refused=is_refused,
    )
    left = pages - (want.free_bytes if want is not None else 0)

    assert left >= min(pages, int(0.9 * min(trigger, 0.9) * limit / 4) - 1)
    # With that the limit is kept wherever it can be.
    assert left + others <= max(limit, others + limit / 4)


def test_who_was_refused_is_made_room_for_below_the_trigger_too() -> None:
    """At a trigger of 1 the last page that would reach it does not fit."""
    full = {"used_bytes": 99, "limit_bytes": 100, "trigger": 1.0, "share": 0.1}

    assert want_of(**full) is None  # type: ignore[arg-type]
    assert want_of(**full, is_refused=True) is not None  # type: ignore[arg-type]


accounts = st.builds(
    lambda written, more: NodeAccount(written, None if more is None else written + more),
    st.integers(0, 1 << 30),
    st.none() | st.integers(0, 1 << 30),
)


spare_shares = st.floats(0.05, 0.5)


@given(
    st.integers(0, 1 << 32),
    st.integers(0, 1 << 32),
    st.dictionaries(st.text(max_size=2), accounts, max_size=9),
    spare_shares,
    st.data(),
)
def test_what_is_granted_never_exceeds_the_limit(
    limit: int, used: int, nodes: dict[str, NodeAccount], spare: float, data: st.DataObject
) -> None:
    """Though nobody may have heard yet that they have less than before."""
    refused = data.draw(st.lists(st.sampled_from(sorted(nodes)))) if nodes else []
    up_to = granted(
        limit_bytes=limit, used_bytes=used, nodes=nodes, spare_share=spare, refused=refused
    )

    before = {name: max(of.written_bytes, of.up_to_bytes or 0) for name, of in nodes.items()}
    assert up_to.keys() == nodes.keys()
    assert all(up_to[name] >= nodes[name].written_bytes for name in nodes)
    more = sum(max(0, up_to[name] - before[name]) for name in nodes)
    is_open = sum(before[name] - of.written_bytes for name, of in nodes.items())
    assert more == 0 or used + is_open + more <= limit


@given(
    st.integers(1, 1 << 40),
    st.dictionaries(st.text(max_size=2), accounts, min_size=1, max_size=9),
    spare_shares,
)
def test_nodes_that_write_nothing_keep_no_more_than_the_spare_share_from_the_others(
    limit: int, nodes: dict[str, NodeAccount], spare: float
) -> None:
    """Whatever they had; once they have heard of it."""
    up_to = granted(limit_bytes=limit, used_bytes=0, nodes=nodes, spare_share=spare)
    heard = {
        name: NodeAccount(of.written_bytes, max(of.written_bytes, up_to[name]))
        for name, of in nodes.items()
    }
    assert sum(of.up_to_bytes - of.written_bytes for of in heard.values()) <= limit * spare

    heard["new"] = NodeAccount(0, None)
    last: dict[str, int] = {}
    for _ in range(2):
        last = granted(
            limit_bytes=limit, used_bytes=0, nodes=heard, spare_share=spare, refused=["new"]
        )
        heard = {name: NodeAccount(of.written_bytes, last[name]) for name, of in heard.items()}
    assert last["new"] >= limit // len(heard) - 1


def test_a_trigger_at_the_limit_leaves_something_to_be_granted() -> None:
    assert ReclaimRules(trigger=1.0).spare_share == pytest.approx(0.05)
    assert ReclaimRules(trigger=0.7).spare_share == pytest.approx(0.15)


NAME = "3f9a01c2" + "0" * 56


def test_a_quota_is_named_by_a_fingerprint_or_by_weights_or_is_for_each_other() -> None:
    quotas = quotas_of(8, {"3f9a01c2": 1, "model_id:m": 2, "*": 4}, num_backends=2)

    def gib(name: str, manifest: bytes) -> float:
        limit = quotas.of(name, manifest)
        return 0 if limit is None else limit.nbytes / GIB

    assert quotas.whole is not None and quotas.whole.nbytes == 4 * GIB
    assert gib(NAME, b'{"weights": "model_id:m"}') == 0.5, "the directory's name comes first"
    assert gib("0" * 64, b'{"weights": "model_id:m"}') == 1
    for manifest in (b'{"weights": "sha256:1"}', b'{"weights": 3}', b"[]", b"\xff", b""):
        assert gib("0" * 64, manifest) == 2


def test_a_quota_is_of_a_salt_by_its_name_or_by_its_tag() -> None:
    tag = salt_tag("tenant: a").hex()
    by_name, by_tag = (
        quotas_of(0, {name: 4, "salt:b": 1}, num_backends=2)
        for name in ("salt:tenant: a", f"salt-tag:{tag}")
    )
    account = salt_account(bytes.fromhex(tag))

    assert by_name and by_name.by_salt[account].nbytes == 2 * GIB
    assert by_tag.by_salt[account].nbytes == 2 * GIB
    assert by_name.of(NAME, b"{}") is None, "it is for no namespace"


def test_without_limits_there_is_nothing_to_keep_to() -> None:
    assert not quotas_of(0, {"*": 0}, num_backends=1)
    assert quotas_of(0, {"3f9a01c2": 1}, num_backends=1).of("0" * 64, b"{}") is None


def test_what_was_granted_counts_though_its_node_has_not_said_that_it_heard() -> None:
    said = {WHOLE: NodeAccount(10, 20), "other": NodeAccount(1, None)}

    assert with_grants(said, {WHOLE: 50}) == {WHOLE: NodeAccount(10, 50), "other": said["other"]}
    assert with_grants(said, {WHOLE: 5}) == said
    assert with_grants(said, {}) == said
