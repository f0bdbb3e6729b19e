"""Every file and directory name of the Posix tier is built and parsed here.

    <backend>/
      ucm-backend-id                          16 hex digits: `docs/backends.md`
      ucm-reclaim-lease                       who reclaims: lease.py
      ucm-reclaim-grants                      how much everybody may write: grants.py
      ucm-reclaim-node-<16 hex digits>        how much a node cache has written
      ucm-reclaim-record                      what was reclaimed: reclaim_record.py
      ucm-reclaim-record-before               the same, of the time before that
      <namespace fingerprint>/                or <namespace fingerprint>-<id of the page key>/
        manifest.json
        <hh>/<hh>/<key>.kv                    hh: first and second byte of the key
        <hh>/<hh>/<key>.<tokens>.kv           a tail of so many tokens
        <hh>/<hh>/.<key>.kv.<writer>.tmp      a block that is being written
      quarantine/
        <namespace fingerprint>/<key>.kv.<writer>

Fingerprints, keys and their bytes are in lower-case hex. `<writer>` says who made a file, and is
unique: see writers.py. Manifests and ids have temporary names too, made in the same way.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from dataclasses import dataclass

from ucm.store.blocks.keys import Key
from ucm.store.blocks.page_names import MANIFEST as MANIFEST
from ucm.store.blocks.page_names import (
    PAGE_PATTERN,
    is_namespace_name,
    namespace_name,
    page_name,
)
from ucm.store.processes import this_process
from ucm.store.tiers.posix import writers
from ucm.store.tiers.posix.writers import WriterName

TEMP_SUFFIX = ".tmp"
QUARANTINE = "quarantine"
BACKEND_ID = "ucm-backend-id"
RECLAIM_LEASE = "ucm-reclaim-lease"
RECLAIM_GRANTS = "ucm-reclaim-grants"
RECLAIM_RECORD = "ucm-reclaim-record"
RECLAIM_RECORD_BEFORE = "ucm-reclaim-record-before"
_NODE_PREFIX = "ucm-reclaim-node-"

_RANDOM_BYTES = 8
LEVELS = 3

_RECLAIM_NODE = re.compile(rf"{_NODE_PREFIX}[0-9a-f]{{16}}", re.ASCII)
_RECLAIM = rf"{RECLAIM_LEASE}|{RECLAIM_GRANTS}|{_RECLAIM_NODE.pattern}"
# Nothing else gets one, so that a dot in a host's name is never taken for the target's end.
_TARGET = rf"(?P<target>{PAGE_PATTERN}|{re.escape(MANIFEST)}|{re.escape(BACKEND_ID)}|{_RECLAIM})"
_TEMP_NAME = re.compile(rf"\.{_TARGET}\.{writers.PATTERN}{re.escape(TEMP_SUFFIX)}", re.ASCII)
# Where files of ours may lie: in a backend, its namespaces, and two levels of fan-out below.
_FAN_OUT = re.compile("[0-9a-f]{2}")


@dataclass(frozen=True)
class TempName:
    """`target` is the name, in the same directory, that the file was to get."""

    target: str
    writer: WriterName


def backend_id_path(backend: str) -> str:
    return f"{backend}/{BACKEND_ID}"


def namespace_dir(backend: str, fingerprint: bytes, key_id: bytes = b"") -> str:
    """`key_id` is that of the page key, if pages are sealed."""
    return f"{backend}/{namespace_name(fingerprint, key_id)}"


def reclaim_record_paths(backend: str) -> tuple[str, str]:
    """The older one first."""
    return f"{backend}/{RECLAIM_RECORD_BEFORE}", f"{backend}/{RECLAIM_RECORD}"


def manifest_path(backend: str, fingerprint: bytes, key_id: bytes = b"") -> str:
    return f"{namespace_dir(backend, fingerprint, key_id)}/{MANIFEST}"


def block_path(backend: str, fingerprint: bytes, key: Key, key_id: bytes = b"") -> str:
    name = page_name(key)
    return f"{namespace_dir(backend, fingerprint, key_id)}/{name[:2]}/{name[2:4]}/{name}"


def temp_path(target: str) -> str:
    """A new name beside `target`, never given out before.

    Beside it and not in a directory of temporary files: a rename within one directory needs no
    lock on the whole filesystem, is the same quota and the same metadata server, and XFS and ext4
    place a file near its first directory, so one directory for all would pile them up in one spot.
    The price is that the sweep has to walk the whole tree (sweep.py).
    """
    directory, name = os.path.split(target)
    return f"{directory}/.{name}.{_new_writer()}{TEMP_SUFFIX}"


def temp_target(temp: str) -> str:
    """The path that `temp_path` was asked for."""
    directory, name = os.path.split(temp)
    parsed = parse_temp_name(name)
    assert parsed is not None, temp
    return f"{directory}/{parsed.target}"


def quarantine_path(backend: str, fingerprint: bytes, key: Key) -> str:
    """A new name, because the same block may be damaged twice."""
    directory = f"{backend}/{QUARANTINE}/{fingerprint.hex()}"
    return f"{directory}/{page_name(key)}.{_new_writer()}"


def reclaim_node_name(word: str) -> str:
    """`word`: 16 hex digits that nobody else has."""
    return f"{_NODE_PREFIX}{word}"


def is_reclaim_node(name: str) -> bool:
    return _RECLAIM_NODE.fullmatch(name) is not None


def is_own_directory(name: str, *, level: int) -> bool:
    """Whether a directory of this name, `level` levels below a backend, may hold files of ours or
    other such directories. Level 1: namespaces; 2 and 3: the fan-out of keys."""
    if level == 1:
        return is_namespace_name(name)
    return 1 < level <= LEVELS and bool(_FAN_OUT.fullmatch(name))


def parse_temp_name(name: str) -> TempName | None:
    """`name` is a file name without its directory."""
    match = _TEMP_NAME.fullmatch(name)
    return None if match is None else TempName(match["target"], writers.parsed(match))


def _new_writer() -> str:
    return writers.writer_name(
        this_process(), now_s=time.time(), random=secrets.token_hex(_RANDOM_BYTES)
    )
