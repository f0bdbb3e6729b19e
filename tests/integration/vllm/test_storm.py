"""Storms around the scheduler side: whatever clients, ranks and the node cache do, and whenever."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.integration.vllm.storm import Storm
from tests.integration.vllm.storm_async import AsyncStorm
from tests.integration.vllm.storm_engine import Weather
from tests.integration.vllm.storm_guesses import GuessingStorm
from tests.integration.vllm.storm_node import Clock
from ucm.integration.engine import dumps, hits, promise_book, side_lookups
from ucm.store.client import session

STEPS = 250
# Another set of storms: none is the same as in the short test.
LONG_SEEDS, LONG_STEPS = range(1000, 1100), 1000


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


def run_storm(
    folder: Path, seed: int, steps: int, patch: pytest.MonkeyPatch, weather: Weather | None = None
) -> Storm:
    clock = Clock()
    for module in (dumps, hits, promise_book, session, side_lookups):
        patch.setattr(module, "time", clock)
    rng = random.Random(seed)
    weather = weather or Weather.of(rng)
    kind = AsyncStorm if weather.schedules_ahead else Storm
    kind = GuessingStorm if weather.num_guesses else kind
    storm = kind(folder, weather, seed=seed, clock=clock)
    node = storm.node
    rare = (
        lambda: node.mute(rng.choice((0.05, 0.5, 2.0))),
        node.die,
        node.break_connection,
        storm.reset,
        storm.everybody_leaves,
        lambda: node.forget_files(rng.random()),
        node.lose_heads,
        node.lose_heads,
    )
    for _ in range(steps):
        if rng.random() < 0.25 and len(storm.scheduler.requests) < 30:
            for _ in range(rng.choice((1, 1, 1, 6))):
                storm.come()
        if rng.random() < 0.15:
            storm.leave()
        if rng.random() < 0.05:
            rng.choice(rare)()
            if rng.random() < 0.3:
                storm.leave()
        storm.step()
    storm.calm_down()
    return storm


@pytest.mark.parametrize("seed", range(60))
def test_a_storm_leaves_the_scheduler_alive_every_token_right_and_nothing_behind(
    seed: int, model_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run_storm(model_folder, seed, STEPS, monkeypatch).answered


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize(
    "kind", [Weather.with_windows, Weather.with_windows_only, Weather.with_states]
)
def test_a_storm_around_a_model_that_is_not_plain_stores_and_loads_what_is_right(
    kind: Callable[[random.Random], Weather],
    seed: int,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    weather = kind(random.Random(seed))
    assert run_storm(model_folder, seed, STEPS, monkeypatch, weather).answered


@pytest.mark.parametrize("seed", range(20))
def test_a_storm_in_which_tokens_are_guessed_stores_none_of_the_guesses(
    seed: int, model_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    weather = Weather.with_guesses(random.Random(seed))
    storm = run_storm(model_folder, seed, STEPS, monkeypatch, weather)
    assert isinstance(storm, GuessingStorm)
    assert storm.right_guesses and storm.wrong_guesses


@pytest.mark.long
@pytest.mark.parametrize("seed", LONG_SEEDS)
def test_a_hundred_thousand_steps_of_storms(
    seed: int, model_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run_storm(model_folder, seed, LONG_STEPS, monkeypatch).answered
