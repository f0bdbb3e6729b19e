"""What isn't installed is named in one line that installs it."""

from __future__ import annotations

import sys

import pytest

from tests.cluster import packages
from tests.source import ROOT


def test_what_is_missing_is_named_once_and_what_is_here_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = {"ip", "sshfs"}
    monkeypatch.setattr(packages, "_is_here", here.__contains__)
    assert packages.missing(["sshfs"]) == ["openssh-sftp-server"]
    assert packages.missing(["glusterfs"]) == ["attr", "glusterfs-client", "glusterfs-server"]
    line = packages.install_line(packages.missing())
    assert line.startswith("apt-get install -y --no-install-recommends ")
    assert len(line.split()) == len(set(line.split()))
    assert {"user-mode-linux", "glusterfs-server"} <= set(line.split())
    assert not {"iproute2", "sshfs"} & set(line.split())


def test_nothing_is_missing_where_all_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_is_here", lambda binary: True)
    monkeypatch.setattr(packages, "weed_binary", lambda: "weed")
    monkeypatch.setattr(packages, "juicefs_binary", lambda: "juicefs")
    assert packages.missing() == packages.install_lines() == []


def test_an_s3_server_is_installed_with_the_python_that_runs_the_tests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packages, "_is_here", lambda binary: True)
    monkeypatch.setattr(packages, "weed_binary", lambda: None)
    (line,) = packages.install_lines()
    assert line.startswith(f"{sys.executable} -m pip install ")
    assert (ROOT / line.split()[-1]).is_file()
