"""What was counted, until vLLM takes it."""

from __future__ import annotations

import pickle

import pytest

pytest.importorskip("vllm")

import msgspec

from ucm.integration.engine.counts import MAX_VALUES
from ucm.integration.vllm.stats import UcmStats


def test_counters_add_up_by_their_labels() -> None:
    stats = UcmStats()
    stats.count("ucm_hit_tokens", 100, source="memory")
    stats.count("ucm_hit_tokens", 28, source="memory")
    stats.count("ucm_hit_tokens", 7, source="files")
    stats.count("ucm_epochs")

    assert stats.data["counters"] == {
        'ucm_hit_tokens{source="memory"}': 128,
        'ucm_hit_tokens{source="files"}': 7,
        "ucm_epochs": 1,
    }


def test_of_a_gauge_the_last_value_counts() -> None:
    stats, later = UcmStats(), UcmStats()
    stats.gauge("ucm_node_pins", 3)
    stats.gauge("ucm_node_pins", 5)
    assert stats.data["gauges"] == {"ucm_node_pins": 5}

    later.gauge("ucm_node_pins", 0)

    assert stats.aggregate(later).data["gauges"] == {"ucm_node_pins": 0}


@pytest.mark.parametrize(
    "mistake",
    [
        lambda stats: stats.count("ucm_hit_tokens", 1, source="tape"),
        lambda stats: stats.count("ucm_hit_tokens", 0, source="tape"),
        lambda stats: stats.count("ucm_hits"),
        lambda stats: stats.count("ucm_node_pins"),
        lambda stats: stats.count("ucm_epochs", -1),
        lambda stats: stats.gauge("ucm_epochs", 1),
        lambda stats: stats.gauge("ucm_node_slots", 1),
        lambda stats: stats.observe("ucm_epochs", 1.0),
    ],
)
def test_a_mistake_in_the_code_is_an_error_at_once(mistake) -> None:
    stats = UcmStats()

    with pytest.raises(ValueError, match="ucm_"):
        mistake(stats)

    assert stats.is_empty()


def test_what_was_taken_is_counted_once() -> None:
    stats = UcmStats()
    stats.count("ucm_epochs")
    first = stats.take()
    assert first is not None
    assert stats.take() is None

    stats.count("ucm_epochs", 2)

    assert first.data["counters"] == {"ucm_epochs": 1}
    second = stats.take()
    assert second is not None
    assert second.data["counters"] == {"ucm_epochs": 2}


def test_nothing_is_sent_where_nothing_was_counted() -> None:
    """vLLM sends what is not empty with every step, from every rank."""
    stats = UcmStats()
    stats.count("ucm_loaded_bytes", 0)
    assert stats.take() is None

    for count in (
        lambda: stats.count("ucm_loaded_bytes", 1),
        lambda: stats.gauge("ucm_node_pins", 0),
        lambda: stats.observe("ucm_handoff_wait_seconds", 0.0),
    ):
        count()
        assert stats.take() is not None


def test_a_reset_forgets_everything() -> None:
    stats = UcmStats()
    stats.count("ucm_epochs")
    stats.reset()

    assert stats.is_empty()


def test_what_is_read_from_vllm_s_message_is_not_changed_by_adding_up() -> None:
    """vLLM gives one dict to the logger, which adds later ones, and to the metrics page."""
    sent = UcmStats()
    sent.count("ucm_epochs")
    sent.observe("ucm_handoff_wait_seconds", 0.5)
    payload = sent.to_dict()
    before = pickle.dumps(payload)

    UcmStats(payload).aggregate(sent).aggregate(sent)

    assert pickle.dumps(payload) == before


def test_what_is_sent_arrives_through_pickle_and_msgpack() -> None:
    """Ranks send the object to the scheduler's process, that the dict to the API server's."""
    stats = UcmStats()
    stats.count("ucm_hit_tokens", 10, source="files")
    stats.gauge("ucm_node_slots", 4, state="free")
    stats.observe("ucm_handoff_wait_seconds", 0.25)

    from_rank = pickle.loads(pickle.dumps(stats))
    arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(from_rank.to_dict()))

    assert UcmStats(arrived).data == stats.data


def test_values_beyond_the_bound_are_counted_and_not_kept() -> None:
    stats, more = UcmStats(), UcmStats()
    for i in range(MAX_VALUES - 1):
        stats.observe("ucm_handoff_wait_seconds", i)
    for _ in range(4):
        more.observe("ucm_handoff_wait_seconds", 0.5)

    stats.aggregate(more).aggregate(more)

    told = stats.data["histograms"]["ucm_handoff_wait_seconds"]
    assert (len(told["values"]), told["values"][-1], told["more"]) == (MAX_VALUES, 0.5, 7)


def test_the_log_line_has_sums_a_mean_and_the_node_s_queues() -> None:
    stats = UcmStats()
    stats.count("ucm_hit_tokens", 100, source="memory")
    stats.count("ucm_hit_tokens", 28, source="files")
    stats.count("ucm_loaded_bytes", 2_500_000)
    stats.count("ucm_load_seconds", 0.0625)
    stats.gauge("ucm_node_queue", 12, queue="write_pages")
    stats.gauge("ucm_node_slots", 5, state="free")
    for wait_s in (0.25, 0.75):
        stats.observe("ucm_handoff_wait_seconds", wait_s)

    assert stats.reduce() == {
        "hit_tokens": 128,
        "loaded_mb": 2.5,
        "load_seconds": 0.062,
        "handoff_wait_seconds_mean": 0.5,
        "node_write_pages": 12,
    }
