"""Instances that come and go by a file, while requests run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from yarl import URL

from tests.pd.conftest import Fleet, until
from ucm.errors import ConfigError
from ucm.pd import toy_proxy_server
from ucm.pd.fleet.etcd import Registration
from ucm.pd.fleet.file import read_instances
from ucm.pd.fleet.instance import Role
from ucm.pd.fleet.members import Members
from ucm.pd.fleet.pool import Pool, PoolRules


def write(path: Path, text: str) -> None:
    """As an editor does it: never half a file."""
    temp = path.with_suffix(".new")
    temp.write_text(text)
    os.replace(temp, path)


async def test_a_file_of_instances_is_followed_and_a_bad_one_changes_nothing(
    fleet: Fleet, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "instances.yaml"
    new = await fleet.engine("new")
    write(path, f"decode: [{new.url.origin()}]")
    await fleet.start(1, 1, instances_file=str(path))

    async def decoders() -> set[str]:
        return {(await fleet.ask(prompt=f"{i}"))[1] for i in range(4)}

    async def are_two() -> bool:
        return await decoders() == {"decode0", "new"}

    async def is_one() -> bool:
        return await decoders() == {"decode0"}

    async def is_said() -> bool:
        return "the instances stay as they are" in caplog.text

    await until(are_two)
    write(path, "decode: [http://a b:1]")
    await until(is_said)
    assert await are_two()
    write(path, "decode: []")
    await until(is_one)


async def test_a_file_may_bring_the_first_worker(fleet: Fleet, tmp_path: Path):
    path = tmp_path / "instances.yaml"
    new = await fleet.engine("new")
    write(path, f"worker: [{new.url.origin()}]")
    await fleet.start(0, 0, mixed_mode=True, instances_file=str(path))

    async def answers() -> bool:
        return await fleet.ask() == (200, "new", "mixed")

    await until(answers)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("- a", "expected lists of URLs under some of: prefill, decode, worker"),
        ("cook: []", "expected lists of URLs under some of: prefill, decode, worker"),
        ("decode: http://a:1", "decode: expected a list of URLs"),
        ("decode: [nowhere]", "decode: 'nowhere' is no instance"),
        ("decode: [http://a:1", "bad YAML"),
    ],
)
def test_a_bad_file_is_one_line_at_the_start(tmp_path: Path, text: str, says: str, capsys):
    path = tmp_path / "instances.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_instances(str(path))

    with pytest.raises(SystemExit) as exited:
        toy_proxy_server.main([f"--instances-file={path}"])
    error = capsys.readouterr().err
    assert (2, 1) == (exited.value.code, error.count("\n"))
    assert str(path) in error and says in error


def pools() -> dict[Role, Pool]:
    return {
        role: Pool(
            role,
            PoolRules(
                max_running=1,
                max_queued=1,
                queue_timeout_s=1.0,
                silent_after_s=10.0,
                breaker_failures=1,
                breaker_open_s=1000.0,
            ),
        )
        for role in (Role.PREFILL, Role.DECODE)
    }


def test_an_instance_that_was_restarted_begins_anew():
    found = pools()
    members = Members(found)
    url = "http://a:1"
    members.registered({"k": Registration(role="decode", url=url, incarnation="one")})
    (first,) = found[Role.DECODE].instances
    first.breaker.failed()
    assert "open" == first.state

    members.registered({"k": Registration(role="decode", url=url, incarnation="one")})
    assert [first] == found[Role.DECODE].instances
    members.registered({"k": Registration(role="decode", url=url, incarnation="two")})
    (second,) = found[Role.DECODE].instances
    assert ("closed", URL(url)) == (second.state, second.url)
    members.registered({})
    assert [] == found[Role.DECODE].instances


def test_instances_of_another_mode_are_told_of_by_their_addresses(caplog):
    Members(pools()).listed({Role.WORKER: (URL("http://a:1"), URL("http://b:1"))})
    (said,) = caplog.messages
    assert "worker instances are of no use in this mode: http://a:1, http://b:1" == said


def test_a_source_takes_away_only_what_it_has_brought():
    found = pools()
    members = Members(found)
    found[Role.PREFILL].add(URL("http://flags:1"))
    members.listed({Role.PREFILL: (URL("http://file:1"),)})
    members.listed({})
    assert ["http://flags:1"] == [str(each.url) for each in found[Role.PREFILL].instances]
