"""What a kernel remembers as missing stays missing, and which calls make it look again.

Experiments with this machine's kernel and FUSE. An NFS client decides differently (fs/nfs/dir.c; it
can't be tried here): it believes in an absence when a link or rename is to fill it, and asks for
the state of a folder when that is opened.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.fuse import FuseMount, mount_fuse, needs_fuse
from tests.faults.fuse_server import unmount
from tests.faults.mounts import mount_read_only, own_mounts

pytestmark = [pytest.mark.process, needs_fuse]

FOREVER_S = 3600.0


@pytest.fixture
def forgetful(tmp_path: Path) -> Iterator[FuseMount]:
    """A mount with a folder, whose kernel remembers absences longer than any test takes."""
    source = tmp_path / "source"
    (source / "folder").mkdir(parents=True)
    with mount_fuse(source, tmp_path / "mounted", negative_timeout_s=FOREVER_S) as mounted:
        yield mounted


def appear_after_absence(mount: FuseMount, name: str) -> Path:
    """Asks for `name`, which is missing, and has another node make it. Returns its path here, where
    it is still missing, and not because the storage said so."""
    path = mount.path / name
    assert not path.exists()
    (mount.source / name).write_bytes(b"content")
    num_lookups = mount.calls["lookup"]
    assert not path.exists()
    assert mount.calls["lookup"] <= num_lookups + name.count("/")  # of the folders above it
    return path


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_a_missing_name_stays_missing_although_it_is_listed(forgetful: FuseMount) -> None:
    path = appear_after_absence(forgetful, "folder/name")
    assert os.listdir(path.parent) == ["name"]
    with pytest.raises(FileNotFoundError):
        os.stat(path)
    with pytest.raises(FileNotFoundError):
        os.open(path, os.O_RDONLY)


def open_folder(path: Path) -> None:
    os.close(os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY))


@pytest.mark.parametrize(
    "look",
    [
        pytest.param(lambda path: os.listdir(path.parent), id="list"),
        pytest.param(open_folder, id="open"),
        pytest.param(lambda path: os.stat(path.parent), id="stat"),
    ],
)
def test_looking_at_the_folder_does_not_make_the_kernel_look_again(
    forgetful: FuseMount, look: Callable[[Path], object]
) -> None:
    path = appear_after_absence(forgetful, "folder/name")
    look(path)
    assert not path.exists()


def rename_folder_into_itself(path: Path) -> int | None:
    with pytest.raises(OSError, match=r"\[Errno") as raised:
        os.rename(path.parent, path)
    return raised.value.errno


def link_folder_into_itself(path: Path) -> int | None:
    with pytest.raises(OSError, match=r"\[Errno") as raised:
        os.link(path.parent, path)
    return raised.value.errno


def test_renaming_a_folder_into_itself_is_refused_and_makes_the_kernel_look_again(
    forgetful: FuseMount,
) -> None:
    path = appear_after_absence(forgetful, "folder/name")
    before = contents(forgetful.source)
    assert rename_folder_into_itself(path) == errno.EINVAL
    assert path.read_bytes() == b"content"

    missing = path.with_name("missing")
    assert rename_folder_into_itself(missing) == errno.EINVAL
    assert not missing.exists()
    assert contents(forgetful.source) == before
    assert forgetful.calls["rename"] == 0


def test_linking_a_folder_into_itself_is_refused_and_makes_the_kernel_look_again(
    forgetful: FuseMount,
) -> None:
    """And says what it saw."""
    path = appear_after_absence(forgetful, "folder/name")
    before = contents(forgetful.source)
    assert link_folder_into_itself(path) == errno.EEXIST
    assert path.read_bytes() == b"content"

    missing = path.with_name("missing")
    assert link_folder_into_itself(missing) == errno.EPERM
    assert not missing.exists()
    assert contents(forgetful.source) == before
    assert forgetful.calls["link"] == 0


def test_only_the_link_makes_it_look_again_right_below_the_mount(forgetful: FuseMount) -> None:
    """The folder that is mounted can't be renamed from inside, so nobody looks at the target."""
    path = appear_after_absence(forgetful, "name")
    assert rename_folder_into_itself(path) == errno.EXDEV
    assert not path.exists()
    assert link_folder_into_itself(path) == errno.EEXIST
    assert path.exists()


@own_mounts
def test_only_the_link_makes_it_look_again_on_a_read_only_mount(tmp_path: Path) -> None:
    source, read_only = tmp_path / "source", tmp_path / "read_only"
    (source / "folder").mkdir(parents=True)
    with mount_fuse(source, tmp_path / "mounted", negative_timeout_s=FOREVER_S) as mount:
        appear_after_absence(mount, "folder/name")
        mount_read_only(mount.path, read_only)
        path = read_only / "folder" / "name"
        assert rename_folder_into_itself(path) == errno.EROFS
        assert not path.exists()
        assert link_folder_into_itself(path) == errno.EEXIST
        assert path.exists()
        assert link_folder_into_itself(path.with_name("missing")) in (errno.EPERM, errno.EROFS)
        unmount(str(read_only))


def test_a_missing_folder_has_to_be_asked_for_before_what_is_in_it(forgetful: FuseMount) -> None:
    path = forgetful.path / "folder" / "new" / "name"
    assert not path.exists()
    (forgetful.source / "folder" / "new").mkdir()
    (forgetful.source / "folder" / "new" / "name").touch()
    assert link_folder_into_itself(path) == errno.ENOENT
    assert not path.exists()
    assert link_folder_into_itself(path.parent) == errno.EEXIST
    assert path.exists()
