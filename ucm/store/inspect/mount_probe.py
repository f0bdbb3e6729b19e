"""What a filesystem can do, tried out in a folder of one's own: facts, without a verdict."""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from ucm.errors import TierError
from ucm.store.blocks.page_names import parse_page_name
from ucm.store.inspect.contents import backend_id, num_quarantined
from ucm.store.inspect.model_label import model_label
from ucm.store.inspect.speed import FOLDER_START, ProbeLoad, Speed, SpeedTest, own_folder
from ucm.store.inspect.strand_pages import StrandPages
from ucm.store.inspect.walk import NamespaceFolder, namespace_folders, read_manifest
from ucm.store.inspect.within import Trial
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.filesystem import mount_of

_ROUNDS: Final = 16
_DIRECT_BYTES: Final = 4096
_MAX_LEFT: Final = 100


class MountFacts(msgspec.Struct, frozen=True, kw_only=True):
    """`kind` is empty where the mount table can't tell."""

    point: str
    kind: str
    options: list[str]
    is_local: bool


class SpaceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Totals of 0: the filesystem doesn't tell."""

    total_bytes: int
    free_bytes: int
    total_inodes: int
    free_inodes: int


class CallFacts(msgspec.Struct, frozen=True, kw_only=True):
    """`refused` has what the filesystem can't do, with its words. The rest is milliseconds for one
    call, the median of a few."""

    refused: dict[str, str]
    stat_hit_ms: float
    stat_miss_ms: float
    mkdir_ms: float
    create_rename_ms: float


class BackendFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Of one backend. `is_read_only`: nobody may write to its mount. `skew_s`: how far its clock is
    ahead of this machine's; what could not be tried or looked at is None or empty, and `troubles`
    say why, for people. `leftovers` are folders of tools that were killed."""

    backend: str
    mount: MountFacts
    id: str
    mode: int
    uid: int
    may_write: bool
    is_read_only: bool
    space: SpaceFacts
    skew_s: float | None
    calls: CallFacts | None
    troubles: list[str]
    speeds: list[Speed]
    page_bytes: int
    namespaces: dict[str, str]
    num_quarantined: int
    leftovers: list[str]


@dataclass
class _Outcomes:
    """What was found by trying, up to what was refused."""

    skew_s: float | None = None
    calls: CallFacts | None = None
    speeds: list[Speed] = field(default_factory=list)


@dataclass
class _Troubles:
    """Goes on behind its block where storage refuses something in it."""

    trial: Trial
    said: list[str] = field(default_factory=list)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        if isinstance(error, TimeoutError) or not isinstance(error, (OSError, TierError)):
            return False
        cause = error.__cause__ if isinstance(error, TierError) else error
        words = cause.strerror if isinstance(cause, OSError) else None
        self.said.append(f"{self.trial.doing}: {words or error}")
        return True


def look_at_backend(
    backend: str, load: ProbeLoad, num_threads: tuple[int, ...], trial: Trial
) -> BackendFacts:
    """Raises OSError if there is nothing to look at."""
    trial.doing = "looking at the directory"
    status = os.stat(backend)
    may_write = os.access(backend, os.W_OK | os.X_OK)
    troubles = _Troubles(trial)
    leftovers: list[str] = []
    namespaces: dict[str, str] = {}
    trial.doing = "listing the directory"
    with troubles:
        leftovers = _leftovers(backend)
        trial.doing = "reading the manifests"
        namespaces = _namespaces(backend)
    tried = _Outcomes()
    if may_write:
        with troubles:
            _try_out(backend, load, num_threads, trial, tried)
    trial.doing = "reading the id and the mount table"
    return BackendFacts(
        backend=backend,
        mount=mount_facts(backend),
        id=backend_id(backend),
        mode=stat.S_IMODE(status.st_mode),
        uid=os.geteuid(),
        may_write=may_write,
        is_read_only=bool(os.statvfs(backend).f_flag & os.ST_RDONLY),
        space=_space(backend),
        skew_s=tried.skew_s,
        calls=tried.calls,
        troubles=troubles.said,
        speeds=tried.speeds,
        page_bytes=load.page_bytes,
        namespaces=namespaces,
        num_quarantined=num_quarantined(backend),
        leftovers=leftovers,
    )


def _try_out(
    backend: str, load: ProbeLoad, num_threads: tuple[int, ...], trial: Trial, tried: _Outcomes
) -> None:
    """Raises TierError or OSError for the first thing that is refused."""
    trial.doing = "making a folder"
    with own_folder(backend) as folder:
        trial.doing = "making, writing and renaming files"
        tried.skew_s = round(_skew_s(folder), 3)
        tried.calls = _calls(folder)
        trial.doing = "making room for pages in memory"
        test = SpeedTest(folder, load, num_threads)
        trial.doing = "writing pages"
        for number in test.num_threads:
            tried.speeds.append(test.write(number))
        trial.doing = "reading pages"
        for number in test.num_threads if test.has_files else ():
            tried.speeds.append(test.read(number))
        trial.doing = "removing what was made"


def mount_facts(path: str) -> MountFacts:
    """Raises OSError if nothing is there."""
    mount = mount_of(path)
    if mount is None:
        return MountFacts(point="", kind="", options=[], is_local=False)
    return MountFacts(
        point=mount.point,
        kind=mount.kind,
        options=sorted(mount.options),
        is_local=mount.is_local,
    )


def largest_page_bytes(backends: tuple[str, ...]) -> int:
    """Of the pages in the store, as far as a look at one of each namespace tells; 0 for none. Of a
    model with several strands those of the first count: of them a long prompt is read."""
    folders = [folder for backend in backends for folder in namespace_folders(backend)]
    return max((_typical_page_bytes(folder) for folder in folders), default=0)


def _typical_page_bytes(folder: NamespaceFolder) -> int:
    found = _first_page_bytes(folder.path)
    first, *_ = [*StrandPages(read_manifest(folder)[0]).page_bytes, 0]
    return found and (first or found)


def _first_page_bytes(directory: str) -> int:
    """The length of any page below, going straight down."""
    for _ in range(paths.LEVELS):
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    directory = entry.path
                    break
                if parse_page_name(entry.name) and entry.is_file(follow_symlinks=False):
                    return max(0, entry.stat(follow_symlinks=False).st_size - _DIRECT_BYTES)
            else:
                return 0
    return 0


def _namespaces(backend: str) -> dict[str, str]:
    named = {}
    for folder in namespace_folders(backend):
        manifest, why = read_manifest(folder)
        named[folder.name] = model_label(manifest) if manifest is not None else f"? ({why})"
    return named


def _leftovers(backend: str) -> list[str]:
    with os.scandir(backend) as entries:
        found = sorted(entry.name for entry in entries if entry.name.startswith(FOLDER_START))
    return found[:_MAX_LEFT]


def _space(path: str) -> SpaceFacts:
    of = os.statvfs(path)
    return SpaceFacts(
        total_bytes=of.f_blocks * of.f_frsize,
        free_bytes=of.f_bavail * of.f_frsize,
        total_inodes=of.f_files,
        free_inodes=of.f_favail,
    )


def _skew_s(folder: str) -> float:
    path = f"{folder}/clock"
    before_s = time.time()
    _make(path)
    after_s = time.time()
    seen_s = os.stat(path).st_mtime
    os.unlink(path)
    if before_s - 1 <= seen_s <= after_s + 1:
        return 0.0  # as exact as files' times are
    return seen_s - (before_s + after_s) / 2


def _calls(folder: str) -> CallFacts:
    tried: dict[str, Callable[[str], None]] = {
        "O_EXCL": _exclusive,
        "rename": _rename_over,
        "link": _link,
        "flock": _flock,
        "O_DIRECT": _direct,
        "utime": os.utime,
    }
    refused = {}
    for name, act in tried.items():
        path = f"{folder}/{name}"
        _make(path)
        try:
            act(path)
        except OSError as error:
            refused[name] = error.strerror or str(error)
    path = f"{folder}/there"
    _make(path)
    return CallFacts(
        refused=refused,
        stat_hit_ms=_median_ms(lambda number: os.stat(path)),
        stat_miss_ms=_median_ms(lambda number: os.path.lexists(f"{folder}/miss-{number}")),
        mkdir_ms=_median_ms(lambda number: os.mkdir(f"{folder}/dir-{number}")),
        create_rename_ms=_median_ms(lambda number: _create_and_rename(f"{folder}/new-{number}")),
    )


def _median_ms(act: Callable[[int], object]) -> float:
    took = []
    for number in range(_ROUNDS):
        started_s = time.perf_counter()
        act(number)
        took.append(time.perf_counter() - started_s)
    return round(1000 * sorted(took)[_ROUNDS // 2], 4)


def _make(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _create_and_rename(path: str) -> None:
    _make(f"{path}.tmp")
    os.rename(f"{path}.tmp", path)


def _exclusive(path: str) -> None:
    try:
        _make(path)
    except FileExistsError:
        return
    raise OSError("made a file that was there")


def _rename_over(path: str) -> None:
    _create_and_rename(path)
    if os.path.exists(f"{path}.tmp"):
        raise OSError("left the old name behind")


def _link(path: str) -> None:
    os.link(path, f"{path}.2")
    try:
        os.link(path, f"{path}.2")
    except FileExistsError:
        return
    raise OSError("made a name that was there")


def _flock(path: str) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fd)


def _direct(path: str) -> None:
    """Taken at open may still be refused at the first transfer."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
    try:
        os.pwritev(fd, [mmap.mmap(-1, _DIRECT_BYTES)], 0)
    finally:
        os.close(fd)
