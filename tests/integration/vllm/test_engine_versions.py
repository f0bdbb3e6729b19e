"""Versions of vLLM that are too old are refused, newer ones than were tried are warned of, and what
older ones say otherwise is understood."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
import vllm
from vllm.v1 import kv_cache_interface
from vllm.v1.kv_cache_interface import KVQuantMode

from ucm.errors import UnsupportedEngine
from ucm.integration.vllm import engine_versions
from ucm.integration.vllm.engine_versions import (
    NEWEST_TRIED,
    OLDEST,
    OLDEST_TIERING,
    BlockTables,
    block_bytes,
    check_version,
    head_major_layout,
    hides_unlike_specs,
    packs_states,
    refuse_what_fails_untold,
    runs_of_specs,
    tokens_per_state,
)

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


@pytest.mark.parametrize("version", ["0.22.1", "0.18.0+cpu", "0.9.2", "0.3.0rc1"])
def test_an_old_one_is_refused_by_its_number(version: str) -> None:
    with pytest.raises(
        UnsupportedEngine, match=r"this is vLLM .* needs 0\.23 or a later one"
    ) as why:
        check_version(version)
    assert version in str(why.value)


def test_one_that_is_too_old_for_the_tier_alone_is_told_so() -> None:
    with pytest.raises(UnsupportedEngine, match=r"vLLM 0\.30\.0, and UcmTier needs 0\.31 or"):
        check_version("0.30.0", oldest=OLDEST_TIERING, who="UcmTier")
    check_version("0.30.0")


@pytest.mark.parametrize(
    "version", ["0.23.0.post1", "0.26.0rc1", "0.28.0", "0.32.1.dev5+g12ab", "0.33.0", "dev"]
)
def test_what_was_tried_and_what_has_no_number_runs_without_a_word(
    version: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        check_version(version)
    assert not caplog.records


@pytest.mark.parametrize("version", ["0.34.0", "0.100.0", "1.0.0"])
def test_a_newer_one_runs_with_a_warning(version: str, caplog: pytest.LogCaptureFixture) -> None:
    check_version(version)
    assert f"this is vLLM {version}, and UCM was tried with versions up to 0.33" in caplog.text


def test_packaging_asks_for_the_same() -> None:
    assert f'vllm = ["vllm>={OLDEST[0]}.{OLDEST[1]}"]\n' in PYPROJECT.read_text()


def test_what_is_installed_for_the_tests_is_a_version_that_was_tried() -> None:
    assert OLDEST < tuple(map(int, vllm.__version__.split(".")[:2])) <= NEWEST_TRIED


def old_step(
    *,
    new: dict[str, tuple[list[int], ...]] | None = None,
    more: dict[str, tuple[list[int], ...] | None] | None = None,
    resumed: set[str] | None = None,
    finished: set[str] | None = None,
    **told: Any,
) -> Any:
    """As vLLM's scheduler tells it before 0.30."""
    new, more = new or {}, more or {}
    return SimpleNamespace(
        finished_req_ids=finished or set(),
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, block_ids=blocks) for name, blocks in new.items()
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(more), new_block_ids=list(more.values()), resumed_req_ids=resumed or set()
        ),
        **told,
    )


def test_before_0_30_blocks_add_up_from_step_to_step_and_begin_anew_after_a_preemption() -> None:
    tables = BlockTables()
    given = ([1, 2],)
    assert tables.of_step(old_step(new={"a": given}))("a") == ([1, 2],)
    assert tables.of_step(old_step(more={"a": ([3],)}))("a") == ([1, 2, 3],)
    assert tables.of_step(old_step(more={"a": None}))("a") == ([1, 2, 3],)
    assert given == ([1, 2],), "vLLM's own list"
    assert tables.of_step(old_step(more={"a": ([7, 8],)}, resumed={"a"}))("a") == ([7, 8],)
    # Or with the V2 runner, which has it as a new one.
    assert tables.of_step(old_step(new={"a": ([5],)}))("a") == ([5],)


def test_before_0_30_nothing_is_kept_of_requests_that_are_over() -> None:
    tables = BlockTables()
    tables.of_step(old_step(new={"a": ([1],), "b": ([2],)}))
    tables.of_step(old_step(more={"b": None}, finished={"a"}))
    assert tables._blocks.keys() == {"b"}
    # A name may come again in the step that ends its last request.
    assert tables.of_step(old_step(new={"b": ([9],)}, finished={"b"}))("b") == ([9],)


def test_0_29_tells_whole_tables_but_not_of_requests_that_go_on_in_the_blocks_they_have() -> None:
    tables = BlockTables()
    told = SimpleNamespace(block_ids={"a": ([1, 2],)})
    tables.of_step(old_step(new={"a": ([1, 2],)}, kv_connector_block_state=told))
    nothing = SimpleNamespace(block_ids={})
    output = old_step(more={"a": None}, kv_connector_block_state=nothing)
    assert tables.of_step(output)("a") == ([1, 2],)
    told = SimpleNamespace(block_ids={"a": ([1, 9, 3],)})
    output = old_step(more={"a": ([3],)}, kv_connector_block_state=told)
    assert tables.of_step(output)("a") == ([1, 9, 3],)


def test_from_0_30_on_vllm_is_asked() -> None:
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


def old_spec(*, heads: int = 2, mode: str = "NONE", tokens: int = 16, **more: Any) -> Any:
    """As vLLM has a layer's spec before 0.26, of 16-bit numbers with heads of 64."""
    head_size, item_bytes = 64, 2
    fields = {
        "block_size": tokens,
        "num_kv_heads": heads,
        "head_size": head_size,
        "dtype": torch.float16,
        "kv_quant_mode": KVQuantMode[mode],
        "real_page_size_bytes": 2 * tokens * heads * head_size * item_bytes,
    }
    return SimpleNamespace(**{**fields, **more})


def test_before_0_28_a_block_of_plain_kv_is_known_by_its_bytes() -> None:
    plain = old_spec()
    assert not packs_states(plain)
    assert block_bytes(plain) == 2 * 16 * 2 * 64 * 2
    assert not packs_states(old_spec(head_size_v=64))
    assert not packs_states(old_spec(head_size_v=32, real_page_size_bytes=16 * 2 * (64 + 32) * 2))
    assert packs_states(old_spec(mode="NVFP4", real_page_size_bytes=2 * 16 * 2 * 36 * 2))
    assert packs_states(old_spec(mode="INT8_PER_TOKEN_HEAD")), "its scales lie behind the rest"
    assert packs_states(old_spec(compress_ratio=4))


def test_before_0_28_a_block_of_latents_is_known_by_its_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MLA keeps one vector a token, and says the size of a value all the same."""

    class Latent(SimpleNamespace): ...

    monkeypatch.setattr(kv_cache_interface, "MLAAttentionSpec", Latent)

    def of_bytes(count: int) -> Any:
        spec = old_spec(heads=1, head_size_v=64, real_page_size_bytes=count)
        return Latent(**vars(spec))

    assert not packs_states(of_bytes(16 * 64 * 2))
    assert packs_states(of_bytes(16 * 656)), "fp8_ds_mla"


def test_from_0_26_on_the_bytes_of_a_block_have_another_name() -> None:
    scales_bytes = 2 * 16 * 2 * 4
    plain = old_spec().real_page_size_bytes
    assert block_bytes(old_spec(unpadded_page_size_bytes=plain + scales_bytes)) == plain + 256
    assert packs_states(old_spec(unpadded_page_size_bytes=plain + scales_bytes))
    assert not packs_states(old_spec(unpadded_page_size_bytes=plain))


def test_from_0_28_on_vllm_says_what_a_block_holds_besides() -> None:
    assert packs_states(SimpleNamespace(state_content_bytes=656))
    assert not packs_states(SimpleNamespace(state_content_bytes=None))
    assert packs_states(SimpleNamespace(state_content_bytes=None, tokens_per_state=4))


def test_where_vllm_hears_of_failed_blocks_alone_only_plain_models_are_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse_what_fails_untold(one_plain_group=False)
    monkeypatch.setattr(engine_versions, "tells_failed_requests", lambda: False)
    refuse_what_fails_untold(one_plain_group=True)
    with pytest.raises(UnsupportedEngine, match=r"use vLLM 0\.30 or a later one"):
        refuse_what_fails_untold(one_plain_group=False)
