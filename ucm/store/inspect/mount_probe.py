"""What a filesystem can do, tried out in a folder of one's own: facts, without a verdict."""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import time
from collections.abc import Callable
from typing import Final

import msgspec

from ucm.store.inspect.contents import backend_id, model_label
from ucm.store.inspect.speed import FOLDER_START, ProbeLoad, Speed, SpeedTest, own_folder
from ucm.store.inspect.walk import namespace_folders, read_manifest
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
    """Of one backend. `skew_s`: how far its clock is ahead of this machine's. `leftovers` are
    folders of tools that were killed."""

    backend: str
    mount: MountFacts
    id: str
    mode: int
    uid: int
    may_write: bool
    space: SpaceFacts
    skew_s: float
    calls: CallFacts | None
    speeds: list[Speed]
    page_bytes: int
    namespaces: dict[str, str]
    num_quarantined: int
    leftovers: list[str]


def look_at_backend(
    backend: str, load: ProbeLoad, num_threads: tuple[int, ...], trial: Trial
) -> BackendFacts:
    """Raises TierError or OSError if storage does."""
    trial.doing = "looking at the directory"
    status = os.stat(backend)
    may_write = os.access(backend, os.W_OK | os.X_OK)
    trial.doing = "listing the directory"
    leftovers = _leftovers(backend)
    calls, speeds, skew_s = None, [], 0.0
    if may_write:
        trial.doing = "making a folder"
        with own_folder(backend) as folder:
            trial.doing = "making, writing and renaming files"
            skew_s = _skew_s(folder)
            calls = _calls(folder)
            test = SpeedTest(folder, load)
            trial.doing = "writing pages"
            speeds = [test.write(number) for number in num_threads]
            trial.doing = "reading pages"
            speeds += [test.read(number) for number in num_threads]
            trial.doing = "removing what was made"
    trial.doing = "reading the id and the manifests"
    return BackendFacts(
        backend=backend,
        mount=mount_facts(backend),
        id=backend_id(backend),
        mode=stat.S_IMODE(status.st_mode),
        uid=os.geteuid(),
        may_write=may_write,
        space=_space(backend),
        skew_s=round(skew_s, 3),
        calls=calls,
        speeds=speeds,
        page_bytes=load.page_bytes,
        namespaces=_namespaces(backend),
        num_quarantined=_num_entries(f"{backend}/{paths.QUARANTINE}"),
        leftovers=leftovers,
    )


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
    """Of the pages in the store, as far as a look at one of each namespace tells; 0 for none."""
    folders = [folder for backend in backends for folder in namespace_folders(backend)]
    return max((_first_page_bytes(folder.path) for folder in folders), default=0)


def _first_page_bytes(directory: str) -> int:
    """The length of any page below, going straight down."""
    for _ in range(paths.LEVELS):
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    directory = entry.path
                    break
                if paths.parse_block_name(entry.name) and entry.is_file(follow_symlinks=False):
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


def _num_entries(directory: str) -> int:
    try:
        with os.scandir(directory) as folders:
            return sum(len(os.listdir(each.path)) for each in folders if each.is_dir())
    except OSError:
        return 0


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
