"""The file of a backend's id is found again by a machine that remembers that it was missing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.store.tiers.tier_contract import ODD, content_of, dump, load, make_key, make_page
from ucm.store.tiers.posix import id_file, paths
from ucm.store.tiers.posix.tier import PosixTier

KEY, PAGE = make_key(1), make_page(ODD, "a")


class Remembering:
    """A client that goes on to say that a file is missing until somebody makes it look again."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_blind = False
        self.num_looks = 0
        self._name, self._lstat, self._link = name, os.lstat, os.link
        monkeypatch.setattr(os, "lstat", self.lstat)
        monkeypatch.setattr(os, "link", self.link)

    def lstat(self, path: str) -> os.stat_result:
        if self.is_blind and os.fspath(path) == self._name:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return self._lstat(path)

    def link(self, source: str, target: str, **how: object) -> None:
        if target == self._name:
            self.num_looks += 1
            self.is_blind = False
        self._link(source, target, **how)  # type: ignore[arg-type]


def test_a_backend_comes_back_though_this_machine_remembers_that_its_id_was_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = PosixTier([str(tmp_path)])
    dump(tier, ODD, KEY, PAGE)
    client = Remembering(paths.backend_id_path(str(tmp_path)), monkeypatch)
    client.is_blind = True
    assert load(tier, ODD, KEY) == content_of(ODD, PAGE)


def test_it_is_looked_past_what_is_remembered_once_in_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    monkeypatch.setattr(id_file.time, "monotonic", lambda: now_s)
    PosixTier([str(tmp_path)]).open_namespace(ODD)
    one = id_file.IdFile(str(tmp_path))
    assert one.locate() is not None
    name = Path(paths.backend_id_path(str(tmp_path)))
    name.unlink()
    client = Remembering(str(name), monkeypatch)
    for _ in range(100):
        assert one.locate() is None
    assert client.num_looks == 1
    now_s += 1.0
    assert one.locate() is None
    assert client.num_looks == 2


def test_an_id_that_was_never_there_is_not_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Remembering(paths.backend_id_path(str(tmp_path)), monkeypatch)
    assert id_file.IdFile(str(tmp_path)).locate() is None
    assert client.num_looks == 0
