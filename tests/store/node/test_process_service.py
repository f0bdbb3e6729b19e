"""A node cache that runs as a service: engines use it and never start one."""

from __future__ import annotations

import time

import pytest
import yaml

from tests.store.node.support import (
    SOON_S,
    Engine,
    Place,
    client_of,
    engine,
    make_keys,
    wait_until,
)
from tests.store.node.test_process_cli import by_hand, config, serves, settings_of
from ucm.errors import NodeUnavailable
from ucm.store.client.link import NodeLink
from ucm.store.client.start import connect_or_start

pytestmark = pytest.mark.process

__all__ = ["config"]


@pytest.fixture
def service(config):
    """Its settings file. By `node_cache_idle_exit_s` it would have left before it is asked."""
    tree = yaml.safe_load(config.read_text())
    store = tree["ucm_connectors"][0]["ucm_connector_config"]
    store |= {"node_cache_autostart": False, "node_cache_idle_exit_s": 0.2}
    config.write_text(yaml.safe_dump(tree))
    return config


def test_an_engine_starts_none_and_says_what_is_to_run(place: Place, service):
    settings = settings_of(service)

    with pytest.raises(NodeUnavailable, match=r"`ucm node-cache` is to run there"):
        connect_or_start(settings, session="e/0", role="scheduler", timeout_s=1.0)

    assert [] == place.pids()


def test_a_service_without_engines_stays(service):
    with by_hand(service) as process:
        serves(process)
        time.sleep(1.5)

        with Engine(settings_of(service)) as client:
            assert process.pid == client.pid


def test_an_engine_leaves_the_place_of_a_killed_service_to_the_next_one(place: Place, service):
    """As it would not with an engine that is faster than the service's manager."""
    keys = make_keys("a", 4)
    link = NodeLink(settings_of(service), engine_id="e")
    try:
        with by_hand(service) as first:
            serves(first)
            assert first.pid == client_of(link).welcome.pid
            with engine(settings_of(service), "o/0") as other:
                other.dump(keys)
                other.wait_written()
            first.kill()
            first.wait(SOON_S)
        wait_until(lambda: link.poll() == [] and link.client is None, "the link knows")
        time.sleep(1.0)  # it has tried several times
        assert [] == place.pids()

        with by_hand(service) as second:
            serves(second)
            assert second.pid == client_of(link).welcome.pid
            with engine(settings_of(service), "o/1") as other:
                assert (4, 4) == other.load(keys)
    finally:
        link.close()
