"""The flags in every spelling of the documents, and the mistakes one makes with them."""

from __future__ import annotations

import shlex

import pytest

from ucm.pd.flags import ProxySettings, parse_flags

P, D = "http://10.0.0.1", "http://10.0.0.2"


def settings(line: str) -> ProxySettings:
    return parse_flags(shlex.split(line), description="")


def urls(line: str) -> dict[str, list[str]]:
    parsed = settings(line)
    roles = {"p": parsed.prefillers, "d": parsed.decoders, "w": parsed.workers}
    return {role: [str(url) for url in found] for role, found in roles.items() if found}


@pytest.mark.parametrize(
    ("line", "instances"),
    [
        pytest.param(
            "--pd-disaggregation --host localhost --port 7802 --prefiller-host 10.0.0.1"
            " --prefiller-port 7800 --decoder-host 10.0.0.2 --decoder-port 7801",
            {"p": [f"{P}:7800"], "d": [f"{D}:7801"]},
            id="ucm-1p1d",
        ),
        pytest.param(
            "--host localhost --port 7802 --prefiller-host 10.0.0.1 --prefiller-port 7800"
            " --decoder-host 10.0.0.2 --decoder-port 7801",
            {"p": [f"{P}:7800"], "d": [f"{D}:7801"]},
            id="ucm-cross-platform",
        ),
        pytest.param(
            "--pd-disaggregation --host localhost --port 7805 --prefiller-hosts 10.0.0.1 10.0.0.2"
            " --prefiller-port 7800 7801 --decoder-hosts 10.0.0.1 10.0.0.2"
            " --decoder-ports 7802 7803",
            {"p": [f"{P}:7800", f"{D}:7801"], "d": [f"{P}:7802", f"{D}:7803"]},
            id="ucm-xpyd",
        ),
        pytest.param(
            "--prefiller-hosts 10.0.0.1 --prefiller-port 13700 --decoder-hosts 10.0.0.2"
            " --decoder-ports 13701",
            {"p": [f"{P}:13700"], "d": [f"{D}:13701"]},
            id="vllm-ascend",
        ),
        pytest.param(
            "--worker-hosts 10.0.0.1 10.0.0.2 --worker-ports 1 2",
            {"w": [f"{P}:1", f"{D}:2"]},
            id="mixed",
        ),
        pytest.param("--work-host 10.0.0.1 --work-port 1", {"w": [f"{P}:1"]}, id="work"),
        pytest.param(
            "--worker-host 10.0.0.1 --worker-port 1 2 3",
            {"w": [f"{P}:1", f"{P}:2", f"{P}:3"]},
            id="one-host-for-many-ports",
        ),
        pytest.param(
            "--worker-hosts 10.0.0.1 10.0.0.2 --worker-port 1",
            {"w": [f"{P}:1", f"{D}:1"]},
            id="one-port-for-many-hosts",
        ),
        pytest.param(
            "--worker-hosts 10.0.0.1:5 http://10.0.0.2:6 https://w.example:7/ [::1]:8",
            {"w": [f"{P}:5", f"{D}:6", "https://w.example:7", "http://[::1]:8"]},
            id="hosts-with-ports",
        ),
        pytest.param("--worker-host ::1 --worker-port 8", {"w": ["http://[::1]:8"]}, id="ipv6"),
        pytest.param(
            "",
            {"p": ["http://localhost:8100"], "d": ["http://localhost:8200"]},
            id="nothing-said",
        ),
        pytest.param(
            "--worker-host 10.0.0.1 --worker-port 1 --worker-host 10.0.0.2 --worker-port 2",
            {"w": [f"{P}:1", f"{D}:2"]},
            id="said-twice",
        ),
    ],
)
def test_the_documents_lines_name_their_instances(line, instances):
    assert instances == urls(line)


def test_the_mode_is_said_in_the_words_of_the_documents():
    line = "--prefiller-host a --prefiller-port 1 2 --decoder-host b"
    assert "[PD Mode] Initialized 2 prefillers and 1 decoders." == settings(line).mode
    assert "[Mixed Mode] Initialized 1 PD-mixed workers." == settings("--worker-host a").mode
    none_yet = settings("--mixed-mode --instances-file some.yaml")
    assert "[Mixed Mode] Initialized 0 PD-mixed workers." == none_yet.mode


@pytest.mark.parametrize("mode", ["chain", "overlap"])
def test_both_ways_to_hand_over_can_be_asked_for(mode):
    assert mode == settings(f"--handoff {mode}").handoff


PD = "--prefiller-host a --decoder-host b"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--prefiller-hosts a b --prefiller-ports 1 2 3 --decoder-host c", "2 hosts and --pref"),
        ("--prefiller-host a --prefiller-port x --decoder-host c", "'x' is no port"),
        ("--prefiller-host a --prefiller-port 70000 --decoder-host c", "'70000' is no port"),
        ("--prefiller-host a", "a decoder is missing"),
        ("--decoder-host a", "a prefiller is missing"),
        (f"{PD} --worker-host c", "give either those, or prefillers and decoders"),
        ("--pd-disaggregation --worker-host c", "needs prefillers and decoders"),
        ("--worker-host a:1 --worker-port 2", "has the ports already"),
        ("--worker-hosts a a --worker-port 2", "is there twice"),
        ("--worker-host a,b", "'a,b' looks like several addresses in one"),
        ("--worker-host a:1,b:1", "'a:1,b:1'"),
        ("--mixed-mode", "--mixed-mode is for instances that do both: name them"),
        (f"{PD} --mixed-mode", "--mixed-mode is for instances that do both: name them"),
        ("--mixed-mode --etcd-addr a:1 --pd-disaggregation", "needs prefillers and decoders"),
        ("--worker-host 192.0.0.3192.0.0.3", "looks like several addresses in one"),
        ("--worker-host http://a:1/v1", "is no host, host:port or http://host:port"),
        ("--worker-host ftp://a:1", "is no host, host:port or http://host:port"),
        (f"{PD} --policy best", "invalid choice: 'best'"),
        (f"{PD} --handoff both", "invalid choice: 'both'"),
        (f"{PD} --max-running 0", "must be at least 1"),
        (f"{PD} --connect-timeout-s -1", "'-1' is no time in seconds"),
        (f"{PD} --connect-timeout-s inf", "'inf' is no time in seconds"),
        (f"{PD} --connect-timeout-s nan", "'nan' is no time in seconds"),
        (f"{PD} --connect-timeout-s 1e300", "'1e300' is no time in seconds"),
        (f"{PD} --max-running {'9' * 400}", "is no number from 0 on"),
        (f"{PD} --min-prefill-tokens few", "'few' is no number"),
        (f"{PD} --workers 3", "--workers"),
        ("--prefiller a", "ambiguous option"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(line, says, capsys):
    with pytest.raises(SystemExit) as exited:
        settings(line)
    error = capsys.readouterr().err
    assert 2 == exited.value.code
    assert says in error
    assert 1 == error.count("\n"), error
