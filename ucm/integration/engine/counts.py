"""What was counted of one engine, in a process of it. ucm/metrics.py says what there is to count.

Nothing here is thread-safe: in each process one thread counts and takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ucm.metrics import METRICS, Metric, series_key

if TYPE_CHECKING:
    from typing_extensions import Self

# Values of one histogram that travel one by one: Prometheus takes them no other way. The step that
# has more is not known yet.
MAX_VALUES = 1000
_MB = 1_000_000


def nothing() -> dict[str, Any]:
    return {"counters": {}, "gauges": {}, "histograms": {}}


class Counts:
    """What was counted since the last `take`. `data` has plain types only, as it is sent:

    counters    key of the series -> what came on top
    gauges      key of the series -> the last value
    histograms  name -> `values`, at most MAX_VALUES of them, and how many `more` there were, which
                then count as the last of the values
    """

    data: dict[str, Any]

    def __init__(self) -> None:
        self.data = nothing()

    # -- counting ----------------------------------------------------------------------------

    def count(self, name: str, by: float = 1, **labels: str) -> None:
        """Raises ValueError for what the table does not have: a mistake in the code."""
        if by < 0:
            raise ValueError(f"{name} can't be counted by {by}")
        key = series_key(name, "counter", labels)
        if by:
            counters = self.data["counters"]
            counters[key] = counters.get(key, 0) + by

    def gauge(self, name: str, value: float, **labels: str) -> None:
        self.data["gauges"][series_key(name, "gauge", labels)] = value

    def observe(self, name: str, value: float) -> None:
        self._observe(series_key(name, "histogram", {}), [value], 0)

    def take(self) -> Self | None:
        """What was counted since the last time; None if that is nothing."""
        if not any(self.data.values()):
            return None
        taken = type(self)()
        taken.data, self.data = self.data, taken.data
        return taken

    def add(self, data: dict[str, Any]) -> None:
        """What somebody else has counted, or what was counted later."""
        counters = self.data["counters"]
        for key, value in data["counters"].items():
            counters[key] = counters.get(key, 0) + value
        self.data["gauges"].update(data["gauges"])
        for name, told in data["histograms"].items():
            self._observe(name, told["values"], told["more"])

    def reduce(self) -> dict[str, int | float]:
        """A few numbers for people: sums over all labels, and of the node what may grow."""
        reduced: dict[str, int | float] = {}
        for name, metric in METRICS.items():
            short = name.removeprefix("ucm_")
            if metric.kind == "counter" and (total := self._sum(metric)):
                if short.endswith("_bytes"):
                    short, total = short.replace("_bytes", "_mb"), total / _MB
                reduced[short] = round(total, 3)
        for name, told in self.data["histograms"].items():
            count = len(told["values"]) + told["more"]
            total = sum(told["values"]) + told["values"][-1] * told["more"]
            reduced[f"{name.removeprefix('ucm_')}_mean"] = round(total / count, 3)
        for queue in ("reads", "write_pages"):
            key = series_key("ucm_node_queue", "gauge", {"queue": queue})
            if key in self.data["gauges"]:
                reduced[f"node_{queue}"] = self.data["gauges"][key]
        return reduced

    def _observe(self, name: str, values: list[float], more: int) -> None:
        told = self.data["histograms"].setdefault(name, {"values": [], "more": 0})
        room = MAX_VALUES - len(told["values"])
        told["values"] += values[:room]
        told["more"] += len(values[room:]) + more

    def _sum(self, metric: Metric) -> float:
        counters: dict[str, float] = self.data["counters"]
        return sum(counters.get(metric.key(values), 0) for values in metric.series())
