"""From counting in several processes to the metrics page, through vLLM's own classes."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import msgspec
from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging, KVConnectorProm
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

from tests.documents.metric_names import shown_as
from ucm.integration.vllm import stats as stats_module
from ucm.integration.vllm.stats import UcmPromMetrics, UcmStats
from ucm.metrics import METRICS, Metric

TRANSFER = KVTransferConfig(
    kv_connector="UCMConnector",
    kv_role="kv_both",
    kv_connector_module_path="ucm.integration.vllm.ucm_connector",
)
WAIT = "ucm_handoff_wait_seconds"


@pytest.fixture(autouse=True)
def clean_registry() -> Iterator[None]:
    yield
    stats_module._hide_earlier()


def page_of(*engines: int) -> KVConnectorProm:
    """What vLLM's API server makes of these engines."""
    config = SimpleNamespace(kv_transfer_config=TRANSFER)
    per_engine = {engine: ["the-model", str(engine)] for engine in engines}
    return KVConnectorProm(config, ["model_name", "engine"], per_engine)


def shown() -> dict[str, dict[tuple[str, ...], float]]:
    """Name -> label values without the model's name -> value, of what begins with ucm_."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(generate_latest(REGISTRY).decode()):
        for sample in family.samples:
            if sample.name.startswith("ucm_") and not sample.name.endswith("_created"):
                labels = dict(sample.labels)
                assert labels.pop("model_name") == "the-model"
                found.setdefault(sample.name, {})[tuple(labels.values())] = sample.value
    return found


def by_label(metric: Metric, values: tuple[str, ...]) -> list[str]:
    """In the order of the page, which sorts by the labels' names."""
    return [value for _, value in sorted(zip(metric.labels, values, strict=True))]


def through_the_step(ranks: list[UcmStats | None], scheduler: UcmStats) -> dict[str, object]:
    """As a step's stats travel: ranks added up, then the scheduler side's, then as a message."""
    outputs = []
    for stats in ranks:
        output = ModelRunnerOutput(req_ids=[], req_id_to_index={})
        output.kv_connector_output = KVConnectorOutput(kv_connector_stats=stats)
        outputs.append(output)
    aggregated = KVOutputAggregator(expected_finished_count=len(ranks)).aggregate(outputs)
    assert aggregated is not None
    assert aggregated.kv_connector_output is not None
    of_ranks = aggregated.kv_connector_output.kv_connector_stats
    merged = scheduler if of_ranks is None else of_ranks.aggregate(scheduler)
    payload: dict[str, object] = msgspec.msgpack.decode(msgspec.msgpack.encode(merged.to_dict()))
    return payload


def of_rank(loaded: int) -> UcmStats | None:
    counted = UcmStats()
    counted.count("ucm_loaded_bytes", loaded)
    counted.count("ucm_load_seconds", loaded / 1000)
    return counted.take()


def of_scheduler() -> UcmStats:
    counted = UcmStats()
    counted.count("ucm_handoff_recomputed_tokens", 128, reason="late")
    counted.count("ucm_hit_tokens", 640, source="files")
    counted.gauge("ucm_node_queue", 9, queue="write_pages")
    for wait_s in (0.004, 0.004, 0.3):
        counted.observe(WAIT, wait_s)
    return counted


def test_every_series_is_there_before_anything_has_happened() -> None:
    page_of(0, 3)
    page = shown()

    for metric in METRICS.values():
        if metric.kind != "histogram":
            assert page[shown_as(metric)] == {
                (engine, *by_label(metric, values)): 0.0
                for engine in "03"
                for values in metric.series()
            }
    assert page[f"{WAIT}_count"] == {("0",): 0.0, ("3",): 0.0}


def test_ranks_and_scheduler_side_add_up_on_the_page() -> None:
    page = page_of(0)
    for _ in range(2):
        page.observe(through_the_step([of_rank(1000), None, of_rank(500)], of_scheduler()))

    seen = shown()
    assert seen["ucm_loaded_bytes_total"] == {("0",): 3000}
    assert seen["ucm_load_seconds_total"] == {("0",): 3.0}
    assert seen["ucm_handoff_recomputed_tokens_total"]["0", "late"] == 256
    assert sum(seen["ucm_handoff_recomputed_tokens_total"].values()) == 256
    assert seen["ucm_hit_tokens_total"] == {("0", "memory"): 0, ("0", "files"): 1280}
    assert seen["ucm_node_queue"]["0", "write_pages"] == 9


def test_a_histogram_has_its_values_in_the_buckets_of_the_table() -> None:
    page = page_of(0)
    page.observe(through_the_step([None], of_scheduler()))

    seen = shown()
    buckets = {le: value for (_, le), value in seen[f"{WAIT}_bucket"].items()}
    assert [float(le) for le in buckets] == [*METRICS[WAIT].buckets, float("inf")]
    assert (buckets["0.0025"], buckets["0.005"], buckets["0.25"], buckets["0.5"]) == (0, 2, 2, 3)
    assert seen[f"{WAIT}_count"]["0",] == 3
    assert seen[f"{WAIT}_sum"]["0",] == pytest.approx(0.308)


def test_values_that_were_only_counted_go_where_the_last_one_is() -> None:
    page = page_of(0)
    payload = {"counters": {}, "gauges": {}, "histograms": {WAIT: {"values": [3, 0.2], "more": 5}}}
    page.observe(payload)

    seen = shown()
    assert (seen[f"{WAIT}_count"]["0",], seen[f"{WAIT}_bucket"]["0", "0.25"]) == (7, 6)


def test_each_engine_has_its_own_series() -> None:
    page = page_of(0, 1)
    page.observe(through_the_step([of_rank(10)], UcmStats()), 0)
    page.observe(through_the_step([of_rank(20)], UcmStats()), 1)

    assert shown()["ucm_loaded_bytes_total"] == {("0",): 10, ("1",): 20}


def test_a_second_engine_client_in_a_process_shows_metrics_of_its_own() -> None:
    """vLLM clears the registry of its own names only; two of one name are an error there."""
    page_of(0).observe(through_the_step([of_rank(10)], UcmStats()))
    unregister_vllm_metrics()

    page_of(0).observe(through_the_step([of_rank(7)], UcmStats()))

    assert shown()["ucm_loaded_bytes_total"] == {("0",): 7}


def test_a_series_that_this_process_does_not_know_is_left_out() -> None:
    """The engine may be of a later version; an error here would end the API server."""
    page = page_of(0)
    payload = {
        "counters": {"ucm_later": 1, "ucm_epochs": 2},
        "gauges": {"ucm_later_too": 1},
        "histograms": {"ucm_later_still": {"values": [1.0], "more": 0}},
    }
    page.observe(payload)

    seen = shown()
    assert seen["ucm_epochs_total"] == {("0",): 2}
    assert not any("later" in name for name in seen)


def test_metrics_are_made_of_the_types_that_vllm_gives() -> None:
    """With Ray they are not Prometheus's, and in no registry."""
    made: list[tuple[str, str]] = []

    class Fake:
        kind = ""

        def __init__(self, name: str, documentation: str, labelnames: list[str], **_) -> None:
            made.append((name, self.kind))

        def labels(self, *values: object) -> Fake:
            return self

    kinds = {Counter: "counter", Gauge: "gauge", Histogram: "histogram"}
    types = {known: type(kind, (Fake,), {"kind": kind}) for known, kind in kinds.items()}
    config = SimpleNamespace(kv_transfer_config=TRANSFER)
    for _ in range(2):
        UcmPromMetrics(config, types, ["engine"], {0: ["0"]})

    assert made == [(m.name, m.kind) for m in METRICS.values()] * 2
    assert not shown()


def test_vllm_logs_what_was_counted_since_its_last_line() -> None:
    logging = KVConnectorLogging(TRANSFER)
    lines: list[str] = []
    for _ in range(2):
        logging.observe(through_the_step([of_rank(1_000_000)], of_scheduler()))
    logging.log(lambda form, *args: lines.append(form % args))
    logging.log(lambda form, *args: lines.append(form % args))

    (line,) = lines
    assert "hit_tokens=1280" in line
    assert "loaded_mb=2.0" in line
    assert "node_write_pages=9" in line


def test_gauges_of_several_api_servers_are_merged_by_the_latest(monkeypatch) -> None:
    """vLLM gives the stats of a step to one of its API servers."""
    made: list[dict[str, object]] = []

    class SeenGauge(Gauge):
        def __init__(self, *args, **more) -> None:
            made.append(more)
            super().__init__(*args, **more)

    monkeypatch.setattr(KVConnectorProm, "_gauge_cls", SeenGauge)
    page_of(0)

    assert {more["multiprocess_mode"] for more in made} == {"mostrecent"}
