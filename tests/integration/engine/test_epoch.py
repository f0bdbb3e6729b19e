"""What a reset of vLLM's cache does: go on, begin an epoch of one's own, or one that all share."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm.v1.request import RequestStatus

from tests.integration.scheduler_parts import MANIFEST, Engine, Loopback
from tests.store.tiers.memory_tier import MemoryTier
from ucm.config.settings import PRIVATE_EPOCH, load_settings, read_epoch, start_epoch
from ucm.errors import ConfigError


def reset(engine: Engine) -> None:
    engine.side.reset()
    engine.step({})


def epoch(engine: Engine) -> int:
    return engine.side._epochs.manifest.epoch


def hit(engine: Engine, name: str) -> int:
    return engine.admit(engine.add(name, 100))


def test_an_engine_whose_weights_never_change_goes_on_with_what_is_stored() -> None:
    engine = Engine(Loopback(), reset_epoch="keep")
    engine.prefill("before", 100)
    reset(engine)

    assert hit(engine, "after") == 96
    assert engine.counted("ucm_epochs") == 0


def test_a_prompt_that_is_computed_across_such_a_reset_is_stored() -> None:
    engine = Engine(Loopback(), reset_epoch="keep")
    request = engine.add("a", 100)
    engine.admit(request)
    engine.step({"a": 64})
    reset(engine)
    engine.step({"a": 36})
    engine.side.finished(request, engine.blocks(request))
    engine.step({})
    engine.copied(*engine.take_dumping())
    engine.step({})

    assert hit(engine, "again") == 96


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("preempted", [False, True])
def test_copies_that_end_after_a_reset_are_given_back_in_the_namespace_that_they_began_in(
    preempted: bool, failed: bool
) -> None:
    engine = Engine(Loopback())
    request = engine.add("a", 100)
    engine.admit(request)
    engine.step({"a": 64})
    copies = engine.take_dumping()
    assert copies
    if preempted:
        request.status, request.num_computed_tokens = RequestStatus.PREEMPTED, 0
        engine.step({})
    reset(engine)
    engine.copied(*copies, failed=failed)
    engine.step({})

    assert not engine.slots()["filling"] and not engine.slots()["ready"]


def test_without_a_word_about_it_an_epoch_is_nobody_elses() -> None:
    engine = Engine(Loopback())
    epochs = {epoch(engine)}
    for _ in range(3):
        reset(engine)
        epochs.add(epoch(engine))

    assert len(epochs) == 4
    assert min(epochs) == MANIFEST.epoch and sorted(epochs)[1] >= PRIVATE_EPOCH


def test_engines_whose_file_has_one_number_share_whenever_they_were_reset(tmp_path: Path) -> None:
    """As a trainer does it: new weights for all, one number for them."""
    file, tier = tmp_path / "epoch", MemoryTier()
    one, two = (Engine(Loopback(tier=tier), epoch_file=str(file)) for _ in range(2))
    file.write_text("17\n")
    reset(one)
    one.prefill("a", 100)
    assert hit(two, "before its own reset") == 0

    reset(two)
    assert hit(two, "after it") == 96
    reset(two)
    assert hit(two, "no new weights") == 96
    file.write_text("18")
    reset(two)
    assert hit(two, "new weights") == 0


@pytest.mark.parametrize("text", ["", "-1", "one", "1.5", str(PRIVATE_EPOCH), "9" * 70, "\xff"])
def test_a_file_that_holds_no_epoch_shares_with_nobody(tmp_path: Path, text: str) -> None:
    file = tmp_path / "epoch"
    file.write_text(text, encoding="latin-1")
    engine = Engine(Loopback(), epoch_file=str(file))
    reset(engine)

    assert epoch(engine) >= PRIVATE_EPOCH
    with pytest.raises(ConfigError, match="epoch_file"):
        read_epoch(str(file))


def test_a_file_on_a_disk_that_hangs_does_not_hold_up_a_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    returns = threading.Event()
    monkeypatch.setattr("ucm.integration.engine.epoch.read_epoch", lambda path: returns.wait(60))
    monkeypatch.setattr("ucm.integration.engine.epoch._READ_S", 0.05)
    engine = Engine(Loopback(), epoch_file=str(tmp_path / "epoch"))
    try:
        reset(engine)
        reset(engine)
        assert epoch(engine) >= PRIVATE_EPOCH
    finally:
        returns.set()


def test_an_engine_starts_in_the_epoch_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "epoch"
    tree = {
        "ucm_connectors": [
            {
                "ucm_connector_name": "UcmPipelineStore",
                "ucm_connector_config": {"store_pipeline": "Cache"},
            }
        ],
    }
    settings = load_settings({**tree, "epoch_file": str(file)})
    with pytest.raises(ConfigError, match=r"epoch_file .*can't be read"):
        start_epoch(settings)
    file.write_text("5")
    assert start_epoch(settings) == 5
    assert start_epoch(load_settings({**tree, "epoch": 6})) == 6
