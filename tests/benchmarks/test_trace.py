"""What trace.py asks, and what it makes of the answers."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.trace import arguments
from benchmarks.trace_replay import Asked, Played, gaps
from benchmarks.trace_report import PLAIN, Figures, as_json, cpu_table, figures, table, verdicts
from benchmarks.trace_servers import Used
from benchmarks.trace_workload import (
    SYSTEM_TOKENS,
    Workload,
    agents,
    conversations,
    recorded,
)
from tests.source import ROOT

BLOCK_TOKENS = 128


def line(
    at_ms: int, blocks: Sequence[int], *, tokens: int = 0, answer: int = 400
) -> dict[str, Any]:
    return {
        "timestamp": at_ms,
        "input_length": tokens or 512 * len(blocks),
        "output_length": answer,
        "hash_ids": list(blocks),
    }


def workload_of(
    folder: Path, lines: Sequence[Mapping[str, Any]], *, requests: int = 100, **more: Any
) -> Workload:
    path = folder / "recorded.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in lines))
    settings = {"block_tokens": BLOCK_TOKENS, "per_s": 0.5, "max_tokens": 8000, **more}
    return recorded(path, requests=requests, **settings)


def prompts(workload: Workload) -> list[tuple[int, ...]]:
    return [turn.tokens for session in workload.sessions for turn in session.turns]


def shared(left: Sequence[int], right: Sequence[int]) -> int:
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    )


def test_recorded_prompts_share_as_many_blocks_as_they_did(tmp_path: Path) -> None:
    found = workload_of(tmp_path, [line(0, [0, 1, 2]), line(1000, [0, 1, 3]), line(2000, [4, 5])])
    first, second, third = prompts(found)
    assert [len(each) for each in (first, second, third)] == [384, 384, 256]
    # What follows them is not the same, but for a token that is so by chance.
    assert 2 * BLOCK_TOKENS <= shared(first, second) < 2 * BLOCK_TOKENS + 8
    assert shared(first, third) < 8


def test_lengths_of_prompts_and_answers_are_divided_alike(tmp_path: Path) -> None:
    found = workload_of(tmp_path, [line(0, [0, 1], tokens=1000, answer=400)])
    (turn,) = found.sessions[0].turns
    assert (len(turn.tokens), turn.answer_tokens) == (250, 100)


def test_recorded_requests_come_in_order_at_the_rate_that_is_asked_for(tmp_path: Path) -> None:
    lines = [line(at_ms, [number]) for number, at_ms in enumerate((500, 1500, 4500))]
    found = workload_of(tmp_path, lines, per_s=0.5)
    assert [each.begin_s for each in found.sessions] == pytest.approx([0.0, 1.5, 6.0])


def test_prompts_that_no_engine_takes_are_left_out_and_it_is_said(tmp_path: Path) -> None:
    found = workload_of(tmp_path, [line(0, [0]), line(1, range(1, 60))], max_tokens=1000)
    assert found.num_requests == 1
    assert "1 that are longer than 1000" in found.what


def test_a_trace_is_cut_by_conversations_and_the_same_each_time(tmp_path: Path) -> None:
    lines = [line(at, [0, 10 + at % 25, 100 + at]) for at in range(50)]
    once, again = (workload_of(tmp_path, lines, requests=20, seed=3) for _ in range(2))
    assert once == again
    assert once.num_requests == 20
    assert workload_of(tmp_path, lines, requests=20, seed=4) != once
    # Ten whole conversations of two.
    assert len({prompt[BLOCK_TOKENS : 2 * BLOCK_TOKENS] for prompt in prompts(once)}) == 10


def test_what_many_begin_with_makes_no_conversation() -> None:
    lines = [line(at, [0, 10 + at % 25, 100 + at]) for at in range(50)]
    assert [len(each) for each in conversations(lines)] == [2] * 25


def test_agents_share_their_system_prompt_and_are_the_same_each_time() -> None:
    found = agents(num=3, turns=4, max_tokens=8000, seed=1)
    assert found == agents(num=3, turns=4, max_tokens=8000, seed=1)
    assert found != agents(num=3, turns=4, max_tokens=8000, seed=2)
    begins = {session.turns[0].tokens[:SYSTEM_TOKENS] for session in found.sessions}
    assert len(begins) == 1
    assert found.num_requests == 12


def test_no_agent_says_more_than_an_engine_takes() -> None:
    found = agents(num=4, turns=50, max_tokens=3000)
    for session in found.sessions:
        said = sum(len(turn.tokens) + turn.answer_tokens for turn in session.turns)
        assert 2000 < said <= 3000


def asked(turn: int = 0, *, session: int = 0, answer: Sequence[int] = (1,), **more: Any) -> Asked:
    return Asked(session, turn, 100, answer=tuple(answer), **more)


def played(*found: Asked, seconds: float = 10.0, computed: int = 0) -> Played:
    return Played(found, seconds, computed, Used())


def row_of(
    name: str, played_: Played, *, is_ours: bool = False, right: Played | None = None
) -> Figures:
    return figures("w", "1p1d", name, is_ours=is_ours, played=played_, right=right or played_)


def test_figures_are_of_what_was_answered() -> None:
    found = played(
        asked(0, ttft_s=0.1, gaps_s=(0.01, 0.02)),
        asked(1, ttft_s=0.3, gaps_s=(0.03,)),
        asked(2, failure="HTTP 500"),
        computed=150,
    )
    row = row_of("ours", found)
    assert (row.requests, row.failed) == (3, 1)
    assert row.ttft_p50_ms == pytest.approx(200)
    assert row.tbt_p99_ms == pytest.approx(29.8)
    assert row.requests_per_s == pytest.approx(0.2)
    assert row.computed_per_token == pytest.approx(0.5)


def test_what_the_proxy_left_to_decode_alone_is_counted() -> None:
    paths = ("pd", "skip-known", "shared-prefill", "skip-short")
    assert row_of("ours", played(*(asked(path=path) for path in paths))).skipped == 2


def test_one_different_answer_counts_once_however_long_the_conversation() -> None:
    right = played(*(asked(turn, session=session) for session in (0, 1) for turn in range(3)))
    other = played(
        *(asked(turn) for turn in range(3)),
        *(asked(turn, session=1, answer=(turn, 7)) for turn in range(3)),
    )
    assert row_of("ours", other, right=right).differ == 1
    assert row_of("ours", right, right=right).differ == 0


def test_first_is_who_waits_least_among_peers_whatever_plain_does() -> None:
    def row(name: str, ttft_s: float, *, is_ours: bool = False) -> Figures:
        return row_of(name, played(asked(ttft_s=ttft_s)), is_ours=is_ours)

    rows = [row(PLAIN, 0.05), row("ours", 0.1, is_ours=True), row("peer", 0.2), row("slow", 0.3)]
    found = verdicts(rows)
    assert [is_first for is_first, _ in found] == [True, True]
    assert "peer 200 ms, 2.00 times that" in found[0][1]
    assert "plain 50 ms, 0.50 times that" in found[0][1]
    assert [is_first for is_first, _ in verdicts([*rows, row("quick", 0.09)])] == [False, False]


def test_a_peer_that_fails_requests_is_nobody_to_be_compared_with() -> None:
    failing = row_of("quick", played(asked(0, ttft_s=0.01), asked(1, failure="HTTP 500")))
    ours = row_of("ours", played(asked(ttft_s=0.1)), is_ours=True)
    assert verdicts([ours, failing]) == []


def test_what_was_used_is_the_difference_of_two_looks() -> None:
    before, after = Used({"proxy": 1.0}, 10, 20), Used({"proxy": 1.5, "cache": 2.0}, 40, 60)
    assert after - before == Used({"proxy": 0.5, "cache": 2.0}, 30, 40)


def test_tables_have_a_row_for_each_contender_and_a_column_for_each_kind_of_process() -> None:
    found = Played((asked(ttft_s=0.1),), 10.0, 50, Used({"cache": 1.25, "proxy": 0.5}))
    rows = [row_of(PLAIN, played(asked(ttft_s=0.2))), row_of("ours", found, is_ours=True)]
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(table(rows), cpu_table(rows))
    lines = [line for line in console.export_text().splitlines() if "ours" in line]
    assert "0.50" in lines[0].split()  # of plain's TTFT
    assert lines[1].split()[1::2] == ["ours", "1.2", "0.5", "1.8"]


def test_gaps_lie_between_tokens() -> None:
    assert gaps((1.0, 1.5, 1.75)) == (0.5, 0.25)
    assert gaps(()) == ()


def test_figures_survive_as_json() -> None:
    row = row_of("ours", played(asked(ttft_s=0.25, stages_s={"prefill": 0.2})))
    found = json.loads(json.dumps(as_json([row], {"line": "model"})))
    assert found["rows"][0]["ttft_ms"] == [250.0]
    assert found["rows"][0]["stages_ms"] == [{"prefill": 200.0}]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--trace nowhere.jsonl", "nowhere.jsonl; they are published in"),
        ("--contenders ucm-dram,nobody", "there is no nobody, but ucm-dram"),
        ("--topology 1p1d,9p9d", "there is no 9p9d"),
        ("--kv-tokens 8192", "one prompt has up to 8192"),
        ("--agents 0", "nothing to replay"),
    ],
)
def test_what_can_t_be_run_is_refused_with_what_could_be(flags: str, said: str) -> None:
    command = [sys.executable, "benchmarks/trace.py", *flags.split()]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert said in ended.stderr


@pytest.mark.parametrize(
    ("flag", "path", "problem"),
    [
        ("--json", "nowhere/found.json", "there is no directory"),
        ("--chart", "nowhere/chart.svg", "there is no directory"),
        ("--chart", "chart.gif", "is no .svg or .png file"),
    ],
)
def test_what_can_t_be_written_at_the_end_is_said_at_the_beginning(
    flag: str,
    path: str,
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["trace.py", flag, str(tmp_path / path)])
    with pytest.raises(SystemExit) as ended:
        arguments()

    assert ended.value.code == 2
    assert problem in capsys.readouterr().err
