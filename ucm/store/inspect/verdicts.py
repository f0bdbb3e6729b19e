"""What facts about a mount mean for a store, and what to change: pure.

Each finding has one of four verdicts: `fine`; `note`, which costs nothing that is promised;
`warning`, which costs hits or safety; `wrong`, with which the store does not work as it should.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Literal

import msgspec

from ucm.store.inspect.mount_probe import BackendFacts, MountFacts, SpaceFacts
from ucm.store.inspect.peer_probe import PeerFacts
from ucm.store.inspect.remedies import remedy
from ucm.store.inspect.speed import Speed
from ucm.store.tiers.posix.rights import problems
from ucm.store.tiers.posix.space import Space, reserve_bytes

Verdict = Literal["fine", "note", "warning", "wrong"]

_GIB: Final = 1 << 30
_PROMPT_BLOCKS: Final = 128
_MIN_INODES: Final = 10_000
_SKEW_S: Final = 2.0
# Object stores and caches behind FUSE, where renames are copies or listings lie.
_UNUSABLE: Final = ("s3fs", "rclone", "goofys", "mount-s3", "gcsfuse", "s3ql")
_IN_MEMORY: Final = ("tmpfs", "ramfs")


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """`fix` says what to change; empty where nothing is to be."""

    check: str
    verdict: Verdict
    found: str
    fix: str = ""


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """Of the settings, and of the engine. 0 tokens: unknown."""

    min_free_bytes: int | None
    queue_pages: int
    is_sealed: bool
    lookup_timeout_s: float
    handoff_timeout_s: float
    block_tokens: int
    prefill_tokens_per_s: float
    read_threads: int


def backend_findings(facts: BackendFacts, wishes: Wishes) -> list[Finding]:
    """In the order in which one would look."""
    return [
        *_mount(facts.mount),
        _id(facts),
        *_rights(facts, wishes),
        *(_refused("storage", trouble, facts.space) for trouble in facts.troubles),
        *_space(facts, wishes),
        *(() if facts.skew_s is None else (_clock(facts.skew_s),)),
        *_calls(facts, wishes),
        *_speeds(facts, wishes),
        *_leftovers(facts),
    ]


def _mount(mount: MountFacts) -> Iterator[Finding]:
    kind = mount.kind or "unknown"
    found = f"{kind} at {mount.point}" if mount.kind else "the mount table doesn't tell"
    options = [option for option in mount.options if "=" in option or option in ("soft", "sync")]
    if options:
        found += f" ({','.join(options[:6])}{', ...' if len(options) > 6 else ''})"
    if any(name in kind for name in _UNUSABLE):
        fix = "use a filesystem with renames, such as NFS, CephFS, GlusterFS or JuiceFS"
        yield Finding(check="mount", verdict="wrong", found=found, fix=fix)
    elif kind in _IN_MEMORY:
        fix = "fine for a trial: what is stored goes with this machine"
        yield Finding(check="mount", verdict="warning", found=found, fix=fix)
    elif mount.is_local:
        fix = "only this machine sees it: mount shared storage there, if nodes are to share"
        yield Finding(check="mount", verdict="warning", found=found, fix=fix)
    elif "sshfs" in kind:
        fix = "its clients remember listings for 20 s: mount with -o dir_cache=no"
        yield Finding(check="mount", verdict="warning", found=found, fix=fix)
    else:
        yield Finding(check="mount", verdict="fine", found=found)
    if kind.startswith("nfs"):
        yield from _nfs(mount.options)


def _nfs(options: Sequence[str]) -> Iterator[Finding]:
    given = {option.partition("=")[0]: option for option in options}
    if given.get("lookupcache") not in (
        "lookupcache=pos",
        "lookupcache=positive",
        "lookupcache=none",
    ):
        yield Finding(
            check="NFS",
            verdict="warning",
            found="absent names are remembered for up to half a minute",
            fix="mount with lookupcache=positive",
        )
    if "soft" in given or "softerr" in given:
        fix = "mount with hard: UCM has deadlines of its own"
        found = "soft: a short outage becomes an error of each call"
        yield Finding(check="NFS", verdict="note", found=found, fix=fix)
    if "noac" in given or "sync" in given:
        found = "noac or sync: each write waits for the server"
        yield Finding(check="NFS", verdict="warning", found=found, fix="mount without them")
    if "nconnect" not in given:
        fix = "mount with nconnect=8 for each 100 Gbit/s"
        yield Finding(check="NFS", verdict="note", found="one connection", fix=fix)


def _refused(check: str, words: str, space: SpaceFacts) -> Finding:
    free_inodes = space.free_inodes if space.total_inodes else None
    fix = remedy(words, free_inodes=free_inodes)
    return Finding(check=check, verdict="wrong", found=words, fix=fix)


def _id(facts: BackendFacts) -> Finding:
    if facts.id:
        return Finding(check="id", verdict="fine", found=facts.id)
    fix = f"the first node cache makes one, or `ucm init {facts.backend}`, once it is mounted"
    return Finding(check="id", verdict="warning", found="none: a new store, or no mount", fix=fix)


def _rights(facts: BackendFacts, wishes: Wishes) -> Iterator[Finding]:
    if facts.is_read_only:
        found = "nobody may write: it is mounted read-only"
        fix = (
            "mount it with rw; else pages of this node stay in its memory, and what others have "
            "stored is read"
        )
        yield Finding(check="rights", verdict="warning", found=found, fix=fix)
        return
    found = f"mode {facts.mode:04o}, uid {facts.uid} may {'' if facts.may_write else 'not '}write"
    said = problems(
        facts.mode, may_write=facts.may_write, uid=facts.uid, is_sealed=wishes.is_sealed
    )
    if not said:
        yield Finding(check="rights", verdict="fine", found=found)
    for problem in said:
        yield Finding(check="rights", verdict="warning", found=found, fix=problem)


def _space(facts: BackendFacts, wishes: Wishes) -> Iterator[Finding]:
    of = facts.space
    space = Space(of.total_bytes, of.free_bytes)
    kept = reserve_bytes(
        space,
        min_free_bytes=wishes.min_free_bytes,
        queue_bytes=wishes.queue_pages * facts.page_bytes,
    )
    found = f"{of.free_bytes / _GIB:.1f} of {of.total_bytes / _GIB:.1f} GiB free"
    if not of.total_bytes:
        yield Finding(check="space", verdict="note", found="the filesystem doesn't tell")
    elif of.free_bytes <= kept:
        fix = f"nothing is written below {kept / _GIB:.1f} GiB (min_free_gb): make room"
        yield Finding(check="space", verdict="wrong", found=found, fix=fix)
    else:
        yield Finding(
            check="space", verdict="fine", found=f"{found}, {kept / _GIB:.1f} stay so (min_free_gb)"
        )
    if of.total_inodes and of.free_inodes < _MIN_INODES:
        fix = "each page is a file: make the filesystem with more inodes"
        found = f"{of.free_inodes:,} of {of.total_inodes:,} inodes free"
        yield Finding(check="inodes", verdict="warning", found=found, fix=fix)


def _clock(skew_s: float) -> Finding:
    found = f"files' times are {abs(skew_s):.1f} s {'ahead' if skew_s > 0 else 'behind'}"
    if abs(skew_s) <= _SKEW_S:
        return Finding(check="clock", verdict="fine", found="as this machine's")
    fix = "run NTP on all nodes and on the server: ages of files are measured by these clocks"
    return Finding(check="clock", verdict="warning", found=found, fix=fix)


def _calls(facts: BackendFacts, wishes: Wishes) -> Iterator[Finding]:
    calls = facts.calls
    if calls is None:
        return
    needed: dict[str, tuple[Verdict, str]] = {
        "O_EXCL": ("wrong", "two writers may mix their files: use another filesystem"),
        "rename": ("wrong", "pages can't appear whole: use another filesystem"),
        "link": ("note", "two nodes that start a new store at once may disagree: use `ucm init`"),
        "flock": ("note", "not needed: only node caches of one machine lock, in node_cache_socket"),
        "O_DIRECT": ("note", "io_direct has no effect here"),
        "utime": ("warning", "what a client remembers as missing can't be cleared"),
    }
    works = [name for name in needed if name not in calls.refused]
    yield Finding(check="calls", verdict="fine", found=f"{', '.join(works)} work")
    for name, why in calls.refused.items():
        verdict, fix = needed[name]
        yield Finding(check="calls", verdict=verdict, found=f"{name}: {why}", fix=fix)
    hit_s = _PROMPT_BLOCKS * calls.stat_hit_ms / 1000
    found = (
        f"stat {calls.stat_hit_ms:.3f} ms, of a missing name {calls.stat_miss_ms:.3f}, mkdir "
        f"{calls.mkdir_ms:.3f}, create and rename {calls.create_rename_ms:.3f}; a lookup of "
        f"{_PROMPT_BLOCKS} blocks {1000 * hit_s:.0f} ms"
    )
    is_slow = hit_s > wishes.lookup_timeout_s
    fix = "lookups will be late: raise posix_read_threads and lookup_timeout_ms" if is_slow else ""
    yield Finding(check="latency", verdict="warning" if is_slow else "fine", found=found, fix=fix)


def _speeds(facts: BackendFacts, wishes: Wishes) -> Iterator[Finding]:
    for op in ("write", "read"):
        speeds = [speed for speed in facts.speeds if speed.op == op]
        bad = next((speed.problem for speed in speeds if speed.problem), "")
        if bad:
            yield _refused(op, bad, facts.space)
        elif speeds:
            yield _speed(op, speeds, facts, wishes)


def _speed(op: str, speeds: list[Speed], facts: BackendFacts, wishes: Wishes) -> Finding:
    each = ", ".join(f"{speed.pages_per_s:,.0f} ({speed.num_threads})" for speed in speeds)
    best = max(speeds, key=lambda speed: speed.pages_per_s)
    found = (
        f"{each} pages/s by threads, of {facts.page_bytes / (1 << 20):.1f} MiB: "
        f"{best.bytes_per_s / (1 << 20):,.0f} MiB/s"
    )
    if op == "write":
        return Finding(check=op, verdict="fine", found=found)
    tokens = best.pages_per_s * wishes.block_tokens
    found += f", {tokens:,.0f} tokens/s"
    if not wishes.prefill_tokens_per_s:
        fix = "loading pays where the engine's prefill is slower than that"
        return Finding(check=op, verdict="fine", found=found, fix=fix)
    if tokens < wishes.prefill_tokens_per_s:
        fix = f"recomputing at {wishes.prefill_tokens_per_s:,.0f} tokens/s is faster: `ucm bench`"
        return Finding(check=op, verdict="warning", found=found, fix=fix)
    return Finding(check=op, verdict="fine", found=found)


def _leftovers(facts: BackendFacts) -> Iterator[Finding]:
    if facts.num_quarantined:
        found = f"{facts.num_quarantined:,} files in quarantine"
        fix = "storage, memory or a cable damages data: look at them, then remove them"
        yield Finding(check="quarantine", verdict="warning", found=found, fix=fix)
    if facts.leftovers:
        found = f"{', '.join(facts.leftovers)} left by a tool that was killed"
        yield Finding(check="leftovers", verdict="note", found=found, fix="rm -r them")


def peer_findings(facts: PeerFacts, own_id: str, wishes: Wishes) -> list[Finding]:
    """What a second node sees."""
    if facts.id != own_id:
        found = f"its id is {facts.id or 'missing'}, here it is {own_id or 'missing'}"
        fix = "the two mounts are not of one directory: mount the same one"
        return [Finding(check="peer id", verdict="wrong", found=found, fix=fix)]
    return [
        Finding(check="peer id", verdict="fine", found="the same"),
        _visible("new file", facts.new_file_s, facts, wishes.handoff_timeout_s),
        _after_miss(facts),
        _visible("asked again", facts.asked_again_s, facts, wishes.handoff_timeout_s),
        Finding(
            check="removed file", verdict="fine", found=f"gone {_after(facts.removed_s, facts)}"
        ),
        _race(facts),
    ]


def _visible(check: str, seen_s: float | None, facts: PeerFacts, limit_s: float) -> Finding:
    found = f"seen by the peer {_after(seen_s, facts)}"
    if seen_s is not None and seen_s < limit_s:
        return Finding(check=check, verdict="fine", found=found)
    fix = f"decode waits {limit_s:g} s (handoff_timeout_ms): raise it, or mind the mount's caches"
    return Finding(check=check, verdict="wrong", found=found, fix=fix)


def _after_miss(facts: PeerFacts) -> Finding:
    found = f"a name that was missing is seen {_after(facts.after_miss_s, facts)}"
    if facts.after_miss_s is not None and facts.after_miss_s < 1:
        return Finding(check="after a miss", verdict="fine", found=found)
    fix = "lookups ask again past that, at some cost: mount with lookupcache=positive on NFS"
    return Finding(check="after a miss", verdict="warning", found=found, fix=fix)


def _race(facts: PeerFacts) -> Finding:
    found = (
        f"{facts.num_unseen} of {facts.num_races} files that came in one tick with a look unseen"
    )
    if not facts.num_unseen:
        return Finding(check="one-tick race", verdict="fine", found=found)
    if not facts.num_unseen_after_touch:
        fix = "UCM touches their directory after 0.2 s, and then they are seen"
        return Finding(check="one-tick race", verdict="note", found=found, fix=fix)
    found += f", {facts.num_unseen_after_touch} even after their directory was touched"
    fix = "hand-offs will miss them: mount with lookupcache=positive, or NFS 4.2"
    return Finding(check="one-tick race", verdict="warning", found=found, fix=fix)


def _after(seen_s: float | None, facts: PeerFacts) -> str:
    return f"not within {facts.limit_s:g} s" if seen_s is None else f"after {1000 * seen_s:.0f} ms"


def model_findings(
    model: str, is_known: bool, differences: Sequence[str], where: str = "the store"
) -> list[Finding]:
    """Whether the store has anything of a model, and if not in what the nearest one differs."""
    if is_known:
        return [Finding(check="model", verdict="fine", found=f"{model}: {where} has its pages")]
    found = f"{model}: {where} has nothing of it"
    fix = "; ".join(differences) and f"the nearest namespace differs in {'; '.join(differences)}"
    return [Finding(check="model", verdict="note", found=found, fix=fix)]
