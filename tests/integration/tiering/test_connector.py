"""What our connector does beside vLLM's: it tells tiers their engine, and gives receipts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from ucm import handoff as h
from ucm.errors import UnsupportedEngine
from ucm.integration.tiering import connector
from ucm.integration.tiering.connector import UCMOffloadingConnector
from ucm.integration.tiering.engine import Engine, engine_of_tier
from ucm.integration.tiering.promises import Promising

RECEIPT = h.Receipt(namespace="ab" * 32, block_tokens=128, tokens=256, key="cd" * 32, issued_s=1.0)
HASHES = [b"one", b"two"]


class Tier(Promising):
    def __init__(self, receipt: h.Receipt | None) -> None:
        self.asked: list[tuple[str, Any, int]] = []
        self.epochs = 0
        self._receipt = receipt

    def receipt(self, request_id: str, block_hashes: Any, num_prompt: int) -> h.Receipt | None:
        self.asked.append((request_id, block_hashes, num_prompt))
        return self._receipt

    def begin_epoch(self) -> None:
        self.epochs += 1


def connector_with(*tiers: Tier, params: dict[str, Any] | None = None) -> UCMOffloadingConnector:
    made: Any = object.__new__(UCMOffloadingConnector)
    made._engine = Engine(None, None, list(tiers))
    made.connector_scheduler = SimpleNamespace(
        request_finished=lambda request: (False, params), reset_cache=lambda: None
    )
    return made  # type: ignore[no-any-return]


def finished(words: h.Handoff | None = None, status: Any = None) -> Any:
    return SimpleNamespace(
        request_id="r",
        kv_transfer_params=h.params(words) if words is not None else None,
        status=status or RequestStatus.FINISHED_LENGTH_CAPPED,
        block_hashes=HASHES,
        num_prompt_tokens=300,
    )


def test_a_prefill_that_is_asked_for_a_receipt_gives_that_of_the_first_tier_that_has_one() -> None:
    mute, tier = Tier(None), Tier(RECEIPT)
    made = connector_with(mute, tier, params={"theirs": 1})

    for answer in (
        made.request_finished_all_groups(finished(h.Wanted()), ([1, 2],)),
        made.request_finished(finished(h.Wanted()), [1, 2]),
    ):
        assert answer == (False, {"theirs": 1, **h.params(RECEIPT)})
    assert tier.asked == [("r", HASHES, 300)] * 2


@pytest.mark.parametrize(
    "request_",
    [
        finished(),
        finished(h.Expected()),
        finished(h.Wanted(with_answer=True)),
        finished(h.Wanted(), RequestStatus.FINISHED_ABORTED),
    ],
)
def test_nobody_else_gets_one(request_: Any) -> None:
    tier = Tier(RECEIPT)

    assert connector_with(tier).request_finished_all_groups(request_, ([1],)) == (False, None)
    assert tier.asked == []


def test_a_reset_is_told_to_every_tier() -> None:
    tiers = (Tier(None), Tier(None))

    assert connector_with(*tiers).reset_cache() is True
    assert [tier.epochs for tier in tiers] == [1, 1]


def test_tiers_that_vllm_makes_of_it_know_their_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Engine] = []
    monkeypatch.setattr(
        connector.OffloadingConnector,
        "__init__",
        lambda self, *_: seen.append(engine_of_tier()),
    )
    config: Any = SimpleNamespace()

    UCMOffloadingConnector(config, None, None)  # type: ignore[arg-type]
    assert [each.vllm_config for each in seen] == [config]
    with pytest.raises(UnsupportedEngine):
        engine_of_tier()


def test_a_vllm_that_tells_tiers_too_little_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connector.vllm, "__version__", "0.30.0")

    with pytest.raises(UnsupportedEngine, match=r"needs 0\.31"):
        UCMOffloadingConnector(None, None, None)  # type: ignore[arg-type]
