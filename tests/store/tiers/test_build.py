from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.store.tiers.tier_contract import SMALL, dump, make_key, make_page
from ucm.config.settings import PIPELINES, STAGES, StoreSettings
from ucm.errors import ConfigError
from ucm.metrics import METRICS
from ucm.store.tiers.build import NODE_CACHE_STAGE, TIER_STAGES, build_tiers, keeps_pages
from ucm.store.tiers.posix import paths
from ucm.store.tiers.tier import NoTier


def settings_for(pipeline: str, directory: Path) -> StoreSettings:
    return StoreSettings(
        pipeline=tuple(pipeline.split("|")),
        storage_backends=(str(directory),),
        s3_bucket="pages",
        socket_path=str(directory / "socket"),
    )


def test_every_stage_that_may_be_configured_is_known() -> None:
    assert set(STAGES) == {NODE_CACHE_STAGE, *TIER_STAGES}


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_pipeline_builds_without_touching_storage(pipeline: str, tmp_path: Path) -> None:
    tiers = build_tiers(settings_for(pipeline, tmp_path / "store"))

    if pipeline == "Cache":
        assert [type(tier) for tier in tiers] == [NoTier]
    else:
        stages = [stage.lower() for stage in pipeline.split("|") if stage != NODE_CACHE_STAGE]
        assert [tier.name for tier in tiers] == stages
        assert set(stages) <= set(METRICS["ucm_tier_bytes"].labels["tier"])
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("pipeline", ["Posix", "Cache|Posix"])
def test_a_posix_pipeline_stores_in_its_backends(pipeline: str, tmp_path: Path) -> None:
    (tier,) = build_tiers(settings_for(pipeline, tmp_path))

    dump(tier, SMALL, make_key(1), make_page(SMALL, "a"))

    assert Path(paths.block_path(str(tmp_path), SMALL.fingerprint, make_key(1))).exists()


def test_pages_stay_in_memory_where_there_is_a_cache(tmp_path: Path) -> None:
    kept = {pipeline: keeps_pages(settings_for(pipeline, tmp_path)) for pipeline in PIPELINES}

    assert [pipeline for pipeline in PIPELINES if not kept[pipeline]] == ["Posix"]


def test_the_s3_client_is_imported_only_where_pages_go_to_a_bucket() -> None:
    """It is an extra: who has not got it serves from files as before."""
    code = (
        "import sys; sys.modules['obstore'] = None\n"
        "import ucm.store.node.server, ucm.store.pipeline, ucm.cli.main\n"
        "from ucm.config.settings import StoreSettings\n"
        "from ucm.store.tiers.build import build_tiers\n"
        "build_tiers(StoreSettings(storage_backends=('/x',), socket_path='/x'))\n"
        "print([name for name in sys.modules if 'tiers.s3' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_without_the_s3_client_the_start_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    for name in [name for name in sys.modules if name.startswith("ucm.store.tiers.s3.")]:
        monkeypatch.delitem(sys.modules, name)

    with pytest.raises(ConfigError, match=r"needs the package obstore: pip install 'ucm\[s3\]'"):
        build_tiers(settings_for("Cache|S3", tmp_path))
