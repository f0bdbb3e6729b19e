"""`ucm node-cache`, as a person runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.store.node.support import ROOT, SOON_S, Place, engine, make_keys
from ucm.config.settings import StoreSettings, load_settings_file

pytestmark = pytest.mark.process


@pytest.fixture
def config(place: Place) -> Path:
    path = place.directory / "ucm.yaml"
    store = {
        "store_pipeline": "Cache|Posix",
        "storage_backends": str(place.store),
        "cache_buffer_capacity_gb": 0.03125,
        "node_cache_socket": place.settings().socket_path,
    }
    connector = {"ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": store}
    path.write_text(yaml.safe_dump({"ucm_connectors": [connector]}))
    return path


@contextmanager
def by_hand(config: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "ucm.cli.main", "node-cache", "--config", str(config)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def serves(process: subprocess.Popen[str]) -> list[str]:
    """What it says until it serves."""
    said = []
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line)
        if f"node cache {process.pid} serves at" in line:
            return said
    raise AssertionError("".join(said))


def settings_of(config: Path) -> StoreSettings:
    return load_settings_file(config).store


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_in_the_foreground_until_it_is_interrupted(
    place: Place, config: Path, number: signal.Signals
) -> None:
    keys = make_keys("a", 20)
    with by_hand(config) as process:
        said = serves(process)
        assert "memory for slots: 0.03 GiB (cache_buffer_capacity_gb)" in "".join(said)
        with engine(settings_of(config)) as client:
            assert client.pid == process.pid
            client.dump(keys)
            client.status()
            process.send_signal(number)
            _, rest = process.communicate(timeout=SOON_S)

        assert process.returncode == 0
        assert f"node cache {process.pid} leaves" in rest
        assert "Traceback" not in rest
    assert place.blocks() == {place.block(key) for key in keys}


def test_a_second_one_says_in_one_line_who_serves_already(config: Path) -> None:
    with by_hand(config) as first:
        serves(first)
        with by_hand(config) as second:
            _, said = second.communicate(timeout=SOON_S)

        assert second.returncode == 1
        socket_path = settings_of(config).socket_path
        assert said == f"ucm node-cache: another node cache serves at {socket_path}\n"
        with engine(settings_of(config)) as client:
            assert client.pid == first.pid


def test_a_directory_that_is_not_to_be_trusted_is_one_line(config: Path) -> None:
    directory = Path(settings_of(config).socket_path).parent
    directory.mkdir()
    os.chmod(directory, 0o777)

    with by_hand(config) as process:
        _, said = process.communicate(timeout=SOON_S)

    assert process.returncode == 1
    assert said.startswith("ucm node-cache: node_cache_socket: others may write to ")
    assert said.count("\n") == 1
