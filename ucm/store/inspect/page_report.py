"""What one page file is, and whether it is whole: by its path, or by the beginning of its key."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from ucm.errors import ConfigError, TierError
from ucm.store.blocks.blockfile import HEADER_BYTES, Header, decode_header
from ucm.store.blocks.keys import Key, TailKey
from ucm.store.blocks.namespace import Manifest
from ucm.store.blocks.page_key import NO_KEY_ID, PageKey
from ucm.store.blocks.page_names import parse_page_name
from ucm.store.inspect.contents import used_s
from ucm.store.inspect.model_label import model_label
from ucm.store.inspect.page_check import Condition, ExpectedPage, PageCheck, PageChecker
from ucm.store.inspect.signs_of_life import LOOKED
from ucm.store.inspect.strand_pages import StrandPages
from ucm.store.inspect.walk import NamespaceFolder, namespace_folders, read_manifest
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.plain_files import NotPlain, open_plain

_HEX: Final = frozenset("0123456789abcdef")
_MIN_DIGITS: Final = 4


class PageReport(msgspec.Struct, frozen=True, kw_only=True):
    """Digests in hex. `why` says what is wrong, or can't be told; empty if nothing is. Of a header
    that can't be believed the numbers are 0. `is_at_home` is false for a file that no reader looks
    for there, such as one in quarantine. `strand` is the label of its strand, or of those whose
    pages are as large; empty where there is one, or where it can't be told. `used_s`: seconds since
    1970, of an object when it was written. It has no `mode` and no `uid`."""

    path: str
    condition: str
    why: str
    is_at_home: bool
    namespace: str
    model: str
    strand: str
    key: str
    num_tokens: int
    is_tail: bool
    page_bytes: int
    file_bytes: int
    num_segments: int
    segment_bytes: int
    sealed_by: str
    mode: str
    uid: int | None
    used_s: float


@dataclass(frozen=True)
class Seen:
    """What is seen of a file or an object from outside."""

    size_bytes: int
    used_s: float
    mode: str = ""
    uid: int | None = None


def is_key(text: str) -> bool:
    """Whether it can be the beginning of a key."""
    return len(text) >= _MIN_DIGITS and set(text) <= _HEX


def files_of(backends: Sequence[str], beginning: str) -> list[str]:
    """Paths of all pages whose key begins so, in any namespace, those in quarantine too. Raises
    TierError where a backend can't be listed."""
    found = []
    for backend in backends:
        for folder in namespace_folders(backend):
            directory = f"{folder.path}/{beginning[:2]}/{beginning[2:4]}"
            found += _beginning_so(directory, beginning)
            found += _beginning_so(f"{backend}/{paths.QUARANTINE}/{folder.name}", beginning)
    return found


def page_report(path: str, page_key: PageKey | None) -> PageReport:
    """Raises ConfigError for a path that leads to no page file."""
    sys.audit(LOOKED, os.path.abspath(path))
    expected, folder = _by_its_place(os.path.abspath(path))
    expected = expected or _by_its_header(path)
    check = PageChecker(page_key).check(path, expected)
    if check.condition is Condition.GONE:
        raise ConfigError(f"{path}: is not there")
    manifest = None
    if folder is not None:
        manifest, _ = read_manifest(folder)
    status = check.status or os.lstat(path)
    mode = f"{status.st_mode & 0o7777:04o}"
    seen = Seen(status.st_size, used_s(status), mode, status.st_uid)
    is_at_home = folder is not None
    return report_of(path, expected, check, seen, is_at_home=is_at_home, manifest=manifest)


def report_of(
    path: str,
    expected: ExpectedPage,
    check: PageCheck,
    seen: Seen,
    *,
    is_at_home: bool,
    manifest: Manifest | None,
) -> PageReport:
    """Pure."""
    header: Header | None = check.header
    page_bytes = header.block.page_bytes if header is not None else 0
    is_sealed = header is not None and header.key_id != NO_KEY_ID
    return PageReport(
        path=path,
        condition=check.condition.value,
        why=check.why,
        is_at_home=is_at_home,
        namespace=expected.fingerprint.hex(),
        model=model_label(manifest) if manifest is not None else "",
        strand=StrandPages(manifest).of_page(page_bytes),
        key=expected.key.hex(),
        num_tokens=header.num_tokens if header is not None else 0,
        is_tail=isinstance(expected.key, TailKey),
        page_bytes=page_bytes,
        file_bytes=seen.size_bytes,
        num_segments=len(header.checksums) if header is not None else 0,
        segment_bytes=header.segment_bytes if header is not None else 0,
        sealed_by=header.key_id.hex() if header is not None and is_sealed else "",
        mode=seen.mode,
        uid=seen.uid,
        used_s=seen.used_s,
    )


def _beginning_so(directory: str, beginning: str) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return sorted(entry.path for entry in entries if entry.name.startswith(beginning))
    except OSError:
        return []


def _by_its_place(path: str) -> tuple[ExpectedPage | None, NamespaceFolder | None]:
    """What the path promises; the folder if it is where readers look."""
    directory, name = os.path.split(path)
    levels = directory.split("/")
    key = parse_page_name(name)
    if key is not None and len(levels) > paths.LEVELS:
        backend, namespace, first, second = *_split(levels), *levels[-2:]
        if paths.is_own_directory(namespace, level=1) and name[:4] == first + second:
            folder = NamespaceFolder(backend, namespace)
            manifest, _ = read_manifest(folder)
            version = manifest.page_format_version if manifest is not None else None
            return ExpectedPage(key, folder.fingerprint, folder.key_id, version), folder
    return None, None


def _split(levels: list[str]) -> tuple[str, str]:
    return "/".join(levels[: -paths.LEVELS]) or "/", levels[-paths.LEVELS]


def _by_its_header(path: str) -> ExpectedPage:
    """Of a file that lies elsewhere: what it says of itself, if it can be believed."""
    try:
        fd = open_plain(path)
        try:
            content = os.pread(fd, HEADER_BYTES, 0)
        finally:
            os.close(fd)
    except NotPlain as error:
        raise ConfigError(f"{path}: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror or error}") from error
    return expected_by_header(path, content)


def expected_by_header(path: str, head: bytes | memoryview) -> ExpectedPage:
    """What a file or an object that begins so says of itself. Raises ConfigError."""
    if len(head) < HEADER_BYTES:
        raise ConfigError(f"{path}: is no page file: it is shorter than a header")
    try:
        header = decode_header(head)
    except TierError as error:
        raise ConfigError(f"{path}: is no page file that can be read: {error}") from error
    key_id = b"" if header.key_id == NO_KEY_ID else header.key_id
    return ExpectedPage(Key(header.block.key), header.block.fingerprint, key_id)
