"""Versions of vLLM that are too old are refused, newer ones than were tried are warned of, and what
older ones say otherwise is understood."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import vllm

from ucm.errors import UnsupportedEngine
from ucm.integration.vllm import engine_versions
from ucm.integration.vllm.engine_versions import (
    NEWEST_TRIED,
    OLDEST,
    BlockTables,
    check_version,
    head_major_layout,
    hides_unlike_specs,
    refuse_what_fails_untold,
    runs_of_specs,
    tokens_per_state,
)

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


@pytest.mark.parametrize("version", ["0.27.1", "0.26.0+cpu", "0.9.2", "0.3.0rc1"])
def test_an_old_one_is_refused_by_its_number(version: str) -> None:
    with pytest.raises(
        UnsupportedEngine, match=r"this is vLLM .* needs 0\.28 or a later one"
    ) as why:
        check_version(version)
    assert version in str(why.value)


@pytest.mark.parametrize("version", ["0.28.0", "0.31.0rc2", "0.32.0", "0.32.1.dev5+g12ab", "dev"])
def test_what_was_tried_and_what_has_no_number_runs_without_a_word(
    version: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        check_version(version)
    assert not caplog.records


@pytest.mark.parametrize("version", ["0.33.0", "0.100.0", "1.0.0"])
def test_a_newer_one_runs_with_a_warning(version: str, caplog: pytest.LogCaptureFixture) -> None:
    check_version(version)
    assert f"this is vLLM {version}, and UCM was tried with versions up to 0.32" in caplog.text


def test_packaging_asks_for_the_same() -> None:
    assert f'vllm = ["vllm>={OLDEST[0]}.{OLDEST[1]}"]\n' in PYPROJECT.read_text()


def test_what_is_installed_for_the_tests_is_what_was_tried() -> None:
    assert tuple(map(int, vllm.__version__.split(".")[:2])) == NEWEST_TRIED


def old_step(
    *,
    new: dict[str, tuple[list[int], ...]] | None = None,
    more: dict[str, tuple[list[int], ...] | None] | None = None,
    resumed: set[str] | None = None,
    finished: set[str] | None = None,
) -> Any:
    """As vLLM's scheduler tells it before 0.29."""
    new, more = new or {}, more or {}
    return SimpleNamespace(
        finished_req_ids=finished or set(),
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, block_ids=blocks) for name, blocks in new.items()
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(more), new_block_ids=list(more.values()), resumed_req_ids=resumed or set()
        ),
    )


def test_before_0_29_blocks_add_up_from_step_to_step_and_begin_anew_after_a_preemption() -> None:
    tables = BlockTables()
    given = ([1, 2],)
    assert tables.of_step(old_step(new={"a": given}))("a") == ([1, 2],)
    assert tables.of_step(old_step(more={"a": ([3],)}))("a") == ([1, 2, 3],)
    assert tables.of_step(old_step(more={"a": None}))("a") == ([1, 2, 3],)
    assert given == ([1, 2],), "vLLM's own list"
    assert tables.of_step(old_step(more={"a": ([7, 8],)}, resumed={"a"}))("a") == ([7, 8],)
    # Or with the V2 runner, which has it as a new one.
    assert tables.of_step(old_step(new={"a": ([5],)}))("a") == ([5],)


def test_before_0_29_nothing_is_kept_of_requests_that_are_over() -> None:
    tables = BlockTables()
    tables.of_step(old_step(new={"a": ([1],), "b": ([2],)}))
    tables.of_step(old_step(more={"b": None}, finished={"a"}))
    assert tables._blocks.keys() == {"b"}
    # A name may come again in the step that ends its last request.
    assert tables.of_step(old_step(new={"b": ([9],)}, finished={"b"}))("b") == ([9],)


def test_from_0_29_on_vllm_is_asked() -> None:
    told = SimpleNamespace(get_block_ids=lambda name: ([4, len(name)],))
    output = SimpleNamespace(kv_connector_block_state=told)
    assert BlockTables().of_step(output)("abc") == ([4, 3],)


def test_the_layout_is_asked_for_by_the_name_that_vllm_knows() -> None:
    def config(**cache: object) -> Any:
        return SimpleNamespace(cache_config=SimpleNamespace(**cache))

    assert head_major_layout(config(kv_cache_layout=None)) == "LBHNC"
    assert head_major_layout(config()) == "HND"


def test_layers_of_several_specs_are_seen_where_only_a_rank_knows_of_them() -> None:
    """Before 0.29 a rank has one tensor for each layer, and the scheduler one spec for a group."""
    several = SimpleNamespace(kv_cache_spec=SimpleNamespace(kv_cache_specs={"l0": 1, "l1": 2}))
    one = SimpleNamespace(kv_cache_spec=SimpleNamespace())
    old = SimpleNamespace(kv_cache_tensors=[SimpleNamespace(shared_by=["l0"])])
    new = SimpleNamespace(kv_cache_tensors=[SimpleNamespace(layers=["l0"])])
    assert hides_unlike_specs(old, several)
    assert not hides_unlike_specs(old, one)
    assert not hides_unlike_specs(new, several)
    assert runs_of_specs(old, {"l0"}) == []
    assert runs_of_specs(new, {"l0"}) == new.kv_cache_tensors
    assert runs_of_specs(new, {"l9"}) == []


def test_how_many_tokens_a_state_is_of_has_had_two_names() -> None:
    assert tokens_per_state(SimpleNamespace(tokens_per_state=4, compress_ratio=1)) == 4
    assert tokens_per_state(SimpleNamespace(compress_ratio=4)) == 4
    assert tokens_per_state(SimpleNamespace()) == 1


def test_where_vllm_hears_of_failed_blocks_alone_only_plain_models_are_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse_what_fails_untold(one_plain_group=False)
    monkeypatch.setattr(engine_versions, "tells_failed_requests", lambda: False)
    refuse_what_fails_untold(one_plain_group=True)
    with pytest.raises(UnsupportedEngine, match=r"use vLLM 0\.30 or a later one"):
        refuse_what_fails_untold(one_plain_group=False)
