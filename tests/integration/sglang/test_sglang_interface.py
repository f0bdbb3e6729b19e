"""Our backend has what SGLang calls: by the recorded interface, and by SGLang's own where it is."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest

from tests.integration.sglang.instances import CLASS, extra_config
from tests.integration.sglang.recorded import (
    SIGNATURES,
    STORAGE_BATCH_SIZE,
    ExtraInfo,
    StorageConfig,
)
from tests.store.node.support import Place
from ucm.integration.sglang.hicache import UcmHiCache


def parameters(method: Any) -> list[str]:
    return [name for name in inspect.signature(method).parameters if name != "self"]


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_method_takes_what_sglang_gives_it(name: str) -> None:
    assert parameters(getattr(UcmHiCache, name)) == SIGNATURES[name]


def test_the_class_is_where_the_documents_say() -> None:
    assert CLASS["module_path"] == UcmHiCache.__module__
    assert CLASS["class_name"] == UcmHiCache.__name__


def test_the_door_needs_no_engine_and_no_torch() -> None:
    """In an interpreter that has neither, it imports."""
    code = (
        "import sys\n"
        "for name in ('sglang', 'vllm', 'torch'): sys.modules[name] = None\n"
        "from ucm.integration.sglang.hicache import UcmHiCache\n"
        "print(UcmHiCache.__mro__[1].__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("object\n", "")


# -- with SGLang ---------------------------------------------------------------------------------


@pytest.fixture
def sglang() -> Any:
    return pytest.importorskip("sglang.srt.mem_cache.hicache_storage", exc_type=ImportError)


def test_the_recorded_interface_is_sglangs(sglang: Any) -> None:
    assert issubclass(UcmHiCache, sglang.HiCacheStorage)
    for name, recorded in SIGNATURES.items():
        assert parameters(getattr(sglang.HiCacheStorage, name)) == recorded, name
    abstract = sglang.HiCacheStorage.__abstractmethods__
    assert abstract <= SIGNATURES.keys()
    for ours, theirs in (
        (StorageConfig, sglang.HiCacheStorageConfig),
        (ExtraInfo, sglang.HiCacheStorageExtraInfo),
    ):
        assert [each.name for each in fields(ours)] == [each.name for each in fields(theirs)]
    assert sglang.STORAGE_BATCH_SIZE == STORAGE_BATCH_SIZE


def test_sglangs_factory_makes_our_backend(sglang: Any, place: Place) -> None:
    factory = pytest.importorskip("sglang.srt.mem_cache.storage.backend_factory")
    config = sglang.HiCacheStorageConfig(
        tp_rank=0,
        tp_size=1,
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=False,
        enable_storage_metrics=False,
        is_page_first_layout=True,
        model_name="tiny",
        extra_config=extra_config(place),
    )
    backend = factory.StorageBackendFactory.create_backend("dynamic", config, object())
    assert isinstance(backend, UcmHiCache)
    assert backend.batch_exists(["no pool yet"]) == 0
    assert backend.get_stats() is None
    backend.close()
