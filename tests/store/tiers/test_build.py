from __future__ import annotations

from pathlib import Path

import pytest

from tests.store.tiers.tier_contract import SMALL, dump, make_key, make_page
from ucm.config.settings import PIPELINES, STAGES, StoreSettings
from ucm.metrics import METRICS
from ucm.store.tiers.build import NODE_CACHE_STAGE, TIER_STAGES, build_tier, keeps_pages
from ucm.store.tiers.posix import paths
from ucm.store.tiers.tier import NoTier


def settings_for(pipeline: str, directory: Path) -> StoreSettings:
    return StoreSettings(
        pipeline=tuple(pipeline.split("|")),
        storage_backends=(str(directory),),
        socket_path=str(directory / "socket"),
    )


def test_every_stage_that_may_be_configured_is_known() -> None:
    assert set(STAGES) == {NODE_CACHE_STAGE, *TIER_STAGES}


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_pipeline_builds_without_touching_storage(pipeline: str, tmp_path: Path) -> None:
    tier = build_tier(settings_for(pipeline, tmp_path / "store"))

    assert isinstance(tier, NoTier) == (pipeline == "Cache")
    assert isinstance(tier, NoTier) or tier.name in METRICS["ucm_tier_bytes"].labels["tier"]
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("pipeline", ["Posix", "Cache|Posix"])
def test_a_posix_pipeline_stores_in_its_backends(pipeline: str, tmp_path: Path) -> None:
    tier = build_tier(settings_for(pipeline, tmp_path))

    dump(tier, SMALL, make_key(1), make_page(SMALL, "a"))

    assert Path(paths.block_path(str(tmp_path), SMALL.fingerprint, make_key(1))).exists()


def test_pages_stay_in_memory_where_there_is_a_cache(tmp_path: Path) -> None:
    kept = {pipeline: keeps_pages(settings_for(pipeline, tmp_path)) for pipeline in PIPELINES}

    assert kept == {"Cache|Posix": True, "Posix": False, "Cache": True}
